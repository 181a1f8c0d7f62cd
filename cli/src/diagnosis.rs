//! Problems of nodes, derived from their rows.
//!
//! Shared by `status` and `check`, so that both report the same cause.

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use switchtower_admin_api::codes::{self, Code};
use switchtower_admin_api::{ConditionType, ControllerInfo, NodeReason, NodeState};
use switchtower_crds::{ProxyStatus, ProxyStatusStatus};

use crate::error::CliError;

/// Maximum time since the controller last received data from the API server. Every watch receives something every ten
/// seconds.
const UPSTREAM_MILLISECONDS: u64 = 30_000;

/// State of a node according to its row.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Diagnosis {
    pub(crate) node: String,
    pub(crate) ready: bool,
    pub(crate) state: String,
    /// `None` for a state of another version.
    #[serde(skip)]
    pub(crate) known: Option<NodeState>,
    pub(crate) desired: i64,
    pub(crate) applied: i64,
    pub(crate) since_seconds: Option<i64>,
    /// Age of the last confirmation of the row by a controller, in seconds.
    pub(crate) reported_seconds: Option<i64>,
    /// The row was not renewed in time and may no longer be true.
    pub(crate) outdated: bool,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) agent: String,
    pub(crate) kernel: String,
    pub(crate) drift_repaired: i64,
    #[serde(skip)]
    pub(crate) code: Option<Code>,
    /// Further violated conditions, which the state does not show.
    #[serde(skip)]
    also: Vec<(Code, String, String)>,
}

impl Diagnosis {
    pub(crate) fn new(row: &ProxyStatus, now: Timestamp) -> Self {
        let empty = ProxyStatusStatus::default();
        let status = row.status.as_ref().unwrap_or(&empty);
        let ready =
            status.conditions.iter().find(|condition| condition.type_ == ConditionType::Ready.as_str());
        let agent = status.agent.as_ref();
        let seconds_since = |time: Timestamp| now.duration_since(time).as_secs();
        let state = if status.state.is_empty() { NodeState::Unknown.as_str() } else { &status.state };
        let known = NodeState::from_name(state);
        let reason = ready.map(|ready| ready.reason.clone()).unwrap_or_default();
        Self {
            node: row.metadata.name.clone().unwrap_or_default(),
            ready: ready.is_some_and(|ready| ready.status == "True"),
            state: state.to_owned(),
            known,
            desired: status.generation.desired,
            applied: status.generation.applied,
            since_seconds: ready.map(|ready| seconds_since(ready.last_transition_time.0)),
            reported_seconds: status.reported_at.as_ref().map(|time| seconds_since(time.0)),
            outdated: status.stale_after.as_ref().is_some_and(|limit| limit.0 < now),
            message: ready.map(|ready| ready.message.clone()).unwrap_or_default(),
            agent: agent.map(|agent| agent.version.clone()).unwrap_or_default(),
            kernel: status.kernel.clone().unwrap_or_default(),
            drift_repaired: status.drift_repaired.unwrap_or_default(),
            code: code(known, &reason),
            also: also(status, known),
            reason,
        }
    }
}

/// Returns violated conditions other than the one that determines the state.
fn also(status: &ProxyStatusStatus, state: Option<NodeState>) -> Vec<(Code, String, String)> {
    let known = [
        (ConditionType::Exclusive, NodeState::NotExclusive, codes::NOT_EXCLUSIVE),
        (ConditionType::LocalDetection, NodeState::PodsNotLocal, codes::PODS_NOT_LOCAL),
    ];
    let violated = |kind: ConditionType| {
        let mut conditions = status.conditions.iter();
        conditions.find(|condition| condition.type_ == kind.as_str() && condition.status == "False")
    };
    let others = known.into_iter().filter(|(_, own, _)| Some(*own) != state);
    others
        .filter_map(|(kind, _, code)| {
            let condition = violated(kind)?;
            Some((code, condition.reason.clone(), condition.message.clone()))
        })
        .collect()
}

/// Returns the message code for a state and reason, or `None` for a healthy node.
fn code(state: Option<NodeState>, reason: &str) -> Option<Code> {
    Some(match (state, NodeReason::from_name(reason)) {
        (Some(NodeState::Synced | NodeState::Shadow), _) => return None,
        (_, Some(NodeReason::NodeStatusUnknown)) => codes::NODE_DOWN,
        (_, Some(NodeReason::ControllerNotListening)) => codes::CONTROLLER_NOT_LISTENING,
        (_, Some(NodeReason::SettingsOnTrial)) => codes::SETTINGS_ON_TRIAL,
        (_, Some(NodeReason::RolledBack)) => codes::SETTINGS_ROLLED_BACK,
        (_, Some(NodeReason::DeletionsHeld)) => codes::DELETIONS_HELD,
        (Some(NodeState::Absent), _) => codes::AGENT_ABSENT,
        (Some(NodeState::Unknown), _) => codes::AGENT_AWAITED,
        (Some(NodeState::Stale), _) => codes::AGENT_DISCONNECTED,
        (Some(NodeState::ApplyFailed), _) => codes::APPLY_FAILED,
        (Some(NodeState::Deviating), _) => codes::DEVIATING,
        (Some(NodeState::Drifted), _) => codes::FOREIGN_CHANGE,
        (Some(NodeState::NotExclusive), _) => codes::NOT_EXCLUSIVE,
        (Some(NodeState::PodsNotLocal), _) => codes::PODS_NOT_LOCAL,
        _ => codes::NODE_BEHIND,
    })
}

/// A problem and the nodes that have it.
#[derive(Debug, Clone)]
pub(crate) struct Cause<'a> {
    pub(crate) code: Code,
    /// Reason from the row; empty if the code is sufficient.
    pub(crate) reason: &'a str,
    /// Message of the first node.
    pub(crate) message: &'a str,
    pub(crate) nodes: Vec<&'a str>,
}

/// Groups problems by code and reason, in the order of the nodes.
pub(crate) fn causes(nodes: &[Diagnosis]) -> Vec<Cause<'_>> {
    let mut causes: Vec<Cause<'_>> = Vec::new();
    let mut add = |code: Code, reason, message, node| match causes
        .iter_mut()
        .find(|known| known.code == code && known.reason == reason)
    {
        Some(known) => known.nodes.push(node),
        None => causes.push(Cause { code, reason, message, nodes: vec![node] }),
    };
    for node in nodes.iter().filter(|node| node.outdated) {
        add(codes::ROW_OUTDATED, "", "", &*node.node);
    }
    for node in nodes {
        if let Some(code) = node.code {
            add(code, &*node.reason, &*node.message, &*node.node);
        }
        for (code, reason, message) in &node.also {
            add(*code, reason, message, &node.node);
        }
    }
    causes
}

/// Returns the problem of the controller or of its connection to agents, if any.
pub(crate) fn controller(nodes: &[Diagnosis], asked: Result<&ControllerInfo, &CliError>) -> Option<Code> {
    match asked {
        Err(error) => Some(error.code.unwrap_or(codes::CONTROLLER_UNREACHABLE)),
        Ok(info) if info.upstream_age_milliseconds.is_none_or(|age| age > UPSTREAM_MILLISECONDS) => {
            Some(codes::UPSTREAM_STALE)
        }
        // Rows report a lost agent only after a grace period.
        Ok(info) if info.connected < info.nodes && nodes.iter().all(|node| node.code.is_none()) => {
            Some(codes::AGENT_DISCONNECTED)
        }
        Ok(_) => None,
    }
}
