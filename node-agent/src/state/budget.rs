//! The delete budget: how many pools may become empty and frontends may vanish within a sliding window.
//!
//! Removals count net of additions: an update that replaces Services removes nothing. Pure: the caller passes in the
//! time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Length of the window.
pub(crate) const WINDOW: Duration = Duration::from_secs(60);
/// Decline that is always allowed.
pub(crate) const MINIMUM: usize = 100;
/// Allowed decline in percent of the number of items at the start of the window.
pub(crate) const PERCENT: usize = 20;
/// Resolution of the window, which bounds its memory.
const STEP: Duration = Duration::from_secs(1);

/// Numbers of items over the window.
#[derive(Debug)]
pub(super) struct Budget {
    minimum: usize,
    /// Pools with a member and frontends.
    level: usize,
    /// Earlier levels, oldest first, each with the last time at which it was in force.
    earlier: VecDeque<(Instant, usize)>,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { minimum: MINIMUM, level: 0, earlier: VecDeque::new() }
    }
}

impl Budget {
    /// Takes the first view as present from the beginning: an agent that has just started counts its removals too.
    pub(super) fn start(&mut self, level: usize) {
        (self.level, self.earlier) = (level, VecDeque::new());
    }

    /// Counts removed items as present again: they are held.
    pub(super) fn keep(&mut self, held: usize) {
        self.level += held;
    }

    /// Forgets items whose removal was intended.
    pub(super) fn release(&mut self, released: usize) {
        let levels = self.earlier.iter_mut().map(|(_, level)| level);
        for level in levels.chain([&mut self.level]) {
            *level = level.saturating_sub(released);
        }
    }

    /// Notes a change. Returns whether the decline in the window exceeds the budget.
    pub(super) fn note(&mut self, added: usize, removed: usize, now: Instant) -> bool {
        let before = self.level;
        self.level = (before + added).saturating_sub(removed);
        let age = |until: Instant| now.saturating_duration_since(until);
        while self.earlier.front().is_some_and(|(until, _)| age(*until) > WINDOW) {
            self.earlier.pop_front();
        }
        if self.level != before && self.earlier.back().is_none_or(|(until, _)| age(*until) >= STEP) {
            self.earlier.push_back((now, before));
        }
        let start = self.earlier.front().map_or(self.level, |(_, level)| *level);
        start.saturating_sub(self.level) > self.minimum.max(start * PERCENT / 100)
    }

    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        self.earlier.clear();
    }

    #[cfg(test)]
    pub(super) fn set_minimum(&mut self, minimum: usize) {
        self.minimum = minimum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn minimum_allowed_in_a_small_view() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.start(101);
        assert!(!budget.note(0, 100, now));
        assert!(budget.note(0, 1, now), "the 101st");
    }

    #[test]
    fn a_fifth_allowed_in_a_large_view() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.start(10_000);
        assert!(!budget.note(0, 2_000, at(now, 100)));
        assert!(budget.note(0, 1, at(now, 101)));
    }

    #[test]
    fn decline_forgotten_after_the_window() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.start(1_000);
        assert!(!budget.note(0, 200, at(now, 1)));
        assert!(budget.note(0, 1, at(now, 61)));
        assert!(!budget.note(0, 1, at(now, 62)), "only the removals at 61 s and 62 s count");
        assert!(!budget.note(0, 100, at(now, 300)));
    }

    #[test]
    fn replaced_items_not_counted() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.start(1_000);
        for second in 0..50 {
            assert!(!budget.note(150, 150, at(now, second)));
        }
        // An addition just before does not hide the removal of what was there.
        assert!(!budget.note(5_000, 0, at(now, 51)));
        assert!(budget.note(0, 5_500, at(now, 52)));
    }

    #[test]
    fn items_of_the_last_minute_removed_freely() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.start(10);
        assert!(!budget.note(500, 0, now));
        assert!(!budget.note(0, 500, at(now, 30)));
        assert!(!budget.note(500, 0, at(now, 100)));
        assert!(budget.note(0, 500, at(now, 161)), "present at the start of the window");
    }

    #[test]
    fn slow_removal_one_by_one_noticed() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.start(300);
        let exceeded =
            (1..=300_u32).find(|number| budget.note(0, 1, now + *number * Duration::from_millis(100)));
        assert_eq!(exceeded, Some(101));
        assert!(budget.earlier.len() <= 61);
    }
}
