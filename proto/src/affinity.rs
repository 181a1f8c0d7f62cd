//! Timeouts of ClientIP session affinity.
//!
//! The kernel takes a timeout from the rule that remembers the client. Rules are the same for all Services, so
//! there is one for each value of [`TIMEOUTS`], and a timeout in between is rounded up.

/// The timeouts in seconds that nodes can program, ascending. The last one is the API's maximum.
pub const TIMEOUTS: [u32; 31] = [
    1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600, 900, 1_200, 1_800, 2_700,
    3_600, 5_400, 7_200, 10_800, 14_400, 21_600, 43_200, 86_400,
];

/// The timeout that nodes program for `seconds`: the next of [`TIMEOUTS`], at most the last one. 0 means no
/// affinity and stays 0.
pub fn programmed_timeout(seconds: u32) -> u32 {
    if seconds == 0 {
        return 0;
    }
    TIMEOUTS.iter().copied().find(|timeout| *timeout >= seconds).unwrap_or(86_400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_timeouts_are_exact_and_others_round_up() {
        for exact in [0, 1, 2, 3, 5, 10, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 10_800, 86_400] {
            assert_eq!(programmed_timeout(exact), exact);
        }
        assert_eq!(programmed_timeout(61), 90);
        assert_eq!(programmed_timeout(10_801), 14_400);
        assert_eq!(programmed_timeout(u32::MAX), 86_400);
    }

    #[test]
    fn no_timeout_is_more_than_doubled() {
        assert!(TIMEOUTS.is_sorted());
        for seconds in 1..=86_400 {
            let programmed = programmed_timeout(seconds);
            assert!(programmed >= seconds && programmed < 2 * seconds, "{seconds} s becomes {programmed} s");
        }
    }
}
