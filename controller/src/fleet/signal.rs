//! Wakes the task of a stream.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use switchtower_proto::v1::GoAwayReason;
use tokio::sync::Notify;
use tokio::time::Instant;

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
    heard: Heard,
}

/// Time of the agent's last message; never for an agent without heartbeats.
#[derive(Debug)]
struct Heard {
    base: Instant,
    /// Milliseconds after `base`.
    after: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Default for Heard {
    fn default() -> Self {
        Self { base: Instant::now(), after: AtomicU64::new(NEVER) }
    }
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

    /// Records a message of an agent that sends heartbeats.
    pub(crate) fn hear(&self, now: Instant) {
        self.heard.after.store(now.duration_since(self.heard.base).as_millis() as u64, Ordering::Relaxed);
    }

    /// Wakes the session if the agent has sent nothing for this long.
    pub(super) fn wake_silent(&self, silence: Duration, now: Instant) {
        let after = self.heard.after.load(Ordering::Relaxed);
        if after != NEVER && now.duration_since(self.heard.base) >= Duration::from_millis(after) + silence {
            self.notify.notify_one();
        }
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

    #[tokio::test(start_paused = true)]
    async fn silence_wakes_the_session_of_an_agent_with_heartbeats() {
        let (signal, silence) = (Signal::default(), Duration::from_secs(8));
        let wakes_after = async |seconds| {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            signal.wake_silent(silence, Instant::now());
            wakes(&signal)
        };
        assert!(!wakes_after(100).await, "an agent without heartbeats");
        signal.hear(Instant::now());
        assert_eq!([wakes_after(7).await, wakes_after(1).await, wakes_after(1).await], [false, true, true]);
        signal.hear(Instant::now());
        assert!(!wakes_after(7).await);
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
