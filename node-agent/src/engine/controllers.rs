//! Frontends at the addresses of controllers, which are never programmed: they would capture the agent's own
//! connections.

use std::net::SocketAddr;

use super::Engine;
use crate::kernel::change::KernelChange;

impl Engine {
    /// Takes over new addresses. A frontend at a controller's address would disconnect the agent for good, because its
    /// removal could no longer be sent.
    pub(super) fn controllers_changed(&mut self, addresses: Vec<SocketAddr>) {
        if self.sync.is_held() {
            // During a hold only a controller can make the view current, so the connection comes first.
            match self.parts.dataplane.release(&addresses) {
                Ok(0) => {}
                Ok(removed) => {
                    tracing::warn!(
                        removed,
                        "removed frontends at addresses of controllers, which captured the agent's connections"
                    );
                }
                Err(error) => tracing::warn!(%error, "cannot remove frontends at addresses of controllers"),
            }
        }
        if self.parts.controllers == addresses {
            return;
        }
        self.parts.controllers.clone_from(&addresses);
        if !self.confidence.must_compare() {
            self.pending.retain(|change| !matches!(change, KernelChange::Controllers(_)));
            self.pending.push(KernelChange::Controllers(addresses));
        }
        self.queue_and_sync();
    }
}
