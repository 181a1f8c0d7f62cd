//! Back-off with full jitter.

use std::time::Duration;

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
}
