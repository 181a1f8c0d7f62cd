//! Metrics of rollouts.
//!
//! Series of single rollouts exist for active ones and for the latest of each profile, so that the number of profiles
//! bounds them. They reflect the API server as of the last round.

use std::sync::{Arc, Mutex};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry, register_int_counter_vec_with_registry};
use switchtower_admin_api::ConditionType;
use switchtower_core::rollout::{FailureReason, Progress, State};
use switchtower_crds::ProxyRollout;

use super::convert;

use crate::sync::lock;

/// Causes of rollbacks.
const CAUSES: [&str; 3] = ["failure", "abort", "superseded"];
/// Values of the label `result` of nodes.
const RESULTS: [&str; 5] = ["eligible", "touched", "updated", "failed", "excluded"];

/// Metrics of rollouts. Clones share them.
#[derive(Clone)]
pub struct RolloutMetrics {
    samples: Arc<Samples>,
    failures: IntCounterVec,
    rollbacks: IntCounterVec,
}

impl RolloutMetrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let failures = register_int_counter_vec_with_registry!(
            "switchtower_rollout_failures_total",
            "Nodes that failed a gate of a rollout, by reason; at most 16 of one rollout.",
            &["reason"],
            registry
        )?;
        let rollbacks = register_int_counter_vec_with_registry!(
            "switchtower_rollout_rollbacks_total",
            "Rollouts that were rolled back, by cause.",
            &["cause"],
            registry
        )?;
        // Create all series at the start: rate() misses the first increase of a new series.
        for reason in FailureReason::ALL {
            failures.with_label_values(&[reason.as_str()]);
        }
        for cause in CAUSES {
            rollbacks.with_label_values(&[cause]);
        }
        let samples = Arc::new(Samples::new()?);
        registry.register(Box::new(Registered(samples.clone())))?;
        Ok(Self { samples, failures, rollbacks })
    }

    /// Counts a stored decision.
    pub(super) fn decided(&self, before: &Progress, after: &Progress, touched: usize) {
        if before.state == after.state {
            return;
        }
        let cause = match after.state {
            State::RollingBack if after.failed > 0 => "failure",
            State::RollingBack => "abort",
            State::Superseded if touched > 0 => "superseded",
            _ => return,
        };
        self.rollbacks.with_label_values(&[cause]).inc();
        for failure in &after.failures {
            // Another version may have stored an unknown reason.
            if let Some(reason) = FailureReason::from_name(&failure.reason) {
                self.failures.with_label_values(&[reason.as_str()]).inc();
            }
        }
    }

    /// Publishes the rollouts after a round.
    pub(super) fn publish<'a>(&self, rollouts: impl Iterator<Item = &'a ProxyRollout>) {
        let mut shown: Vec<Sample> = Vec::new();
        let mut latest = std::collections::BTreeMap::new();
        for object in rollouts {
            let Some(past) = convert::past(object) else { continue };
            let sample = Sample::of(object);
            if !past.state.is_final() {
                shown.push(sample);
                continue;
            }
            let known = latest.entry(past.target.profile).or_insert((past.target.number, None));
            if past.target.number >= known.0 {
                *known = (past.target.number, Some(sample));
            }
        }
        shown.extend(latest.into_values().filter_map(|(_, sample)| sample));
        *lock(&self.samples.known) = shown;
    }
}

/// The values of one rollout.
struct Sample {
    rollout: String,
    state: String,
    reason: String,
    step: i64,
    steps: i64,
    /// In the order of [`RESULTS`].
    nodes: [i64; 5],
    /// Seconds since 1970.
    advanced: Option<i64>,
}

impl Sample {
    fn of(object: &ProxyRollout) -> Self {
        let status = object.status.clone().unwrap_or_default();
        let progress = &status.progress;
        let stalled =
            status.conditions.iter().find(|condition| condition.type_ == ConditionType::Stalled.as_str());
        Self {
            rollout: object.metadata.name.clone().unwrap_or_default(),
            reason: stalled.map(|condition| condition.reason.clone()).unwrap_or_default(),
            step: progress.current_step.into(),
            steps: convert::count(object.spec.strategy.steps.len()),
            nodes: [
                progress.eligible_nodes,
                progress.touched_nodes,
                progress.updated_nodes,
                status.failed,
                status.excluded.count,
            ],
            advanced: progress.advanced_at.as_ref().map(|at| at.0.as_second()),
            state: status.state,
        }
    }
}

/// Gauges of all rollouts, filled at each scrape so that a scrape never sees a partial set.
struct Samples {
    known: Mutex<Vec<Sample>>,
    info: IntGaugeVec,
    step: IntGaugeVec,
    steps: IntGaugeVec,
    nodes: IntGaugeVec,
    advanced: IntGaugeVec,
}

impl Samples {
    fn new() -> Result<Self, prometheus::Error> {
        let gauges =
            |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        Ok(Self {
            known: Mutex::default(),
            info: gauges(
                "switchtower_rollout_info",
                "1 for the present state of a rollout and the reason of its conditions.",
                &["rollout", "state", "reason"],
            )?,
            step: gauges(
                "switchtower_rollout_step",
                "Current step of a rollout, starting at 1.",
                &["rollout"],
            )?,
            steps: gauges("switchtower_rollout_steps", "Number of steps of a rollout.", &["rollout"])?,
            nodes: gauges(
                "switchtower_rollout_nodes",
                "Nodes of a rollout: eligible, touched, updated, failed, excluded.",
                &["rollout", "result"],
            )?,
            advanced: gauges(
                "switchtower_rollout_advanced_timestamp_seconds",
                "Time of the last progress of a node or step of a rollout, in seconds since 1970.",
                &["rollout"],
            )?,
        })
    }

    fn gauges(&self) -> [&IntGaugeVec; 5] {
        [&self.info, &self.step, &self.steps, &self.nodes, &self.advanced]
    }

    fn fill(&self) {
        self.gauges().into_iter().for_each(IntGaugeVec::reset);
        for sample in lock(&self.known).iter() {
            let Sample { rollout, state, reason, step, steps, nodes, advanced } = sample;
            self.info.with_label_values(&[rollout, state, reason]).set(1);
            self.step.with_label_values(&[rollout]).set(*step);
            self.steps.with_label_values(&[rollout]).set(*steps);
            for (result, count) in RESULTS.into_iter().zip(nodes) {
                self.nodes.with_label_values(&[rollout.as_str(), result]).set(*count);
            }
            if let Some(advanced) = advanced {
                self.advanced.with_label_values(&[rollout]).set(*advanced);
            }
        }
    }
}

struct Registered(Arc<Samples>);

impl Collector for Registered {
    fn desc(&self) -> Vec<&Desc> {
        self.0.gauges().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.fill();
        self.0.gauges().into_iter().flat_map(Collector::collect).collect()
    }
}
