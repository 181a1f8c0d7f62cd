//! The delete budget as specified, checked against every view of an agent.

use std::collections::VecDeque;
use std::time::Duration;

use crate::agent::Agent;
use crate::controller::Row;

/// Length of the window in seconds.
const WINDOW: f64 = 60.0;
/// Resolution of the agent's window in seconds, with a margin: its window may begin earlier or later by this.
const SLACK: f64 = 2.0;
/// Removals within the window that are always allowed.
const MINIMUM: usize = 100;
/// Allowed removals in percent of the items at the start of the window.
const PERCENT: usize = 20;

/// Sizes of an agent's view, including what it holds.
#[derive(Default)]
pub struct Budget {
    /// Number of the agent's changes that were checked.
    pub changes: u64,
    pub held: usize,
    starts: u64,
    /// Each size with the time since when it is in force.
    levels: VecDeque<(Duration, usize)>,
}

impl Budget {
    pub fn check(&mut self, node: usize, agent: &Agent, row: &Row, now: Duration) {
        self.changes = agent.changes;
        let (items, held) = (agent.items(), agent.state.held());
        // A restarted agent counts the items of its file as present from the beginning.
        let started = std::mem::replace(&mut self.starts, agent.starts) != agent.starts;
        if started || row.release_held_before > agent.state.generation() {
            self.levels.clear();
        }
        // Holds may end for each item: its address has a new owner, or its Service is deleted.
        let ended = std::mem::replace(&mut self.held, held).saturating_sub(held);
        self.levels.iter_mut().for_each(|(_, level)| *level = level.saturating_sub(ended));
        let [earliest, latest] = [SLACK, -SLACK].map(|slack| now.as_secs_f64() - WINDOW - slack);
        while self.levels.get(1).is_some_and(|(since, _)| since.as_secs_f64() < earliest) {
            self.levels.pop_front();
        }
        let starts = self.levels.iter().take_while(|(since, _)| since.as_secs_f64() <= latest);
        let first = self.levels.front().map_or(items, |(_, level)| *level);
        let start = starts.map(|(_, level)| *level).min().unwrap_or(first);
        let gone = start.saturating_sub(items);
        assert!(gone <= MINIMUM.max(start * PERCENT / 100), "node {node} lost {gone} of {start} items");
        self.levels.push_back((now, items));
    }
}
