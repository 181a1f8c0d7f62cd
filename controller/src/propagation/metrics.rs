//! What is measured of changes on their way.

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, Registry};
use switchtower_core::propagation::{Milestone, Outcome};

/// Metrics of changes.
#[derive(Debug, Clone)]
pub struct PropagationMetrics {
    ack: Histogram,
    propagation: HistogramVec,
    excluded: IntCounter,
    given_up: IntCounter,
    unread: IntCounter,
}

/// The value of the label `nodes`.
fn label(milestone: Milestone) -> &'static str {
    match milestone {
        Milestone::Half => "50%",
        Milestone::Most => "99%",
        Milestone::All => "all",
    }
}

impl PropagationMetrics {
    /// Creates and registers them.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        // From half a millisecond to 262 seconds.
        let buckets = prometheus::exponential_buckets(0.000_5, 2.0, 20)?;
        let ack = HistogramOpts::new(
            "switchtower_change_ack_seconds",
            "From the receipt of a change to a node's acknowledgement, per change and node.",
        );
        let propagation = HistogramOpts::new(
            "switchtower_propagation_seconds",
            "From the receipt of a change until a share of the connected nodes that it concerns held it.",
        );
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let metrics = Self {
            ack: Histogram::with_opts(ack.buckets(buckets.clone()))?,
            propagation: HistogramVec::new(propagation.buckets(buckets), &["nodes"])?,
            excluded: counter(
                "switchtower_propagation_excluded_total",
                "Nodes whose stream ended before they acknowledged a revision, per revision.",
            )?,
            given_up: counter(
                "switchtower_propagation_given_up_total",
                "Revisions that were not followed to the end because too many were open.",
            )?,
            unread: counter(
                "switchtower_traces_dropped_total",
                "Revisions without traces because the exporter had too many to do.",
            )?,
        };
        // Every series exists from the start: its first increase would be lost otherwise.
        for milestone in Milestone::ASCENDING {
            metrics.propagation.with_label_values(&[label(milestone)]);
        }
        registry.register(Box::new(metrics.ack.clone()))?;
        registry.register(Box::new(metrics.propagation.clone()))?;
        Ok(metrics)
    }

    pub(super) fn note(&self, outcome: &Outcome) {
        for (nanoseconds, _) in &outcome.acknowledged {
            self.ack.observe(seconds(*nanoseconds));
        }
        for (milestone, nanoseconds, _) in &outcome.milestones {
            self.propagation.with_label_values(&[label(*milestone)]).observe(seconds(*nanoseconds));
        }
        self.excluded.inc_by(outcome.excluded);
        self.given_up.inc_by(outcome.given_up);
    }

    pub(super) fn unread(&self) {
        self.unread.inc();
    }
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}
