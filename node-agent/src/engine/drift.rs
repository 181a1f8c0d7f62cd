//! Foreign changes of our tables: when they are repaired, and what is told of it.
//!
//! A repair compares both tables as a whole. What holds:
//! * Whatever was noticed before a comparison began is repaired by it: notices of one burst are one repair.
//! * Somebody who writes again and again is answered more and more rarely, so that updates are not held up.

use std::time::{Duration, Instant, SystemTime};

use super::{Engine, Event};
use crate::kernel::dataplane::{Committed, Refused, Repaired};
use crate::state::UdpChanges;

/// After a repair that found something the tables are left alone for this many times its duration ...
const REST: u32 = 4;
/// ... at least this long, doubled each time that a notice comes before the rest is over ...
const FIRST_REST: Duration = Duration::from_millis(100);
/// ... and at most this long.
const LONGEST_REST: Duration = Duration::from_secs(5);

/// What was noticed, and when the next repair may begin.
#[derive(Debug, Default)]
pub(super) struct Drift {
    /// The cause of a notice that no comparison has answered yet.
    waiting: Option<&'static str>,
    /// When the last comparison began.
    compared: Option<Instant>,
    rest: Duration,
    rest_until: Option<Instant>,
    /// A notice came before the rest was over.
    fought: bool,
    /// How often something was repaired.
    pub(super) repaired: u64,
}

impl Drift {
    /// Somebody changed our tables at `noticed` or before.
    pub(super) fn notice(&mut self, cause: &'static str, noticed: Instant) {
        if self.compared.is_some_and(|compared| noticed < compared) {
            return;
        }
        self.fought |= self.rest_until.is_some_and(|until| noticed < until);
        self.waiting.get_or_insert(cause);
    }

    /// When the next repair is due.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        self.waiting.map(|_| self.rest_until.unwrap_or(now))
    }

    fn begin(&mut self, now: Instant) -> Option<&'static str> {
        self.compared = Some(now);
        self.waiting.take()
    }

    fn end(&mut self, found: bool, now: Instant) {
        let took = self.compared.map_or(Duration::ZERO, |compared| now.saturating_duration_since(compared));
        let least = if self.fought { (self.rest * 2).max(FIRST_REST) } else { FIRST_REST };
        self.fought = false;
        self.rest = if found { (took * REST).max(least).min(LONGEST_REST) } else { Duration::ZERO };
        self.rest_until = Some(now + self.rest);
    }
}

impl Engine {
    /// Repairs what was noticed, if that is due.
    pub(super) fn repair_if_due(&mut self) {
        let now = Instant::now();
        if self.drift.due(now).is_none_or(|at| at > now) {
            return;
        }
        let Some(cause) = self.drift.begin(now) else { return };
        let found = self.repair(cause);
        self.drift.end(found, Instant::now());
    }

    /// Compares and repairs; returns whether there was something to repair.
    fn repair(&mut self, cause: &'static str) -> bool {
        if self.hold {
            return self.repair_held(cause);
        }
        if !self.state.is_loaded() || self.doubt {
            return false;
        }
        let began = SystemTime::now();
        let result = self.parts.dataplane.repair();
        self.parts.traces.repaired(cause, began, &result);
        match result {
            Ok(Repaired { differences, refused }) => {
                if differences > 0 {
                    self.drift.repaired += 1;
                    self.parts.metrics.drift.with_label_values(&[cause]).inc();
                    tracing::warn!(differences, cause, "foreign changes of our tables were repaired");
                    // Flows that began meanwhile may have passed without translation.
                    self.passes.add(UdpChanges::all());
                    self.tell(cause, None);
                }
                self.refusals_changed(refused);
                self.look_at_flows();
                differences > 0
            }
            Err(error) => {
                self.doubt = true;
                self.queue();
                self.failed(&error);
                true
            }
        }
    }

    /// While the kernel is newer than the view nothing says what it should hold, so whatever somebody else changed
    /// cannot be told from what belongs there. The view, at most a minute older, is then the best that is known.
    fn repair_held(&mut self, cause: &'static str) -> bool {
        if !self.state.is_loaded() || self.expired {
            return false;
        }
        tracing::warn!(cause, "foreign changes of our tables: the view of the snapshot file is programmed");
        self.hold = false;
        self.drift.repaired += 1;
        self.parts.metrics.drift.with_label_values(&[cause]).inc();
        self.passes.add(UdpChanges::all());
        self.queue_and_sync();
        self.tell(cause, None);
        true
    }

    /// A repair tries again what was refused: what became of it is acknowledged.
    fn refusals_changed(&mut self, refused: Vec<Refused>) {
        if self.refused == refused {
            return;
        }
        self.refused = refused;
        self.passes.add(UdpChanges::all());
        self.parts.metrics.refused.set(self.refused.len() as i64);
        self.dirty = true;
        if let Some(kernel) = self.kernel.filter(|_| !self.queued) {
            let ack = self.ack(kernel, &Committed::default());
            self.send(Event::Ack(ack));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_comparison_answers_a_burst_and_a_fight_is_slowed_down() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut drift = Drift::default();
        assert_eq!(drift.due(start), None);
        drift.notice("changed", at(0));
        drift.notice("table_deleted", at(0));
        assert_eq!(
            (drift.due(at(1)), drift.begin(at(1))),
            (Some(at(1)), Some("changed")),
            "the first at once"
        );
        drift.end(true, at(2));
        drift.notice("changed", at(0));
        assert_eq!(drift.due(at(3)), None, "it was noticed before the comparison began");
        // Somebody writes on: each rest is twice the one before, to a limit.
        let mut now = at(2);
        for rest in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            drift.notice("changed", now);
            now += Duration::from_millis(rest);
            assert_eq!(drift.due(at(0)), Some(now));
            assert!(drift.begin(now).is_some());
            drift.end(true, now);
        }
        // A notice after the rest is another matter.
        drift.notice("changed", now + Duration::from_secs(6));
        now += Duration::from_secs(6);
        drift.begin(now);
        drift.end(true, now + Duration::from_millis(50));
        drift.notice("changed", now + Duration::from_millis(50));
        assert_eq!(drift.due(now), Some(now + Duration::from_millis(250)), "four times what it took");
        drift.begin(now + Duration::from_millis(250));
        drift.end(false, now + Duration::from_millis(250));
        drift.notice("changed", now + Duration::from_millis(250));
        assert_eq!(drift.due(now), Some(now + Duration::from_millis(250)), "nothing was found: no rest");
    }
}
