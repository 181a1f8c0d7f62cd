//! Stale UDP flows, to backends that no longer serve: schedule of checks over the conntrack table, and the decision
//! which entries are stale.
//!
//! The cost of a check depends on the machine's whole table, so another thread runs it, after the acknowledgement, and
//! queries the engine about the entries that it finds. Invariants:
//! * A check begins only while the kernel holds the view, and covers only families of which it does: old rules must not
//!   recreate a deleted entry.
//! * The next check covers changes that arrive during a check.

use std::time::{Duration, Instant};

use switchtower_proto::v1::ProxyMode;

use super::Engine;
use crate::kernel::conntrack::{Families, FlowReport, UdpFlow};
use crate::kernel::dataplane::CommitError;
use crate::state::{Flow, UdpChanges};
use crate::traces::Applying;

/// Delay before the retry of a failed check.
const RETRY: Duration = Duration::from_secs(2);
/// Pause after a check, as a multiple of its duration: steady changes use a fifth of a CPU.
const REST: u32 = 4;
/// Maximum pause, kube-proxy's minimum interval between two checks. It applies to checks of 250 ms (about 500,000 entries)
/// and longer: the share of a CPU grows to a half for checks of a second, but flows to dead backends wait no longer.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Changes that need a check, and those that the running check covers.
#[derive(Default)]
pub(super) struct FlowChecks {
    due: UdpChanges,
    /// Families of which the kernel holds the view although the last commit failed.
    partial: Families,
    running: Option<UdpChanges>,
    /// The update that made the running check necessary, if it is traced.
    traced: Option<Applying>,
    not_before: Option<Instant>,
}

impl FlowChecks {
    /// After a start, when earlier changes are unknown.
    pub(super) fn everything() -> Self {
        FlowChecks { due: UdpChanges::all(), ..FlowChecks::default() }
    }

    /// Adds changes for the next check.
    pub(super) fn add(&mut self, changes: UdpChanges) {
        self.due.merge(changes);
    }

    /// Records a failed commit: the kernel may have refused the changes of one family only.
    pub(super) fn failed(&mut self, error: &CommitError) {
        self.partial = match error {
            CommitError::Family { family, .. } => {
                Families { ipv4: *family != "IPv4", ipv6: *family != "IPv6" }
            }
            CommitError::Refused { .. } | CommitError::Io(_) => Families::default(),
        };
    }

    /// Records that the view changed.
    pub(super) fn outdated(&mut self) {
        self.partial = Families::default();
    }

    /// Returns the earliest start of the next check of these families; `None` if none is needed, or one is running.
    pub(super) fn next(&self, now: Instant, families: Families) -> Option<Instant> {
        let due = self.due.ipv4 && families.ipv4 || self.due.ipv6 && families.ipv6;
        (due && self.running.is_none()).then(|| self.not_before.unwrap_or(now))
    }

    fn begin(&mut self, families: Families) -> Families {
        let changes = self.due.take(families);
        let families = Families { ipv4: changes.ipv4, ipv6: changes.ipv6 };
        self.running = Some(changes);
        families
    }

    /// Ends the check; a failed one is repeated.
    fn end(&mut self, failed: bool, took: Duration, now: Instant) {
        let changes = self.running.take().unwrap_or_default();
        if failed {
            self.due.merge(changes);
        }
        self.not_before = Some(now + if failed { RETRY } else { (took * REST).min(LONGEST_REST) });
    }
}

impl Engine {
    /// Begins a check over the conntrack table if one is due.
    pub(super) fn reconcile_flows(&mut self) {
        let now = Instant::now();
        let families = self.reconcilable();
        if self.flow_checks.next(now, families).is_some_and(|at| at <= now) {
            self.flow_checks.traced = self.applying.take();
            self.parts.flows.begin(self.flow_checks.begin(families));
        }
    }

    pub(super) fn flows(&mut self, report: FlowReport) {
        match report {
            FlowReport::Found { flows, stale } => {
                // A check that has failed since needs no answer.
                let _ = stale.send(flows.iter().map(|flow| self.is_stale(flow)).collect());
            }
            FlowReport::Done { deleted, took } => {
                self.parts.metrics.conntrack_duration.observe(took.as_secs_f64());
                self.flow_checks.end(deleted.is_err(), took, Instant::now());
                match deleted {
                    Ok(deleted) => {
                        self.parts.metrics.conntrack_deleted.inc_by(deleted as u64);
                        if let Some(traced) = self.flow_checks.traced.take() {
                            traced.flows(took, deleted);
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot reconcile conntrack entries; retrying");
                    }
                }
            }
        }
    }

    /// Returns the families that a check may cover. In mode Shadow the flows belong to another proxy.
    pub(super) fn reconcilable(&self) -> Families {
        if self.mode() == ProxyMode::Shadow {
            Families::default()
        } else if self.kernel_holds_view() {
            Families::ALL
        } else {
            self.flow_checks.partial
        }
    }

    fn is_stale(&self, flow: &UdpFlow) -> bool {
        if self.mode() == ProxyMode::Shadow {
            return false;
        }
        let Some(changes) = &self.flow_checks.running else { return false };
        self.state.udp_flow(flow.destination, flow.backend, &changes.gone) == Flow::Stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_changes_leave_pauses_between_passes() {
        let now = Instant::now();
        let mut checks = FlowChecks::default();
        assert_eq!(checks.next(now, Families::ALL), None, "nothing changed");
        checks.add(UdpChanges { ipv4: true, ..UdpChanges::default() });
        assert_eq!(checks.next(now, Families::ALL), Some(now), "the first begins immediately");
        assert_eq!(checks.begin(Families::ALL), Families { ipv4: true, ipv6: false });
        checks.add(UdpChanges { ipv6: true, ..UdpChanges::default() });
        assert_eq!(checks.next(now, Families::ALL), None, "one at a time");
        checks.end(false, Duration::from_millis(50), now);
        assert_eq!(checks.next(now, Families::ALL), Some(now + Duration::from_millis(200)));
        assert_eq!(checks.begin(Families::ALL), Families { ipv4: false, ipv6: true });
        checks.end(true, Duration::from_secs(5), now);
        assert_eq!(checks.next(now, Families::ALL), Some(now + RETRY), "a failed check is repeated");
        assert_eq!(checks.begin(Families::ALL), Families { ipv4: false, ipv6: true });
        checks.end(false, Duration::from_secs(5), now);
        checks.add(UdpChanges::all());
        assert_eq!(checks.next(now, Families::ALL), Some(now + LONGEST_REST));
    }
    #[test]
    fn refused_family_does_not_delay_checks_of_the_other() {
        let now = Instant::now();
        let mut checks = FlowChecks::everything();
        let refused = CommitError::Family { family: "IPv6", operation: String::new(), errno: libc::EPERM };
        checks.failed(&refused);
        let ipv4 = Families { ipv4: true, ipv6: false };
        assert_eq!(checks.partial, ipv4);
        assert_eq!(checks.next(now, checks.partial), Some(now));
        assert_eq!(checks.begin(ipv4), ipv4);
        checks.end(false, Duration::ZERO, now);
        assert_eq!(checks.next(now, ipv4), None, "the rest waits for its rules");
        assert_eq!(checks.begin(Families::ALL), Families { ipv4: false, ipv6: true });
        checks.outdated();
        assert_eq!(checks.partial, Families::default(), "the kernel has neither family's new rules");
    }
}
