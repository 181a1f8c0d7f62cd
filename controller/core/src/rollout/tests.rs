//! One rollout, decision by decision.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use switchtower_admin_api::ConditionType;
use switchtower_proto::v1::DriftCause;

use super::*;
use fixtures::{assignment, labelled, step, strategy};

mod evidence;
pub(super) mod fixtures;
mod overlap_simulation;
mod simulation;

const NOW: Time = Time(1_000_000_000);

fn target() -> Revision {
    Revision { profile: "default".into(), number: 2 }
}

fn stable() -> Revision {
    Revision { profile: "default".into(), number: 1 }
}

fn canary(selector: Selector) -> Step {
    Step { name: "canary".into(), selector: Some(selector), ..step(Quantity::Number(1)) }
}

fn rollout(steps: Vec<Step>) -> Rollout {
    fixtures::rollout(target(), stable(), strategy(steps))
}

fn node(name: &str, labels: &[&str]) -> FleetNode {
    let labels = labels.iter().map(|label| {
        let (key, value) = label.split_once('=').unwrap_or((label, ""));
        (key.to_owned(), value.to_owned())
    });
    FleetNode {
        name: name.into(),
        uid: format!("uid-{name}").into(),
        labels: Arc::new(labels.collect()),
        profile: Some("default".into()),
        assigned: Some(assignment(stable(), Time(0))),
        still: None,
        pending: false,
        unknown: false,
        lost: None,
        agent: Agent::connected(Observed { acknowledged: Some(stable()), ..Observed::default() }),
    }
}

fn fleet(count: usize) -> Vec<FleetNode> {
    (0..count).map(|index| node(&format!("n{index}"), &[])).collect()
}

fn observed(node: &mut FleetNode) -> &mut Observed {
    match &mut node.agent {
        Agent::Connected(observed) => observed,
        _ => panic!("{} is not connected", node.name),
    }
}

/// A rollout, its fleet, and the clock; decisions are carried out as the controller does.
struct Stage {
    rollout: Rollout,
    fleet: Vec<FleetNode>,
    now: Time,
}

impl Stage {
    fn new(steps: Vec<Step>, fleet: Vec<FleetNode>) -> Self {
        Self { rollout: rollout(steps), fleet, now: NOW }
    }

    fn decide(&mut self) -> Decision {
        let decision = decide(&self.rollout, &self.fleet, self.now);
        self.rollout.progress = decision.progress.clone();
        for node in &mut self.fleet {
            if let Some(revision) = decision.moves.get(&node.name) {
                node.assigned = Some(Assignment {
                    revision: revision.clone(),
                    at: self.now,
                    trace: "0af7".into(),
                    previous: None,
                });
            }
        }
        decision
    }

    /// Decides until nothing changes, while agents comply at once.
    fn settle(&mut self) -> Decision {
        for _ in 0..100 {
            let decision = self.decide();
            self.agents_follow();
            if decision.moves.is_empty()
                && decision.progress == decide(&self.rollout, &self.fleet, self.now).progress
            {
                return decision;
            }
        }
        panic!("it never settles: {:?}", self.rollout.progress);
    }

    fn agents_follow(&mut self) {
        for node in &mut self.fleet {
            let assigned = node.assigned.as_ref().map(|assigned| assigned.revision.clone());
            if let Agent::Connected(observed) = &mut node.agent {
                observed.acknowledged = assigned;
                observed.in_force = None;
            }
        }
    }

    fn pass(&mut self, seconds: i64) {
        self.now.0 += seconds * 1_000;
    }

    fn touched(&self) -> Vec<&str> {
        let touched = self
            .fleet
            .iter()
            .filter(|node| node.assigned.as_ref().is_some_and(|assigned| assigned.revision == target()));
        touched.map(|node| &*node.name).collect()
    }

    fn node(&mut self, name: &str) -> &mut FleetNode {
        self.fleet.iter_mut().find(|node| &*node.name == name).unwrap()
    }

