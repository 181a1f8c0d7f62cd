//! Exponential back-off with full jitter.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(200);
const LAST: Duration = Duration::from_secs(5);

/// Delays between attempts: uniformly between 0.1 s and a ceiling that doubles from 0.2 s to 5 s.
#[derive(Debug, Clone)]
pub struct Backoff {
    ceiling: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { ceiling: FIRST }
    }
}

impl Backoff {
    /// Returns the delay before the next attempt.
    pub fn next_delay(&mut self) -> Duration {
        let ceiling = self.ceiling;
        self.ceiling = (ceiling * 2).min(LAST);
        FIRST / 2 + (ceiling - FIRST / 2).mul_f64(rand::random::<f64>())
    }

    /// Resets the delays after a success.
    pub fn reset(&mut self) {
        self.ceiling = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_within_bounds() {
        let mut backoff = Backoff::default();
        for _ in 0..100 {
            let delay = backoff.next_delay();
            assert!(delay >= FIRST / 2 && delay <= LAST, "{delay:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= FIRST);
    }
}
