//! Time from an API write to the nodes.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::agent::Applied;
use super::load::Change;

/// Time from an API write until a share of the nodes had acknowledged it, in milliseconds: percentiles over changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median of the time to half of the nodes.
    pub half_p50: f64,
    /// Median of the time to 99 % of the nodes.
    pub most_p50: f64,
    /// 99th percentile of the time to 99 % of the nodes.
    pub most_p99: f64,
    /// Median of the time to all nodes.
    pub all_p50: f64,
    /// 99th percentile of the time to all nodes.
    pub all_p99: f64,
    /// Pairs of change and node that were never seen.
    pub lost: usize,
}

impl Latency {
    /// Latencies of changes, ordered by version, and each change's time to 99 % of the nodes in milliseconds.
    pub(super) fn of(changes: &[Change], updates: &[Vec<Applied>]) -> (Self, Vec<f64>) {
        let mut lost = 0;
        let mut positions = vec![0; updates.len()];
        let (mut half, mut most, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for change in changes {
            let mut times = Vec::with_capacity(updates.len());
            for (applied, position) in updates.iter().zip(&mut positions) {
                while applied.get(*position).is_some_and(|one| one.slices < change.version) {
                    *position += 1;
                }
                match applied.get(*position) {
                    Some(one) => times.push(one.at.saturating_duration_since(change.at)),
                    None => lost += 1,
                }
            }
            times.sort_unstable();
            half.push(share(&times, 0.5));
            most.push(share(&times, 0.99));
            all.push(share(&times, 1.0));
        }
        let p99 = |values: &[f64]| percentile(values, 0.99);
        let latency = Self {
            half_p50: median(&half),
            most_p50: median(&most),
            most_p99: p99(&most),
            all_p50: median(&all),
            all_p99: p99(&all),
            lost,
        };
        (latency, most)
    }
}

fn share(sorted: &[Duration], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(index.saturating_sub(1)).map_or(f64::NAN, |time| time.as_secs_f64() * 1_000.0)
}

/// The median; NaN of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn latency_ends_with_the_first_update_of_a_change() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let changes = [
            Change { at: at(0), write: Duration::ZERO, version: 5 },
            Change { at: at(10), write: Duration::ZERO, version: 7 },
        ];
        let fast = vec![Applied { at: at(4), slices: 5 }, Applied { at: at(12), slices: 7 }];
        // Both changes come with one update.
        let slow = vec![Applied { at: at(2), slices: 4 }, Applied { at: at(30), slices: 8 }];
        let (latency, each) = Latency::of(&changes, &[fast, slow]);
        assert_eq!((latency.half_p50, latency.all_p50, latency.all_p99), (2.0, 20.0, 30.0));
        assert_eq!((each, latency.lost), (vec![30.0, 20.0], 0));
    }

    #[test]
    fn latency_counts_missing_changes() {
        let start = Instant::now();
        let changes = [Change { at: start, write: Duration::ZERO, version: 5 }];
        let (latency, _) = Latency::of(&changes, &[vec![], vec![Applied { at: start, slices: 5 }]]);
        assert_eq!(latency.lost, 1);
    }
}
