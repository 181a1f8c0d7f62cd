//! The agent's metrics: kube-proxy's names where it has one, `switchtower_*` otherwise.
//!
//! Both families are programmed by one transaction, so series with kube-proxy's `ip_family` label get the
//! same value for both.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, exponential_buckets,
};

mod programming;

pub(crate) use programming::Programming;

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// All metrics of the agent.
#[derive(Clone)]
pub struct Metrics {
    pub(crate) programming: Programming,
    sync_duration: HistogramVec,
    last_timestamp: GaugeVec,
    last_queued: GaugeVec,
    sync_failures: IntCounter,
    pub(crate) conntrack_duration: Histogram,
    pub(crate) conntrack_deleted: IntCounter,
    pub(crate) healthz: IntCounterVec,
    pub(crate) livez: IntCounterVec,
    apply: HistogramVec,
    apply_errors: IntCounterVec,
    pub(crate) drift: IntCounterVec,
    pub(crate) drift_watched: IntGauge,
    generation: IntGauge,
    pub(crate) connected: IntGauge,
    snapshot_written: Gauge,
    pub(crate) refused: IntGauge,
    pub(crate) held: IntGauge,
    pub(crate) services: IntGauge,
    pub(crate) endpoints: IntGauge,
    pub(crate) sysctl_failures: IntGauge,
    pub(crate) health_check_bind_failures: IntCounter,
}

/// Registers the gauge that identifies the node of this agent's series.
///
/// # Errors
/// The name is already registered.
pub(crate) fn register_info(registry: &Registry, node: &str) -> Result<(), prometheus::Error> {
    let info = GaugeVec::new(
        Opts::new("switchtower_agent_info", "Always 1: the node and the version of the agent."),
        &["node", "version"],
    )?;
    info.with_label_values(&[node, env!("CARGO_PKG_VERSION")]).set(1.0);
    registry.register(Box::new(info))
}

impl Metrics {
    /// Registers everything with `registry`.
    ///
    /// # Errors
    /// A name is registered already.
    #[expect(clippy::too_many_lines, reason = "one declaration per metric")]
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let family = &["ip_family"];
        let sync = HistogramOpts::new(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Duration of one sync of the rules.",
        )
        .buckets(exponential_buckets(0.001, 2.0, 15)?);
        let apply =
            HistogramOpts::new("switchtower_apply_seconds", "Time to plan and commit one generation.")
                .buckets(exponential_buckets(0.000_05, 2.0, 18)?);
        let conntrack = HistogramOpts::new(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Duration of one pass of the conntrack reconciler.",
        )
        .buckets(exponential_buckets(0.001, 2.0, 15)?);
        Ok(Metrics {
            programming: Programming::register(registry)?,
            sync_duration: add(registry, HistogramVec::new(sync, family)?)?,
            last_timestamp: gauges(
                registry,
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "Time of the last successful sync.",
            )?,
            last_queued: gauges(
                registry,
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "Time of the last queued sync.",
            )?,
            sync_failures: add(
                registry,
                IntCounter::new(
                    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                    "Syncs that the kernel refused.",
                )?,
            )?,
            conntrack_duration: add(registry, Histogram::with_opts(conntrack)?)?,
            conntrack_deleted: add(
                registry,
                IntCounter::new(
                    "kubeproxy_conntrack_reconciler_deleted_entries_total",
                    "Conntrack entries that the reconciler deleted.",
                )?,
            )?,
            healthz: counters(registry, "kubeproxy_proxy_healthz_total", "Responses of /healthz.", "code")?,
            livez: counters(registry, "kubeproxy_proxy_livez_total", "Responses of /livez.", "code")?,
            apply: add(registry, HistogramVec::new(apply, &["mode"])?)?,
            apply_errors: counters(
                registry,
                "switchtower_apply_errors_total",
                "Failed commits, by error number.",
                "errno",
            )?,
            drift: counters(
                registry,
                "switchtower_drift_total",
                "Foreign changes of our tables that were repaired.",
                "cause",
            )?,
            drift_watched: add(
                registry,
                IntGauge::new(
                    "switchtower_drift_watched",
                    "1 while the agent monitors its tables for foreign changes.",
                )?,
            )?,
            generation: add(
                registry,
                IntGauge::new("switchtower_kernel_generation", "Generation in the kernel.")?,
            )?,
            connected: add(
                registry,
                IntGauge::new("switchtower_controller_connected", "1 while a controller serves this node.")?,
            )?,
            snapshot_written: add(
                registry,
                Gauge::new(
                    "switchtower_snapshot_timestamp_seconds",
                    "Time of the last write of the snapshot file.",
                )?,
            )?,
            refused: add(
                registry,
                IntGauge::new("switchtower_refused_items", "Items of the view that the kernel refused.")?,
            )?,
            held: add(
                registry,
                IntGauge::new(
                    "switchtower_held_removals",
                    "Pools and frontends that the delete budget keeps in the kernel.",
                )?,
            )?,
            services: add(registry, IntGauge::new("switchtower_services", "Services in the view.")?)?,
            endpoints: add(registry, IntGauge::new("switchtower_endpoints", "Endpoints in the view.")?)?,
            sysctl_failures: add(
                registry,
                IntGauge::new("switchtower_sysctl_failures", "Kernel settings that could not be applied.")?,
            )?,
            health_check_bind_failures: add(
                registry,
                IntCounter::new(
                    "switchtower_health_check_bind_failures_total",
                    "Failed attempts to listen on a healthCheckNodePort.",
                )?,
            )?,
        })
    }

    /// A change waits to be committed.
    pub(crate) fn queued(&self) {
        FAMILIES.iter().for_each(|family| self.last_queued.with_label_values(&[family]).set(unix_now()));
    }

    /// The kernel holds `generation` since now.
    pub(crate) fn applied(&self, mode: &str, generation: u64, took: Duration) {
        self.generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        self.apply.with_label_values(&[mode]).observe(took.as_secs_f64());
        self.programming.synced(mode == "full", took);
        for family in FAMILIES {
            self.sync_duration.with_label_values(&[family]).observe(took.as_secs_f64());
            self.last_timestamp.with_label_values(&[family]).set(unix_now());
        }
    }

    /// A commit failed.
    pub(crate) fn failed(&self, errno: i32) {
        self.sync_failures.inc();
        self.apply_errors.with_label_values(&[&errno.to_string()]).inc();
    }

    /// The snapshot file was written.
    pub(crate) fn snapshot(&self) {
        self.snapshot_written.set(unix_now());
    }
}

/// Registers a metric and returns it.
fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauges(registry: &Registry, name: &str, help: &str) -> Result<GaugeVec, prometheus::Error> {
    add(registry, GaugeVec::new(Opts::new(name, help), &["ip_family"])?)
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
) -> Result<IntCounterVec, prometheus::Error> {
    add(registry, IntCounterVec::new(Opts::new(name, help), &[label])?)
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64()).unwrap_or_default()
}
