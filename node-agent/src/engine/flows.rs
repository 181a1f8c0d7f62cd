//! The seam to the conntrack table: which UDP flows are stale.

use crate::state::{State, UdpChanges};

/// Removes conntrack entries that lead UDP flows to backends that no longer serve.
pub trait FlowTable: Send {
    /// One pass; returns how many entries were deleted.
    ///
    /// # Errors
    /// The table could not be read or an entry not be deleted; the pass has to be repeated.
    fn reconcile(&mut self, stale: &StaleFlows<'_>) -> std::io::Result<usize>;
}

/// Decides which flows are stale.
pub struct StaleFlows<'a> {
    pub(super) state: &'a State,
    pub(super) udp: &'a UdpChanges,
}

impl StaleFlows<'_> {
    /// Whether entries of this family have to be looked at.
    pub fn concerns(&self, ipv4: bool) -> bool {
        if ipv4 { self.udp.ipv4 } else { self.udp.ipv6 }
    }

    /// Whether a UDP entry with this original destination and this source of replies is stale.
    pub fn is_stale(&self, destination: std::net::SocketAddr, backend: std::net::SocketAddr) -> bool {
        self.state.udp_flow(destination, backend, &self.udp.gone) == crate::state::Flow::Stale
    }
}
