//! One rollout's next decision.

use std::collections::BTreeMap;
use std::time::Duration;

use super::describe::{self, Status};
use super::judge::{Outcome, outcome};
use super::order::order;
use super::{
    Acknowledgements, Excluded, Failure, FleetNode, Health, Progress, Quantity, Revision, Rollout, State,
    Step, Time, WaitingOn, health,
};

/// Failures that are kept.
const FAILURES: usize = 16;
/// Nodes that a message names.
const NAMED: usize = 3;
/// Fewer unhealthy nodes than this never freeze a rollout: one broken node must not hold up a small cluster.
const FREEZE_MINIMUM: usize = 2;

/// What to store, and then to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// To be stored before anything else is done.
    pub progress: Progress,
    /// The same for people, with the counts.
    pub status: Status,
    /// What happened, for Events.
    pub transitions: Vec<Transition>,
    /// Nodes to be given another revision, by name.
    pub moves: BTreeMap<std::sync::Arc<str>, Revision>,
    /// When to decide again if nothing happens.
    pub again_in: Option<Duration>,
}

/// Something that people are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// One CamelCase word.
    pub reason: &'static str,
    /// Somebody should look.
    pub warning: bool,
    /// What happened, with the evidence.
    pub message: String,
}

/// A node as this rollout sees it.
pub(super) struct Member<'a> {
    node: &'a FleetNode,
    /// It belongs to the profile.
    mine: bool,
    health: Health,
    /// Of a touched node.
    outcome: Option<Outcome>,
}

impl Member<'_> {
    fn reachable(&self) -> bool {
        !matches!(self.health, Health::Absent | Health::Disconnected)
    }

    /// It can take part, or already does.
    fn eligible(&self) -> bool {
        self.mine && (self.reachable() || self.outcome.is_some())
    }

    fn updated(&self) -> bool {
        self.outcome == Some(Outcome::Updated)
    }

    fn is_of(&self, step: &Step) -> bool {
        self.eligible() && step.selector.as_ref().is_none_or(|selector| selector.matches(&self.node.labels))
    }

    /// Out of order, because of the rollout or for another reason. Whose agent is gone and who was not touched is
    /// excluded, so that one dead node does not stop everything.
    fn unavailable(&self) -> bool {
        match &self.outcome {
            Some(outcome) => *outcome != Outcome::Updated,
            None => self.health == Health::Unhealthy,
        }
    }
}

/// The fleet as this rollout sees it.
pub(super) struct Survey<'a> {
    pub(super) members: Vec<Member<'a>>,
}

