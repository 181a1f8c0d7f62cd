//! The JSON types of the controller's admin API, the states of nodes and rollouts, and the catalogue of message codes,
//! shared by the controller and kubectl-switchtower.
//!
//! Field names are part of the API: `-o json` prints them unchanged. Times are in milliseconds unless a field says
//! otherwise.

use serde::{Deserialize, Serialize};

mod changes;
pub mod codes;
mod conditions;
mod explanation;
mod nodes;
mod states;

pub use changes::{ChangeReport, DrainReport, NodeReport, RefusalReport};
pub use conditions::{ConditionType, NodeReason, ProfileReason, RolloutReason};
pub use explanation::{ConnectionOutcome, Example, Explanation, Finding, KernelCheck, NodeGroup, NodeStatus};
pub use nodes::{ChainInfo, Destination, FrontendTreatment, NodeDiff, NodeFrontends, NodeRules, Stage};
pub use states::{FailureReason, NodeState, RolloutState, WaitingOn};

/// The audience of tokens for the admin API.
pub const AUDIENCE: &str = "switchtower-admin";
/// The name in the certificate of the controller, which clients pin.
pub const SERVER_NAME: &str = "switchtower-controller";
/// The ServiceAccount whose tokens may read the controller's state.
pub const VIEWER: &str = "switchtower-viewer";
/// The ServiceAccount whose tokens may also read whole tables of nodes.
pub const OPERATOR: &str = "switchtower-operator";

/// `GET /v1/controller`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControllerInfo {
    /// Name of the replica that was asked.
    pub replica: String,
    /// Version of the controller.
    pub version: String,
    /// Age of the latest data from the API server, of the replica that was not heard for the longest time; `null` before the
    /// first.
    pub upstream_age_milliseconds: Option<u64>,
    /// Revision of the layers, one counter per process.
    pub revision: u64,
    /// Nodes that the controller serves.
    pub nodes: usize,
    /// Nodes with an open stream to any replica.
    pub connected: usize,
}

/// `GET /v1/metrics`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MetricsText {
    /// All metrics of the controller in the text format of Prometheus.
    pub text: String,
}

/// `GET /v1/progress`: progress of changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// The processes that answered, each with its revision. With it as a parameter, the next request is about the same
    /// revisions.
    pub instance: String,
    /// Revision of the replica that was asked, which contains everything requested; `null` until the watches of all replicas
    /// deliver it.
    pub revision: Option<u64>,
    /// Nodes that are connected.
    pub connected: usize,
    /// Connected nodes whose kernel holds it.
    pub reached: usize,
    /// Connected nodes that do not, at most 50.
    pub waiting: Vec<String>,
    /// Nodes left out, because they are not connected, at most 50.
    pub excluded: Vec<String>,
    /// Total number of excluded nodes.
    pub excluded_total: usize,
}

/// Any failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiError {
    /// Error message with the solution.
    pub message: String,
    /// The message code, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}
