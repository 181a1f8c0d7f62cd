//! Tables: Pods as kubelets write them, and the reason that a row shows.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use switchtower_admin_api::NodeReason;

use super::ask::{Answer, Connection};
use super::pod::{AgentPod, Stage, agent_pod};
use super::{Agents, Blocker};

const NODE: &str = "alpha";

/// A Pod of the agents' DaemonSet, bound to a node, with this status.
fn pod(name: &str, status: &Value) -> Pod {
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": NODE, "containers": [{"name": "node-agent", "ports": [
            {"name": "metrics", "containerPort": 10249}, {"name": "healthz", "containerPort": 11256},
        ]}]},
        "status": status,
    });
    serde_json::from_value(object).unwrap()
}

fn parsed(name: &str, status: &Value) -> AgentPod {
    agent_pod(&pod(name, status)).unwrap()
}

/// The status of a Pod with one container in this state, after this one.
fn container(state: &Value, last_state: &Value, restarts: i32) -> Value {
    json!({"phase": "Running", "podIP": "192.0.2.7", "containerStatuses": [{
        "name": "node-agent", "image": "agent", "imageID": "", "ready": false, "restartCount": restarts,
        "state": state, "lastState": last_state,
    }]})
}

fn running() -> Value {
    container(&json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}), &json!({}), 0)
}

fn crashed(message: &str) -> Value {
    json!({"terminated": {"exitCode": 1, "reason": "Error", "message": message}})
}

#[track_caller]
fn blocked(status: &Value, reason: &str, words: &[&str]) {
    let Stage::Blocked(blocker) = parsed("agent-x", status).stage else {
        panic!("{:?}", parsed("agent-x", status).stage)
    };
    assert_eq!(blocker.reason, reason, "{}", blocker.message);
    for word in words {
        assert!(blocker.message.contains(word), "{word:?} is not in {:?}", blocker.message);
    }
}

#[test]
fn blocked_pod_has_the_reason_of_the_kubelet() {
    let waiting = |reason: &str, message: &str| json!({"waiting": {"reason": reason, "message": message}});
    let none = json!({});
    blocked(
        &container(&waiting("ErrImagePull", "not found: agent:9"), &none, 0),
        "ErrImagePull",
        &["Pod agent-x", "container node-agent", "not found: agent:9"],
    );
    blocked(&container(&waiting("ImagePullBackOff", ""), &none, 0), "ImagePullBackOff", &["node-agent"]);
    blocked(&container(&waiting("ContainerCreating", ""), &none, 0), "ContainerCreating", &[]);
    blocked(
        &container(&waiting("CreateContainerConfigError", "configmap \"x\" not found"), &none, 0),
        "CreateContainerConfigError",
        &["configmap \"x\" not found"],
    );
    blocked(
        &container(&waiting("CrashLoopBackOff", "back-off 40s"), &crashed("no --node-name\n"), 3),
        "CrashLoopBackOff",
        &["back-off 40s", "restarted 3 times", "exit code 1 (Error)", "no --node-name"],
    );
    blocked(
        &container(&json!({"terminated": {"exitCode": 137, "signal": 9, "reason": "OOMKilled"}}), &none, 0),
        "OOMKilled",
        &["signal 9"],
    );
    blocked(
        &json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/3 nodes are available: 1 node didn't have free ports"}]}),
        "Unschedulable",
        &["free ports"],
    );
    blocked(
        &json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}),
        "Evicted",
        &["memory"],
    );
}

#[test]
fn failed_init_container_is_named_and_completed_is_not() {
    let with_init = |init: &Value| {
        let mut status = running();
        status["initContainerStatuses"] = json!([{
            "name": "sysctl", "image": "agent", "imageID": "", "ready": false, "restartCount": 2, "state": init,
        }]);
        status
    };
    blocked(&with_init(&crashed("read-only file system")), "Error", &["container sysctl", "read-only"]);
    blocked(&with_init(&json!({"running": {}})), "PodInitializing", &["sysctl"]);
    let done = with_init(&json!({"terminated": {"exitCode": 0, "reason": "Completed"}}));
    assert!(matches!(parsed("agent-x", &done).stage, Stage::Running { .. }));
}

#[test]
fn text_of_a_container_cannot_break_the_row() {
    let garbage = format!("first\nsecond\n\u{1b}[31mthird\nfourth\nfifth\nsixth\n{}", "x".repeat(5_000));
    let status = container(&json!({"waiting": {"reason": "no such-word!"}}), &crashed(&garbage), 1);
    let Stage::Blocked(Blocker { reason, message }) = parsed("agent-x", &status).stage else { panic!() };
    assert_eq!(reason, "AgentNotRunning", "the API server would refuse the reason");
    assert!(message.len() < 2_048 && !message.contains(char::is_control), "{message}");
    assert!(message.contains("fourth") && !message.contains("second"), "the end of the log: {message}");
}

