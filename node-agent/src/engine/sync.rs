//! Synchronization of the kernel with the view, as states.

use std::time::Instant;

/// Progress of the view towards the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SyncState {
    /// The kernel holds the view, or there is no view.
    Idle,
    /// A change waits for the next commit.
    Queued,
    /// The last commit failed.
    Retrying {
        /// Time of the next attempt.
        at: Instant,
        /// Number of the failed attempt, from 0.
        attempt: u32,
    },
    /// The kernel is newer than the view: nothing is written before a controller sends what is missing.
    Held {
        /// Time when a view that the controller resumed counts as current, if no update arrives first.
        until: Option<Instant>,
    },
}

/// Action that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Commit the view.
    Commit,
    /// Treat the held view as current.
    Release,
}

impl SyncState {
    /// Returns whether a change waits for a commit.
    pub(super) fn is_queued(self) -> bool {
        matches!(self, Self::Queued | Self::Retrying { .. })
    }

    /// Returns whether writes wait for a controller.
    pub(super) fn is_held(self) -> bool {
        matches!(self, Self::Held { .. })
    }

    /// Number of the next attempt after a failure.
    pub(super) fn next_attempt(self) -> u32 {
        match self {
            Self::Retrying { attempt, .. } => attempt.saturating_add(1),
            Self::Idle | Self::Queued | Self::Held { .. } => 0,
        }
    }

    /// Returns the time of the next action; `earliest` is the earliest start of a commit.
    pub(super) fn next(self, earliest: Instant) -> Option<(Instant, Due)> {
        match self {
            Self::Idle | Self::Held { until: None } => None,
            Self::Queued => Some((earliest, Due::Commit)),
            Self::Retrying { at, .. } => Some((at, Due::Commit)),
            Self::Held { until: Some(at) } => Some((at, Due::Release)),
        }
    }
}

/// Knowledge of the kernel's content, which decides how the next commit is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Confidence {
    /// The kernel holds the last commit: pending changes are enough.
    Incremental,
    /// The next commit compares everything.
    MustCompare,
    /// The kernel could not be read at start, and nothing was committed since: it may hold anything.
    Unread,
}

impl Confidence {
    /// Returns whether the next commit compares everything.
    pub(super) fn must_compare(self) -> bool {
        self != Self::Incremental
    }

    /// Discards the incremental state.
    pub(super) fn lose(&mut self) {
        if *self == Self::Incremental {
            *self = Self::MustCompare;
        }
    }
}

/// Acknowledgements owed to the controller.
#[derive(Debug, Default)]
pub(super) struct Acknowledgement {
    /// The next commit is acknowledged.
    pub(super) due: bool,
    /// Generation and error number of the last Nack; a retry that fails alike sends no other.
    nacked: Option<(u64, i32)>,
}

impl Acknowledgement {
    /// Returns whether a failed commit is reported: once per generation and error number.
    pub(super) fn nack(&mut self, generation: u64, errno: i32) -> bool {
        self.due && self.nacked.replace((generation, errno)) != Some((generation, errno))
    }

    /// Forgets earlier reports: a new session has seen none of them.
    pub(super) fn forget(&mut self) {
        self.nacked = None;
    }

    /// Returns whether a successful commit is acknowledged.
    pub(super) fn take(&mut self) -> bool {
        self.nacked = None;
        std::mem::take(&mut self.due)
    }
}

/// Treatment of update messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reception {
    /// Parts go into the view.
    Receiving,
    /// The update was refused: its remaining parts are dropped.
    Discarding,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn next_action_follows_the_state() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        assert_eq!(SyncState::Idle.next(now), None);
        assert_eq!(SyncState::Queued.next(later), Some((later, Due::Commit)));
        let retrying = SyncState::Retrying { at: later, attempt: 3 };
        assert_eq!((retrying.next(now), retrying.next_attempt()), (Some((later, Due::Commit)), 4));
        assert_eq!(SyncState::Held { until: None }.next(now), None);
        assert_eq!(SyncState::Held { until: Some(later) }.next(now), Some((later, Due::Release)));
    }

    #[test]
    fn nack_sent_once_per_generation_and_error() {
        let mut acknowledgement = Acknowledgement::default();
        assert!(!acknowledgement.nack(1, 1), "no update waits for an answer");
        acknowledgement.due = true;
        assert!(acknowledgement.nack(1, 1));
        assert!(!acknowledgement.nack(1, 1));
        assert!(acknowledgement.nack(1, 12), "another error");
        assert!(acknowledgement.nack(2, 12), "another generation");
        acknowledgement.forget();
        assert!(acknowledgement.nack(2, 12), "another session");
        assert!(acknowledgement.take() && !acknowledgement.take());
    }

    #[test]
    fn unread_kernel_stays_unread_until_a_commit() {
        let mut confidence = Confidence::Unread;
        confidence.lose();
        assert_eq!(confidence, Confidence::Unread);
        let mut confidence = Confidence::Incremental;
        confidence.lose();
        assert!(confidence == Confidence::MustCompare && confidence.must_compare());
    }
}
