//! The clock of decisions.
//!
//! A jump of the wall clock must neither shorten nor extend a running soak or deadline, so time advances with the
//! monotonic clock. The clock is set from the API server's clock ([`crate::server_clock`]) at the start of the process,
//! because stored times must be comparable, and whenever no rollout is active.

use k8s_openapi::jiff::Timestamp;
use switchtower_core::rollout::Time;
use tokio::time::Instant;

use super::convert;

/// Reads the wall clock.
type Wall = Box<dyn Fn() -> Timestamp + Send + Sync>;

/// A clock that jumps only when it is set.
pub(super) struct Clock {
    wall: Wall,
    set: Instant,
    /// Time at `set`.
    time: Time,
}

impl Clock {
    /// Creates a clock and sets it.
    pub(super) fn new(wall: Wall) -> Self {
        let time = convert::time(wall());
        Self { wall, set: Instant::now(), time }
    }

    /// Sets the clock from the wall clock.
    pub(super) fn set(&mut self) {
        (self.set, self.time) = (Instant::now(), convert::time((self.wall)()));
    }

    /// Returns the current time.
    pub(super) fn now(&self) -> Time {
        self.at(Instant::now())
    }

    /// Returns the time at a moment of this process, before or after the clock was set.
    pub(super) fn at(&self, moment: Instant) -> Time {
        let milliseconds = |one: Instant, other: Instant| {
            i64::try_from(one.saturating_duration_since(other).as_millis()).unwrap_or(i64::MAX)
        };
        let passed = milliseconds(moment, self.set) - milliseconds(self.set, moment);
        Time(self.time.0.saturating_add(passed))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_advances_independently_of_the_wall_clock() {
        let wall = Arc::new(AtomicI64::new(1_000_000));
        let reading = wall.clone();
        let read = move || Timestamp::from_millisecond(reading.load(Ordering::Relaxed)).unwrap_or_default();
        let started = Instant::now();
        let mut clock = Clock::new(Box::new(read));
        for jump in [3_600_000, -7_200_000] {
            wall.fetch_add(jump, Ordering::Relaxed);
            tokio::time::advance(Duration::from_secs(5)).await;
        }
        assert_eq!((clock.now(), clock.at(started)), (Time(1_010_000), Time(1_000_000)));
        wall.store(5_000_000, Ordering::Relaxed);
        clock.set();
        assert_eq!(clock.now(), Time(5_000_000));
        assert_eq!(clock.at(started), Time(4_990_000), "durations since earlier moments stay the same");
    }
}
