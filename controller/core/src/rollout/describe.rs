//! Human-readable form of a decision: counts, conditions, Events.

use std::collections::BTreeMap;

use switchtower_admin_api::{ConditionType, RolloutReason as Reason};

use super::survey::Survey;
use super::{Acknowledgements, Excluded, Progress, Revision, Rollout, State, Time, WaitingOn};

/// Human-readable form of a decision. Counts are those of the fleet at the decision.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// The current step from 1, or the last one; 0 before the first.
    pub step: usize,
    /// Number of steps.
    pub steps: usize,
    /// Nodes whose row names the target.
    pub touched: usize,
    /// Nodes of the profile that hold the target and passed the gates.
    pub updated: usize,
    /// Nodes of the profile that take part.
    pub eligible: usize,
    /// Nodes of the profile that are left out, by name.
    pub excluded: Vec<Excluded>,
    /// Time that nodes took to acknowledge the target; `None`: no node whose time is known.
    pub acknowledgements: Option<Acknowledgements>,
    /// Ready (not with every state), Reconciling, Stalled.
    pub conditions: Vec<Condition>,
    /// Human-readable summary, in a sentence.
    pub message: String,
}

/// A condition as the API has it, without its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its type.
    pub kind: ConditionType,
    /// True or False.
    pub holds: bool,
    /// Machine-readable reason in CamelCase.
    pub reason: &'static str,
    /// Human-readable message.
    pub message: String,
}

/// A change of state, reported as an Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// Machine-readable reason in CamelCase.
    pub reason: &'static str,
    /// The Event is of type Warning.
    pub warning: bool,
    /// Human-readable message with the evidence.
    pub message: String,
}

pub(super) fn status(
    rollout: &Rollout,
    progress: &Progress,
    survey: &Survey<'_>,
    note: Option<&str>,
    now: Time,
) -> Status {
    let steps = rollout.strategy.steps.len();
    let step = match progress.state {
        State::Pending => 0,
        _ => (progress.steps_done + 1).min(steps),
    };
    let mut status = Status {
        step,
        steps,
        touched: survey.touched(),
        updated: survey.updated(),
        eligible: survey.eligible(),
        excluded: survey.excluded(),
        acknowledgements: survey.acknowledgements(&rollout.target),
        conditions: Vec::new(),
        message: String::new(),
    };
    let overdue = matches!(progress.state, State::Progressing | State::Pending)
        && progress.advanced_at.is_some_and(|at| now.since(at) > rollout.strategy.progress_deadline);
    let remarks = Remarks { way_back: &way_back(rollout, progress, survey), note, overdue };
    status.message = message(rollout, progress, &status, &remarks);
    if let Some(to) = &rollout.handover {
        let profile = &rollout.target.profile;
        status.message =
            format!("nodes of {profile}, which is being deleted, go to {to}: {}", status.message);
    }
    status.conditions = conditions(progress, &status.message, overdue);
    status
}

/// Parts of the message that do not follow from the state alone.
struct Remarks<'a> {
    /// The settings to which nodes return.
    way_back: &'a str,
    /// The nodes that the decision is about.
    note: Option<&'a str>,
    /// There was no progress for longer than the strategy allows.
    overdue: bool,
}

fn message(rollout: &Rollout, progress: &Progress, status: &Status, remarks: &Remarks<'_>) -> String {
    let Remarks { way_back, note, overdue } = *remarks;
    let Rollout { target, .. } = rollout;
    let object = format!("{}-{}", target.profile, target.number);
    let Status { step, steps, updated, eligible, touched, .. } = status;
    let name = rollout.strategy.steps.get(step.saturating_sub(1)).map_or("", |step| &step.name);
    let place = if name.is_empty() {
        format!("step {step}/{steps}")
    } else {
        format!("step {step}/{steps} ({name})")
    };
    let held = format!("{updated} of {eligible} nodes hold {target}");
    let note = note.unwrap_or("no node of the step can be reached");
    match (progress.state, progress.waiting_on) {
        (State::Pending, Some(WaitingOn::Stable)) => {
            format!("waiting until {note} of an earlier rollout hold {} again", earlier(rollout))
        }
        (State::Pending, _) => "not begun".to_owned(),
        (State::Soaking, _) => format!("{place}: {held}; they are being watched"),
        (State::Frozen, _) => format!("{place}: frozen: {note}; it continues when they are healthy again"),
        (State::Paused, Some(WaitingOn::Approval)) => format!(
            "{place}: {held}; waiting for approval: `kubectl patch pxr {object} --type=merge -p \
             '{{\"spec\":{{\"approvedStep\":{step}}}}}'`"
        ),
        (State::Paused, Some(WaitingOn::Resume)) => format!("{place}: {held}; paused by spec.paused"),
        (State::Paused, Some(WaitingOn::EligibleNodes)) => {
            format!("{place}: the profile has no node whose agent is connected")
        }
        (State::Paused, Some(WaitingOn::UnreachableNodes)) => format!(
            "{place}: {held}; {note} got it and cannot be reached. It goes on when they are back or their Node is \
             deleted; to go on without them approve the step: `kubectl patch pxr {object} --type=merge -p \
             '{{\"spec\":{{\"approvedStep\":{step}}}}}'`"
        ),
        (State::Paused, _) => format!(
            "{place}: inconclusive: {note}. It goes on when they are back; set spec.paused to true and back to false to \
             start the step with other nodes, or set spec.abort"
        ),
        (State::Progressing, Some(WaitingOn::HealthyNodes)) => {
            format!("{place}: {held}; too many nodes are out of order for another reason")
        }
        (State::Progressing, _) if overdue => format!("{place}: {held}; no node has advanced for too long"),
        (State::Progressing, _) => format!("{place}: {held}"),
        (State::RollingBack, _) => {
            format!("{}; {touched} nodes are still to be returned to {way_back}", why(progress))
        }
        (State::Failed | State::Aborted, _) => {
            format!("{}; all nodes were returned to {way_back}", why(progress))
        }
        (State::Superseded, _) => "a newer revision took its place".to_owned(),
        (State::Complete, _) => held,
    }
}

