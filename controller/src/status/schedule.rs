//! Schedules the writes of rows: one lane for assignments and one for everything else, each with a rate limit, and
//! timers for later checks. Transitions precede other writes.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::token_bucket::{Rate, TokenBucket};

/// Minimum budget of writes per second, without assignments.
pub(super) const WRITES_PER_SECOND: u32 = 100;
/// Maximum writes per second of rows that only show progress, for all rows together. A write costs as much as dozens
/// of updates.
const PROGRESS_PER_SECOND: u32 = 20;
/// Seconds in which every row of a large fleet can be written once. A new row takes two writes.
const ROUND: u32 = 10;

/// Maximum writes per second, without assignments. The budget grows with the fleet for transitions; progress and
/// renewals are also limited by their intervals.
pub(super) fn writes_per_second(nodes: usize) -> u32 {
    WRITES_PER_SECOND.max(u32::try_from(nodes).unwrap_or(u32::MAX) / ROUND)
}

/// Assignment writes per second. A rollback must reach the nodes of a step within seconds, and steps are few.
pub(super) const ASSIGNMENTS_PER_SECOND: u32 = 500;

/// Minimum interval between two writes of one row that only show progress: a second up to 20 nodes, 250 seconds at
/// 5,000.
pub(super) fn minimum_interval(nodes: usize) -> Duration {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    Duration::from_secs(1).max(Duration::from_secs(1) * nodes / PROGRESS_PER_SECOND)
}

/// Renewals per second; the rest of the budget is for changes.
const RENEWALS_PER_SECOND: u32 = 10;

/// Interval between renewals of an unchanged row: 10 seconds up to 100 nodes, then proportional to the number of nodes
/// (500 seconds at 5,000 nodes).
pub(super) fn renewal_interval(nodes: usize) -> Duration {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    Duration::from_secs(10).max(Duration::from_secs(1) * nodes / RENEWALS_PER_SECOND)
}

/// Age at which a row is out of date: two missed renewals and one retry.
pub(super) fn validity(nodes: usize) -> Duration {
    renewal_interval(nodes) * 2 + Duration::from_secs(10)
}

/// Queues of rows to write, and timers of rows to check later.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    assignments: VecDeque<Arc<str>>,
    to_assign: HashSet<Arc<str>>,
    urgent: VecDeque<Arc<str>>,
    ordinary: VecDeque<Arc<str>>,
    queued: HashSet<Arc<str>>,
    dates: BTreeSet<(Instant, Arc<str>)>,
    date_of: HashMap<Arc<str>, Instant>,
}

impl Schedule {
    /// Queues a row for the next write that the budget allows.
    pub(super) fn push(&mut self, name: &Arc<str>, urgent: bool) {
        if self.queued.insert(name.clone()) {
            if urgent { &mut self.urgent } else { &mut self.ordinary }.push_back(name.clone());
        }
    }

    /// Queues an assignment, independent of other writes.
    pub(super) fn push_assignment(&mut self, name: &Arc<str>) {
        if self.to_assign.insert(name.clone()) {
            self.assignments.push_back(name.clone());
        }
    }

    /// Takes the next assignment.
    pub(super) fn pop_assignment(&mut self) -> Option<Arc<str>> {
        let name = self.assignments.pop_front()?;
        self.to_assign.remove(&name);
        Some(name)
    }

    pub(super) fn has_assignments(&self) -> bool {
        !self.assignments.is_empty()
    }

    /// Takes the next row to write.
    pub(super) fn pop(&mut self) -> Option<Arc<str>> {
        let name = self.urgent.pop_front().or_else(|| self.ordinary.pop_front())?;
        self.queued.remove(&name);
        Some(name)
    }

    pub(super) fn has_work(&self) -> bool {
        !self.queued.is_empty()
    }

    /// Schedules a check of the row. The earlier of two dates wins.
    pub(super) fn at(&mut self, name: &Arc<str>, date: Instant) {
        if let Some(known) = self.date_of.get(name).copied() {
            if known <= date {
                return;
            }
            self.dates.remove(&(known, name.clone()));
        }
        self.date_of.insert(name.clone(), date);
        self.dates.insert((date, name.clone()));
    }

