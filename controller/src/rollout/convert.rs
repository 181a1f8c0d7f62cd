//! Conversions between API objects and the model of decisions.
//!
//! Every conversion is total. Values that the API server should have refused are read in the way that affects the fewest
//! nodes.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{self as meta, Condition};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use switchtower_core::rollout::profile::{Past, Profile};
use switchtower_core::rollout::{
    self as core, Decision, FailedNode, Progress, Quantity, Requirement, Revision, Rollout, Selector, State,
    Step, Strategy, Time, WaitingOn,
};
use switchtower_crds as api;

/// Maximum number of excluded nodes that a status names.
const EXCLUDED: usize = 16;

/// Converts to milliseconds since 1970.
pub(super) fn time(at: Timestamp) -> Time {
    Time(at.as_millisecond())
}

/// Rounds up to whole seconds, the precision of the API, so that durations from there are never too short.
pub(super) fn api_time(at: Time) -> meta::Time {
    let seconds = at.0.div_euclid(1_000) + i64::from(at.0.rem_euclid(1_000) != 0);
    meta::Time(Timestamp::from_second(seconds).unwrap_or_default())
}

/// Reads a time that was rounded up: it must not be in the future.
fn stored_time(at: &meta::Time, now: Time) -> Time {
    let at = time(at.0);
    if at > now && at.0 - now.0 < 1_000 { now } else { at }
}

/// Converts a non-negative number from the API.
pub(super) fn number(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// Converts a number to the API.
pub(super) fn api_number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Converts a count to the API.
pub(super) fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Returns the target of a rollout.
pub(super) fn target(spec: &api::ProxyRolloutSpec) -> Revision {
    Revision { profile: spec.profile.as_str().into(), number: number(spec.revision) }
}

/// Returns the revision to which nodes return while no revision of the profile is complete.
pub(super) fn fallback(spec: &api::ProxyRolloutSpec) -> Revision {
    Revision { profile: spec.fallback.profile.as_str().into(), number: number(spec.fallback.revision) }
}

/// Returns the revision that takes over the nodes of a deleted profile.
pub(super) fn handover(spec: &api::ProxyRolloutSpec) -> Option<Revision> {
    let to = spec.handover.as_ref()?;
    Some(Revision { profile: to.profile.as_str().into(), number: number(to.revision) })
}

/// Reads the assignment of a row.
pub(super) fn assigned(profile: &api::ProfileAssignment) -> core::Assignment {
    let revision = Revision { profile: profile.name.as_str().into(), number: number(profile.revision) };
    let at = profile.assigned_at.as_ref().map_or(Time(0), |at| time(at.0));
    let previous = profile
        .previous
        .as_ref()
        .map(|known| Revision { profile: known.name.as_str().into(), number: number(known.revision) });
    core::Assignment { revision, at, trace: profile.trace_id.clone().unwrap_or_default(), previous }
}

/// Builds the assignment of a row.
pub(super) fn assignment(
    revision: &Revision,
    trace: u128,
    previous: Option<&Revision>,
    now: Time,
) -> api::ProfileAssignment {
    api::ProfileAssignment {
        previous: previous.map(|previous| api::PreviousRevision {
            name: previous.profile.to_string(),
            revision: api_number(previous.number),
        }),
        name: revision.profile.to_string(),
        revision: api_number(revision.number),
        assigned_at: Some(api_time(now)),
        trace_id: Some(format!("{trace:032x}")),
    }
}

/// Converts a selector; `None` selects everything.
pub(super) fn selector(from: Option<&api::NodeSelector>) -> Selector {
    let Some(from) = from else { return Selector::default() };
    let labels = from.match_labels.iter();
    let labels = labels.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()]));
    let expressions = from.match_expressions.iter().map(|requirement| {
        let (key, values) = (requirement.key.clone(), requirement.values.clone());
        match requirement.operator {
            api::SelectorOperator::In => Requirement::In(key, values),
            api::SelectorOperator::NotIn => Requirement::NotIn(key, values),
            api::SelectorOperator::Exists => Requirement::Exists(key),
            api::SelectorOperator::DoesNotExist => Requirement::DoesNotExist(key),
        }
    });
    Selector { requirements: labels.chain(expressions).collect() }
}

