//! Drift: schedule of repairs after foreign changes of our tables, and their reports.
//!
//! A repair compares both tables as a whole. Invariants:
//! * A comparison covers every notice from before its start: one burst of notices is one repair.
//! * Repairs against a program that keeps writing become rarer, so that they do not delay updates.

use std::time::{Duration, Instant, SystemTime};

use switchtower_proto::v1::DriftCause;

use super::{Engine, SyncState};
use crate::kernel::dataplane::Repaired;
use crate::state::UdpChanges;

/// Pause after a repair that found differences, as a multiple of its duration.
const REST: u32 = 4;
/// Minimum pause after such a repair; it doubles with each notice that arrives during a pause.
const FIRST_REST: Duration = Duration::from_millis(100);
/// Maximum pause.
const LONGEST_REST: Duration = Duration::from_secs(5);

/// Pending notice, and the pause between repairs.
#[derive(Debug, Default)]
pub(super) struct Drift {
    /// Cause of a notice that no comparison covers yet.
    waiting: Option<DriftCause>,
    /// Start of the last comparison.
    compared: Option<Instant>,
    rest: Duration,
    rest_until: Option<Instant>,
    /// A notice arrived during the pause.
    contested: bool,
    /// Number of repairs that found differences.
    pub(super) repaired: u64,
}

impl Drift {
    /// Notes a foreign change at `noticed` or before.
    pub(super) fn notice(&mut self, cause: DriftCause, noticed: Instant) {
        if self.compared.is_some_and(|compared| noticed < compared) {
            return;
        }
        self.contested |= self.rest_until.is_some_and(|until| noticed < until);
        self.waiting.get_or_insert(cause);
    }

    /// Returns the time of the next repair.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        self.waiting.map(|_| self.rest_until.unwrap_or(now))
    }

    fn begin(&mut self, now: Instant) -> Option<DriftCause> {
        self.compared = Some(now);
        self.waiting.take()
    }

    fn end(&mut self, found: bool, now: Instant) {
        let took = self.compared.map_or(Duration::ZERO, |compared| now.saturating_duration_since(compared));
        let least = if self.contested { (self.rest * 2).max(FIRST_REST) } else { FIRST_REST };
        self.contested = false;
        self.rest = if found { (took * REST).max(least).min(LONGEST_REST) } else { Duration::ZERO };
        self.rest_until = Some(now + self.rest);
    }
}

impl Engine {
    /// Runs a repair, if one is due.
    pub(super) fn repair_if_due(&mut self) {
        let now = Instant::now();
        if self.drift.due(now).is_none_or(|at| at > now) {
            return;
        }
        let Some(cause) = self.drift.begin(now) else { return };
        let found = self.repair(cause);
        self.drift.end(found, Instant::now());
    }

    /// Compares and repairs; returns whether there were differences.
    fn repair(&mut self, cause: DriftCause) -> bool {
        if self.sync.is_held() {
            return self.repair_held(cause);
        }
        if !self.state.is_loaded() || self.confidence.must_compare() {
            return false;
        }
        let began = SystemTime::now();
        let result = self.parts.dataplane.repair();
        self.parts.traces.repaired(cause.name(), began, &result);
        match result {
            Ok(Repaired { differences, refused }) => {
                if differences > 0 {
                    self.drift.repaired += 1;
                    self.parts.metrics.drift.with_label_values(&[cause.name()]).inc();
                    tracing::warn!(
                        differences,
                        cause = cause.name(),
                        "repaired foreign changes of our tables"
                    );
                    // Flows that began before the repair may have passed without translation.
                    self.flow_checks.add(UdpChanges::all());
                    self.report_drift(cause);
                }
                self.refusals_changed(refused);
                self.reconcile_flows();
                differences > 0
            }
            Err(error) => {
                self.mirror_lost(&error);
                true
            }
        }
    }

    /// Programs the view of the snapshot file. While the kernel is newer than the view, foreign changes cannot be
    /// distinguished from wanted content; the view, at most a minute older, is the best known state.
    fn repair_held(&mut self, cause: DriftCause) -> bool {
        if !self.state.is_loaded() || self.expired {
            return false;
        }
        tracing::warn!(
            cause = cause.name(),
            "foreign changes of our tables during a hold; programming the view of the snapshot file"
        );
        // A controller that resumed this view expects its acknowledgement.
        self.acknowledgement.due |= matches!(self.sync, SyncState::Held { until: Some(_) });
        self.release();
        self.drift.repaired += 1;
        self.parts.metrics.drift.with_label_values(&[cause.name()]).inc();
        self.flow_checks.add(UdpChanges::all());
        self.queue_and_sync();
        self.report_drift(cause);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_one_repair_and_contests_slow_down() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut drift = Drift::default();
        assert_eq!(drift.due(start), None);
        drift.notice(DriftCause::Changed, at(0));
        drift.notice(DriftCause::TableDeleted, at(0));
        assert_eq!(
            (drift.due(at(1)), drift.begin(at(1))),
            (Some(at(1)), Some(DriftCause::Changed)),
            "the first runs immediately"
        );
        drift.end(true, at(2));
        drift.notice(DriftCause::Changed, at(0));
        assert_eq!(drift.due(at(3)), None, "the comparison covers it");
        // Another program keeps writing: each pause is twice the one before, up to the maximum.
        let mut now = at(2);
        for rest in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            drift.notice(DriftCause::Changed, now);
            now += Duration::from_millis(rest);
            assert_eq!(drift.due(at(0)), Some(now));
            assert!(drift.begin(now).is_some());
            drift.end(true, now);
        }
        // A notice after the pause starts over.
        drift.notice(DriftCause::Changed, now + Duration::from_secs(6));
        now += Duration::from_secs(6);
        drift.begin(now);
        drift.end(true, now + Duration::from_millis(50));
        drift.notice(DriftCause::Changed, now + Duration::from_millis(50));
        assert_eq!(drift.due(now), Some(now + Duration::from_millis(250)), "four times the duration");
        drift.begin(now + Duration::from_millis(250));
        drift.end(false, now + Duration::from_millis(250));
        drift.notice(DriftCause::Changed, now + Duration::from_millis(250));
        assert_eq!(drift.due(now), Some(now + Duration::from_millis(250)), "no pause without differences");
    }
}
