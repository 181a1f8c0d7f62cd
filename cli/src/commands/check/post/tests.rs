//! Injected faults and the cause that `check` names for each. The rows are made by the controller's own code from what
//! it observes of agents and Pods.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp, ToSpan as _};
use serde_json::{Value, json};
use switchtower_admin_api::NodeReason;
use switchtower_controller::status::absence::ask::{Answer, Connection};
use switchtower_controller::status::absence::{Agents, Blocker, pod::agent_pod};
use switchtower_controller::status::observation::{Observation, RefusedGeneration, nack_reason};
use switchtower_controller::status::row::{Absence, Inputs, row};
use switchtower_crds::{ProxyStatus, ProxyStatusStatus};
use switchtower_proto::v1::{Deviations, DriftCause, NackReason, SettingsCause, SettingsDeviation};

use super::super::{Verdict, codes_of, text};
use super::*;
use crate::output::Style;

fn now() -> Timestamp {
    Timestamp::from_second(1_000_000).unwrap()
}

fn ago(seconds: i64) -> Timestamp {
    now() - seconds.seconds()
}

fn healthy() -> Observation {
    Observation {
        session: 3,
        since: ago(600),
        desired: 10,
        sent: 10,
        applied: 10,
        acknowledged: true,
        agent_version: "0.1.0".into(),
        settings: Some(("builtin".into(), 0)),
        ..Observation::default()
    }
}

/// Faults to inject into a node.
enum Fault {
    /// Observed state of the agent's session.
    Observed(Box<Observation>),
    /// The stream ended a minute ago, for this reason if one is known.
    Lost(Option<Blocker>),
    /// No agent ever came.
    Never(Option<Blocker>),
    /// The controller restarted and the agent has not connected.
    Restarted(Absence),
}

/// The node's row, as the controller makes it.
fn row_of(name: &str, fault: &Fault) -> ProxyStatus {
    let make = |observation: Option<&Observation>, blocker, previous, absence| {
        row(Inputs {
            observation,
            blocker,
            previous,
            row_generation: Some(1),
            replica: "controller-0",
            absence,
            now: now(),
            ahead: SignedDuration::ZERO,
        })
        .status
    };
    let before: ProxyStatusStatus = make(Some(&healthy()), None, None, Absence::Certain);
    let lost = Observation { lost_since: Some(ago(60)), ..healthy() };
    let mut status = match fault {
        Fault::Observed(observation) => make(Some(&**observation), None, Some(&before), Absence::Certain),
        Fault::Lost(blocker) => make(Some(&lost), blocker.as_ref(), Some(&before), Absence::Certain),
        Fault::Never(blocker) => make(None, blocker.as_ref(), None, Absence::Certain),
        Fault::Restarted(absence) => make(None, None, Some(&before), *absence),
    };
    status.reported_at = Some(Time(ago(5)));
    status.stale_after = Some(Time(ago(-25)));
    let mut object = ProxyStatus::new(name, Default::default());
    object.status = Some(status);
    object
}

/// Blocker of the agent of node-1, read from its Pod and from its health port.
fn blocker(container: &Value, phase: &str, answer: Option<Answer>) -> Option<Blocker> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "agent-x"},
        "spec": {"nodeName": "node-1", "containers": [{"name": "node-agent"}]},
        "status": {"phase": phase, "podIP": "192.0.2.1", "containerStatuses": [container]},
    }))
    .unwrap();
    let agents = Agents::default();
    agents.pods_listed(agent_pod(&pod).into_iter().collect());
    agents.set_missing(&"node-1".into(), true);
    if let Some(answer) = answer {
        agents.answered(&"node-1".into(), answer);
    }
    agents.blocker("node-1", None)
}

fn container(state: &Value) -> Value {
    json!({"name": "node-agent", "image": "", "imageID": "", "ready": false, "restartCount": 3, "state": state})
}

