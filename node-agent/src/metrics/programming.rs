//! Metrics of changes on their way to the kernel, with kube-proxy's names and buckets.

use std::time::Duration;

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry, exponential_buckets,
    linear_buckets,
};

use super::{FAMILIES, add};
use crate::state::WithoutLocal;

/// The metrics. One transaction covers both families, so both get the same values.
#[derive(Clone)]
pub(crate) struct Programming {
    latency: HistogramVec,
    full: HistogramVec,
    partial: HistogramVec,
    endpoints_pending: IntGaugeVec,
    endpoints_total: IntCounterVec,
    services_pending: IntGaugeVec,
    services_total: IntCounterVec,
    no_local: IntGaugeVec,
}

impl Programming {
    #[expect(clippy::too_many_lines, reason = "one declaration per metric")]
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            let histogram =
                HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), &["ip_family"])?;
            add(registry, histogram)
        };
        let gauge =
            |name: &str, help: &str| add(registry, IntGaugeVec::new(Opts::new(name, help), &["ip_family"])?);
        let counter = |name: &str, help: &str| {
            add(registry, IntCounterVec::new(Opts::new(name, help), &["ip_family"])?)
        };
        // Dashboards and alerts of kube-proxy's nftables mode query it. The agent deletes elements and rules in the
        // same transaction, so there is no separate cleanup that could fail.
        let cleanup = IntCounter::new(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
            "Cleanups after a sync that failed; always 0, because a sync cleans up itself.",
        )?;
        add(registry, cleanup)?;
        let programming = Self {
            latency: histogram(
                "kubeproxy_network_programming_duration_seconds",
                "Latency from the trigger time of an EndpointSlice to the kernel.",
                network_programming_buckets()?,
            )?,
            full: histogram(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Duration of a full sync.",
                exponential_buckets(0.001, 2.0, 15)?,
            )?,
            partial: histogram(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Duration of a sync of changes only.",
                exponential_buckets(0.001, 2.0, 15)?,
            )?,
            endpoints_pending: gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "Endpoint changes that are not in the kernel yet.",
            )?,
            endpoints_total: counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "Endpoint changes received.",
            )?,
            services_pending: gauge(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "Service changes that are not in the kernel yet.",
            )?,
            services_total: counter(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "Service changes received.",
            )?,
            no_local: add(
                registry,
                IntGaugeVec::new(
                    Opts::new(
                        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                        "Service ports with a Local traffic policy and no endpoint on this node.",
                    ),
                    &["ip_family", "traffic_policy"],
                )?,
            )?,
        };
        // Exported from the start: dashboards show zeros instead of no data.
        for family in FAMILIES {
            for histogram in [&programming.latency, &programming.full, &programming.partial] {
                let _ = histogram.with_label_values(&[family]);
            }
        }
        programming.without_local(WithoutLocal::default());
        programming.pending(0, 0);
        programming.arrived(0, 0);
        Ok(programming)
    }

    /// Counts received changes.
    pub(crate) fn arrived(&self, endpoints: u64, services: u64) {
        for family in FAMILIES {
            self.endpoints_total.with_label_values(&[family]).inc_by(endpoints);
            self.services_total.with_label_values(&[family]).inc_by(services);
        }
    }

    /// Sets the number of changes that are not in the kernel yet.
    pub(crate) fn pending(&self, endpoints: u64, services: u64) {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        for family in FAMILIES {
            self.endpoints_pending.with_label_values(&[family]).set(number(endpoints));
            self.services_pending.with_label_values(&[family]).set(number(services));
        }
    }

    /// Records the latency of a change from its trigger to the kernel.
    pub(crate) fn programmed(&self, after: Duration) {
        for family in FAMILIES {
            self.latency.with_label_values(&[family]).observe(after.as_secs_f64());
        }
    }

    /// Sets the number of service ports without a local endpoint.
    pub(crate) fn without_local(&self, ports: WithoutLocal) {
        for (policy, counts) in [("internal", ports.internal), ("external", ports.external)] {
            for (family, count) in FAMILIES.into_iter().zip([counts.0, counts.1]) {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.no_local.with_label_values(&[family, policy]).set(count);
            }
        }
    }

    /// Records a successful sync.
    pub(super) fn synced(&self, full: bool, took: Duration) {
        let duration = if full { &self.full } else { &self.partial };
        for family in FAMILIES {
            duration.with_label_values(&[family]).observe(took.as_secs_f64());
        }
    }
}

/// Buckets of kube-proxy: quarters of a second, then seconds to a minute, then coarser to five minutes.
fn network_programming_buckets() -> Result<Vec<f64>, prometheus::Error> {
    let parts = [
        linear_buckets(0.25, 0.25, 2)?,
        linear_buckets(1.0, 1.0, 59)?,
        linear_buckets(60.0, 5.0, 12)?,
        linear_buckets(120.0, 30.0, 7)?,
    ];
    Ok(parts.concat())
}
