//! Retries of items that the kernel refused, and their acknowledgement.

use std::time::{Duration, Instant};

use super::Engine;
use crate::controller::backoff::full_jitter;
use crate::kernel::dataplane::{Committed, Refused};
use crate::state::UdpChanges;

/// Minimum delay before a retry, added to the jitter: a retry reads every element of the mirror.
const LEAST_DELAY: Duration = Duration::from_secs(1);
/// Maximum jitter of the first retry; it doubles with each one.
const FIRST_DELAY: Duration = Duration::from_secs(2);
/// Maximum jitter of later retries.
const DELAY_LIMIT: Duration = Duration::from_secs(300);

/// Schedule of retries.
#[derive(Debug, Default)]
pub(super) struct Retries {
    at: Option<Instant>,
    attempt: u32,
}

impl Retries {
    /// Schedules a retry if the kernel refused an item. The agent's own limits need none: a change that makes room
    /// retries their items.
    pub(super) fn schedule(&mut self, refused: &[Refused], now: Instant) {
        if refused.iter().all(|refused| refused.errno == 0) {
            *self = Self::default();
        } else if self.at.is_none() {
            let delay = LEAST_DELAY + full_jitter(FIRST_DELAY, DELAY_LIMIT, self.attempt);
            self.at = Some(now + delay);
        }
    }

    /// Returns the time of the next retry.
    pub(super) fn due(&self) -> Option<Instant> {
        self.at
    }

    fn begin(&mut self) {
        self.at = None;
        self.attempt = self.attempt.saturating_add(1);
    }
}

impl Engine {
    /// Returns the time of the next retry of refused items. A failed commit is retried first.
    pub(super) fn refused_due(&self) -> Option<Instant> {
        self.retries.due().filter(|_| self.kernel_holds_view() && !self.confidence.must_compare())
    }

    /// Retries refused items, if a retry is due.
    pub(super) fn retry_refused(&mut self) {
        let now = Instant::now();
        if self.refused_due().is_none_or(|at| at > now) {
            return;
        }
        self.retries.begin();
        match self.parts.dataplane.retry_refused() {
            Ok(refused) => {
                self.refusals_changed(refused);
                self.reconcile_flows();
            }
            Err(error) => self.mirror_lost(&error),
        }
    }

    /// Acknowledges a change of the refused items: a repair retries them too.
    pub(super) fn refusals_changed(&mut self, refused: Vec<Refused>) {
        self.retries.schedule(&refused, Instant::now());
        if self.refused == refused {
            return;
        }
        self.refused = refused;
        self.flow_checks.add(UdpChanges::all());
        self.parts.metrics.refused.set(self.refused.len() as i64);
        self.snapshots.invalidate();
        if let Some(kernel) = self.kernel.filter(|_| !self.sync.is_queued()) {
            let ack = self.ack(kernel, &Committed::default());
            self.send(super::Event::Ack(ack));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32) -> Vec<Refused> {
        vec![Refused { item: "item".into(), reason: "reason".into(), errno }]
    }

    #[test]
    fn refused_items_retried_ever_more_rarely() {
        let now = Instant::now();
        let mut retries = Retries::default();
        retries.schedule(&refused(0), now);
        assert_eq!(retries.due(), None, "a limit of the agent");
        for _ in 0..20 {
            retries.schedule(&refused(libc::ENFILE), now);
            let at = retries.due().unwrap();
            assert!((now + LEAST_DELAY..=now + LEAST_DELAY + DELAY_LIMIT).contains(&at));
            retries.schedule(&refused(libc::ENFILE), now + LEAST_DELAY);
            assert_eq!(retries.due(), Some(at), "commits do not postpone it");
            retries.begin();
            assert_eq!(retries.due(), None);
        }
        retries.schedule(&[], now);
        assert_eq!((retries.due(), retries.attempt), (None, 0));
    }
}
