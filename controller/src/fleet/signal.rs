//! Wakes the task of a stream.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use switchtower_proto::v1::GoAwayReason;
use tokio::sync::Notify;

use super::queries::QueryQueue;
use crate::sync::lock;

/// Requests to the task of a stream.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    pub(crate) notify: Notify,
    /// The node's layers or settings changed since the last plan.
    stale: AtomicBool,
    /// The session sleeps until something changes. While an update is unacknowledged or held it does not, and a change
    /// costs it nothing.
    waiting: AtomicBool,
    pub(crate) queries: QueryQueue,
    /// `releaseHeldBefore` of the node's row.
    release_held_before: AtomicU64,
    end: Mutex<Option<GoAwayReason>>,
}

impl Signal {
    pub(super) fn end(&self, reason: GoAwayReason) {
        lock(&self.end).get_or_insert(reason);
        self.notify.notify_one();
    }

    /// Records a change of the node's layers or settings, and wakes the session if it waits for one.
    pub(super) fn changed(&self) {
        self.stale.store(true, Ordering::SeqCst);
        if self.waiting.swap(false, Ordering::SeqCst) {
            self.notify.notify_one();
        }
    }

    /// Sets the `releaseHeldBefore` of the node's row, and wakes the session if it changed.
    pub(super) fn release_held(&self, before: u64) {
        if self.release_held_before.swap(before, Ordering::SeqCst) != before {
            self.notify.notify_one();
        }
    }

    /// The `releaseHeldBefore` of the node's row; 0: absent.
    pub(crate) fn release_held_before(&self) -> u64 {
        self.release_held_before.load(Ordering::SeqCst)
    }

    /// Returns true if something changed since the last call.
    pub(crate) fn take_changed(&self) -> bool {
        self.stale.swap(false, Ordering::SeqCst)
    }

    /// Announces that the session sleeps until something changes. Returns false if something has changed.
    pub(crate) fn wait_for_change(&self) -> bool {
        self.waiting.store(true, Ordering::SeqCst);
        !self.stale.load(Ordering::SeqCst)
    }

    /// Announces that the session is busy.
    pub(crate) fn stop_waiting(&self) {
        self.waiting.store(false, Ordering::SeqCst);
    }

    pub(crate) fn ended(&self) -> Option<GoAwayReason> {
        *lock(&self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wakes(signal: &Signal) -> bool {
        use futures::FutureExt as _;
        signal.notify.notified().now_or_never().is_some()
    }

    #[test]
    fn changes_wake_a_waiting_session_once() {
        let signal = Signal::default();
        assert!(signal.wait_for_change());
        signal.changed();
        signal.changed();
        assert_eq!((wakes(&signal), wakes(&signal)), (true, false));
        assert_eq!((signal.take_changed(), signal.take_changed()), (true, false));
    }

    #[test]
    fn changes_of_a_busy_session_are_kept_without_a_wake() {
        let signal = Signal::default();
        for _ in 0..1_000 {
            signal.changed();
        }
        assert!(!wakes(&signal));
        assert!(!signal.wait_for_change(), "it must not sleep");
        assert!(signal.take_changed() && signal.wait_for_change());
    }
}
