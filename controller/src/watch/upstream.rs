//! Time since the last response of the API server, and counters of the watches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntCounterVec, Registry, register_int_counter_vec_with_registry};
use tokio::sync::watch as channel;

use super::WatchedResource;

const NEVER: u64 = u64::MAX;

/// Receiver of [`Upstream::restores`].
pub type Restores = channel::Receiver<u64>;

/// Time of the last response of the API server to each watch: an event, a bookmark, or an accepted request.
#[derive(Debug)]
pub struct Upstream {
    base: Instant,
    /// Milliseconds after `base`, in the order of [`WatchedResource::ALL`].
    heard: [AtomicU64; WatchedResource::ALL.len()],
    /// Number of times that a watch found the API server behind a version that it sent before.
    restores: channel::Sender<u64>,
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            heard: std::array::from_fn(|_| AtomicU64::new(NEVER)),
            restores: channel::Sender::new(0),
        }
    }
}

impl Upstream {
    /// Records a response to a watch.
    pub fn heard(&self, resource: WatchedResource) {
        let elapsed = u64::try_from(self.base.elapsed().as_millis()).unwrap_or(NEVER - 1);
        self.heard[resource.index()].store(elapsed, Ordering::Relaxed);
    }

    /// Records that the API server went back in time, as after a restore of etcd. A watch without its own check gets
    /// no event until the API server has caught up, and misses the events up to there.
    pub fn went_back(&self) {
        self.restores.send_modify(|count| *count += 1);
    }

    /// Returns a receiver that changes whenever the API server went back in time, after which all objects must be
    /// listed again.
    #[must_use]
    pub fn restores(&self) -> Restores {
        self.restores.subscribe()
    }

    /// Returns the time since the last response to the watch that has been silent for the longest time; `None` before
    /// each had one.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let oldest =
            self.heard.iter().try_fold(NEVER, |oldest, heard| match heard.load(Ordering::Relaxed) {
                NEVER => None,
                milliseconds => Some(oldest.min(milliseconds)),
            })?;
        Some(self.base.elapsed().saturating_sub(Duration::from_millis(oldest)))
    }
}

/// Computes the age at each scrape: a gauge set at intervals would hide a process that hangs.
pub struct UpstreamCollector {
    upstream: Arc<Upstream>,
    gauge: Gauge,
}

impl UpstreamCollector {
    /// Creates the collector; the caller registers it.
    ///
    /// # Errors
    /// The gauge is invalid.
    pub fn new(upstream: Arc<Upstream>) -> Result<Self, prometheus::Error> {
        let gauge = Gauge::new(
            "switchtower_upstream_age_seconds",
            "Time since the last response of the API server, of the watch that has been silent for the longest time; absent before every watch had one.",
        )?;
        Ok(Self { upstream, gauge })
    }
}

impl Collector for UpstreamCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(age) = self.upstream.age() else { return Vec::new() };
        self.gauge.set(age.as_secs_f64());
        self.gauge.collect()
    }
}

/// Counters of the watches by resource.
#[derive(Debug, Clone)]
pub struct WatchMetrics {
    errors: IntCounterVec,
    lists: IntCounterVec,
    undecodable: IntCounterVec,
}

impl WatchMetrics {
    /// Creates and registers the counters.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            errors: register_int_counter_vec_with_registry!(
                "switchtower_watch_errors_total",
                "Lists and watches that failed and were retried.",
                &["resource"],
                registry
            )?,
            lists: register_int_counter_vec_with_registry!(
                "switchtower_watch_lists_total",
                "Complete lists that were started.",
                &["resource"],
                registry
            )?,
            undecodable: register_int_counter_vec_with_registry!(
                "switchtower_watch_undecodable_total",
                "Objects that could not be decoded.",
                &["resource"],
                registry
            )?,
        })
    }

    pub(super) fn error(&self, resource: WatchedResource) {
        self.errors.with_label_values(&[resource.name()]).inc();
    }

    pub(super) fn list(&self, resource: WatchedResource) {
        self.lists.with_label_values(&[resource.name()]).inc();
    }

    pub(super) fn undecodable(&self, resource: WatchedResource) {
        self.undecodable.with_label_values(&[resource.name()]).inc();
    }
}
