//! The update that is on its way to an agent.

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
    /// The kernel refused it, and the agent tries again until it is taken: no deadline holds.
    pub(super) retried: bool,
    delivery: Delivery,
}

impl InFlight {
    /// Notes that sending begins.
    pub(super) fn begin(to: u64, after: Cursor, whole: bool, snapshot: bool, parts: &[Part]) -> Self {
        let delivery = Delivery {
            started: unix_nanoseconds(SystemTime::now()),
            generation: to,
            bytes: parts.iter().map(|part| part.payload.len() as u64).sum(),
            snapshot,
            ..Delivery::default()
        };
        Self { to, after, snapshot: whole, since: Instant::now(), retried: false, delivery }
    }

    /// Payload bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.delivery.bytes
    }

    /// Notes that the connection has all of it.
    pub(super) fn sent(&mut self) {
        self.since = Instant::now();
        self.delivery.sent = unix_nanoseconds(SystemTime::now());
    }

    /// The whole way, now that the agent acknowledged it.
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