impl<'a> Survey<'a> {
    fn new(rollout: &Rollout, fleet: &'a [FleetNode], now: Time) -> Self {
        let member = |node: &'a FleetNode| {
            let assigned = node.assigned.as_ref().filter(|assigned| assigned.revision == rollout.target);
            Member {
                node,
                mine: node.profile.as_ref() == Some(&rollout.target.profile),
                health: health(node, now),
                outcome: assigned.map(|assigned| outcome(node, assigned, &rollout.strategy, now)),
            }
        };
        Self { members: fleet.iter().map(member).collect() }
    }

    pub(super) fn count(&self, which: impl Fn(&Member<'a>) -> bool) -> usize {
        self.members.iter().filter(|member| which(member)).count()
    }

    pub(super) fn touched(&self) -> usize {
        self.count(|member| member.outcome.is_some())
    }

    pub(super) fn updated(&self) -> usize {
        self.count(|member| member.mine && member.updated())
    }

    pub(super) fn eligible(&self) -> usize {
        self.count(Member::eligible)
    }

    pub(super) fn excluded(&self) -> Vec<Excluded> {
        let left_out = self.members.iter().filter(|member| member.mine && !member.reachable());
        let mut excluded: Vec<_> = left_out
            .map(|member| Excluded {
                node: member.node.name.clone(),
                reason: if member.health == Health::Absent { "NoAgent" } else { "Disconnected" },
            })
            .collect();
        excluded.sort_by(|one, other| one.node.cmp(&other.node));
        excluded
    }

    /// How long the nodes took that acknowledged the target, as far as that is known.
    pub(super) fn acknowledgements(&self, target: &Revision) -> Option<Acknowledgements> {
        let took = self.members.iter().filter_map(|member| match &member.node.agent {
            super::Agent::Connected(observed) if observed.acknowledged.as_ref() == Some(target) => {
                Some((observed.took?, &member.node.name))
            }
            _ => None,
        });
        let mut took: Vec<_> = took.collect();
        took.sort_unstable();
        let (slowest, node) = took.last()?;
        Some(Acknowledgements {
            nodes: took.len(),
            median: took[(took.len() - 1) / 2].0,
            slowest: *slowest,
            slowest_node: (*node).clone(),
        })
    }

    /// Nodes that failed. `canaries`: the step that is under way, if its nodes are canaries; their loss is a failure.
    fn failures(&self, canaries: Option<&Step>) -> Vec<Failure> {
        let failed = self.members.iter().filter_map(|member| match &member.outcome {
            Some(Outcome::Failed(failure)) => Some(failure.clone()),
            Some(Outcome::Lost(failure)) if canaries.is_some_and(|step| member.is_of(step)) => {
                Some(failure.clone())
            }
            _ => None,
        });
        let mut failures: Vec<_> = failed.collect();
        failures.sort_by(|one, other| one.node.cmp(&other.node));
        failures
    }

    /// Unhealthy and all untouched nodes of the whole fleet, if that is more than a rollout may ignore.
    fn too_much_elsewhere(&self, percent: u8) -> Option<(usize, usize)> {
        let untouched = |member: &Member<'a>| member.outcome.is_none() && member.health != Health::Absent;
        let all = self.count(untouched);
        let unhealthy = self.count(|member| {
            untouched(member) && matches!(member.health, Health::Unhealthy | Health::Disconnected)
        });
        let too_much = unhealthy >= FREEZE_MINIMUM && unhealthy * 100 > usize::from(percent) * all;
        too_much.then_some((unhealthy, all))
    }

    /// What each node of the profile has, if it has been assigned anything.
    pub(super) fn assigned(&self) -> Vec<Revision> {
        let mine = self.members.iter().filter(|member| member.mine);
        mine.filter_map(|member| Some(member.node.assigned.as_ref()?.revision.clone())).collect()
    }

    /// Every touched node gets what it had of another profile, or else the stable revision.
    pub(super) fn returned(&self, stable: &Revision) -> BTreeMap<std::sync::Arc<str>, Revision> {
        let touched = self.members.iter().filter(|member| member.outcome.is_some());
        let own = |node: &FleetNode| node.assigned.as_ref().and_then(|assigned| assigned.previous.clone());
        touched
            .map(|member| (member.node.name.clone(), own(member.node).unwrap_or_else(|| stable.clone())))
            .collect()
    }

    /// Nodes whose row still names what an earlier rollout of the profile did not bring to its end, and that it is
    /// about to return. A revision that nothing describes any more is returned by nobody.
    fn others_under_way(&self, rollout: &Rollout) -> Vec<&'a FleetNode> {
        let own = rollout.stable.profile == rollout.target.profile;
        let proved = if own { rollout.stable.number } else { 0 };
        let is_under_way = |node: &&FleetNode| {
            !node.unknown
                && node.assigned.as_ref().is_some_and(|assigned| {
                    assigned.revision.profile == rollout.target.profile
                        && assigned.revision.number > proved
                        && assigned.revision != rollout.target
                })
        };
        self.members.iter().map(|member| member.node).filter(is_under_way).collect()
    }

    /// A row that still names the target, or a connected node that still has it in its kernel, although its row may
    /// not name it any more.
    fn holds(&self, target: &Revision) -> bool {
        self.members.iter().any(|member| {
            let in_kernel = match &member.node.agent {
                super::Agent::Connected(observed) => {
                    observed.in_force.as_ref().or(observed.acknowledged.as_ref()) == Some(target)
                }
                _ => false,
            };
            in_kernel || member.node.still.as_ref() == Some(target)
        })
    }
}

/// How many nodes, and the first of them by name.
fn names<'a>(nodes: impl Iterator<Item = &'a FleetNode>) -> String {
    let mut names: Vec<&str> = nodes.map(|node| &*node.name).collect();
    names.sort_unstable();
    let more = if names.len() > NAMED { ", …" } else { "" };
    let first = names[..names.len().min(NAMED)].join(", ");
    let nodes = if names.len() == 1 { "node" } else { "nodes" };
    format!("{} {nodes} ({first}{more})", names.len())
}

