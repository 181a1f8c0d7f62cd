//! How a stream's task learns that something concerns it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use switchtower_proto::v1::GoAwayReason;
use tokio::sync::Notify;

use super::lock;
use super::queries::QueryQueue;

/// What a stream is told from outside of its task.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    pub(crate) notify: Notify,
    /// The node's layers or settings changed since the session last looked.
    stale: AtomicBool,
    /// The session sleeps until something changes. While an update is under way or put off it does not: then a change
    /// costs it nothing.
    waiting: AtomicBool,
    pub(crate) queries: QueryQueue,
    end: Mutex<Option<GoAwayReason>>,
}

impl Signal {
    pub(super) fn end(&self, reason: GoAwayReason) {
        lock(&self.end).get_or_insert(reason);
        self.notify.notify_one();
    }

    /// The node's layers or settings changed. Wakes the session only where it waits for that.
    pub(super) fn changed(&self) {
        self.stale.store(true, Ordering::SeqCst);
        if self.waiting.swap(false, Ordering::SeqCst) {
            self.notify.notify_one();
        }
    }

    /// Whether something changed since the last call.
    pub(crate) fn take_changed(&self) -> bool {
        self.stale.swap(false, Ordering::SeqCst)
    }

    /// The session is about to sleep until something changes. False: something has.
    pub(crate) fn wait_for_change(&self) -> bool {
        self.waiting.store(true, Ordering::SeqCst);
        !self.stale.load(Ordering::SeqCst)
    }

    /// The session does not wait for changes now.
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
    fn changes_wake_a_session_that_waits_and_only_once() {
        let signal = Signal::default();
        assert!(signal.wait_for_change());
        signal.changed();
        signal.changed();
        assert_eq!((wakes(&signal), wakes(&signal)), (true, false));
        assert_eq!((signal.take_changed(), signal.take_changed()), (true, false));
    }

    #[test]
    fn changes_do_not_wake_a_busy_session_and_are_not_lost() {
        let signal = Signal::default();
        for _ in 0..1_000 {
            signal.changed();
        }
        assert!(!wakes(&signal));
        assert!(!signal.wait_for_change(), "it must look instead of sleeping");
        assert!(signal.take_changed() && signal.wait_for_change());
    }
}
