//! Metrics of streams.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry,
    exponential_buckets, register_histogram_vec_with_registry, register_histogram_with_registry,
    register_int_counter_vec_with_registry, register_int_counter_with_registry,
    register_int_gauge_with_registry,
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
    drains: HistogramVec,
    /// Streams of agents that have seen later versions than any replica.
    pub(crate) source_regressed: IntCounter,
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
        // From 1 millisecond to 17 minutes.
        let drains = HistogramOpts::new(
            "switchtower_drain_gate_seconds",
            "From a query of the drain gate to its answer, by verdict.",
        )
        .buckets(exponential_buckets(0.001, 2.0, 21)?);
        Ok(Self {
            drains: register_histogram_vec_with_registry!(drains, &["verdict"], registry)?,
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
            source_regressed: register_int_counter_with_registry!(
                "switchtower_source_regressed_total",
                "Streams of agents that have seen later resourceVersions than any replica, as after a restore of etcd.",
                registry
            )?,
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

    /// Counts an answer of the drain gate.
    pub(crate) fn drained(&self, verdict: &str, took: std::time::Duration) {
        self.drains.with_label_values(&[verdict]).observe(took.as_secs_f64());
    }

    pub(crate) fn ended(&self, reason: &str) {
        self.ended.with_label_values(&[reason]).inc();
    }

    #[cfg(test)]
    pub(crate) fn refusals(&self, reason: &str) -> u64 {
        self.refusals.with_label_values(&[reason]).get()
    }
}
