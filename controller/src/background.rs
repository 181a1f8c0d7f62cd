//! Tasks that run as long as the process. If one ends, the process exits and is restarted: a controller without its
//! engine or its writer of rows must not report readiness.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};

/// A task ended unexpectedly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The task returned.
    #[error("the task `{0}` ended; see the log above for the reason; restarting the process restarts it")]
    Returned(&'static str),
    /// The task panicked, which is a bug.
    #[error("the task `{0}` panicked; please report this bug with the log above")]
    Panicked(&'static str),
}

/// The set of tasks. Dropping it aborts them.
#[derive(Debug, Default)]
pub(crate) struct Background {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Background {
    /// Starts a task; `name` identifies it in messages.
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits until a task ends. Cancel safe.
    pub(crate) async fn ended(&mut self) -> Ended {
        let name = |id: Id| self.names.get(&id).copied().unwrap_or("unknown");
        match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => Ended::Returned(name(id)),
            Some(Err(error)) => Ended::Panicked(name(error.id())),
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ended_task_is_named() {
        let mut background = Background::default();
        background.spawn("rows", std::future::pending());
        background.spawn("engine", async { panic!("a defect") });
        assert_eq!(
            background.ended().await.to_string().split(';').next(),
            Some("the task `engine` panicked")
        );
        background.spawn("rollouts", async {});
        assert!(matches!(background.ended().await, Ended::Returned("rollouts")));
    }
}