    /// Returns the date of the next check.
    pub(super) fn next_date(&self) -> Option<Instant> {
        self.dates.first().map(|(date, _)| *date)
    }

    /// Takes a row whose check is due.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Arc<str>> {
        let (date, name) = self.dates.first().filter(|(date, _)| *date <= now)?.clone();
        self.dates.remove(&(date, name.clone()));
        self.date_of.remove(&name);
        Some(name)
    }
}

/// A token bucket that holds one second's worth.
#[derive(Debug)]
pub(super) struct Budget(TokenBucket);

impl Budget {
    pub(super) fn new(per_second: u32, now: Instant) -> Self {
        Self(TokenBucket::new(rate(per_second), now.into_std()))
    }

    /// Changes the rate.
    pub(super) fn set_rate(&mut self, per_second: u32) {
        self.0.set_rate(rate(per_second));
    }

    /// Takes a token, or says when there will be one.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        if self.0.take(now.into_std()) {
            return Ok(());
        }
        // Timers count milliseconds; a fraction of a token must not become a date that has come already.
        Err(now + self.0.wait().max(Duration::from_millis(1)))
    }
}

fn rate(per_second: u32) -> Rate {
    Rate { per_second: per_second.into(), burst: per_second.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minimum_interval_grows_with_the_cluster() {
        for (nodes, seconds) in [(0, 1), (3, 1), (20, 1), (500, 25), (5_000, 250)] {
            assert_eq!(minimum_interval(nodes), Duration::from_secs(seconds), "{nodes}");
        }
    }

    #[test]
    fn write_budget_covers_every_row_in_ten_seconds() {
        for (nodes, rate) in [(3, 100), (500, 100), (5_000, 500), (10_000, 1_000)] {
            assert_eq!(writes_per_second(nodes), rate, "{nodes}");
        }
    }

    #[test]
    fn renewals_leave_most_of_the_budget_for_changes() {
        for (nodes, interval, valid) in [(0, 10, 30), (100, 10, 30), (1_000, 100, 210), (5_000, 500, 1_010)] {
            assert_eq!(renewal_interval(nodes), Duration::from_secs(interval), "{nodes}");
            assert_eq!(validity(nodes), Duration::from_secs(valid), "{nodes}");
            let rate = nodes as f64 / renewal_interval(nodes).as_secs_f64();
            assert!(rate <= f64::from(WRITES_PER_SECOND) * 0.2, "{rate} per second for {nodes} nodes");
        }
    }

    #[test]
    fn transitions_precede_other_writes_and_duplicates_are_dropped() {
        let mut schedule = Schedule::default();
        let [a, b]: [Arc<str>; 2] = ["a".into(), "b".into()];
        schedule.push(&a, false);
        schedule.push(&b, true);
        schedule.push(&a, true);
        schedule.push_assignment(&a);
        schedule.push_assignment(&a);
        assert_eq!((schedule.pop_assignment(), schedule.pop_assignment()), (Some(a.clone()), None));
        assert_eq!([schedule.pop(), schedule.pop(), schedule.pop()], [Some(b), Some(a), None]);
        assert!(!schedule.has_work());
    }

    #[test]
    fn earlier_of_two_dates_wins() {
        let (mut schedule, now, a) = (Schedule::default(), Instant::now(), Arc::<str>::from("a"));
        for seconds in [5, 2, 9] {
            schedule.at(&a, now + Duration::from_secs(seconds));
        }
        assert_eq!(schedule.next_date(), Some(now + Duration::from_secs(2)));
        assert_eq!(schedule.pop_due(now), None);
        assert_eq!(schedule.pop_due(now + Duration::from_secs(2)), Some(a));
        assert_eq!(schedule.next_date(), None);
    }

    #[test]
    fn budget_bursts_for_one_second() {
        let now = Instant::now();
        let mut budget = Budget::new(WRITES_PER_SECOND, now);
        for _ in 0..WRITES_PER_SECOND {
            assert_eq!(budget.take(now), Ok(()));
        }
        let date = budget.take(now).unwrap_err();
        assert!(date > now && date <= now + Duration::from_millis(21));
        assert_eq!(budget.take(now + Duration::from_millis(21)), Ok(()));
    }
}