#[test]
fn unscheduled_pod_belongs_to_the_node_of_its_affinity() {
    let mut pod = pod("agent-x", &json!({"phase": "Pending"}));
    let spec = pod.spec.as_mut().unwrap();
    spec.node_name = None;
    assert_eq!(agent_pod(&pod), None);
    let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["beta"]}]}]}}});
    pod.spec.as_mut().unwrap().affinity = serde_json::from_value(affinity).unwrap();
    assert_eq!(&*agent_pod(&pod).unwrap().node, "beta");
}

fn reason(agents: &Agents) -> Option<String> {
    agents.blocker(NODE, None).map(|blocker| blocker.reason.into_owned())
}

fn status(connected: bool, reason: &str) -> Answer {
    Answer::Status(Connection { connected, reason: reason.into(), detail: "detail".into() })
}

#[tokio::test]
async fn answer_of_the_agent_counts_once_its_pod_runs() {
    let (agents, node) = (Agents::default(), NODE.into());
    assert_eq!(reason(&agents), None);
    agents.pod(parsed("agent-x", &running()));
    assert_eq!(reason(&agents), None, "not queried yet");
    agents.set_missing(&node, true);
    let asked = agents.to_ask().await;
    assert_eq!(asked, [(node.clone(), "192.0.2.7:11256".parse().unwrap())]);
    agents.changed().await;
    agents.answered(&node, status(false, "BootstrapMissing"));
    assert_eq!(agents.changed().await, std::slice::from_ref(&node));
    assert_eq!(reason(&agents).unwrap(), "BootstrapMissing");
    agents.answered(&node, Answer::Failed("connection refused".into()));
    assert_eq!(reason(&agents).unwrap(), "AgentNotAnswering");
    agents.answered(&node, status(true, ""));
    assert_eq!(reason(&agents), None, "connecting to this or another replica");
    agents.answered(&node, status(false, "not a word"));
    assert_eq!(reason(&agents).unwrap(), "AgentNotRunning".to_owned());
    agents.set_missing(&node, false);
    assert_eq!(reason(&agents), None, "it is connected");
}

#[test]
fn deleted_pod_does_not_count() {
    let agents = Agents::default();
    let waiting = |reason: &str| container(&json!({"waiting": {"reason": reason}}), &json!({}), 0);
    let mut old = parsed("agent-a", &waiting("CrashLoopBackOff"));
    agents.pod(old.clone());
    let mut young = parsed("agent-b", &waiting("ErrImagePull"));
    young.created = Some("2026-02-01T00:00:00Z".parse().unwrap());
    agents.pod(young.clone());
    assert_eq!(reason(&agents).unwrap(), "ErrImagePull");
    young.stage = Stage::Leaving;
    agents.pod(young);
    assert_eq!(reason(&agents).unwrap(), "CrashLoopBackOff");
    old.stage = Stage::Pending;
    agents.pod(old);
    assert_eq!(reason(&agents), None);
    agents.pod_gone(NODE, "agent-a");
    agents.pod_gone(NODE, "agent-b");
    agents.pod_gone(NODE, "agent-b");
    assert_eq!(reason(&agents), None);
}

#[test]
fn missing_pod_counts_only_if_agents_run_as_pods() {
    let agents = Agents::default();
    let elsewhere = AgentPod { node: "beta".into(), ..parsed("agent-b", &running()) };
    agents.pod(elsewhere.clone());
    assert_eq!(reason(&agents), None, "the list is not complete");
    agents.pods_listed(vec![elsewhere]);
    assert_eq!(reason(&agents).unwrap(), "NoAgentPod");
    agents.pods_listed(Vec::new());
    assert_eq!(reason(&agents), None);
}

#[test]
fn lost_kubelet_precedes_the_status_of_its_pods() {
    let agents = Agents::default();
    agents.pod(parsed("agent-x", &running()));
    let lost = agents.blocker(NODE, Some("Kubelet stopped posting node status.")).unwrap();
    assert_eq!(lost.reason, "NodeStatusUnknown");
    agents.closed(Some(Blocker::new(NodeReason::ControllerNotListening, "")));
    assert_eq!(agents.blocker(NODE, Some("")).unwrap().reason, "ControllerNotListening");
}
