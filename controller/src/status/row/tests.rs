//! Observations, and the columns that `kubectl get proxystatus` prints for them.

use k8s_openapi::jiff::{SignedDuration, Timestamp, ToSpan as _};
use switchtower_admin_api::{NodeReason as Reason, NodeState as State};
use switchtower_core::locality::{Detection, Locality};
use switchtower_crds::ProxyStatusStatus;
use switchtower_proto::v1::{Deviation, Deviations, ProxyMode, SettingsCause, SettingsDeviation};

use super::{Absence, DISCONNECT_GRACE, Inputs, Row, api_time, row};
use crate::status::absence::Blocker;
use crate::status::observation::{Loss, Observation, RefusedGeneration};

fn now() -> Timestamp {
    Timestamp::from_second(1_000_000).unwrap()
}

fn ago(seconds: i64) -> Timestamp {
    now() - seconds.seconds()
}

fn healthy() -> Observation {
    Observation {
        session: 3,
        since: ago(60),
        desired: 10,
        sent: 10,
        applied: 10,
        acknowledged: true,
        digest: Some([0xab; 16]),
        agent_version: "0.1.0".into(),
        kernel_version: "6.1.0".into(),
        counts: Some((2, 6)),
        settings: Some(("builtin".into(), 0)),
        ..Observation::default()
    }
}

fn make(observation: Option<&Observation>, previous: Option<&ProxyStatusStatus>, settled: bool) -> Row {
    make_with(observation, None, previous, settled)
}

fn make_with(
    observation: Option<&Observation>,
    blocker: Option<&Blocker>,
    previous: Option<&ProxyStatusStatus>,
    settled: bool,
) -> Row {
    let absence = if settled { Absence::Certain } else { Absence::Expected(DISCONNECT_GRACE) };
    make_absent(observation, blocker, previous, absence)
}

fn make_absent(
    observation: Option<&Observation>,
    blocker: Option<&Blocker>,
    previous: Option<&ProxyStatusStatus>,
    absence: Absence,
) -> Row {
    let row_generation = Some(1);
    let (replica, now, ahead) = ("tower-0", now(), SignedDuration::ZERO);
    row(Inputs { observation, blocker, previous, row_generation, replica, absence, now, ahead })
}

/// The clock of the API server is ahead of this process' by an hour.
#[test]
fn times_are_those_of_the_api_server() {
    let observation = Observation { applied: 9, behind_since: Some(ago(60)), ..healthy() };
    let row = row(Inputs {
        observation: Some(&observation),
        blocker: None,
        previous: None,
        row_generation: Some(1),
        replica: "tower-0",
        absence: Absence::Certain,
        now: now(),
        ahead: SignedDuration::from_hours(1),
    });
    assert_eq!(columns(&row), ("Progressing".into(), "False".into(), "Behind".into()));
    let hour = |at: Timestamp| api_time(at + 1.hour());
    assert_eq!(row.status.behind_since, Some(hour(ago(60))));
    assert_eq!(row.status.agent.unwrap().since, Some(hour(healthy().since)));
    assert!(row.status.conditions.iter().all(|one| one.last_transition_time == hour(now())));
}

/// STATE, Ready and its reason.
fn columns(row: &Row) -> (String, String, String) {
    let ready = row.status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    (row.status.state.clone(), ready.status.clone(), ready.reason.clone())
}

#[track_caller]
fn check(observation: &Observation, state: &str, ready: &str, reason: &str) -> Row {
    let row = make(Some(observation), None, true);
    assert_eq!(columns(&row), (state.to_owned(), ready.to_owned(), reason.to_owned()));
    assert_eq!(row.state.as_str(), state);
    row
}

#[test]
fn healthy_node_is_synced() {
    let row = check(&healthy(), "Synced", "True", "UpToDate");
    let kinds: Vec<_> = row.status.conditions.iter().map(|condition| condition.type_.as_str()).collect();
    assert_eq!(
        kinds,
        ["Ready", "Connected", "Programmed", "Consistent", "Exclusive", "LocalDetection", "KernelSettings"]
    );
    assert!(row.status.conditions.iter().all(|c| c.status == "True" && c.observed_generation == Some(1)));
    assert_eq!(row.status.profile.unwrap().revision_name, "builtin@0");
    assert_eq!(row.status.digest.unwrap(), "ab".repeat(16));
    assert_eq!(row.status.connection.unwrap().session, 3);
    assert_eq!(row.check_after, None);
}

#[test]
fn kernel_settings_not_in_force_are_a_condition() {
    let unset = vec!["nf_conntrack_max is 262144, wanted 524288: Read-only file system".to_owned()];
    let row = check(&Observation { unset_kernel_settings: unset, ..healthy() }, "Synced", "True", "UpToDate");
    let condition = row.status.conditions.iter().find(|one| one.type_ == "KernelSettings").unwrap();
    assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "NotInForce"));
    assert!(condition.message.contains("262144") && condition.message.contains("conntrack-sysctls"));
}

