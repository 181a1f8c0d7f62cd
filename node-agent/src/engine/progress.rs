//! Log of commits: each at debug level, a summary at info level.

use std::time::{Duration, Instant};

use crate::kernel::dataplane::Committed;

/// Minimum interval between two summaries; a line per commit would be gigabytes per day on each node of a busy cluster.
const INTERVAL: Duration = Duration::from_secs(60);

/// Commits since the last summary.
#[derive(Debug, Default)]
pub(super) struct Progress {
    last: Option<Instant>,
    commits: u64,
    operations: u64,
    longest: Duration,
}

impl Progress {
    /// Logs a commit of `generation`.
    pub(super) fn committed(&mut self, generation: u64, committed: &Committed, now: Instant) {
        tracing::debug!(
            generation,
            operations = committed.operations,
            plan_us = committed.plan.as_micros() as u64,
            commit_us = committed.commit.as_micros() as u64,
            refused = committed.refused.len(),
            "generation committed"
        );
        self.commits += 1;
        self.operations += u64::from(committed.operations);
        self.longest = self.longest.max(committed.commit);
        if self.is_due(now) {
            tracing::info!(
                generation,
                commits = self.commits,
                operations = self.operations,
                longest_commit_us = self.longest.as_micros() as u64,
                refused = committed.refused.len(),
                "the kernel holds the generation"
            );
            *self = Progress { last: Some(now), ..Progress::default() };
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL)
    }

    /// Summarizes the next commit regardless of the interval: the log level was raised to see it.
    pub(super) fn summarize_next(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_commits_summarized_once_per_minute() {
        let start = Instant::now();
        let mut progress = Progress::default();
        let mut summaries = 0;
        for second in 0..600 {
            progress.committed(second, &Committed::default(), start + Duration::from_secs(second));
            summaries += u32::from(progress.commits == 0);
        }
        assert_eq!(summaries, 10);
        progress.summarize_next();
        progress.committed(600, &Committed::default(), start + Duration::from_secs(600));
        progress.committed(601, &Committed::default(), start + Duration::from_secs(601));
        assert_eq!(progress.commits, 1);
    }
}