    fn lose(&mut self, name: &str) {
        let now = self.now;
        let node = self.node(name);
        (node.agent, node.lost) = (Agent::Disconnected, Some(now));
    }

    fn returns(&mut self, name: &str) {
        let node = self.node(name);
        node.agent = Agent::connected(Observed { acknowledged: Some(target()), ..Observed::default() });
        node.lost = None;
    }

    #[track_caller]
    fn stands(&self, state: State, waiting_on: Option<WaitingOn>, touched: usize) {
        let progress = &self.rollout.progress;
        assert_eq!((progress.state, progress.waiting_on), (state, waiting_on));
        assert_eq!(self.touched().len(), touched, "{:?}", self.touched());
    }
}

fn reasons(decision: &Decision) -> Vec<&'static str> {
    decision.transitions.iter().map(|transition| transition.reason).collect()
}

fn condition(decision: &Decision, kind: ConditionType) -> Option<(bool, &'static str)> {
    let found = decision.status.conditions.iter().find(|condition| condition.kind == kind);
    found.map(|condition| (condition.holds, condition.reason))
}

#[test]
fn good_change_passes_canary_and_waves() {
    let mut canaries = canary(labelled("canary"));
    canaries.soak = Duration::from_secs(30);
    canaries.manual = true;
    let steps = vec![canaries, step(Quantity::Percent(50)), step(Quantity::Percent(100))];
    let mut nodes = fleet(10);
    nodes.push(node("c", &["canary"]));
    let mut stage = Stage::new(steps, nodes);
    assert_eq!(reasons(&stage.decide()), ["RolloutStarted"]);
    assert_eq!(stage.touched(), ["c"]);
    stage.agents_follow();
    assert_eq!(reasons(&stage.decide()), ["SoakStarted"]);
    stage.pass(29);
    assert_eq!(stage.decide().again_in, Some(Duration::from_secs(1)));
    stage.stands(State::Soaking, Some(WaitingOn::Soak), 1);
    stage.pass(1);
    assert_eq!(reasons(&stage.decide()), ["WaitingForApproval"]);
    stage.pass(100_000);
    assert_eq!(reasons(&stage.decide()), Vec::<&str>::new());
    stage.stands(State::Paused, Some(WaitingOn::Approval), 1);
    stage.rollout.approved_steps = 1;
    assert_eq!(reasons(&stage.decide()), ["StepDone"]);
    let decision = stage.decide();
    assert_eq!((decision.status.step, decision.moves.len()), (2, 5), "50 % of 11 is 6, and one is done");
    let decision = stage.settle();
    stage.stands(State::Complete, None, 11);
    assert_eq!((decision.status.updated, decision.status.eligible), (11, 11));
    assert_eq!(condition(&decision, ConditionType::Ready), Some((true, "Complete")));
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((false, "Complete")));
    assert_eq!(condition(&decision, ConditionType::Reconciling), Some((false, "Complete")));
}

#[test]
fn failing_canary_halts_with_exactly_the_canary_touched() {
    let mut stage = Stage::new(vec![step(Quantity::Number(1)), step(Quantity::Percent(100))], fleet(12));
    stage.decide();
    let name = stage.touched()[0].to_owned();
    let observed = observed(stage.node(&name));
    observed.acknowledged = Some(target());
    observed.in_force = Some(stable());
    observed.trial = Some(Trial {
        revision: target(),
        phase: TrialPhase::RolledBack,
        evidence: Some(("probe node-port to 192.0.2.7:30080: connection refused".into(), 111)),
    });
    let decision = stage.decide();
    stage.stands(State::RollingBack, Some(WaitingOn::Nodes), 0);
    assert_eq!(decision.moves, BTreeMap::from([(Arc::from(name.as_str()), stable())]));
    let failure = &stage.rollout.progress.failures[0];
    assert_eq!((failure.reason.as_str(), failure.errno), ("ProbeFailed", 111));
    for evidence in [name.as_str(), "ProbeFailed", "connection refused", "errno 111", "trace 0af7"] {
        assert!(decision.status.message.contains(evidence), "{}", decision.status.message);
        assert!(decision.transitions[0].message.contains(evidence), "{:?}", decision.transitions);
    }
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "NodeFailed")));
    stage.agents_follow();
    let decision = stage.decide();
    stage.stands(State::Failed, None, 0);
    assert_eq!(reasons(&decision), ["RolloutFailed"]);
    stage.pass(1_000_000);
    assert_eq!(stage.decide().moves, BTreeMap::new(), "the same revision is never retried automatically");
}

