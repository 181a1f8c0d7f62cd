//! Fixtures of rollout tests: steps, strategies, and agents that follow assignments.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::rollout::*;

/// So many of all nodes, at once.
pub(in crate::rollout) fn step(nodes: Quantity) -> Step {
    Step {
        name: String::new(),
        selector: None,
        nodes,
        spread_by: Vec::new(),
        soak: Duration::ZERO,
        manual: false,
    }
}

/// Nodes with a label of any value.
pub(in crate::rollout) fn labelled(key: &str) -> Selector {
    Selector { requirements: vec![Requirement::Exists(key.into())] }
}

/// The defaults of the API, with these steps and all nodes at once.
pub(in crate::rollout) fn strategy(steps: Vec<Step>) -> Strategy {
    Strategy {
        steps,
        max_unavailable: Quantity::Percent(100),
        apply_deadline: Duration::from_secs(60),
        progress_deadline: Duration::from_secs(600),
        maximum_reconnects: 3,
        freeze_percent: 20,
    }
}

/// Canaries, a share, all; spread over zones.
pub(in crate::rollout) fn walk(canaries: Step, share: u8, soak: [u64; 2]) -> Vec<Step> {
    let seconds = soak.map(Duration::from_secs);
    let mut steps = vec![canaries, step(Quantity::Percent(share)), step(Quantity::Percent(100))];
    for (step, soak) in steps.iter_mut().zip(seconds) {
        step.soak = soak;
    }
    steps.iter_mut().for_each(|step| step.spread_by = vec!["zone".to_owned()]);
    steps
}

/// A rollout of which nothing was decided yet.
pub(in crate::rollout) fn rollout(target: Revision, stable: Revision, strategy: Strategy) -> Rollout {
    Rollout {
        uid: format!("rollout of {target}").into(),
        target,
        stable,
        strategy,
        paused: false,
        approved_steps: 0,
        abort: false,
        superseded: false,
        handover: None,
        progress: Progress::default(),
    }
}

/// A node that has just joined, without a row.
pub(in crate::rollout) fn joined(name: &str, labels: BTreeMap<String, String>, agent: Agent) -> FleetNode {
    FleetNode {
        name: name.into(),
        uid: format!("uid-{name}").into(),
        labels: Arc::new(labels),
        profile: None,
        assigned: None,
        still: None,
        pending: false,
        unknown: false,
        lost: None,
        agent,
    }
}

/// Assignment in a row.
pub(in crate::rollout) fn assignment(revision: Revision, at: Time) -> Assignment {
    Assignment { revision, at, trace: String::new(), previous: None }
}

/// A stream that begins now.
pub(in crate::rollout) fn connected(since: Time) -> Agent {
    Agent::connected(Observed { since, ..Observed::default() })
}

/// Applies an assignment; of settings that break its node it returns to the built-in ones by itself.
pub(in crate::rollout) fn take(seen: &mut Observed, wanted: Revision, broken: bool) {
    seen.in_force = broken.then(Revision::builtin);
    seen.trial = broken.then(|| Trial {
        revision: wanted.clone(),
        phase: TrialPhase::RolledBack,
        evidence: Some(("probe failed".to_owned(), 111)),
    });
    seen.acknowledged = Some(wanted);
}
