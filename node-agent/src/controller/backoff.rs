//! Backoff between attempts to connect: full jitter below a ceiling that grows with the outage.
//!
//! A controller that restarts or moves is back within seconds, so agents retry often at first: 5,000 agents below
//! `SHORT_CEILING` make about 3,300 attempts per second, and the controller limits the rate of new streams. Frequent
//! retries do not shorten a long outage. An established session ends an outage, however short it is; only a long one resets
//! the attempts.

use std::time::Duration;

use tokio::time::Instant;

/// Ceiling of the first delay; it doubles with each attempt.
pub(crate) const FIRST: Duration = Duration::from_millis(500);
/// Maximum ceiling during a short outage.
const SHORT_CEILING: Duration = Duration::from_secs(3);
/// Maximum duration of a short outage.
const SHORT: Duration = Duration::from_secs(60);
/// Maximum ceiling during a long outage.
const CEILING: Duration = Duration::from_secs(30);

/// Kind of failure of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// The controller is unreachable, starting, or at capacity.
    Away,
    /// The controller rejects the agent, or the agent rejects the controller.
    Refused,
}

/// Duration of a session after which the next failure counts as the first one.
const STABLE: Duration = Duration::from_secs(30);

/// Counts the attempts of one outage.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempt: u32,
    since: Option<Instant>,
    /// Start of the session, until it fails.
    connected: Option<Instant>,
}

impl Backoff {
    /// Records the start of a session, which ends the outage.
    pub(crate) fn connected(&mut self, now: Instant) {
        (self.since, self.connected) = (None, Some(now));
    }

    /// Returns the delay after an attempt, or a session, that failed at `now`. The first failure begins the outage.
    pub(crate) fn after(&mut self, failure: FailureKind, now: Instant) -> Duration {
        if self.connected.take().is_some_and(|since| now.saturating_duration_since(since) >= STABLE) {
            self.attempt = 0;
        }
        let outage = now.saturating_duration_since(*self.since.get_or_insert(now));
        let pause = full_jitter(FIRST, ceiling(failure, outage), self.attempt);
        self.attempt = self.attempt.saturating_add(1);
        pause
    }
}

/// Returns the ceiling, which rises linearly while the outage grows from `SHORT` to twice `SHORT`.
fn ceiling(failure: FailureKind, outage: Duration) -> Duration {
    match failure {
        FailureKind::Refused => CEILING,
        FailureKind::Away => {
            let long = outage.saturating_sub(SHORT).as_secs_f64() / SHORT.as_secs_f64();
            SHORT_CEILING + (CEILING - SHORT_CEILING).mul_f64(long.min(1.0))
        }
    }
}

/// Returns a random delay between 0 and `base` · 2^`attempt`, at most `limit`, at least a tenth of `base`.
pub(crate) fn full_jitter(base: Duration, limit: Duration, attempt: u32) -> Duration {
    let ceiling = base.saturating_mul(1_u32.checked_shl(attempt.min(20)).unwrap_or(u32::MAX)).min(limit);
    ceiling.mul_f64(rand::random::<f64>()).max(base / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_is_bounded() {
        let (base, limit) = (Duration::from_secs(1), Duration::from_secs(30));
        for attempt in [0, 1, 5, 31, 32, u32::MAX] {
            let pause = full_jitter(base, limit, attempt);
            assert!(pause >= base / 10 && pause <= limit, "attempt {attempt}: {pause:?}");
        }
        assert!(full_jitter(base, limit, 0) <= base);
    }

    #[test]
    fn fleet_returns_within_seconds_of_a_short_outage() {
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
                    at += backoff.after(FailureKind::Away, start + at);
                }
                latest = latest.max(at - outage);
            }
            assert!(latest <= SHORT_CEILING, "{outage:?}: the last one came after {latest:?}");
            let busiest = attempts.iter().skip(2).max().unwrap();
            assert!(*busiest < FLEET, "{outage:?}: {busiest} attempts in a second");
        }
    }

    #[test]
    fn established_session_ends_the_outage() {
        let (mut backoff, mut now) = (Backoff::default(), Instant::now());
        // Sessions of ten seconds each, for ten minutes: a long outage without them.
        for _ in 0..60 {
            backoff.connected(now);
            now += Duration::from_secs(10);
            assert!(backoff.after(FailureKind::Away, now) <= SHORT_CEILING);
        }
        backoff.connected(now);
        assert!(backoff.after(FailureKind::Away, now + STABLE) <= FIRST, "a stable session");
    }

    #[test]
    fn long_outages_and_refusals_back_off() {
        assert_eq!(ceiling(FailureKind::Away, SHORT), SHORT_CEILING);
        assert_eq!(ceiling(FailureKind::Away, 10 * SHORT), CEILING);
        assert_eq!(ceiling(FailureKind::Refused, Duration::ZERO), CEILING);
        let mut backoff = Backoff::default();
        let began = Instant::now();
        let mut total = Duration::ZERO;
        for _ in 0..100 {
            total += backoff.after(FailureKind::Refused, began);
        }
        assert!(total > 20 * CEILING, "{total:?} for 100 attempts");
    }
}
