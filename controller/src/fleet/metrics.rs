//! Metrics of streams.

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Registry, exponential_buckets,
    register_histogram_with_registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};

/// Counters and histograms of the agents' streams.
#[derive(Debug, Clone)]
pub struct StreamMetrics {
    refusals: IntCounterVec,
    /// Open streams.
    pub(crate) streams: IntGauge,
    /// Payload bytes of parts.
    pub(crate) sent_bytes: IntCounter,
    updates: IntCounterVec,
    nacks: IntCounterVec,
    /// Seconds from the end of sending an update to its acknowledgement.
    pub(crate) ack_seconds: Histogram,
    ended: IntCounterVec,
}

impl StreamMetrics {
    /// Creates and registers them.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let seconds = HistogramOpts::new(
            "switchtower_node_ack_seconds",
            "From sending an update to its acknowledgement.",
        )
        .buckets(exponential_buckets(0.000_25, 2.0, 18)?);
        Ok(Self {
            refusals: register_int_counter_vec_with_registry!(
                "switchtower_refusals_total",
                "Connections and streams that were refused, by reason.",
                &["reason"],
                registry
            )?,
            streams: register_int_gauge_with_registry!(
                "switchtower_streams",
                "Open streams of agents.",
                registry
            )?,
            sent_bytes: register_int_counter_with_registry!(
                "switchtower_delta_bytes_total",
                "Payload bytes sent to agents.",
                registry
            )?,
            updates: register_int_counter_vec_with_registry!(
                "switchtower_updates_total",
                "Updates sent, by kind.",
                &["kind"],
                registry
            )?,
            nacks: register_int_counter_vec_with_registry!(
                "switchtower_nacks_total",
                "Updates that agents refused, by reason.",
                &["reason"],
                registry
            )?,
            ack_seconds: register_histogram_with_registry!(seconds, registry)?,
            ended: register_int_counter_vec_with_registry!(
                "switchtower_streams_ended_total",
                "Streams that ended, by reason.",
                &["reason"],
                registry
            )?,
        })
    }

    pub(crate) fn refused(&self, reason: &str) {
        self.refusals.with_label_values(&[reason]).inc();
    }

    pub(crate) fn updated(&self, kind: &str) {
        self.updates.with_label_values(&[kind]).inc();
    }

    pub(crate) fn nacked(&self, reason: &str) {
        self.nacks.with_label_values(&[reason]).inc();
    }

    pub(crate) fn ended(&self, reason: &str) {
        self.ended.with_label_values(&[reason]).inc();
    }

    #[cfg(test)]
    pub(crate) fn refusals(&self, reason: &str) -> u64 {
        self.refusals.with_label_values(&[reason]).get()
    }
}
