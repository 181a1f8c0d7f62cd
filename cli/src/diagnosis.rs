//! What a node's row says is wrong, and whether the row can still be believed.
//!
//! `status` and `check` share it, so that both name the same cause: the row's own reason, not its state alone.

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use switchtower_admin_api::ControllerInfo;
use switchtower_admin_api::codes::{self, Code};
use switchtower_crds::{ProxyStatus, ProxyStatusStatus};

use crate::error::CliError;

/// The API server has been silent for too long when the controller last heard from it this long ago: every watch
/// receives something every ten seconds.
const UPSTREAM_MILLISECONDS: u64 = 30_000;

/// One node, as its row describes it.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Diagnosis {
    pub(crate) node: String,
    pub(crate) ready: bool,
    pub(crate) state: String,
    pub(crate) desired: i64,
    pub(crate) applied: i64,
    pub(crate) since_seconds: Option<i64>,
    /// How long ago a controller confirmed the row.
    pub(crate) reported_seconds: Option<i64>,
    /// The row was not renewed in time: what it says may no longer be true.
    pub(crate) outdated: bool,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) agent: String,
    pub(crate) kernel: String,
    pub(crate) drift_repaired: i64,
    #[serde(skip)]
    pub(crate) code: Option<Code>,
    /// What else is wrong: conditions that a worse one keeps from being the state.
    #[serde(skip)]
    also: Vec<(Code, String, String)>,
}

impl Diagnosis {
    pub(crate) fn new(row: &ProxyStatus, now: Timestamp) -> Self {
        let empty = ProxyStatusStatus::default();
        let status = row.status.as_ref().unwrap_or(&empty);
        let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
        let agent = status.agent.as_ref();
        let seconds_since = |time: Timestamp| now.duration_since(time).as_secs();
        let state = if status.state.is_empty() { "Unknown" } else { &status.state };
        let reason = ready.map(|ready| ready.reason.clone()).unwrap_or_default();
        Self {
            node: row.metadata.name.clone().unwrap_or_default(),
            ready: ready.is_some_and(|ready| ready.status == "True"),
            state: state.to_owned(),
            desired: status.generation.desired,
            applied: status.generation.applied,
            since_seconds: ready.map(|ready| seconds_since(ready.last_transition_time.0)),
            reported_seconds: status.reported_at.as_ref().map(|time| seconds_since(time.0)),
            outdated: status.stale_after.as_ref().is_some_and(|limit| limit.0 < now),
            message: ready.map(|ready| ready.message.clone()).unwrap_or_default(),
            agent: agent.map(|agent| agent.version.clone()).unwrap_or_default(),
            kernel: status.kernel.clone().unwrap_or_default(),
            drift_repaired: status.drift_repaired.unwrap_or_default(),
            code: code(state, &reason),
            also: also(status, state),
            reason,
        }
    }
}

/// Conditions that hold beside the one that the state is derived from.
fn also(status: &ProxyStatusStatus, state: &str) -> Vec<(Code, String, String)> {
    let known = [
        ("Exclusive", "NotExclusive", codes::NOT_EXCLUSIVE),
        ("LocalDetection", "PodsNotLocal", codes::PODS_NOT_LOCAL),
    ];
    let violated = |kind: &str| {
        let mut conditions = status.conditions.iter();
        conditions.find(|condition| condition.type_ == kind && condition.status == "False")
    };
    let others = known.into_iter().filter(|(_, own, _)| *own != state);
    others
        .filter_map(|(kind, _, code)| {
            let condition = violated(kind)?;
            Some((code, condition.reason.clone(), condition.message.clone()))
        })
        .collect()
}

/// What a row's state and reason mean; `None`: nothing is wrong.
fn code(state: &str, reason: &str) -> Option<Code> {
    Some(match (state, reason) {
        ("Synced", _) => return None,
        (_, "NodeStatusUnknown") => codes::NODE_DOWN,
        (_, "ControllerNotListening") => codes::CONTROLLER_NOT_LISTENING,
        (_, "SettingsOnTrial") => codes::SETTINGS_ON_TRIAL,
        (_, "RolledBack") => codes::SETTINGS_ROLLED_BACK,
        (_, "DeletionsHeld") => codes::DELETIONS_HELD,
        ("Absent", _) => codes::AGENT_ABSENT,
        ("Unknown", _) => codes::AGENT_AWAITED,
        ("Stale", _) => codes::AGENT_DISCONNECTED,
        ("ApplyFailed", _) => codes::APPLY_FAILED,
        ("Deviating", _) => codes::DEVIATING,
        ("Drifted", _) => codes::FOREIGN_CHANGE,
        ("NotExclusive", _) => codes::NOT_EXCLUSIVE,
        ("PodsNotLocal", _) => codes::PODS_NOT_LOCAL,
        _ => codes::NODE_BEHIND,
    })
}

/// Nodes for which the same holds.
#[derive(Debug, Clone)]
pub(crate) struct Cause<'a> {
    pub(crate) code: Code,
    /// The row's reason; empty where the code says it all.
    pub(crate) reason: &'a str,
    /// The first node's message.
    pub(crate) message: &'a str,
    pub(crate) nodes: Vec<&'a str>,
}

/// What the rows say is wrong, one entry per code and reason, in the order of the nodes.
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

/// What is wrong with the controller, or with what it says beside the rows.
pub(crate) fn controller(nodes: &[Diagnosis], asked: Result<&ControllerInfo, &CliError>) -> Option<Code> {
    match asked {
        Err(error) => Some(error.code.unwrap_or(codes::CONTROLLER_UNREACHABLE)),
        Ok(info) if info.upstream_age_milliseconds.is_none_or(|age| age > UPSTREAM_MILLISECONDS) => {
            Some(codes::UPSTREAM_STALE)
        }
        // Rows name the node some seconds later, so that a short interruption is no transition.
        Ok(info) if info.connected < info.nodes && nodes.iter().all(|node| node.code.is_none()) => {
            Some(codes::AGENT_DISCONNECTED)
        }
        Ok(_) => None,
    }
}