/// Describes the revisions to which its nodes return or returned. Nodes of one rollout can return to revisions of several profiles.
fn way_back(rollout: &Rollout, progress: &Progress, survey: &Survey<'_>) -> String {
    let revisions = match progress.state {
        State::RollingBack => survey.returned(&rollout.stable).into_values().collect(),
        State::Failed | State::Aborted => survey.assigned(),
        _ => Vec::new(),
    };
    let mut nodes: BTreeMap<Revision, usize> = BTreeMap::new();
    for revision in revisions {
        *nodes.entry(revision).or_default() += 1;
    }
    match nodes.len() {
        0 => rollout.stable.to_string(),
        1 => nodes.into_keys().map(|revision| revision.to_string()).collect(),
        _ => {
            let each = nodes.iter().map(|(revision, nodes)| format!("{revision} ({nodes})"));
            format!("what they had before: {}", each.collect::<Vec<_>>().join(", "))
        }
    }
}

/// The stable revision, if it is one of the rollout's own profile.
fn earlier(rollout: &Rollout) -> String {
    if rollout.stable.profile == rollout.target.profile {
        rollout.stable.to_string()
    } else {
        "what they had before".to_owned()
    }
}

/// The evidence of the first failure.
fn why(progress: &Progress) -> String {
    let Some(first) = progress.failures.first() else { return "aborted by spec.abort".to_owned() };
    let mut text = format!("{} on node {}: {}", first.reason, first.node, first.message);
    if first.errno != 0 {
        text.push_str(&format!(" (errno {})", first.errno));
    }
    if !first.trace.is_empty() {
        text.push_str(&format!(" (trace {})", first.trace));
    }
    if progress.failed > 1 {
        text.push_str(&format!(" (and {} more nodes)", progress.failed - 1));
    }
    text
}

fn conditions(progress: &Progress, message: &str, overdue: bool) -> Vec<Condition> {
    let condition = |kind, holds, reason: Reason| Condition {
        kind,
        holds,
        reason: reason.as_str(),
        message: message.to_owned(),
    };
    let state = progress.state;
    let reason = match (state, progress.waiting_on) {
        (State::Failed | State::RollingBack, _) if progress.failed > 0 => Reason::NodeFailed,
        (State::RollingBack, _) => Reason::Aborted,
        (State::Paused, Some(WaitingOn::Approval)) => Reason::WaitingForApproval,
        (State::Paused, Some(WaitingOn::EligibleNodes)) => Reason::NoEligibleNodes,
        (State::Paused, Some(WaitingOn::CanaryNodes)) => Reason::Inconclusive,
        (State::Paused, Some(WaitingOn::UnreachableNodes)) => Reason::UnreachableNodes,
        (State::Progressing | State::Pending, _) if overdue => Reason::ProgressDeadlineExceeded,
        _ => state.into(),
    };
    let stalled = overdue
        || matches!(state, State::Failed | State::Aborted | State::RollingBack | State::Frozen)
        || matches!(reason, Reason::NoEligibleNodes | Reason::Inconclusive | Reason::UnreachableNodes);
    let mut conditions = vec![
        condition(ConditionType::Reconciling, !stalled && !state.is_final(), reason),
        condition(ConditionType::Stalled, stalled, reason),
    ];
    // Ready=False would read as "in progress", and a superseded rollout neither succeeds nor continues.
    if state != State::Superseded {
        conditions.insert(0, condition(ConditionType::Ready, state == State::Complete, reason));
    }
    conditions
}

pub(super) fn transitions(rollout: &Rollout, after: &Progress, status: &Status) -> Vec<Transition> {
    let before = &rollout.progress;
    let mut transitions = Vec::new();
    for step in before.steps_done..after.steps_done {
        let message = format!("step {}/{} is done", step + 1, status.steps);
        transitions.push(Transition { reason: "StepDone", warning: false, message });
    }
    // A new reason to wait is reported; a new number of updating nodes is not.
    let kept = before.state == after.state
        && (after.state == State::Progressing || before.waiting_on == after.waiting_on);
    if kept {
        return transitions;
    }
    let (reason, warning) = match (after.state, after.waiting_on) {
        (State::Pending, _) => ("RolloutPending", false),
        (State::Progressing, _) if before.state == State::Pending => ("RolloutStarted", false),
        (State::Progressing, _) if after.steps_done > before.steps_done => return transitions,
        (State::Progressing, _) => ("RolloutProgressing", false),
        (State::Soaking, _) => ("SoakStarted", false),
        (State::Paused, Some(WaitingOn::Approval)) => ("WaitingForApproval", false),
        (State::Paused, Some(WaitingOn::Resume)) => ("RolloutPaused", false),
        (State::Paused, _) => ("RolloutInconclusive", true),
        (State::Frozen, _) => ("RolloutFrozen", true),
        (State::RollingBack, _) => ("RollingBack", true),
        (State::Complete, _) => ("RolloutComplete", false),
        (State::Failed, _) => ("RolloutFailed", true),
        (State::Aborted, _) => ("RolloutAborted", true),
        (State::Superseded, _) => ("RolloutSuperseded", false),
    };
    transitions.push(Transition { reason, warning, message: status.message.clone() });
    transitions
}
