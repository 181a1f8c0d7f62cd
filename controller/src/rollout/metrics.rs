//! What is measured of rollouts.
//!
//! Series about single rollouts exist for those that are under way and for the latest of each profile, so that their
//! number is bounded by that of profiles. They tell what the API server has, as of the last round.

use std::sync::{Arc, Mutex};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use switchtower_core::rollout::{FailureReason, Progress, State};
use switchtower_crds::ProxyRollout;

use super::convert;

use crate::sync::lock;

/// Why nodes were returned to what they had.
const CAUSES: [&str; 3] = ["failure", "abort", "superseded"];
/// What became of a rollout's nodes.
const RESULTS: [&str; 5] = ["eligible", "touched", "updated", "failed", "excluded"];

/// Metrics of rollouts. Clones share them.
#[derive(Clone)]
pub struct RolloutMetrics {
    standings: Arc<Standings>,
    failures: IntCounterVec,
    rollbacks: IntCounterVec,
}

impl RolloutMetrics {
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
        let failures = counters(
            "switchtower_rollout_failures_total",
            "Nodes that failed a gate of a rollout, by reason; at most 16 of one rollout.",
            "reason",
        )?;
        let rollbacks = counters(
            "switchtower_rollout_rollbacks_total",
            "Rollouts whose nodes were returned to what they had, by cause.",
            "cause",
        )?;
        // Every series exists from the start: its first increase would be lost otherwise.
        for reason in FailureReason::ALL {
            failures.with_label_values(&[reason.word()]);
        }
        for cause in CAUSES {
            rollbacks.with_label_values(&[cause]);
        }
        let standings = Arc::new(Standings::new()?);
        registry.register(Box::new(Registered(standings.clone())))?;
        Ok(Self { standings, failures, rollbacks })
    }

    /// A decision was stored.
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
            // Stored by another version it may have another reason.
            if let Some(reason) = FailureReason::from_word(&failure.reason) {
                self.failures.with_label_values(&[reason.word()]).inc();
            }
        }
    }

    /// The rollouts as they stand after a round.
    pub(super) fn show<'a>(&self, rollouts: impl Iterator<Item = &'a ProxyRollout>) {
        let mut shown: Vec<Standing> = Vec::new();
        let mut latest = std::collections::BTreeMap::new();
        for object in rollouts {
            let Some(past) = convert::past(object) else { continue };
            let standing = Standing::of(object);
            if !past.state.is_final() {
                shown.push(standing);
                continue;
            }
            let known = latest.entry(past.target.profile).or_insert((past.target.number, None));
            if past.target.number >= known.0 {
                *known = (past.target.number, Some(standing));
            }
        }
        shown.extend(latest.into_values().filter_map(|(_, standing)| standing));
        *lock(&self.standings.known) = shown;
    }
}

/// One rollout in numbers.
struct Standing {
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

impl Standing {
    fn of(object: &ProxyRollout) -> Self {
        let status = object.status.clone().unwrap_or_default();
        let progress = &status.progress;
        let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled");
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

/// All rollouts, told at each scrape: gauges that are filled from time to time would be incomplete in between.
struct Standings {
    known: Mutex<Vec<Standing>>,
    info: IntGaugeVec,
    step: IntGaugeVec,
    steps: IntGaugeVec,
    nodes: IntGaugeVec,
    advanced: IntGaugeVec,
}

impl Standings {
    fn new() -> Result<Self, prometheus::Error> {
        let gauges =
            |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        Ok(Self {
            known: Mutex::default(),
            info: gauges(
                "switchtower_rollout_info",
                "1 for the state in which a rollout is, and the reason of its conditions.",
                &["rollout", "state", "reason"],
            )?,
            step: gauges("switchtower_rollout_step", "A rollout's current step, from 1.", &["rollout"])?,
            steps: gauges("switchtower_rollout_steps", "How many steps a rollout has.", &["rollout"])?,
            nodes: gauges(
                "switchtower_rollout_nodes",
                "Nodes of a rollout: eligible, touched, updated, failed, excluded.",
                &["rollout", "result"],
            )?,
            advanced: gauges(
                "switchtower_rollout_advanced_timestamp_seconds",
                "When a node or a step of a rollout advanced last, in seconds since 1970.",
                &["rollout"],
            )?,
        })
    }

    fn gauges(&self) -> [&IntGaugeVec; 5] {
        [&self.info, &self.step, &self.steps, &self.nodes, &self.advanced]
    }

    fn fill(&self) {
        self.gauges().into_iter().for_each(IntGaugeVec::reset);
        for standing in lock(&self.known).iter() {
            let Standing { rollout, state, reason, step, steps, nodes, advanced } = standing;
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

struct Registered(Arc<Standings>);

impl Collector for Registered {
    fn desc(&self) -> Vec<&Desc> {
        self.0.gauges().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.fill();
        self.0.gauges().into_iter().flat_map(Collector::collect).collect()
    }
}
