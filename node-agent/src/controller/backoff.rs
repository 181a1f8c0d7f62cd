//! Pauses between attempts to connect: full jitter below a ceiling that grows with the outage.
//!
//! A controller that restarts or moves is back within seconds, so agents look for it often at first: with 5,000 of
//! them that is `SHORT_CEILING` for about 3,300 attempts a second, which cost a connection each and which the
//! controller admits at its own rate. A long outage is not found sooner by looking often.

use std::time::Duration;

use tokio::time::Instant;

/// Ceiling of the first pause; it doubles with each attempt.
pub const FIRST: Duration = Duration::from_millis(500);
/// Highest ceiling while the outage is short.
const SHORT_CEILING: Duration = Duration::from_secs(3);
/// How long an outage is short.
const SHORT: Duration = Duration::from_secs(60);
/// Highest ceiling of a long outage.
const CEILING: Duration = Duration::from_secs(30);

/// Why there was no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The controller is not there, is starting, or has no room.
    Away,
    /// The controller is there and refuses, or is refused.
    Refused,
}

/// Counts the attempts of one outage.
#[derive(Debug, Default)]
pub struct Backoff {
    attempt: u32,
    since: Option<Instant>,
}

impl Backoff {
    /// The pause after an attempt that began at `began` and failed at `now`.
    pub fn after(&mut self, failure: Failure, began: Instant, now: Instant) -> Duration {
        let outage = now.saturating_duration_since(*self.since.get_or_insert(began));
        let pause = full_jitter(FIRST, ceiling(failure, outage), self.attempt);
        self.attempt = self.attempt.saturating_add(1);
        pause
    }
}

/// The ceiling rises from the short one to the long one as the outage becomes twice as long as a short one.
fn ceiling(failure: Failure, outage: Duration) -> Duration {
    match failure {
        Failure::Refused => CEILING,
        Failure::Away => {
            let long = outage.saturating_sub(SHORT).as_secs_f64() / SHORT.as_secs_f64();
            SHORT_CEILING + (CEILING - SHORT_CEILING).mul_f64(long.min(1.0))
        }
    }
}

/// A random pause between 0 and `base` · 2^`attempt`, at most `limit`, at least a tenth of `base`.
pub fn full_jitter(base: Duration, limit: Duration, attempt: u32) -> Duration {
    let ceiling = base.saturating_mul(1_u32.checked_shl(attempt.min(20)).unwrap_or(u32::MAX)).min(limit);
    ceiling.mul_f64(rand::random::<f64>()).max(base / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_and_is_bounded() {
        let (base, limit) = (Duration::from_secs(1), Duration::from_secs(30));
        for attempt in [0, 1, 5, 31, 32, u32::MAX] {
            let pause = full_jitter(base, limit, attempt);
            assert!(pause >= base / 10 && pause <= limit, "attempt {attempt}: {pause:?}");
        }
        assert!(full_jitter(base, limit, 0) <= base);
    }

    #[test]
    fn a_fleet_returns_within_seconds_of_a_short_outage() {
        const FLEET: usize = 5_000;
        for outage in [2, 10, 30, 60].map(Duration::from_secs) {
            let start = Instant::now();
            let mut latest = Duration::ZERO;
            let mut attempts = [0_usize; 64];
            for _ in 0..FLEET {
                let (mut backoff, mut at) = (Backoff::default(), Duration::ZERO);
                while at < outage {
                    attempts[at.as_secs() as usize] += 1;
                    // A refused connection takes no time.
                    at += backoff.after(Failure::Away, start + at, start + at);
                }
                latest = latest.max(at - outage);
            }
            assert!(latest <= SHORT_CEILING, "{outage:?}: the last one came after {latest:?}");
            let busiest = attempts.iter().skip(2).max().unwrap();
            assert!(*busiest < FLEET, "{outage:?}: {busiest} attempts in a second");
        }
    }

    #[test]
    fn a_long_outage_and_a_refusal_are_not_hammered_at() {
        assert_eq!(ceiling(Failure::Away, SHORT), SHORT_CEILING);
        assert_eq!(ceiling(Failure::Away, 10 * SHORT), CEILING);
        assert_eq!(ceiling(Failure::Refused, Duration::ZERO), CEILING);
        let mut backoff = Backoff::default();
        let began = Instant::now();
        let mut total = Duration::ZERO;
        for _ in 0..100 {
            total += backoff.after(Failure::Refused, began, began);
        }
        assert!(total > 20 * CEILING, "{total:?} for 100 attempts");
    }
}