#[test]
fn each_kind_of_evidence_fails_a_node() {
    let refusal = |transient| UpdateRefusal {
        reason: "KernelRefused".into(),
        detail: "no space".into(),
        errno: 28,
        transient,
    };
    type Case = (&'static str, Box<dyn Fn(&mut Observed)>, Option<&'static str>);
    let cases: Vec<Case> = vec![
        ("kernel", Box::new(move |seen| seen.refusal = Some(refusal(false))), Some("ApplyFailed")),
        ("repaired", Box::new(move |seen| seen.refusal = Some(refusal(true))), None),
        ("items", Box::new(|seen| seen.refused_items = 2), Some("ItemsRefused")),
        (
            "drift",
            Box::new(|seen| seen.drift = Some((Time(NOW.0 + 1), DriftCause::TableDeleted))),
            Some("Drifted"),
        ),
        (
            "drift before",
            Box::new(|seen| seen.drift = Some((Time(NOW.0 - 1), DriftCause::TableDeleted))),
            None,
        ),
        ("reconnects", Box::new(|seen| seen.losses = vec![Time(NOW.0 + 1); 4]), Some("Reconnecting")),
        ("few reconnects", Box::new(|seen| seen.losses = vec![Time(NOW.0 + 1); 3]), None),
        ("reconnects before", Box::new(|seen| seen.losses = vec![NOW; 8]), None),
    ];
    for (what, change, expected) in cases {
        let mut stage = Stage::new(vec![step(Quantity::Number(1)), step(Quantity::Percent(100))], fleet(12));
        stage.decide();
        let name = stage.touched()[0].to_owned();
        change(observed(stage.node(&name)));
        stage.pass(1);
        stage.decide();
        let found = stage.rollout.progress.failures.first().map(|failure| failure.reason.as_str());
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn silent_node_fails_at_its_deadline() {
    let mut stage = Stage::new(vec![step(Quantity::Number(1)), step(Quantity::Percent(100))], fleet(3));
    stage.decide();
    let name = stage.touched()[0].to_owned();
    stage.pass(500);
    observed(stage.node(&name)).since = Time(NOW.0 + 450_000);
    stage.decide();
    stage.stands(State::Progressing, Some(WaitingOn::Nodes), 1);
    stage.pass(11);
    stage.decide();
    assert_eq!(stage.rollout.progress.failures[0].reason, "ApplyDeadlineExceeded");
}

#[test]
fn step_waits_for_a_trial() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(100))], fleet(1));
    stage.decide();
    for (phase, in_force, state) in [
        (TrialPhase::Before, Some(stable()), State::Progressing),
        (TrialPhase::Watching, None, State::Progressing),
        (TrialPhase::Passed, None, State::Complete),
    ] {
        let seen = observed(&mut stage.fleet[0]);
        seen.acknowledged = Some(target());
        seen.in_force = in_force;
        seen.trial = Some(Trial { revision: target(), phase, evidence: None });
        stage.decide();
        assert_eq!(stage.rollout.progress.state, state, "{phase:?}");
    }
}

#[test]
fn selectors_without_nodes_never_pass() {
    let mut stage = Stage::new(vec![canary(labelled("canary")), step(Quantity::Percent(100))], fleet(4));
    let decision = stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::CanaryNodes), 0);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "Inconclusive")));
    stage.pass(1_000_000);
    stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::CanaryNodes), 0);
    stage.fleet.push(node("late", &["canary"]));
    stage.settle();
    stage.stands(State::Complete, None, 5);
}

