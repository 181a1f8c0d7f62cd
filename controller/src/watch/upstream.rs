//! How long ago the API server was last heard, and counters of the watches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntCounterVec, Opts, Registry};
use tokio::sync::watch as channel;

use super::WatchedResource;

const NEVER: u64 = u64::MAX;

/// Tells of restores; see [`Upstream::restores`].
pub type Restores = channel::Receiver<u64>;

/// When each watch last heard from the API server: an event, a bookmark, or an accepted request.
#[derive(Debug)]
pub struct Upstream {
    base: Instant,
    /// Milliseconds after `base`, in the order of [`WatchedResource::ALL`].
    heard: [AtomicU64; WatchedResource::ALL.len()],
    /// How often a watch found the API server behind what it had said before.
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
    /// Notes that a watch was heard now.
    pub fn heard(&self, resource: WatchedResource) {
        let elapsed = u64::try_from(self.base.elapsed().as_millis()).unwrap_or(NEVER - 1);
        self.heard[resource.index()].store(elapsed, Ordering::Relaxed);
    }

    /// Notes that the API server went back in time, as after a restore of its etcd. A watch that does not look for that
    /// itself hears nothing until the API server has caught up, and never what happened meanwhile.
    pub fn went_back(&self) {
        self.restores.send_modify(|count| *count += 1);
    }

    /// Changes whenever the API server went back in time: what is known then has to be listed anew.
    #[must_use]
    pub fn restores(&self) -> Restores {
        self.restores.subscribe()
    }

    /// The age of the watch that was not heard for longest; `None` before each was heard once.
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

/// Tells the age at each scrape: a gauge that is set from time to time would hide a process that hangs.
pub struct UpstreamCollector {
    upstream: Arc<Upstream>,
    gauge: Gauge,
}

impl UpstreamCollector {
    /// To be registered.
    ///
    /// # Errors
    /// The gauge cannot be made.
    pub fn new(upstream: Arc<Upstream>) -> Result<Self, prometheus::Error> {
        let gauge = Gauge::new(
            "switchtower_upstream_age_seconds",
            "Time since the API server was heard on the watch that is silent for longest; absent before all were.",
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
        let counter = |name: &str, help: &str| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["resource"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        Ok(Self {
            errors: counter(
                "switchtower_watch_errors_total",
                "Lists and watches that failed and were tried again.",
            )?,
            lists: counter("switchtower_watch_lists_total", "Complete lists that were started.")?,
            undecodable: counter(
                "switchtower_watch_undecodable_total",
                "Objects that could not be decoded.",
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
