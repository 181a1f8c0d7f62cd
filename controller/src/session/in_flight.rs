//! The update that an agent has not acknowledged yet.

use std::time::SystemTime;

use switchtower_core::layer::Cursor;
use switchtower_core::propagation::Delivery;
use switchtower_proto::v1::{ApplyTimings, Part};
use tokio::time::Instant;

use crate::propagation::unix_nanoseconds;

/// One update between its sending and its acknowledgement.
pub(super) struct InFlight {
    pub(super) to: u64,
    pub(super) after: Cursor,
    pub(super) snapshot: bool,
    pub(super) since: Instant,
    /// The kernel refused it and the agent retries until it succeeds, without a deadline.
    pub(super) retried: bool,
    /// It has been under way for so long that the row shows it.
    pub(super) late: bool,
    delivery: Delivery,
}

impl InFlight {
    /// Records the start of sending.
    pub(super) fn begin(to: u64, after: Cursor, whole: bool, snapshot: bool, parts: &[Part]) -> Self {
        let delivery = Delivery {
            started: unix_nanoseconds(SystemTime::now()),
            generation: to,
            bytes: parts.iter().map(|part| part.payload.len() as u64).sum(),
            snapshot,
            ..Delivery::default()
        };
        Self { to, after, snapshot: whole, since: Instant::now(), retried: false, late: false, delivery }
    }

    /// Payload bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.delivery.bytes
    }

    /// Records that the connection has accepted all of it.
    pub(super) fn sent(&mut self) {
        self.since = Instant::now();
        self.delivery.sent = unix_nanoseconds(SystemTime::now());
    }

    /// Returns the complete delivery, now that the agent acknowledged it.
    pub(super) fn delivered(&self, timings: Option<&ApplyTimings>) -> Delivery {
        let timings = timings.copied().unwrap_or_default();
        Delivery {
            acknowledged: unix_nanoseconds(SystemTime::now()),
            plan: timings.plan_microseconds,
            commit: timings.commit_microseconds,
            operations: timings.operations,
            traced: timings.traced,
            ..self.delivery
        }
    }
}
