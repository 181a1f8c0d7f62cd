//! Rate of messages on a stream: the controller ends streams that send too many.

use std::time::Duration;

use tokio::time::Instant;

/// Messages that may be sent at once: the queries of all waiting pods, after the controller was replaced.
const BURST: f64 = 600.0;
/// Average messages per second after that; the controller accepts 100 of all kinds.
const PER_SECOND: f64 = 50.0;

/// A token bucket whose user waits for the next token.
#[derive(Debug)]
pub(super) struct Pace {
    tokens: f64,
    refilled: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { tokens: BURST, refilled: Instant::now() }
    }

    /// Takes a token. Otherwise, returns the time until there is one.
    pub(super) fn take(&mut self) -> Result<(), Duration> {
        let now = Instant::now();
        let refill = now.duration_since(self.refilled).as_secs_f64() * PER_SECOND;
        self.tokens = (self.tokens + refill).min(BURST);
        self.refilled = now;
        if self.tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.tokens) / PER_SECOND));
        }
        self.tokens -= 1.0;
        Ok(())
    }
}