/// The agent runs and reports why it has no session.
fn says(reason: &str) -> Fault {
    let connection = Connection { connected: false, reason: reason.into(), detail: "as it says".into() };
    let running = container(&json!({"running": {"startedAt": null}}));
    Fault::Lost(blocker(&running, "Running", Some(Answer::Status(connection))))
}

fn waiting(reason: &str, message: &str) -> Fault {
    let state = json!({"waiting": {"reason": reason, "message": message}});
    Fault::Never(blocker(&container(&state), "Pending", None))
}

fn refused(reason: NackReason, errno: i32) -> Fault {
    let failure =
        RefusedGeneration { reason: nack_reason(reason), detail: "as it says".into(), errno, generation: 11 };
    Fault::Observed(Box::new(Observation { failure: Some(failure), ..healthy() }))
}

fn deviating(refused: u32, held: u32, cause: Option<SettingsCause>) -> Fault {
    let settings =
        cause.map(|cause| SettingsDeviation { profile: "default".into(), revision: 3, cause: cause.into() });
    let deviations = Deviations { refused, held, settings, ..Deviations::default() };
    Fault::Observed(Box::new(Observation { deviations: Some(deviations), ..healthy() }))
}

fn controller() -> ControllerInfo {
    ControllerInfo {
        replica: "controller-0".into(),
        version: "0.1.0".into(),
        upstream_age_milliseconds: Some(300),
        revision: 9,
        nodes: 3,
        connected: 3,
    }
}

fn diagnosed(rows: &[ProxyStatus]) -> Vec<Diagnosis> {
    rows.iter().map(|row| Diagnosis::new(row, now())).collect()
}

/// Every check that did not pass: its code and what it says.
fn blamed(checks: &[Check]) -> Vec<(&str, &str)> {
    let wrong = checks.iter().filter(|check| check.verdict != Verdict::Passed);
    wrong.map(|check| (check.code.unwrap_or_default(), &*check.what)).collect()
}

/// One of three nodes has the fault: exactly one cause is reported, with this code, reason and text.
#[track_caller]
fn blames(fault: &Fault, code: &str, words: &[&str]) {
    let well = Fault::Observed(Box::new(healthy()));
    let rows = [row_of("node-0", &well), row_of("node-1", fault), row_of("node-2", &well)];
    let checks = about_fleet(&diagnosed(&rows), &Ok(controller()));
    let blamed = blamed(&checks);
    assert_eq!(blamed.len(), 1, "{blamed:?}");
    assert_eq!(blamed[0].0, code, "{blamed:?}");
    for word in words.iter().chain(&["1 of 3 nodes (node-1)"]) {
        assert!(blamed[0].1.contains(word), "{word}: {blamed:?}");
    }
}

#[test]
fn healthy_fleet_gets_no_warning() {
    let behind = Observation { applied: 9, behind_since: Some(ago(2)), ..healthy() };
    let drifted = Observation { drift_at: Some(ago(50)), ..healthy() };
    let interrupted = Observation { lost_since: Some(ago(3)), ..healthy() };
    for observation in [healthy(), behind, drifted, interrupted] {
        let rows = [row_of("node-0", &Fault::Observed(Box::new(observation)))];
        let checks = about_fleet(&diagnosed(&rows), &Ok(controller()));
        assert_eq!(blamed(&checks), []);
    }
    let installed = Kinds { served: Kinds::ALL.map(str::to_owned).into(), terminating: vec![] };
    assert_eq!(blamed(&about_kinds(&installed)), []);
    assert_eq!(blamed(&about_profiles(&[])), []);
}

