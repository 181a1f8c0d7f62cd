//! Tasks that run for as long as the process does. One that ends takes the process with it: a controller that lost its
//! engine or its rows and still says that it is ready helps nobody, a new process does.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};

/// A task ended, although it never should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// By itself.
    #[error("the task of {0} ended; the log above says why, and a new process starts it again")]
    Returned(&'static str),
    /// By a defect.
    #[error("the task of {0} panicked; please report it with the lines above")]
    Panicked(&'static str),
}

/// The tasks. Dropping it ends them.
#[derive(Debug, Default)]
pub(crate) struct Background {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Background {
    /// Starts a task; `name` says what it does.
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits until one ends. May be dropped and called again at any time.
    pub(crate) async fn ended(&mut self) -> Ended {
        let name = |id: Id| self.names.get(&id).copied().unwrap_or("something");
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
    async fn the_one_that_ends_is_named() {
        let mut background = Background::default();
        background.spawn("rows", std::future::pending());
        background.spawn("the engine", async { panic!("a defect") });
        assert_eq!(
            background.ended().await.to_string().split(';').next(),
            Some("the task of the engine panicked")
        );
        background.spawn("rollouts", async {});
        assert!(matches!(background.ended().await, Ended::Returned("rollouts")));
    }
}