/// Converts a quantity; an invalid one counts as one node.
fn quantity(from: &IntOrString) -> Quantity {
    match from {
        IntOrString::Int(number) => Quantity::Number(u32::try_from(*number).unwrap_or(1)),
        IntOrString::String(text) => {
            let percent = text.strip_suffix('%').and_then(|text| text.parse::<u8>().ok());
            percent.filter(|percent| *percent <= 100).map_or(Quantity::Number(1), Quantity::Percent)
        }
    }
}

fn seconds(value: Option<i32>, or: u64) -> Duration {
    Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(or))
}

/// Returns the steps of a handover: those of the deleted profile without node selectors, which the nodes may no longer
/// match, and without approvals, because a user deleted the profile.
pub(super) fn handover_steps(steps: &[api::RolloutStep]) -> Vec<api::RolloutStep> {
    let plain =
        |step: &api::RolloutStep| api::RolloutStep { node_selector: None, approval: None, ..step.clone() };
    steps.iter().map(plain).collect()
}

/// Returns the default steps: one node and a soak, a quarter, all.
#[must_use]
pub(super) fn default_steps() -> Vec<api::RolloutStep> {
    let step = |name: &str, nodes, soak_seconds| api::RolloutStep {
        name: Some(name.to_owned()),
        node_selector: None,
        nodes,
        spread_by: Vec::new(),
        soak_seconds,
        approval: None,
    };
    vec![
        step("first", IntOrString::Int(1), Some(60)),
        step("quarter", IntOrString::String("25%".to_owned()), None),
        step("all", IntOrString::String("100%".to_owned()), None),
    ]
}

fn strategy(from: &api::RolloutStrategy) -> Strategy {
    let step = |step: &api::RolloutStep| Step {
        name: step.name.clone().unwrap_or_default(),
        selector: step.node_selector.as_ref().map(|from| selector(Some(from))),
        nodes: quantity(&step.nodes),
        spread_by: step.spread_by.clone(),
        soak: Duration::from_secs(step.soak_seconds.map_or(0, number)),
        manual: step.approval == Some(api::Approval::Manual),
    };
    let gates = from.gates.clone().unwrap_or_default();
    Strategy {
        steps: from.steps.iter().map(step).collect(),
        max_unavailable: from.max_unavailable.as_ref().map_or(Quantity::Percent(10), quantity),
        apply_deadline: seconds(from.apply_deadline_seconds, 60),
        progress_deadline: seconds(from.progress_deadline_seconds, 600),
        maximum_reconnects: gates
            .maximum_reconnects
            .and_then(|value| usize::try_from(value).ok())
            .unwrap_or(3),
        freeze_percent: gates
            .freeze_percent
            .and_then(|value| u8::try_from(value).ok())
            .unwrap_or(20)
            .min(100),
    }
}

/// Converts a profile.
pub(super) fn profile(object: &api::ProxyProfile) -> Profile {
    let metadata = &object.metadata;
    Profile {
        name: metadata.name.as_deref().unwrap_or_default().into(),
        uid: metadata.uid.as_deref().unwrap_or_default().into(),
        priority: object.spec.priority.unwrap_or(0),
        created: metadata.creation_timestamp.as_ref().map_or(Time(0), |at| time(at.0)),
        selector: selector(object.spec.node_selector.as_ref()),
        hash: hash(&object.spec),
        deleting: metadata.deletion_timestamp.is_some(),
    }
}