#[test]
fn absent_agents_reported_with_their_reason() {
    let reasons = [
        "BootstrapMissing",
        "BootstrapInvalid",
        "TokenMissing",
        "ControllerUntrusted",
        "ControllerUnreachable",
        "ControllerRefused",
        "SentAway",
        "StreamLost",
        "ProtocolError",
    ];
    for reason in reasons {
        blames(&says(reason), "ST0102", &[reason, "as it says"]);
    }
    blames(&Fault::Lost(None), "ST0102", &["AgentDisconnected"]);
    let silent = Answer::Failed("connection refused".into());
    let running = container(&json!({"running": {"startedAt": null}}));
    let killed = Fault::Lost(blocker(&running, "Running", Some(silent)));
    blames(&killed, "ST0102", &["AgentNotAnswering", "connection refused"]);
    blames(&waiting("ErrImagePull", "agent:9 not found"), "ST0101", &["ErrImagePull", "agent:9 not found"]);
    blames(&waiting("CrashLoopBackOff", "back-off 5m0s"), "ST0101", &["CrashLoopBackOff", "back-off"]);
    let ended = container(&json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}));
    blames(&Fault::Lost(blocker(&ended, "Running", None)), "ST0102", &["OOMKilled", "exit code 137"]);
    let elsewhere = Agents::default();
    let other = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "node-9", "containers": []}});
    elsewhere.pods_listed(agent_pod(&serde_json::from_value(other).unwrap()).into_iter().collect());
    blames(&Fault::Never(elsewhere.blocker("node-1", None)), "ST0101", &["NoAgentPod", "tolerations"]);
    blames(&Fault::Never(None), "ST0101", &["NoAgent"]);
    let down = Agents::default().blocker("node-1", Some("Kubelet stopped posting node status."));
    blames(&Fault::Lost(down), "ST0112", &["NodeStatusUnknown", "Kubelet stopped"]);
    let closed = Agents::default();
    closed.closed(Some(Blocker::new(
        NodeReason::ControllerNotListening,
        "another program uses 192.0.2.9:9443",
    )));
    let closed = closed.blocker("node-1", None);
    blames(&Fault::Lost(closed), "ST0306", &["ControllerNotListening", "192.0.2.9:9443"]);
    blames(&Fault::Restarted(Absence::Overdue), "ST0111", &["AwaitingAgent"]);
    blames(&Fault::Restarted(Absence::Certain), "ST0102", &["AgentDisconnected"]);
}

#[test]
fn connected_agents_diagnosed_by_their_reports() {
    blames(&refused(NackReason::Kernel, 1), "ST0104", &["KernelRefused", "generation 11", "errno 1"]);
    blames(&refused(NackReason::DigestMismatch, 0), "ST0104", &["DigestMismatch"]);
    blames(&refused(NackReason::OverLimit, 0), "ST0104", &["OverLimit"]);
    blames(&refused(NackReason::UnknownFeature, 0), "ST0104", &["UnknownFeature"]);
    blames(&deviating(2, 0, None), "ST0105", &["ItemsRefused", "2 items"]);
    blames(&deviating(0, 9, None), "ST0115", &["DeletionsHeld", "9 removals"]);
    blames(&deviating(0, 0, Some(SettingsCause::Trial)), "ST0113", &["SettingsOnTrial", "default@3"]);
    blames(&deviating(0, 0, Some(SettingsCause::RolledBack)), "ST0114", &["RolledBack", "default@3"]);
    let observed = |observation| Fault::Observed(Box::new(observation));
    let drift = Observation { drift_at: Some(ago(3)), drift_cause: DriftCause::TableDeleted, ..healthy() };
    blames(&observed(drift), "ST0106", &["ForeignChange", "table_deleted"]);
    let shared = Observation { foreign_proxy: true, ..healthy() };
    blames(&observed(shared), "ST0107", &["ForeignProxy", "kube-proxy"]);
    let behind = Observation { applied: 8, behind_since: Some(ago(60)), ..healthy() };
    blames(&observed(behind), "ST0103", &["Behind"]);
    let silent = Observation { acknowledged: false, ..healthy() };
    blames(&observed(silent), "ST0103", &["Programming"]);
}

