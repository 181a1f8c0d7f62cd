//! Metrics of the propagation of changes.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, Registry, exponential_buckets,
    register_histogram_vec_with_registry, register_histogram_with_registry,
    register_int_counter_with_registry,
};
use switchtower_core::propagation::{Milestone, StepResult, TraceContext};

use crate::metrics::{Exemplar, Exemplars};

const ACK: &str = "switchtower_change_ack_seconds";
const PROPAGATION: &str = "switchtower_propagation_seconds";

/// Metrics of changes.
#[derive(Debug, Clone)]
pub struct PropagationMetrics {
    bounds: Vec<f64>,
    exemplars: Exemplars,
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
        let buckets = exponential_buckets(0.000_5, 2.0, 20)?;
        let ack = HistogramOpts::new(
            ACK,
            "From the receipt of a change to a node's acknowledgement, per change and node.",
        );
        let propagation = HistogramOpts::new(
            PROPAGATION,
            "From the receipt of a change until a share of the connected nodes that it concerns held it.",
        );
        let metrics = Self {
            ack: register_histogram_with_registry!(ack.buckets(buckets.clone()), registry)?,
            propagation: register_histogram_vec_with_registry!(
                propagation.buckets(buckets.clone()),
                &["nodes"],
                registry
            )?,
            bounds: buckets,
            exemplars: Exemplars::default(),
            excluded: register_int_counter_with_registry!(
                "switchtower_propagation_excluded_total",
                "Nodes whose stream ended before they acknowledged a revision, per revision.",
                registry
            )?,
            given_up: register_int_counter_with_registry!(
                "switchtower_propagation_given_up_total",
                "Revisions that were not followed to the end because too many were open.",
                registry
            )?,
            unread: register_int_counter_with_registry!(
                "switchtower_traces_dropped_total",
                "Revisions without traces because the exporter had too many to do.",
                registry
            )?,
        };
        // Every series exists from the start, because rate() misses the first increase of a new one.
        for milestone in Milestone::ASCENDING {
            metrics.propagation.with_label_values(&[label(milestone)]);
        }
        Ok(metrics)
    }

    /// Adds the traces of sampled changes to `exemplars`.
    #[must_use]
    pub fn with_exemplars(self, exemplars: Exemplars) -> Self {
        Self { exemplars, ..self }
    }

    pub(super) fn note(&self, outcome: &StepResult) {
        for (nanoseconds, trace) in &outcome.acknowledged {
            self.ack.observe(seconds(*nanoseconds));
            self.remember(ACK, "", *nanoseconds, trace);
        }
        for (milestone, nanoseconds, trace) in &outcome.milestones {
            let label = label(*milestone);
            self.propagation.with_label_values(&[label]).observe(seconds(*nanoseconds));
            self.remember(PROPAGATION, label, *nanoseconds, trace);
        }
        self.excluded.inc_by(outcome.excluded);
        self.given_up.inc_by(outcome.given_up);
    }

    /// Only a sampled trace is certain to reach the collector.
    fn remember(&self, family: &'static str, label: &'static str, nanoseconds: u64, trace: &TraceContext) {
        if trace.sampled {
            let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            let exemplar = Exemplar { trace: trace.trace, value: seconds(nanoseconds), at };
            self.exemplars.note(family, label, &self.bounds, exemplar);
        }
    }

    pub(super) fn unread(&self) {
        self.unread.inc();
    }
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}
