//! UDP flows that lead to backends that no longer serve: when the conntrack table is looked through, and which of
//! its entries are stale.
//!
//! A pass costs what the whole table of the machine costs, so another thread makes it, after the acknowledgement, and
//! asks here about the entries that it finds. What holds:
//! * A pass begins only while the kernel holds the view: an entry that is deleted must not come back by old rules.
//! * What changes while a pass runs is looked at by the next one.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Engine;
use crate::state::{Flow, UdpChanges};
use crate::traces::Applying;

/// Pause after a pass that failed.
const RETRY: Duration = Duration::from_secs(2);
/// After a pass the table is left alone for this many times its duration: steady changes take a fifth of a processor
/// where a pass is short ...
const REST: u32 = 4;
/// ... and at most this long, kube-proxy's shortest time between two passes. From 250 ms per pass on (about half a million
/// entries) this decides, and the share grows: a half for passes of a second. Flows to dead backends wait no longer.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Families whose entries have to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

/// A UDP entry of the conntrack table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpFlow {
    /// Where the client sends to.
    pub destination: SocketAddr,
    /// Where replies come from.
    pub backend: SocketAddr,
}

/// What a pass over the conntrack table tells and asks.
#[derive(Debug)]
pub enum FlowReport {
    /// Which of these are stale?
    Found {
        /// The entries.
        flows: Vec<UdpFlow>,
        /// Gets one answer per entry, in their order.
        stale: oneshot::Sender<Vec<bool>>,
    },
    /// The pass is over.
    Done {
        /// How many entries were deleted, or why the pass has to be repeated.
        deleted: io::Result<usize>,
        /// How long it took.
        took: Duration,
    },
}

/// Looks through the conntrack table.
pub trait FlowTable: Send {
    /// Begins a pass and returns at once. What it finds comes as [`super::Command::Flows`], at last
    /// [`FlowReport::Done`]; before that no other pass is begun.
    fn begin(&mut self, families: Families);
}

/// What has to be looked at, and what is being looked at.
#[derive(Default)]
pub(super) struct Passes {
    due: UdpChanges,
    running: Option<UdpChanges>,
    /// The update that made the running pass necessary, if it is told.
    told: Option<Applying>,
    not_before: Option<Instant>,
}

impl Passes {
    /// After a start: what changed before is not known.
    pub(super) fn everything() -> Self {
        Passes { due: UdpChanges::all(), ..Passes::default() }
    }

    /// An update brought these changes.
    pub(super) fn add(&mut self, changes: UdpChanges) {
        self.due.merge(changes);
    }

    /// When the next pass may begin; `None`: there is nothing to look at, or one is under way.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let needed = self.running.is_none() && !self.due.is_empty();
        needed.then(|| self.not_before.unwrap_or(now))
    }

    fn begin(&mut self) -> Families {
        let changes = std::mem::take(&mut self.due);
        let families = Families { ipv4: changes.ipv4, ipv6: changes.ipv6 };
        self.running = Some(changes);
        families
    }

    /// The pass is over; one that failed leaves everything to be looked at again.
    fn end(&mut self, failed: bool, took: Duration, now: Instant) {
        let changes = self.running.take().unwrap_or_default();
        if failed {
            self.due.merge(changes);
        }
        self.not_before = Some(now + if failed { RETRY } else { (took * REST).min(LONGEST_REST) });
    }
}

impl Engine {
    /// Begins a pass over the conntrack table if one is due.
    pub(super) fn look_at_flows(&mut self) {
        let now = Instant::now();
        if self.kernel_holds_view() && self.passes.next(now).is_some_and(|at| at <= now) {
            self.passes.told = self.applying.take();
            self.parts.flows.begin(self.passes.begin());
        }
    }

    pub(super) fn flows(&mut self, report: FlowReport) {
        match report {
            FlowReport::Found { flows, stale } => {
                // A pass that is gone needs no answer.
                let _ = stale.send(flows.iter().map(|flow| self.is_stale(flow)).collect());
            }
            FlowReport::Done { deleted, took } => {
                self.parts.metrics.conntrack_duration.observe(took.as_secs_f64());
                self.passes.end(deleted.is_err(), took, Instant::now());
                match deleted {
                    Ok(deleted) => {
                        self.parts.metrics.conntrack_deleted.inc_by(deleted as u64);
                        if let Some(told) = self.passes.told.take() {
                            told.flows(took, deleted);
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "conntrack entries could not be reconciled; trying again");
                    }
                }
            }
        }
    }

    fn is_stale(&self, flow: &UdpFlow) -> bool {
        let Some(changes) = &self.passes.running else { return false };
        self.state.udp_flow(flow.destination, flow.backend, &changes.gone) == Flow::Stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_changes_do_not_keep_the_table_busy() {
        let now = Instant::now();
        let mut passes = Passes::default();
        assert_eq!(passes.next(now), None, "nothing changed");
        passes.add(UdpChanges { ipv4: true, ..UdpChanges::default() });
        assert_eq!(passes.next(now), Some(now), "the first begins at once");
        assert_eq!(passes.begin(), Families { ipv4: true, ipv6: false });
        passes.add(UdpChanges { ipv6: true, ..UdpChanges::default() });
        assert_eq!(passes.next(now), None, "one at a time");
        passes.end(false, Duration::from_millis(50), now);
        assert_eq!(passes.next(now), Some(now + Duration::from_millis(200)));
        assert_eq!(passes.begin(), Families { ipv4: false, ipv6: true });
        passes.end(true, Duration::from_secs(5), now);
        assert_eq!(passes.next(now), Some(now + RETRY), "what failed is due again");
        assert_eq!(passes.begin(), Families { ipv4: false, ipv6: true });
        passes.end(false, Duration::from_secs(5), now);
        passes.add(UdpChanges::all());
        assert_eq!(passes.next(now), Some(now + LONGEST_REST));
    }
}
