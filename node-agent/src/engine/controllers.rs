//! Frontends at the controllers' own addresses: they are never programmed, so that the agent keeps its way to them.

use std::net::SocketAddr;

use super::Engine;
use crate::kernel::change::KernelChange;

impl Engine {
    /// A frontend at a controller's address would cut this agent off, and nobody could tell it that it is gone.
    pub(super) fn controllers_changed(&mut self, addresses: Vec<SocketAddr>) {
        if self.hold {
            // Whatever the view says, without a controller it never becomes current.
            match self.parts.dataplane.release(&addresses) {
                Ok(0) => {}
                Ok(removed) => {
                    tracing::warn!(removed, "Services captured the way to the controllers: removed");
                }
                Err(error) => tracing::warn!(%error, "the way to the controllers cannot be kept free"),
            }
        }
        if self.parts.controllers == addresses {
            return;
        }
        self.parts.controllers.clone_from(&addresses);
        if !self.doubt {
            self.pending.retain(|change| !matches!(change, KernelChange::Controllers(_)));
            self.pending.push(KernelChange::Controllers(addresses));
        }
        self.queue_and_sync();
    }
}
