//! One rollout's next decision.

use std::collections::BTreeMap;
use std::time::Duration;

use super::describe::{self, Status};
use super::judge::Judgement;
use super::order::order;
use super::survey::{Member, Survey};
use super::{
    FleetNode, Health, Progress, Quantity, Revision, Rollout, State, Step, Time, Transition, WaitingOn,
};

/// Failures that are kept.
const FAILURES: usize = 16;
/// Nodes that a message names.
const NAMED: usize = 3;
/// State to store, then actions.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// To be stored before anything else is done.
    pub progress: Progress,
    /// Readable form with the counts.
    pub status: Status,
    /// Changes of state, for Events.
    pub transitions: Vec<Transition>,
    /// Nodes to be given another revision, by name.
    pub moves: BTreeMap<std::sync::Arc<str>, Revision>,
    /// Time until the next decision if nothing happens.
    pub again_in: Option<Duration>,
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
    /// Human-readable detail of the state.
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
            // Resuming restarts the step, even one whose nodes are all gone.
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

    /// Returns the current step if it has canaries: nodes chosen by label or number, or the first of several steps.
    fn canaries(&self) -> Option<&Step> {
        let (at, steps) = (self.progress.steps_done, &self.rollout.strategy.steps);
        let first = at == 0 && steps.len() > 1;
        let chosen = |step: &&Step| step.selector.is_some() || matches!(step.nodes, Quantity::Number(_));
        steps.get(at).filter(|step| first || chosen(step))
    }

    fn step(&mut self, step: &Step) -> Next {
        let members: Vec<_> = self.survey.members.iter().filter(|member| member.is_of(step)).collect();
        let waiting_on =
            if step.selector.is_some() { WaitingOn::CanaryNodes } else { WaitingOn::EligibleNodes };
        if members.is_empty() {
            self.progress.soaking_since = None;
            return self.wait(State::Paused, waiting_on);
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
            let waits = touched.iter().any(|member| member.outcome == Some(Judgement::Waiting));
            let blocked = moves.is_empty() && !waits;
            let waiting_on = if blocked { WaitingOn::HealthyNodes } else { WaitingOn::Nodes };
            self.stop(State::Progressing, Some(waiting_on));
            return (moves, Some(self.rollout.strategy.apply_deadline));
        }
        if touched.iter().any(|member| member.outcome == Some(Judgement::Waiting)) {
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

    /// Returns the next nodes, as many as may become unavailable in addition to those that already are.
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

/// Formats the number of nodes and the first names.
fn names<'a>(nodes: impl Iterator<Item = &'a FleetNode>) -> String {
    let mut names: Vec<&str> = nodes.map(|node| &*node.name).collect();
    names.sort_unstable();
    let more = if names.len() > NAMED { ", …" } else { "" };
    let first = names[..names.len().min(NAMED)].join(", ");
    let nodes = if names.len() == 1 { "node" } else { "nodes" };
    format!("{} {nodes} ({first}{more})", names.len())
}
