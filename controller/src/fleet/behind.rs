//! Duration for which nodes have been behind, computed at each scrape: a gauge set at intervals would hide a process
//! that hangs.

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, Opts};

use super::Fleet;

/// Maximum number of nodes in the metric: those that have been behind for the longest time.
const NODES: usize = 100;

/// Collector of `switchtower_node_behind_seconds`.
pub struct BehindCollector {
    fleet: Arc<Fleet>,
    gauge: GaugeVec,
}

impl BehindCollector {
    /// Creates the collector; the caller registers it.
    ///
    /// # Errors
    /// The gauge is invalid.
    pub fn new(fleet: Arc<Fleet>) -> Result<Self, prometheus::Error> {
        let options = Opts::new(
            "switchtower_node_behind_seconds",
            "Time for which a node's kernel has lagged behind its desired generation; only nodes that are behind, at most 100.",
        );
        Ok(Self { fleet, gauge: GaugeVec::new(options, &["node"])? })
    }
}

impl Collector for BehindCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let now = Timestamp::now();
        let mut behind = self.fleet.behind();
        behind.sort_unstable();
        self.gauge.reset();
        for (since, name) in behind.into_iter().take(NODES) {
            let seconds = now.duration_since(since).as_secs_f64().max(0.0);
            self.gauge.with_label_values(&[&*name]).set(seconds);
        }
        self.gauge.collect()
    }
}