#[test]
fn faults_of_the_controller_are_not_blamed_on_nodes() {
    let rows = [row_of("node-0", &Fault::Observed(Box::new(healthy())))];
    let nodes = diagnosed(&rows);
    let code = |nodes: &[Diagnosis], asked: Result<ControllerInfo, CliError>| -> Vec<String> {
        let checks = about_fleet(nodes, &asked);
        blamed(&checks).into_iter().map(|(code, _)| code.to_owned()).collect()
    };
    let away = || Err(CliError::coded(codes::CONTROLLER_UNREACHABLE, "refused"));
    assert_eq!(code(&nodes, away()), ["ST0301"]);
    let deaf = ControllerInfo { upstream_age_milliseconds: Some(31_000), ..controller() };
    assert_eq!(code(&nodes, Ok(deaf)), ["ST0302"]);
    let never = ControllerInfo { upstream_age_milliseconds: None, ..controller() };
    assert_eq!(code(&nodes, Ok(never)), ["ST0302"]);
    let lost = ControllerInfo { connected: 2, ..controller() };
    assert_eq!(code(&nodes, Ok(lost)), ["ST0102"], "the rows do not say it yet");
    assert_eq!(code(&[], Ok(controller())), ["ST0304"]);
    // A row that is not renewed is outdated, independent of its content.
    let mut old = rows[0].clone();
    old.status.as_mut().unwrap().reported_at = Some(Time(ago(90)));
    old.status.as_mut().unwrap().stale_after = Some(Time(ago(60)));
    let old = diagnosed(&[old]);
    assert_eq!(code(&old, Ok(controller())), ["ST0116"]);
    assert_eq!(code(&old, away()), ["ST0301", "ST0116"]);
    let mut newer = rows[0].clone();
    newer.metadata.name = Some("node-1".into());
    newer.status.as_mut().unwrap().agent.as_mut().unwrap().version = "0.2.0".into();
    assert_eq!(code(&diagnosed(&[rows[0].clone(), newer]), Ok(controller())), ["ST0303"]);
}

#[test]
fn definitions_are_checked_by_name_and_for_their_deletion() {
    let kinds = |served: &[&str], terminating: &[&str]| Kinds {
        served: served.iter().map(|&name| name.to_owned()).collect(),
        terminating: terminating.iter().map(|&name| name.to_owned()).collect(),
    };
    let checks = about_kinds(&kinds(&["proxystatuses"], &[]));
    let missing = "the API server does not know proxyprofiles, proxyrollouts of switchtower.dev";
    assert_eq!(blamed(&checks), [("ST0401", missing)]);
    let checks = about_kinds(&kinds(&["proxystatuses"], &["proxyprofiles", "proxyrollouts"]));
    assert_eq!(
        blamed(&checks),
        [("ST0417", "being deleted: proxyprofiles, proxyrollouts of switchtower.dev")]
    );
    assert_eq!(codes_of(&about_kinds(&Kinds::default())), [Some("ST0401")]);
}

#[test]
fn profiles_are_blamed_in_the_words_of_their_conditions() {
    let profile = |kind: &str, status: &str| -> ProxyProfile {
        serde_json::from_value(json!({
            "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "default"},
            "spec": {}, "status": {"conditions": [{"type": kind, "status": status, "reason": "RolloutFailed",
                "message": "node-1: EPERM", "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
        }))
        .unwrap()
    };
    let stalled = about_profiles(&[profile("Stalled", "True")]);
    assert_eq!(blamed(&stalled), [("ST0307", "ProxyProfile default; RolloutFailed: node-1: EPERM")]);
    assert_eq!(codes_of(&about_profiles(&[profile("Overlapping", "True")])), [Some("ST0308")]);
    for status in [profile("Stalled", "False"), profile("Reconciling", "True"), profile("Ready", "True")] {
        assert_eq!(blamed(&about_profiles(&[status])), []);
    }
}

#[test]
fn report_counts_failures() {
    let text = text(&about_fleet(&[], &Ok(controller())), Style::PLAIN);
    assert!(text.contains("FAILED   ST0304 no ProxyStatus objects\n"), "{text}");
    assert!(text.ends_with("\n2 checks, 1 failed, 0 warnings\n"), "{text}");
}
