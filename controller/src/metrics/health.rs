//! Liveness and readiness: whether the engine makes progress, and how old what the API server said last is.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;

use super::Readiness;

use crate::sync::lock;

/// Maximum duration of one step of the engine. The first compile of 50,000 Services takes seconds; beyond this it
/// hangs.
const WORK: Duration = Duration::from_secs(120);
/// Watches are heard at least every 10 seconds; beyond this the controller serves what is out of date.
const STALE: Duration = Duration::from_secs(60);

/// Since when the engine has been working on one batch.
#[derive(Debug, Clone, Default)]
pub struct Busy(Arc<Mutex<Option<Instant>>>);

/// The batch is done when this is dropped.
pub(crate) struct Working<'a>(&'a Busy);

impl Busy {
    pub(crate) fn begin(&self) -> Working<'_> {
        self.set(Some(Instant::now()));
        Working(self)
    }

    fn set(&self, since: Option<Instant>) {
        *lock(&self.0) = since;
    }

    fn elapsed(&self) -> Option<Duration> {
        lock(&self.0).map(|since| since.elapsed())
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

/// Inputs of the probes.
#[derive(Clone)]
pub struct Health {
    /// Readiness.
    pub readiness: Readiness,
    /// The engine's work.
    pub busy: Busy,
    /// Time since the last response of the API server; `None` before every watch was heard.
    pub upstream: Arc<dyn Fn() -> Option<Duration> + Send + Sync>,
}

/// Fails when only a new process helps. An API server that is away is no reason: agents are served on.
pub(super) async fn live(State(health): State<Health>) -> (StatusCode, String) {
    match health.busy.elapsed() {
        Some(elapsed) if elapsed > WORK => {
            let seconds = elapsed.as_secs();
            (StatusCode::SERVICE_UNAVAILABLE, format!("the engine has been at one batch for {seconds} s\n"))
        }
        _ => (StatusCode::OK, "ok\n".to_owned()),
    }
}

/// Handler of `/readyz`: succeeds if agents are served and the state is current.
pub(super) async fn ready(State(health): State<Health>) -> (StatusCode, String) {
    if !health.readiness.get() {
        let text = "not serving: watches are not synced, or the controller drains\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text.to_owned());
    }
    match (health.upstream)() {
        Some(age) if age <= STALE => {
            (StatusCode::OK, format!("ok; upstream age {:.1} s\n", age.as_secs_f64()))
        }
        Some(age) => {
            let text = format!(
                "stale: the API server was last heard {} s ago; agents are served on\n",
                age.as_secs()
            );
            (StatusCode::SERVICE_UNAVAILABLE, text)
        }
        None => (StatusCode::OK, "ok; upstream age unknown\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(age: Option<u64>) -> Health {
        let readiness = Readiness::default();
        readiness.set(true);
        let age = age.map(Duration::from_secs);
        Health { readiness, busy: Busy::default(), upstream: Arc::new(move || age) }
    }

    #[tokio::test]
    async fn stuck_engine_is_not_live() {
        let health = health(Some(0));
        assert_eq!(live(State(health.clone())).await.0, StatusCode::OK);
        let working = health.busy.begin();
        assert_eq!(live(State(health.clone())).await.0, StatusCode::OK, "it has just begun");
        health.busy.set(Some(Instant::now() - WORK - Duration::from_secs(1)));
        let (status, text) = live(State(health.clone())).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("121 s"), "{text}");
        drop(working);
        assert_eq!(live(State(health)).await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn readiness_reports_the_age_of_the_upstream() {
        let (status, text) = ready(State(health(Some(2)))).await;
        assert_eq!((status, text.as_str()), (StatusCode::OK, "ok; upstream age 2.0 s\n"));
        let (status, text) = ready(State(health(Some(61)))).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.contains("61 s"), "{text}");
        let draining = health(Some(0));
        draining.readiness.set(false);
        assert_eq!(ready(State(draining)).await.0, StatusCode::SERVICE_UNAVAILABLE);
    }
}