/// Decides. Total: every input has an outcome, and equal inputs have equal ones.
#[must_use]
pub fn decide(rollout: &Rollout, fleet: &[FleetNode], now: Time) -> Decision {
    let survey = Survey::new(rollout, fleet, now);
    let mut work = Work { rollout, survey: &survey, now, progress: rollout.progress.clone(), note: None };
    let before = rollout.progress.state;
    let (moves, again_in) = work.decide();
    let updated = survey.updated();
    let Work { mut progress, note, .. } = work;
    let resumed = progress.state == State::Progressing && before != State::Progressing;
    let ahead = progress.advanced_at.is_some_and(|at| at > now);
    let begins = progress.advanced_at.is_none();
    if resumed
        || begins
        || ahead
        || updated > progress.updated
        || progress.steps_done > rollout.progress.steps_done
    {
        progress.advanced_at = Some(now);
    }
    progress.updated = updated;
    let status = describe::status(rollout, &progress, &survey, note.as_deref(), now);
    let transitions = describe::transitions(rollout, &progress, &status);
    Decision { progress, status, transitions, moves, again_in }
}

type Next = (BTreeMap<std::sync::Arc<str>, Revision>, Option<Duration>);

struct Work<'a> {
    rollout: &'a Rollout,
    survey: &'a Survey<'a>,
    now: Time,
    progress: Progress,
    /// What people should know about the state.
    note: Option<String>,
}