#[test]
fn drain_gate_that_does_not_work_is_a_condition() {
    let drain_gate_failure = "cannot listen on 127.0.0.1:9910: Address already in use".to_owned();
    let row = check(&Observation { drain_gate_failure, ..healthy() }, "Synced", "True", "UpToDate");
    let condition = row.status.conditions.iter().find(|one| one.type_ == "DrainGate").unwrap();
    assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "NotInForce"));
    assert!(condition.message.contains("9910"), "{}", condition.message);
}

#[test]
fn every_state_has_a_reason() {
    let deviating = |held, refused, settings: Option<SettingsCause>| {
        let in_force = |cause| SettingsDeviation { profile: "builtin".into(), revision: 0, cause };
        let settings = settings.map(|cause| in_force(cause as i32));
        let deviations = Deviations { held, refused, settings, ..Deviations::default() };
        Observation { deviations: Some(deviations), ..healthy() }
    };
    check(&deviating(3, 0, None), "Deviating", "False", "DeletionsHeld");
    check(&deviating(3, 1, None), "Deviating", "False", "ItemsRefused");
    check(&deviating(0, 0, Some(SettingsCause::RolledBack)), "Deviating", "False", "RolledBack");
    check(&deviating(0, 1, Some(SettingsCause::Trial)), "Progressing", "False", "SettingsOnTrial");
    check(&Observation { acknowledged: false, ..healthy() }, "Progressing", "False", "Programming");
    let behind = |seconds| Observation { applied: 9, behind_since: Some(ago(seconds)), ..healthy() };
    check(&behind(60), "Progressing", "False", "Behind");
    let row = check(&behind(2), "Synced", "True", "UpToDate");
    assert_eq!((row.check_after.unwrap().as_secs(), row.status.behind_since), (3, None));
    check(&Observation { drift_at: Some(ago(5)), ..healthy() }, "Drifted", "False", "ForeignChange");
    check(&Observation { drift_at: Some(ago(50)), ..healthy() }, "Synced", "True", "UpToDate");
    check(&Observation { foreign_proxy: true, ..healthy() }, "NotExclusive", "True", "ForeignProxy");
    let detection = Detection::PodCidrs(vec!["10.244.77.0/24".parse().unwrap()]);
    let samples = vec!["10.244.3.11".parse().unwrap()];
    let locality = Locality { detection, missed: 1, samples };
    let outside = Observation { locality, foreign_proxy: true, ..healthy() };
    check(&outside, "PodsNotLocal", "True", "PodsOutside");
    check(&Observation { lost_since: Some(ago(60)), ..healthy() }, "Stale", "False", "AgentDisconnected");
    let silent = Observation { lost_since: Some(ago(60)), loss: Loss::Silent, ..healthy() };
    check(&silent, "Stale", "False", "AgentSilent");
}

#[test]
fn last_error_is_kept_until_the_node_is_synced() {
    let failure =
        RefusedGeneration { reason: Reason::KernelRefused, detail: "EPERM".into(), errno: 1, generation: 11 };
    let failed = Observation { failure: Some(failure), ..healthy() };
    let first = check(&failed, "ApplyFailed", "False", "KernelRefused");
    assert_eq!(first.status.last_error.as_ref().unwrap().errno, 1);
    let behind = Observation { behind_since: Some(ago(60)), ..healthy() };
    let then = make(Some(&behind), Some(&first.status), true);
    assert_eq!(then.status.last_error, first.status.last_error);
    let well = make(Some(&healthy()), Some(&then.status), true);
    assert_eq!(well.status.last_error, None);
}

#[test]
fn short_interruption_is_no_transition() {
    let row = check(&Observation { lost_since: Some(ago(4)), ..healthy() }, "Synced", "True", "UpToDate");
    assert_eq!(row.check_after.unwrap().as_secs(), 3);
    assert!(row.status.agent.unwrap().connected_to.is_some());
}

#[test]
fn node_without_an_agent_is_absent() {
    let row = make(None, None, false);
    assert_eq!(columns(&row), ("Absent".into(), "False".into(), "NoAgent".into()));
    assert_eq!(row.status.connection, None);
}

#[test]
fn rows_stay_after_a_restart_until_agents_could_reconnect() {
    let before = make(Some(&healthy()), None, true).status;
    let early = make(None, Some(&before), false);
    assert_eq!((early.status.clone(), early.check_after), (before.clone(), Some(DISCONNECT_GRACE)));
    assert!(!early.confirmed, "the agent was not observed");
    let late = make(None, Some(&before), true);
    assert_eq!(columns(&late), ("Stale".into(), "False".into(), "AgentDisconnected".into()));
    assert_eq!(late.status.generation, before.generation, "the last generation is kept");
    assert_eq!(late.status.agent.unwrap().connected_to, None);
}

