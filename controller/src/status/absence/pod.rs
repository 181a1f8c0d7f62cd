//! Reads the state of an agent from its Pod. Pure.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodStatus};
use k8s_openapi::jiff::Timestamp;
use switchtower_admin_api::NodeReason;

use super::Blocker;

/// Health port of an agent whose Pod has no port named `healthz`.
const HEALTH_PORT: u16 = 10_256;
/// Maximum length of a message from a Pod, in bytes.
const MESSAGE_LIMIT: usize = 1_024;
/// Number of lines that are kept of a container's termination message, which is the end of its log.
const LAST_LINES: usize = 5;

/// One Pod of the agents' ServiceAccount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentPod {
    /// Node of the Pod, also before it is bound.
    pub node: Arc<str>,
    /// Name of the Pod.
    pub name: Arc<str>,
    /// Creation time.
    pub created: Option<Timestamp>,
    /// Stage of its life.
    pub stage: Stage,
}

/// Stage of a Pod's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// The kubelet has not reported a status yet.
    Pending,
    /// A container does not run.
    Blocked(Blocker),
    /// All containers run.
    Running {
        /// Address of the agent's health port; `None` while the Pod has no address.
        address: Option<SocketAddr>,
        /// Description of the previous container's exit.
        last_exit: Option<String>,
    },
    /// The Pod is being deleted.
    Leaving,
}

/// Reads a Pod; `None` if it belongs to no specific node.
#[must_use]
pub fn agent_pod(pod: &Pod) -> Option<AgentPod> {
    Some(AgentPod {
        node: node_of(pod)?.into(),
        name: pod.metadata.name.as_deref()?.into(),
        created: pod.metadata.creation_timestamp.as_ref().map(|time| time.0),
        stage: stage(pod),
    })
}

/// Returns the node to which the Pod is bound, or for which the DaemonSet controller created it.
fn node_of(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = spec.node_name.as_deref().filter(|name| !name.is_empty()) {
        return Some(node);
    }
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let fields = terms.first()?.match_fields.as_ref()?;
    let name = fields.iter().find(|field| field.key == "metadata.name" && field.operator == "In")?;
    name.values.as_ref()?.first().map(String::as_str)
}

fn stage(pod: &Pod) -> Stage {
    if pod.metadata.deletion_timestamp.is_some() {
        return Stage::Leaving;
    }
    let Some(status) = &pod.status else { return Stage::Pending };
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let blocked = |reason: &str, message: String| {
        Stage::Blocked(Blocker {
            reason: condition_reason(reason),
            message: format!("Pod {name}: {message}"),
        })
    };
    if let Some(condition) = unscheduled(status) {
        return blocked(
            condition.0.unwrap_or(NodeReason::Unschedulable.as_str()),
            bounded(condition.1.unwrap_or("it is not scheduled")),
        );
    }
    if status.phase.as_deref() == Some("Failed") {
        let message = status.message.as_deref().unwrap_or("it failed, see `kubectl describe pod`");
        return blocked(status.reason.as_deref().unwrap_or(NodeReason::PodFailed.as_str()), bounded(message));
    }
    let containers = status
        .init_container_statuses
        .iter()
        .flatten()
        .map(|container| (container, true))
        .chain(status.container_statuses.iter().flatten().map(|container| (container, false)));
    let mut last_exit = None;
    let mut seen = false;
    for (container, init) in containers {
        seen = true;
        if let Some((reason, message)) = trouble(container, init) {
            return blocked(reason, message);
        }
        last_exit = last_exit.or_else(|| last_end(container));
    }
    if !seen {
        return Stage::Pending;
    }
    Stage::Running { address: address(pod, status), last_exit }
}

/// Returns reason and message of a false condition PodScheduled.
fn unscheduled(status: &PodStatus) -> Option<(Option<&str>, Option<&str>)> {
    let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == "PodScheduled")?;
    (condition.status == "False").then_some((condition.reason.as_deref(), condition.message.as_deref()))
}

/// Returns why a container does not run, with the kubelet's reason.
fn trouble(container: &ContainerStatus, init: bool) -> Option<(&str, String)> {
    let state = container.state.as_ref()?;
    let name = &container.name;
    match state {
        ContainerState { waiting: Some(waiting), .. } => {
            let reason = waiting.reason.as_deref().unwrap_or("ContainerWaiting");
            let mut message = format!("container {name} is waiting ({reason})");
            if let Some(detail) = waiting.message.as_deref().filter(|detail| !detail.is_empty()) {
                message = format!("{message}: {}", bounded(detail));
            }
            if let Some(end) = last_end(container) {
                message = format!("{message}; {end}");
            }
            Some((reason, message))
        }
        ContainerState { terminated: Some(end), .. } if !(init && end.exit_code == 0) => {
            let reason = end.reason.as_deref().filter(|reason| !reason.is_empty()).unwrap_or("Terminated");
            Some((reason, format!("container {name} {}", ended(end))))
        }
        // A running init container delays the start of the agent; it is not a failure.
        ContainerState { running: Some(_), .. } if init && !restarts(container) => {
            Some(("PodInitializing", format!("init container {name} is still running")))
        }
        _ => None,
    }
}

/// Returns true for a sidecar: an init container that keeps running alongside the others.
fn restarts(container: &ContainerStatus) -> bool {
    container.started == Some(true) && container.ready
}

fn last_end(container: &ContainerStatus) -> Option<String> {
    let end = container.last_state.as_ref()?.terminated.as_ref()?;
    let times = container.restart_count;
    Some(format!("container {} was restarted {times} times; it {}", container.name, ended(end)))
}

/// Formats an exit, for example "ended with exit code 1 (Error): end of the log".
fn ended(end: &ContainerStateTerminated) -> String {
    let mut text = match end.signal.filter(|signal| *signal != 0) {
        Some(signal) => format!("was killed by signal {signal}"),
        None => format!("ended with exit code {}", end.exit_code),
    };
    if let Some(reason) = end.reason.as_deref().filter(|reason| !reason.is_empty()) {
        text = format!("{text} ({reason})");
    }
    let message = end.message.as_deref().map(bounded).unwrap_or_default();
    if message.is_empty() { text } else { format!("{text}: {message}") }
}

/// Returns the address of the agent's health port: the port named `healthz` on the Pod's address.
fn address(pod: &Pod, status: &PodStatus) -> Option<SocketAddr> {
    let ip = status.pod_ip.as_deref()?.parse().ok()?;
    let containers = pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let mut ports = containers.iter().flat_map(|container| container.ports.iter().flatten());
    let named = ports.find(|port| port.name.as_deref() == Some("healthz")).map(|port| port.container_port);
    let port = named.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
    Some(SocketAddr::new(ip, port.unwrap_or(HEALTH_PORT)))
}

/// Returns a reason that the API server accepts in a condition: an invalid one would make it refuse the whole row.
pub(super) fn condition_reason(text: &str) -> Cow<'static, str> {
    let good = text.len() <= 128
        && text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric());
    Cow::Owned(if good { text } else { NodeReason::AgentNotRunning.as_str() }.to_owned())
}

/// Joins the last lines of a text, without control characters and within [`MESSAGE_LIMIT`].
pub(super) fn bounded(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default().join(" | ");
    let mut bounded = String::new();
    for letter in last.chars().map(|letter| if letter.is_control() { ' ' } else { letter }) {
        if bounded.len() + letter.len_utf8() > MESSAGE_LIMIT {
            bounded.push('…');
            break;
        }
        bounded.push(letter);
    }
    bounded
}
