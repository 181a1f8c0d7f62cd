//! Polling with a deadline, which reports the last error.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// Calls `attempt` every 20 ms until it succeeds.
///
/// # Errors
/// The deadline passed; the message contains `what` and the last error.
pub fn until<T>(what: &str, deadline: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= deadline => {
                return Err(anyhow!("{what}: not within {:.1} s: {error:#}", deadline.as_secs_f64()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