impl Work<'_> {
    fn decide(&mut self) -> Next {
        let Rollout { stable, abort, superseded, .. } = self.rollout;
        let state = self.progress.state;
        match state {
            State::Complete => (BTreeMap::new(), None),
            // A row that was written late, or restored from a backup, names a revision that is not to be used.
            State::Failed | State::Aborted | State::Superseded => (self.survey.returned(stable), None),
            _ if *superseded => {
                self.stop(State::Superseded, None);
                (self.survey.returned(stable), None)
            }
            State::RollingBack => self.roll_back(),
            _ if *abort => self.roll_back(),
            _ => self.forward(),
        }
    }

    fn stop(&mut self, state: State, waiting_on: Option<WaitingOn>) {
        self.progress.state = state;
        self.progress.waiting_on = waiting_on;
    }

    fn wait(&mut self, state: State, waiting_on: WaitingOn) -> Next {
        self.stop(state, Some(waiting_on));
        (BTreeMap::new(), None)
    }

    fn roll_back(&mut self) -> Next {
        let moves = self.survey.returned(&self.rollout.stable);
        if self.progress.state == State::RollingBack
            && moves.is_empty()
            && !self.survey.holds(&self.rollout.target)
        {
            let end = if self.progress.failed > 0 { State::Failed } else { State::Aborted };
            self.stop(end, None);
        } else {
            self.stop(State::RollingBack, Some(WaitingOn::Nodes));
        }
        (moves, None)
    }

    fn forward(&mut self) -> Next {
        let rollout = self.rollout;
        if let Some((unhealthy, all)) = self.survey.too_much_elsewhere(rollout.strategy.freeze_percent) {
            self.note = Some(format!("{unhealthy} of {all} nodes that it has not touched are out of order"));
            self.progress.soaking_since = None;
            return self.wait(State::Frozen, WaitingOn::HealthyNodes);
        }
        let failures = self.survey.failures(self.canaries());
        if !failures.is_empty() {
            self.progress.failed = failures.len();
            self.progress.failures = failures.into_iter().take(FAILURES).collect();
            self.progress.soaking_since = None;
            return self.roll_back();
        }
        if self.progress.state == State::Pending {
            let others = self.survey.others_under_way(rollout);
            if !others.is_empty() {
                self.note = Some(names(others.into_iter()));
                return self.wait(State::Pending, WaitingOn::Stable);
            }
        }
        if rollout.paused {
            // Whoever resumes starts the step anew: also one whose nodes are all gone.
            self.progress.step_began_at = None;
            self.progress.soaking_since = None;
            return self.wait(State::Paused, WaitingOn::Resume);
        }
        match rollout.strategy.steps.get(self.progress.steps_done) {
            Some(step) => self.step(step),
            None => {
                self.note = Some("its steps end before all nodes hold the revision".to_owned());
                self.wait(State::Paused, WaitingOn::Approval)
            }
        }
    }

    /// The step that is under way, if its nodes are there to be judged by: chosen by label or number, or the first of
    /// several.
    fn canaries(&self) -> Option<&Step> {
        let (at, steps) = (self.progress.steps_done, &self.rollout.strategy.steps);
        let first = at == 0 && steps.len() > 1;
        let chosen = |step: &&Step| step.selector.is_some() || matches!(step.nodes, Quantity::Number(_));
        steps.get(at).filter(|step| first || chosen(step))
    }

    fn step(&mut self, step: &Step) -> Next {
        let members: Vec<_> = self.survey.members.iter().filter(|member| member.is_of(step)).collect();
        let nobody = if step.selector.is_some() { WaitingOn::CanaryNodes } else { WaitingOn::EligibleNodes };
        if members.is_empty() {
            self.progress.soaking_since = None;
            return self.wait(State::Paused, nobody);
        }
        let touched: Vec<_> = members.iter().filter(|member| member.outcome.is_some()).collect();
        let reachable = touched.iter().filter(|member| member.reachable()).count();
        if touched.is_empty() && self.progress.step_began_at.is_none() {
            // It begins.
        } else if reachable == 0 {
            self.note = Some("every node of the step that holds the revision is gone".to_owned());
            self.progress.soaking_since = None;
            return self.wait(State::Paused, WaitingOn::CanaryNodes);
        } else {
            self.progress.step_began_at.get_or_insert(self.now);
        }
        let missing = step.nodes.of(members.len()).saturating_sub(touched.len());
        if missing > 0 {
            let moves = self.pick(step, &members, missing);
            if !moves.is_empty() {
                self.progress.soaking_since = None; // Who joins a step that soaks is watched for as long.
            }
            let waits = touched.iter().any(|member| member.outcome == Some(Outcome::Waiting));
            let blocked = moves.is_empty() && !waits;
            let waiting_on = if blocked { WaitingOn::HealthyNodes } else { WaitingOn::Nodes };
            self.stop(State::Progressing, Some(waiting_on));
            return (moves, Some(self.rollout.strategy.apply_deadline));
        }
        if touched.iter().any(|member| member.outcome == Some(Outcome::Waiting)) {
            self.stop(State::Progressing, Some(WaitingOn::Nodes));
            return (BTreeMap::new(), Some(self.rollout.strategy.apply_deadline));
        }
        let unreachable = touched.iter().filter(|member| !member.reachable());
        let unreachable: Vec<_> = unreachable.map(|member| member.node).collect();
        if !unreachable.is_empty() && !self.is_approved() {
            self.note = Some(names(unreachable.into_iter()));
            self.progress.soaking_since = None;
            return self.wait(State::Paused, WaitingOn::UnreachableNodes);
        }
        self.soak(step)
    }

    /// A person approved the step that is under way.
    fn is_approved(&self) -> bool {
        self.rollout.approved_steps > self.progress.steps_done
    }

    /// The next nodes, as many as may be out of order beside those that are.
    fn pick(
        &self,
        step: &Step,
        members: &[&Member<'_>],
        missing: usize,
    ) -> BTreeMap<std::sync::Arc<str>, Revision> {
        let allowed = self.rollout.strategy.max_unavailable.of(self.survey.eligible()).max(1);
        let unavailable = self.survey.count(|member| member.mine && member.unavailable());
        let room = allowed.saturating_sub(unavailable);
        let touched = members.iter().filter(|member| member.outcome.is_some()).map(|member| member.node);
        let well =
            members.iter().filter(|member| member.outcome.is_none() && member.health == Health::Healthy);
        let order = order(&self.rollout.uid, &step.spread_by, touched, well.map(|member| member.node));
        order
            .into_iter()
            .take(missing.min(room))
            .map(|node| (node.name.clone(), self.rollout.target.clone()))
            .collect()
    }

    /// All nodes of the step hold the target.
    fn soak(&mut self, step: &Step) -> Next {
        // A clock that was set back makes the soak longer, never shorter.
        let since = self.progress.soaking_since.filter(|since| *since <= self.now).unwrap_or(self.now);
        self.progress.soaking_since = Some(since);
        let elapsed = self.now.since(since);
        if elapsed < step.soak {
            self.stop(State::Soaking, Some(WaitingOn::Soak));
            return (BTreeMap::new(), Some(step.soak - elapsed));
        }
        if step.manual && !self.is_approved() {
            return self.wait(State::Paused, WaitingOn::Approval);
        }
        self.progress.steps_done += 1;
        self.progress.step_began_at = None;
        self.progress.soaking_since = None;
        let whole = step.selector.is_none() && step.nodes == Quantity::Percent(100);
        if whole && self.progress.steps_done >= self.rollout.strategy.steps.len() {
            self.stop(State::Complete, None);
            return (BTreeMap::new(), None);
        }
        self.stop(State::Progressing, Some(WaitingOn::Nodes));
        (BTreeMap::new(), Some(Duration::ZERO))
    }
}