#[test]
fn node_joining_a_soaking_step_soaks_as_long() {
    let mut watched = step(Quantity::Percent(100));
    watched.soak = Duration::from_secs(100);
    let mut stage = Stage::new(vec![watched], fleet(2));
    stage.settle();
    stage.pass(90);
    stage.decide();
    stage.fleet.push(node("late", &[]));
    stage.settle();
    stage.pass(99);
    stage.decide();
    stage.stands(State::Soaking, Some(WaitingOn::Soak), 3);
    stage.pass(1);
    stage.decide();
    stage.stands(State::Complete, None, 3);
}

#[test]
fn no_eligible_node() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(100))], Vec::new());
    let decision = stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::EligibleNodes), 0);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "NoEligibleNodes")));
    stage.fleet = fleet(2);
    stage.fleet[0].agent = Agent::Absent;
    stage.fleet[1].profile = None;
    stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::EligibleNodes), 0);
    stage.fleet[0].agent = Agent::connected(Observed { acknowledged: Some(stable()), ..Observed::default() });
    stage.settle();
    stage.stands(State::Complete, None, 1);
}

#[test]
fn step_without_canaries_pauses() {
    for deleted in [false, true] {
        let mut watched = step(Quantity::Number(1));
        watched.soak = Duration::from_secs(30);
        let mut stage = Stage::new(vec![watched, step(Quantity::Percent(100))], fleet(4));
        stage.settle();
        stage.stands(State::Soaking, Some(WaitingOn::Soak), 1);
        let name = stage.touched()[0].to_owned();
        if deleted {
            stage.fleet.retain(|node| *node.name != name);
            stage.pass(1_000);
        } else {
            stage.lose(&name);
            stage.pass(60);
        }
        let decision = stage.settle();
        stage.stands(State::Paused, Some(WaitingOn::CanaryNodes), usize::from(!deleted));
        assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "Inconclusive")));
        if deleted {
            // A person decides to continue with another node.
            stage.rollout.paused = true;
            stage.decide();
            stage.rollout.paused = false;
        } else {
            stage.returns(&name);
        }
        stage.settle();
        stage.stands(State::Soaking, Some(WaitingOn::Soak), 1);
        stage.pass(30);
        stage.settle();
        assert_eq!(stage.rollout.progress.state, State::Complete, "deleted: {deleted}");
    }
}

#[test]
fn clock_set_back_never_shortens_a_soak() {
    let mut watched = step(Quantity::Percent(100));
    watched.soak = Duration::from_secs(100);
    let mut stage = Stage::new(vec![watched], fleet(2));
    stage.settle();
    stage.pass(90);
    stage.decide();
    stage.pass(-3_600);
    stage.decide();
    stage.stands(State::Soaking, Some(WaitingOn::Soak), 2);
    stage.pass(99);
    stage.decide();
    stage.stands(State::Soaking, Some(WaitingOn::Soak), 2);
    stage.pass(1);
    stage.decide();
    stage.stands(State::Complete, None, 2);
}

#[test]
fn approvals_beyond_the_last_step_approve_all_and_no_more() {
    let mut last = step(Quantity::Percent(100));
    last.manual = true;
    let mut stage = Stage::new(vec![last], fleet(3));
    stage.rollout.approved_steps = 99;
    stage.settle();
    stage.stands(State::Complete, None, 3);
}

#[test]
fn steps_short_of_all_nodes_never_complete() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(50))], fleet(4));
    stage.settle();
    stage.pass(1_000_000);
    stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::Approval), 2);
}

#[test]
fn share_over_100_percent_means_all_nodes() {
    assert_eq!(Quantity::Percent(200).of(10), 10);
    assert_eq!(Quantity::Number(200).of(10), 10);
    assert_eq!((Quantity::Percent(1).of(10), Quantity::Percent(1).of(0)), (1, 0));
    assert_eq!((Quantity::Percent(34).of(3), Quantity::Percent(33).of(3)), (2, 1));
}

