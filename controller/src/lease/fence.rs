//! Refuses writes of a process that may not be the leader any more.

use std::sync::Arc;

use http::{Method, Request};
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::Instant;
use tower::filter::{FilterLayer, Predicate};

use super::LEASE;

/// A write was refused before it left the process.
#[derive(Debug, thiserror::Error)]
#[error("not sent: this replica does not hold the Lease {LEASE} at the moment")]
pub struct Fenced;

/// Open while this process certainly holds the Lease. Clones share the state.
#[derive(Debug, Clone)]
pub struct Fence(Arc<watch::Sender<Open>>);

#[derive(Debug, Clone, Copy, Default)]
enum Open {
    /// Not held.
    #[default]
    Not,
    Until(Instant),
    /// Released because the process ends: never opens again.
    Never,
}

impl Open {
    fn is_open(self) -> bool {
        matches!(self, Self::Until(end) if Instant::now() < end)
    }
}

impl Default for Fence {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Open::Not)))
    }
}

impl Fence {
    /// Returns true if this process is the leader.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.borrow().is_open()
    }

    /// Waits until this process is the leader.
    pub async fn opened(&self) {
        let mut turns = self.turns();
        while !self.is_open() {
            turns.changed().await;
        }
    }

    /// Reports when this process becomes the leader or ceases to be.
    #[must_use]
    pub fn turns(&self) -> Turns {
        Turns(self.0.subscribe())
    }

    /// A fence that is always open, for tests of the leader's parts.
    #[cfg(test)]
    pub(crate) fn open() -> Self {
        let fence = Self::default();
        fence.open_until(Instant::now() + std::time::Duration::from_secs(1 << 30));
        fence
    }

    pub(crate) fn open_until(&self, end: Instant) {
        self.0.send_if_modified(|open| {
            let is_turn = !open.is_open();
            let may_open = !matches!(open, Open::Never);
            if may_open {
                *open = Open::Until(end);
            }
            is_turn && may_open
        });
    }

    /// The Lease is lost; it may be acquired again.
    pub(crate) fn close(&self) {
        self.set(Open::Not);
    }

    /// The process ends: no renewal that is still in flight opens the fence again.
    pub(super) fn close_for_good(&self) {
        self.set(Open::Never);
    }

    fn set(&self, closed: Open) {
        self.0.send_modify(|open| {
            if !matches!(open, Open::Never) {
                *open = closed;
            }
        });
    }

    /// For the client of everything that only the leader may write. Reads pass.
    #[must_use]
    pub fn layer(&self) -> FilterLayer<Self> {
        FilterLayer::new(self.clone())
    }
}

/// Changes of the leadership.
#[derive(Debug)]
pub struct Turns(watch::Receiver<Open>);

impl Turns {
    /// Waits for the next change. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Predicate<Request<Body>> for Fence {
    type Request = Request<Body>;

    fn check(&mut self, request: Request<Body>) -> Result<Request<Body>, tower::BoxError> {
        if request.method() == Method::GET || self.is_open() { Ok(request) } else { Err(Fenced.into()) }
    }
}