#[test]
fn overdue_agent_makes_readiness_unknown() {
    let overdue = |before: &ProxyStatusStatus| make_absent(None, None, Some(before), Absence::Overdue);
    let before = make(Some(&healthy()), None, true).status;
    let row = overdue(&before);
    assert_eq!(columns(&row), ("Unknown".into(), "Unknown".into(), "AwaitingAgent".into()));
    assert_eq!(row.status.generation, before.generation);
    assert_eq!(columns(&overdue(&row.status)), columns(&row), "the row is stable");
    let migrating = Observation { foreign_proxy: true, ..healthy() };
    assert_eq!(overdue(&make(Some(&migrating), None, true).status).status.state, "Unknown");
    // A row that is not ready stays unchanged.
    let failed = Observation { drift_at: Some(ago(5)), ..healthy() };
    let failed = make(Some(&failed), None, true).status;
    let row = overdue(&failed);
    assert_eq!((row.status, row.confirmed), (failed, false));
    // An agent that never connected is not overdue.
    assert_eq!(make_absent(None, None, None, Absence::Overdue).status.state, "Absent");
}

#[test]
fn transition_time_changes_only_with_the_status() {
    let mut before = make(Some(&healthy()), None, true).status;
    for condition in &mut before.conditions {
        condition.last_transition_time.0 = ago(500);
    }
    let drifted =
        make(Some(&Observation { drift_at: Some(ago(1)), ..healthy() }), Some(&before), true).status;
    for condition in &drifted.conditions {
        let moved = matches!(condition.type_.as_str(), "Ready" | "Consistent");
        assert_eq!(condition.last_transition_time.0 == now(), moved, "{}", condition.type_);
    }
}

#[test]
fn samples_are_bounded_and_numbers_fit_the_api() {
    let samples = vec![Deviation { item: "frontend".into(), reason: "EINVAL".into(), errno: 22 }; 40];
    let deviations = Some(Deviations { refused: 40, samples, ..Deviations::default() });
    let status = make(Some(&Observation { deviations, desired: u64::MAX, ..healthy() }), None, true).status;
    assert_eq!(status.deviations.unwrap().samples.len(), 16);
    assert_eq!(status.generation.desired, i64::MAX);
}

#[test]
fn blocker_is_the_reason_of_an_absent_agent_only() {
    let blocker = Blocker { reason: "ErrImagePull".into(), message: "no such image".into() };
    let with = |observation: Option<&Observation>, previous: Option<&ProxyStatusStatus>| {
        let row = make_with(observation, Some(&blocker), previous, true);
        let connected = row.status.conditions.iter().find(|known| known.type_ == "Connected").unwrap();
        (columns(&row), connected.message.clone())
    };
    let expect = |state: &str| {
        ((state.to_owned(), "False".to_owned(), "ErrImagePull".to_owned()), "no such image".to_owned())
    };
    let lost = |seconds| Observation { lost_since: Some(ago(seconds)), ..healthy() };
    assert_eq!(with(None, None), expect("Absent"));
    assert_eq!(with(Some(&lost(60)), None), expect("Stale"));
    let before = make(Some(&healthy()), None, true).status;
    assert_eq!(with(None, Some(&before)), expect("Stale"));
    let synced = ("Synced".to_owned(), "True".to_owned(), "UpToDate".to_owned());
    assert_eq!(with(Some(&lost(4)), None).0, synced, "a short interruption is no transition");
    assert_eq!(with(Some(&healthy()), None).0, synced);
}

#[test]
fn shadow_is_ready_and_no_conflict_with_kube_proxy() {
    let shadow = Observation { mode: ProxyMode::Shadow, ..healthy() };
    for foreign_proxy in [true, false] {
        let observation = Observation { foreign_proxy, ..shadow.clone() };
        let row = make(Some(&observation), None, true);
        assert_eq!(row.state, State::Shadow);
        let condition = |kind: &str| row.status.conditions.iter().find(|one| one.type_ == kind).unwrap();
        assert_eq!(
            (condition("Ready").status.as_str(), condition("Ready").reason.as_str()),
            ("True", "ShadowMode")
        );
        assert_eq!(condition("Exclusive").status, "True");
        let missing = condition("Exclusive").message.contains("check that another proxy");
        assert_eq!(missing, !foreign_proxy);
    }
    let behind = Observation { behind_since: Some(ago(60)), applied: 9, ..shadow.clone() };
    assert_eq!(make(Some(&behind), None, true).state, State::Progressing);
    let lost = Observation { lost_since: Some(ago(60)), ..shadow };
    assert_eq!(make(Some(&lost), None, true).state, State::Stale);
}