/// Returns the SHA-256 of the fields that define a revision, as 64 hexadecimal digits.
fn hash(spec: &api::ProxyProfileSpec) -> String {
    use std::fmt::Write as _;
    let parts = (&spec.settings, &spec.node_selector, &spec.change_cause);
    // Maps are sorted, and no field can fail to serialize.
    let text = serde_json::to_vec(&parts).unwrap_or_default();
    Sha256::digest(&text).iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns the UID of the profile for which the controller created the rollout; `None` for other objects.
pub(super) fn owner(object: &api::ProxyRollout) -> Option<Arc<str>> {
    let owners = object.metadata.owner_references.iter().flatten();
    let mut profiles = owners.filter(|owner| owner.kind == "ProxyProfile" && owner.controller == Some(true));
    profiles.find(|owner| owner.name == object.spec.profile).map(|owner| owner.uid.as_str().into())
}

/// Converts a rollout for decisions about its profile; `None` if the controller did not create it.
pub(super) fn past(object: &api::ProxyRollout) -> Option<Past> {
    let status = object.status.as_ref();
    Some(Past {
        owner: owner(object)?,
        target: target(&object.spec),
        hash: object.spec.hash.clone(),
        fallback: fallback(&object.spec),
        handover: handover(&object.spec),
        state: status.and_then(|status| State::from_name(&status.state)).unwrap_or_default(),
    })
}

/// Returns true while a rollout is active.
pub(super) fn is_under_way(object: &api::ProxyRollout) -> bool {
    past(object).is_some_and(|past| !past.state.is_final())
}

/// Converts a rollout for its next decision.
pub(super) fn rollout(object: &api::ProxyRollout, stable: Revision, superseded: bool, now: Time) -> Rollout {
    let spec = &object.spec;
    Rollout {
        uid: object.metadata.uid.as_deref().unwrap_or_default().into(),
        target: target(spec),
        stable,
        strategy: strategy(&spec.strategy),
        paused: spec.paused.unwrap_or(false),
        approved_steps: spec.approved_step.and_then(|step| usize::try_from(step).ok()).unwrap_or(0),
        // Deleting a rollout aborts it, except a handover: a foreground deletion of its profile deletes it too.
        abort: spec.abort.unwrap_or(false)
            || (object.metadata.deletion_timestamp.is_some() && spec.handover.is_none()),
        superseded,
        handover: handover(spec),
        progress: object.status.as_ref().map(|status| progress(status, now)).unwrap_or_default(),
    }
}

fn progress(status: &api::ProxyRolloutStatus, now: Time) -> Progress {
    let from = &status.progress;
    let at = |at: &Option<meta::Time>| at.as_ref().map(|at| stored_time(at, now));
    let count = |value: i64| usize::try_from(value).unwrap_or(0);
    let failures = status.failures.iter().map(|failure| FailedNode {
        node: failure.node.clone(),
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        errno: failure.errno,
        trace: failure.trace_id.clone().unwrap_or_default(),
    });
    Progress {
        state: State::from_name(&status.state).unwrap_or_default(),
        waiting_on: status.waiting_on.as_deref().and_then(WaitingOn::from_name),
        steps_done: usize::try_from(from.steps_done).unwrap_or(0),
        step_began_at: at(&from.step_began_at),
        soaking_since: at(&from.soaking_since),
        advanced_at: at(&from.advanced_at),
        updated: count(from.updated_nodes),
        failed: count(status.failed),
        failures: failures.collect(),
    }
}

/// Builds the status that stores a decision. Unchanged conditions keep their times.
pub(super) fn status(
    object: &api::ProxyRollout,
    rollout: &Rollout,
    decision: &Decision,
    now: Time,
) -> api::ProxyRolloutStatus {
    let Decision { progress, status, .. } = decision;
    let previous = object.status.as_ref();
    let failures = progress.failures.iter().map(|failure| api::NodeFailure {
        node: failure.node.clone(),
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        errno: failure.errno,
        trace_id: Some(failure.trace.clone()).filter(|trace| !trace.is_empty()),
    });
    let excluded = status.excluded.iter().take(EXCLUDED);
    api::ProxyRolloutStatus {
        observed_generation: object.metadata.generation,
        state: progress.state.as_str().to_owned(),
        target: rollout.target.to_string(),
        stable: rollout.stable.to_string(),
        progress: api::RolloutProgress {
            steps_done: i32::try_from(progress.steps_done).unwrap_or(i32::MAX),
            current_step: i32::try_from(status.step).unwrap_or(i32::MAX),
            step: format!("{}/{}", status.step, status.steps),
            touched_nodes: count(status.touched),
            updated_nodes: count(status.updated),
            eligible_nodes: count(status.eligible),
            updated: format!("{}/{}", status.updated, status.eligible),
            step_began_at: progress.step_began_at.map(api_time),
            soaking_since: progress.soaking_since.map(api_time),
            advanced_at: progress.advanced_at.map(api_time),
        },
        waiting_on: progress.waiting_on.map(|waiting| waiting.as_str().to_owned()),
        failed: count(progress.failed),
        failures: failures.collect(),
        excluded: api::ExcludedNodes {
            count: count(status.excluded.len()),
            nodes: excluded.map(|excluded| format!("{} ({})", excluded.node, excluded.reason)).collect(),
        },
        acknowledgements: acknowledgements(
            status.acknowledgements.as_ref(),
            previous.and_then(|previous| previous.acknowledgements.as_ref()),
        ),
        conditions: conditions(
            &status.conditions,
            previous.map_or(&[], |previous| &previous.conditions),
            object.metadata.generation,
            now,
        ),
    }
}

/// Keeps the stored acknowledgements if they cover more nodes: an earlier controller process received them.
fn acknowledgements(
    now: Option<&core::Acknowledgements>,
    before: Option<&api::RolloutAcknowledgements>,
) -> Option<api::RolloutAcknowledgements> {
    let milliseconds = |took: Duration| i64::try_from(took.as_millis()).unwrap_or(i64::MAX);
    let now = now.map(|now| api::RolloutAcknowledgements {
        nodes: count(now.nodes),
        median_milliseconds: milliseconds(now.median),
        slowest_milliseconds: milliseconds(now.slowest),
        slowest_node: now.slowest_node.to_string(),
    });
    match (now, before) {
        (Some(now), Some(before)) if now.nodes < before.nodes => Some(before.clone()),
        (now, before) => now.or_else(|| before.cloned()),
    }
}

/// Converts conditions. Unchanged ones keep the time of their last transition.
pub(super) fn conditions(
    from: &[core::Condition],
    previous: &[Condition],
    generation: Option<i64>,
    now: Time,
) -> Vec<Condition> {
    let condition = |condition: &core::Condition| {
        let known = previous.iter().find(|known| known.type_ == condition.kind.as_str());
        let status = if condition.holds { "True" } else { "False" };
        let known = known.filter(|known| known.status == status);
        Condition {
            type_: condition.kind.as_str().to_owned(),
            status: status.to_owned(),
            reason: condition.reason.to_owned(),
            message: condition.message.clone(),
            observed_generation: generation,
            last_transition_time: known
                .map_or_else(|| api_time(now), |known| known.last_transition_time.clone()),
        }
    };
    from.iter().map(condition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_progress_is_read_back() {
        let progress_before = Progress {
            state: State::Paused,
            waiting_on: Some(WaitingOn::Approval),
            steps_done: 2,
            step_began_at: Some(Time(5_000)),
            soaking_since: Some(Time(7_000)),
            advanced_at: Some(Time(9_000)),
            updated: 3,
            failed: 1,
            failures: vec![FailedNode {
                node: "n".into(),
                reason: "Drifted".into(),
                ..FailedNode::default()
            }],
        };
        let mut object = api::ProxyRollout::default();
        object.spec.strategy.steps = default_steps();
        let mut before = rollout(&object, Revision::builtin(), false, Time(9_500));
        before.progress = progress_before.clone();
        before.paused = false;
        let mut decision = core::decide(&before, &[], Time(9_500));
        decision.progress = progress_before.clone();
        decision.status.updated = 3;
        let status = status(&object, &before, &decision, Time(9_500));
        assert_eq!(progress(&status, Time(9_500)), progress_before);
    }

    #[test]
    fn times_are_rounded_up_and_never_lie_ahead() {
        let stored = api_time(Time(12_001));
        assert_eq!(time(stored.0), Time(13_000));
        assert_eq!(stored_time(&stored, Time(12_001)), Time(12_001));
        assert_eq!(stored_time(&stored, Time(20_000)), Time(13_000));
        assert_eq!(stored_time(&stored, Time(1_000)), Time(13_000), "a clock that was set back");
        assert_eq!(time(api_time(Time(12_000)).0), Time(12_000));
    }

    #[test]
    fn hash_covers_settings_selector_and_cause() {
        let spec = |value| serde_json::from_value::<api::ProxyProfileSpec>(value).unwrap();
        let base = hash(&spec(serde_json::json!({})));
        for same in
            [serde_json::json!({"priority": 7}), serde_json::json!({"strategy": {"maxUnavailable": 1}})]
        {
            assert_eq!(hash(&spec(same)), base);
        }
        for other in [
            serde_json::json!({"settings": {"masqueradeAll": true}}),
            serde_json::json!({"nodeSelector": {"matchLabels": {"a": "b"}}}),
            serde_json::json!({"changeCause": "again"}),
        ] {
            assert_ne!(hash(&spec(other)), base);
        }
        assert_eq!(base.len(), 64);
    }

    #[test]
    fn invalid_quantities_touch_one_node() {
        for (text, expected) in
            [("25%", Quantity::Percent(25)), ("101%", Quantity::Number(1)), ("x", Quantity::Number(1))]
        {
            assert_eq!(quantity(&IntOrString::String(text.to_owned())), expected, "{text}");
        }
        assert_eq!(quantity(&IntOrString::Int(-3)), Quantity::Number(1));
    }
}
