//! Metrics of streams.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

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
        let counters = |name: &str, help: &str, label: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let streams = IntGauge::new("switchtower_streams", "Open streams of agents.")?;
        let sent_bytes = IntCounter::new("switchtower_delta_bytes_total", "Payload bytes sent to agents.")?;
        let ack_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "switchtower_node_ack_seconds",
                "From sending an update to its acknowledgement.",
            )
            .buckets(prometheus::exponential_buckets(0.000_25, 2.0, 18)?),
        )?;
        registry.register(Box::new(streams.clone()))?;
        registry.register(Box::new(sent_bytes.clone()))?;
        registry.register(Box::new(ack_seconds.clone()))?;
        Ok(Self {
            refusals: counters(
                "switchtower_refusals_total",
                "Connections and streams that were refused, by reason.",
                "reason",
            )?,
            updates: counters("switchtower_updates_total", "Updates sent, by kind.", "kind")?,
            nacks: counters("switchtower_nacks_total", "Updates that agents refused, by reason.", "reason")?,
            ended: counters("switchtower_streams_ended_total", "Streams that ended, by reason.", "reason")?,
            streams,
            sent_bytes,
            ack_seconds,
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
