//! Exemplars: for each bucket of a histogram the latest observation that has a trace to look at.
//!
//! Invariants: there is at most one per bucket, so that their number is bounded by the histograms'.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::sync::lock;

/// One observation and its trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exemplar {
    /// The trace.
    pub trace: u128,
    /// Observed value in the unit of the histogram.
    pub value: f64,
    /// Time of the observation in seconds since 1970.
    pub at: f64,
}

/// A histogram's family and the value of its label, which is empty if it has none.
type Series = (&'static str, &'static str);

/// The exemplars of a registry, shared by who observes and who prints.
#[derive(Debug, Clone, Default)]
pub struct Exemplars(Arc<Mutex<HashMap<Series, Vec<Option<Exemplar>>>>>);

impl Exemplars {
    /// An observation in a series whose buckets have these upper bounds, ascending and without infinity.
    pub fn note(&self, family: &'static str, label: &'static str, bounds: &[f64], exemplar: Exemplar) {
        let bucket = bounds.partition_point(|bound| *bound < exemplar.value);
        let mut all = self.lock();
        let buckets = all.entry((family, label)).or_insert_with(|| vec![None; bounds.len() + 1]);
        if let Some(place) = buckets.get_mut(bucket) {
            *place = Some(exemplar);
        }
    }

    /// The exemplar of a bucket, counted from the lowest; the one of infinity is the last.
    #[must_use]
    pub fn of(&self, family: &str, label: &str, bucket: usize) -> Option<Exemplar> {
        // The keys are few, and borrowed for longer than a question lasts.
        let all = self.lock();
        let found = all.iter().find(|(series, _)| **series == (family, label));
        found.and_then(|(_, buckets)| *buckets.get(bucket)?)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Series, Vec<Option<Exemplar>>>> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_keeps_its_latest_exemplar() {
        let exemplars = Exemplars::default();
        let seen =
            |trace, value| exemplars.note("seconds", "all", &[1.0, 2.0], Exemplar { trace, value, at: 7.0 });
        seen(1, 0.5);
        seen(2, 1.0);
        seen(3, 1.1);
        seen(4, 9.0);
        let of = |bucket| exemplars.of("seconds", "all", bucket).map(|exemplar| exemplar.trace);
        assert_eq!([of(0), of(1), of(2), of(3)], [Some(2), Some(3), Some(4), None]);
        assert_eq!(exemplars.of("seconds", "99%", 0), None);
    }
}
