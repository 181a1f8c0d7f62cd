//! Judges a node by its agent's reports: healthy, unhealthy, or failed because of the target.

use std::time::Duration;

use super::{
    Agent, Assignment, FailedNode, FailureReason, FleetNode, Observed, Revision, Strategy, Time, TrialPhase,
};

/// A foreign change counts against a node's health for this long.
const DRIFT_COUNTS: Duration = Duration::from_secs(30);

/// A node's health regardless of any rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It holds what it should.
    Healthy,
    /// It is connected and something is out of order.
    Unhealthy,
    /// Its agent is gone.
    Disconnected,
    /// It never had an agent.
    Absent,
    /// This controller has just started.
    Unknown,
}

/// Judges a node regardless of any rollout.
#[must_use]
pub fn health(node: &FleetNode, now: Time) -> Health {
    match &node.agent {
        Agent::Unknown => Health::Unknown,
        Agent::Absent => Health::Absent,
        Agent::Disconnected => Health::Disconnected,
        Agent::Connected(observed) => {
            let drifted = observed.drift.as_ref().is_some_and(|(at, _)| now.since(*at) < DRIFT_COUNTS);
            let well = observed.acknowledged.is_some()
                && observed.in_force.is_none()
                && observed.refusal.is_none()
                && observed.refused_items == 0
                && observed.held_removals == 0
                && !drifted;
            if well { Health::Healthy } else { Health::Unhealthy }
        }
    }
}

/// Outcome of a node that was assigned the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It holds the target and passed the gates.
    Updated,
    /// It is on its way.
    Waiting,
    /// It cannot be asked.
    Unreachable,
    /// It has been unreachable for longer than a canary may be, with the evidence.
    Lost(FailedNode),
    /// It failed, with the evidence.
    Failed(FailedNode),
}

/// Judges a touched node.
pub(super) fn outcome(
    node: &FleetNode,
    assignment: &Assignment,
    strategy: &Strategy,
    now: Time,
) -> Judgement {
    let observed = match &node.agent {
        // A slow API server is no evidence about the node.
        _ if node.pending => return Judgement::Waiting,
        Agent::Unknown => return Judgement::Waiting,
        Agent::Absent | Agent::Disconnected => return lost(node, assignment, strategy, now),
        Agent::Connected(observed) => observed,
    };
    let target = &assignment.revision;
    let finding = trial_failed(observed, target)
        .or_else(|| refused(observed))
        .or_else(|| disturbed(observed, assignment.at, strategy));
    if let Some((reason, message, errno)) = finding {
        return Judgement::Failed(failure(node, assignment, reason, message, errno));
    }
    if is_updated(observed, target) {
        return Judgement::Updated;
    }
    // A trial takes the time that it takes; its own window bounds it.
    let on_trial = observed
        .trial
        .as_ref()
        .is_some_and(|trial| trial.revision == *target && trial.phase == TrialPhase::Watching);
    // A controller that was away does not blame the node for that.
    let since = assignment.at.max(observed.since);
    if !on_trial && now.since(since) > strategy.apply_deadline {
        let message = format!(
            "the node has not taken {target} within {} s of being connected with it",
            strategy.apply_deadline.as_secs()
        );
        return Judgement::Failed(failure(
            node,
            assignment,
            FailureReason::ApplyDeadlineExceeded,
            message,
            0,
        ));
    }
    Judgement::Waiting
}

fn lost(node: &FleetNode, assignment: &Assignment, strategy: &Strategy, now: Time) -> Judgement {
    let gone = node.lost.map(|lost| now.since(lost.max(assignment.at)));
    let Some(gone) = gone.filter(|gone| *gone > strategy.apply_deadline) else {
        return Judgement::Unreachable;
    };
    let message = format!(
        "the agent was lost after the node got {}, and has not been back for {} s",
        assignment.revision,
        gone.as_secs()
    );
    Judgement::Lost(failure(node, assignment, FailureReason::LostAfterUpdate, message, 0))
}

type Finding = (FailureReason, String, i32);

fn trial_failed(observed: &Observed, target: &Revision) -> Option<Finding> {
    let trial = observed.trial.as_ref()?;
    if trial.revision != *target || trial.phase != TrialPhase::RolledBack {
        return None;
    }
    let (message, errno) = trial.evidence.clone().unwrap_or_default();
    Some((FailureReason::ProbeFailed, message, errno))
}

fn refused(observed: &Observed) -> Option<Finding> {
    if let Some(refusal) = observed.refusal.as_ref().filter(|refusal| !refusal.transient) {
        return Some((
            FailureReason::ApplyFailed,
            format!("{}: {}", refusal.reason, refusal.detail),
            refusal.errno,
        ));
    }
    (observed.refused_items > 0).then(|| {
        let message = format!("the kernel refused {} items", observed.refused_items);
        (FailureReason::ItemsRefused, message, 0)
    })
}

/// Foreign changes and lost streams since the node was touched.
fn disturbed(observed: &Observed, touched: Time, strategy: &Strategy) -> Option<Finding> {
    if let Some((_, cause)) = observed.drift.as_ref().filter(|(at, _)| *at > touched) {
        return Some((
            FailureReason::Drifted,
            format!("the node's tables were changed by others: {}", cause.name()),
            0,
        ));
    }
    let losses = observed.losses.iter().filter(|at| **at > touched).count();
    (losses > strategy.maximum_reconnects).then(|| {
        let allowed = strategy.maximum_reconnects;
        (
            FailureReason::Reconnecting,
            format!("the agent lost its connection {losses} times; {allowed} are allowed"),
            0,
        )
    })
}

/// The kernel holds the target, and the trial is over. An agent that restarted forgets a trial that passed.
fn is_updated(observed: &Observed, target: &Revision) -> bool {
    let passed = match &observed.trial {
        Some(trial) if trial.revision == *target => trial.phase == TrialPhase::Passed,
        _ => true,
    };
    observed.acknowledged.as_ref() == Some(target)
        && observed.in_force.is_none()
        && observed.refusal.is_none()
        && passed
}

fn failure(
    node: &FleetNode,
    assignment: &Assignment,
    reason: FailureReason,
    message: String,
    errno: i32,
) -> FailedNode {
    let (node, reason) = (node.name.to_string(), reason.as_str().to_owned());
    FailedNode { node, reason, message, errno, trace: assignment.trace.clone() }
}