#[test]
fn relabeled_canary_still_counted() {
    let mut watched = canary(labelled("canary"));
    watched.soak = Duration::from_secs(30);
    let mut stage = Stage::new(vec![watched, step(Quantity::Percent(100))], fleet(2));
    stage.fleet.push(node("c", &["canary"]));
    stage.settle();
    // It loses the canary's label: the step has no canary any more.
    stage.node("c").labels = Arc::default();
    stage.settle();
    stage.stands(State::Paused, Some(WaitingOn::CanaryNodes), 1);
    // It loses the profile too, and fails: it is returned all the same.
    stage.node("c").profile = None;
    observed(stage.node("c")).refused_items = 1;
    stage.decide();
    stage.stands(State::RollingBack, Some(WaitingOn::Nodes), 0);
}

#[test]
fn nodes_out_of_order_count_before_others_are_touched() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(100))], fleet(20));
    stage.rollout.strategy.max_unavailable = Quantity::Number(2);
    observed(&mut stage.fleet[0]).held_removals = 1;
    assert_eq!(stage.decide().moves.len(), 1, "one of two places is taken by the unhealthy node");
    observed(&mut stage.fleet[1]).held_removals = 1;
    stage.agents_follow();
    let decision = stage.decide();
    assert_eq!((decision.moves.len(), decision.progress.waiting_on), (0, Some(WaitingOn::HealthyNodes)));
    stage.pass(601);
    assert_eq!(condition(&stage.decide(), ConditionType::Stalled), Some((true, "ProgressDeadlineExceeded")));
    for node in &mut stage.fleet[..2] {
        observed(node).held_removals = 0;
    }
    stage.settle();
    stage.stands(State::Complete, None, 20);
}

#[test]
fn too_much_out_of_order_elsewhere_freezes_it() {
    let mut stage = Stage::new(vec![step(Quantity::Number(1)), step(Quantity::Percent(100))], fleet(12));
    stage.decide();
    let name = stage.touched()[0].to_owned();
    let others: Vec<_> =
        stage.fleet.iter().map(|node| node.name.clone()).filter(|other| **other != *name).collect();
    observed(stage.node(&name)).refused_items = 1;
    for other in &others[..3] {
        observed(stage.node(other)).refused_items = 1;
    }
    let decision = stage.decide();
    assert_eq!(reasons(&decision), ["RolloutFrozen"]);
    stage.stands(State::Frozen, Some(WaitingOn::HealthyNodes), 1);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "Frozen")));
    for other in &others[..2] {
        observed(stage.node(other)).refused_items = 0;
    }
    stage.decide();
    assert_eq!(stage.rollout.progress.state, State::RollingBack, "now it is the canary alone");
}

#[test]
fn pausing_touches_no_further_node_and_aborting_returns_all() {
    let mut stage = Stage::new(vec![step(Quantity::Number(2)), step(Quantity::Percent(100))], fleet(8));
    stage.rollout.strategy.max_unavailable = Quantity::Number(1);
    stage.decide();
    stage.rollout.paused = true;
    stage.agents_follow();
    assert_eq!(reasons(&stage.decide()), ["RolloutPaused"]);
    stage.stands(State::Paused, Some(WaitingOn::Resume), 1);
    stage.rollout.paused = false;
    stage.rollout.abort = true;
    stage.settle();
    stage.stands(State::Aborted, None, 0);
    let decision = decide(&stage.rollout, &stage.fleet, stage.now);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((true, "Aborted")));
    stage.rollout.abort = false;
    stage.settle();
    stage.stands(State::Aborted, None, 0);
}

