//! A token bucket: limits a rate and allows bursts.

use std::time::{Duration, Instant};

/// Rate of events.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// Average events per second.
    pub(crate) per_second: f64,
    /// Maximum number of events at once.
    pub(crate) burst: f64,
}

/// Tokens of a [`Rate`], one for each event. Full at first.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    rate: Rate,
    tokens: f64,
    refilled: Instant,
}

impl TokenBucket {
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, tokens: rate.burst, refilled: now }
    }

    /// Takes a token. Returns false if there is none.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let available = self.has_token(now);
        if available {
            self.tokens -= 1.0;
        }
        available
    }

    pub(crate) fn has_token(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens >= 1.0
    }

    /// Returns the time until the next token, as of the last call.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_secs_f64((1.0 - self.tokens).max(0.0) / self.rate.per_second)
    }

    pub(crate) fn set_rate(&mut self, rate: Rate) {
        self.rate = rate;
    }

    /// Returns true if a new bucket would allow no more than this one.
    pub(crate) fn is_full(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens >= self.rate.burst
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate.per_second).min(self.rate.burst);
        self.refilled = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_allows_a_burst_then_the_rate() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_second: 2.0, burst: 20.0 }, now);
        assert_eq!((0..100).filter(|_| bucket.take(now)).count(), 20);
        let later = now + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| bucket.take(later)).count(), 2);
        assert!(!bucket.is_full(later + Duration::from_secs(9)));
        assert!(bucket.is_full(later + Duration::from_secs(10)));
        let much_later = later + Duration::from_secs(3_600);
        assert_eq!((0..100).filter(|_| bucket.take(much_later)).count(), 20, "unused tokens are not saved");
    }
}
