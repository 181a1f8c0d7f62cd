//! Refuses writes of a process that may not be the active controller any more.

use std::sync::{Arc, RwLock};

use http::{Method, Request};
use kube::client::Body;
use tokio::time::Instant;
use tower::filter::{FilterLayer, Predicate};

use super::LEASE;
use crate::sync::{read, write};

/// A write was refused before it left the process.
#[derive(Debug, thiserror::Error)]
#[error("not sent: this controller does not hold the Lease {LEASE} at the moment")]
pub struct Fenced;

/// Open while this process certainly holds the Lease. Clones share the state.
#[derive(Debug, Clone, Default)]
pub struct Fence(Arc<RwLock<Open>>);

#[derive(Debug, Clone, Copy, Default)]
enum Open {
    /// Not held yet.
    #[default]
    Not,
    Until(Instant),
    /// Released or lost: never opens again.
    Never,
}

impl Fence {
    /// Returns true if this process may write.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let open = *read(&self.0);
        matches!(open, Open::Until(end) if Instant::now() < end)
    }

    pub(super) fn open_until(&self, end: Instant) {
        let mut open = write(&self.0);
        if !matches!(*open, Open::Never) {
            *open = Open::Until(end);
        }
    }

    pub(super) fn close(&self) {
        *write(&self.0) = Open::Never;
    }

    /// For the client of everything that only the active controller may write. Reads pass.
    #[must_use]
    pub fn layer(&self) -> FilterLayer<Self> {
        FilterLayer::new(self.clone())
    }
}

impl Predicate<Request<Body>> for Fence {
    type Request = Request<Body>;

    fn check(&mut self, request: Request<Body>) -> Result<Request<Body>, tower::BoxError> {
        if request.method() == Method::GET || self.is_open() { Ok(request) } else { Err(Fenced.into()) }
    }
}