#[test]
fn superseded_rollout_returns_nodes_before_the_next_one() {
    let mut stage = Stage::new(vec![step(Quantity::Number(2)), step(Quantity::Percent(100))], fleet(4));
    stage.decide();
    let mut next = rollout(vec![step(Quantity::Percent(100))]);
    next.target.number = 3;
    let waiting = decide(&next, &stage.fleet, NOW);
    assert_eq!((waiting.progress.state, waiting.moves.len()), (State::Pending, 0));
    stage.rollout.superseded = true;
    let decision = stage.decide();
    assert_eq!(reasons(&decision), ["RolloutSuperseded"]);
    stage.stands(State::Superseded, None, 0);
    assert_eq!(condition(&decision, ConditionType::Ready), None);
    assert_eq!(condition(&decision, ConditionType::Stalled), Some((false, "Superseded")));
    stage.agents_follow();
    assert_eq!(decide(&next, &stage.fleet, NOW).moves.len(), 4);
    // A row restored from a backup.
    stage.fleet[0].assigned = Some(assignment(target(), NOW));
    assert_eq!(stage.decide().moves.len(), 1);
}

#[test]
fn canaries_are_spread_over_zones() {
    let mut spread = step(Quantity::Number(4));
    spread.spread_by = vec!["zone".into()];
    let nodes = (0..30).map(|index| {
        let zone = ["zone=a", "zone=b", "zone=c"][usize::from(index > 19) + usize::from(index > 27)];
        node(&format!("n{index}"), &[zone])
    });
    let mut stage = Stage::new(vec![spread, step(Quantity::Percent(100))], nodes.collect());
    stage.rollout.strategy.max_unavailable = Quantity::Number(2);
    stage.decide();
    stage.agents_follow();
    stage.decide();
    let mut zones = BTreeMap::<&str, usize>::new();
    for node in stage.fleet.iter().filter(|node| node.assigned.as_ref().unwrap().revision == target()) {
        *zones.entry(&node.labels["zone"]).or_default() += 1;
    }
    let mut counts: Vec<_> = zones.values().copied().collect();
    counts.sort_unstable();
    assert_eq!(counts, [1, 1, 2], "{zones:?}");
}

#[test]
fn unreachable_nodes_are_excluded_and_listed() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(100))], fleet(10));
    stage.fleet[3].agent = Agent::Absent;
    stage.fleet[7].agent = Agent::Disconnected;
    let decision = stage.settle();
    stage.stands(State::Complete, None, 8);
    let listed: Vec<_> =
        decision.status.excluded.iter().map(|excluded| (&*excluded.node, excluded.reason)).collect();
    assert_eq!(listed, [("n3", "NoAgent"), ("n7", "Disconnected")]);
}

#[test]
fn nodes_return_to_revisions_of_other_profiles() {
    let mut stage = Stage::new(vec![step(Quantity::Number(3)), step(Quantity::Percent(100))], fleet(3));
    let other = |number| Revision { profile: "other".into(), number };
    stage.decide();
    for (node, previous) in stage.fleet.iter_mut().zip([Some(other(4)), Some(Revision::builtin()), None]) {
        node.assigned.as_mut().unwrap().previous = previous;
    }
    stage.rollout.abort = true;
    let moves = stage.decide().moves;
    let expected = [("n0", other(4)), ("n1", Revision::builtin()), ("n2", stable())];
    assert_eq!(moves, expected.map(|(node, revision)| (node.into(), revision)).into());
    // Each message names what the nodes go back to.
    stage.agents_follow();
    let message = stage.decide().status.message;
    assert!(
        message.ends_with("what they had before: builtin@0 (1), default@1 (1), other@4 (1)"),
        "{message}"
    );
}

#[test]
fn it_is_over_when_the_rows_say_so() {
    let mut stage = Stage::new(vec![step(Quantity::Percent(100))], fleet(1));
    stage.decide();
    stage.rollout.abort = true;
    stage.decide();
    stage.agents_follow();
    stage.fleet[0].still = Some(target());
    stage.decide();
    stage.stands(State::RollingBack, Some(WaitingOn::Nodes), 0);
    stage.fleet[0].still = None;
    stage.decide();
    stage.stands(State::Aborted, None, 0);
}
