//! `ProxyStatus`: one row per Node, including Nodes without an agent.

#![allow(clippy::duplicated_attributes, reason = "one printcolumn per column; their names differ")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Desired and actual state of the proxy on one node.
///
/// `spec.profile` is written by the elected controller replica, `spec.releaseHeldBefore` by the operator, `status` by
/// the replica that serves the node. Rows lag by
/// about a second: do not use the Ready condition of a row as a barrier for a single change.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "switchtower.dev",
    version = "v1alpha1",
    kind = "ProxyStatus",
    plural = "proxystatuses",
    singular = "proxystatus",
    shortname = "pxs",
    category = "switchtower",
    status = "ProxyStatusStatus",
    selectable = ".status.state",
    selectable = ".status.profile.revisionName",
    derive = "Default",
    derive = "PartialEq",
    doc = "Desired and actual state of the proxy on one node. The controller creates one for every Node.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#
    ),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".status.generation.desired"),
    printcolumn(name = "Applied", type_ = "integer", json_path = ".status.generation.applied"),
    printcolumn(name = "Profile", type_ = "string", json_path = ".status.profile.revisionName"),
    printcolumn(
        name = "Since",
        type_ = "date",
        json_path = r#".status.conditions[?(@.type=="Ready")].lastTransitionTime"#
    ),
    printcolumn(name = "Reported", type_ = "date", json_path = ".status.reportedAt"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#
    ),
    printcolumn(name = "Services", type_ = "integer", json_path = ".status.counts.services", priority = 1),
    printcolumn(name = "Endpoints", type_ = "integer", json_path = ".status.counts.endpoints", priority = 1),
    printcolumn(name = "Agent", type_ = "string", json_path = ".status.agent.version", priority = 1),
    printcolumn(name = "Kernel", type_ = "string", json_path = ".status.kernel", priority = 1),
    printcolumn(
        name = "Controller",
        type_ = "string",
        json_path = ".status.connection.replica",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatusSpec {
    /// Profile revision assigned to this node. Absent: the built-in settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileAssignment>,
    /// Releases removals that the node's delete budget holds: those of generations below this one, now and in the
    /// future. To release what is held now, set it to `status.generation.desired` + 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub release_held_before: Option<i64>,
}

/// A revision of a profile.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileAssignment {
    /// Name of the ProxyProfile.
    pub name: String,
    /// Revision of the profile.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// Time of the assignment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assigned_at: Option<Time>,
    /// Trace ID of the assignment, 32 hexadecimal digits. Nodes assigned together share one trace.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "traceID")]
    #[schemars(length(max = 32))]
    pub trace_id: Option<String>,
    /// Revision of another profile that the node used before this assignment. The node returns to it if the rollout
    /// fails, is aborted or is superseded, provided that the other profile still exists. Absent: the node returns to
    /// the stable revision of the rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousRevision>,
}

/// A revision that a node returns to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreviousRevision {
    /// Name of the profile; `builtin` for the built-in settings.
    #[schemars(length(min = 1, max = 52))]
    pub name: String,
    /// Revision of the profile; 0 for the built-in settings.
    #[schemars(range(min = 0))]
    pub revision: i64,
}

/// Observed state of the proxy on the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatusStatus {
    /// Generation of `spec` that the status reflects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Summary of the conditions: Synced, Shadow, Progressing, Stale, ApplyFailed, Deviating, Drifted, PodsNotLocal,
    /// NotExclusive, Unknown or Absent. Later versions may add values.
    #[serde(default)]
    pub state: String,
    /// Time at which a controller last confirmed this status. Renewed periodically even if nothing changes; the
    /// interval grows with the number of nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Time>,
    /// Time after which the status is out of date: no controller has confirmed it, and the conditions may no longer be
    /// true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_after: Option<Time>,
    /// Generations of the node's view. They count changes that affect this node; generations of different nodes cannot
    /// be compared.
    #[serde(default)]
    pub generation: Generations,
    /// Digest of the view that the agent acknowledged last, 32 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Time since which the node has been behind its desired generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind_since: Option<Time>,
    /// Settings in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileInForce>,
    /// Replica and session that write this status. A replica that observes a higher session stops writing the row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,
    /// Agent of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,
    /// Kernel release of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Number of Services and endpoints in the node's view.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<Counts>,
    /// Intentional differences between the kernel and the view.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deviations: Option<DeviationCounts>,
    /// Number of repaired foreign changes of the agent's tables since the agent started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift_repaired: Option<i64>,
    /// Last error, kept until the node is healthy again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// Conditions: Ready, Connected, Programmed, Consistent, Exclusive, LocalDetection, KernelSettings, and
    /// DrainGate if the drain gate of the settings does not work.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Generations of one node, each 0 or more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Generations {
    /// Latest generation, which the node is to hold.
    #[schemars(range(min = 0))]
    pub desired: i64,
    /// Generation that was sent last.
    #[schemars(range(min = 0))]
    pub sent: i64,
    /// Generation that the kernel holds, as acknowledged by the agent.
    #[schemars(range(min = 0))]
    pub applied: i64,
}

/// Settings in force on a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileInForce {
    /// Name of the profile; `builtin` before any ProxyProfile applies.
    pub name: String,
    /// Revision of the profile.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// Display name, `name@revision`.
    pub revision_name: String,
}

/// Session that the status comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// Name of the controller replica.
    pub replica: String,
    /// Number of the node's session; increases by one with every session.
    #[schemars(range(min = 0))]
    pub session: i64,
}

/// Agent of a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// Version of the agent.
    pub version: String,
    /// Replica that the agent is connected to; absent while it is disconnected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected_to: Option<String>,
    /// Time since which the agent has been connected or disconnected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

/// Sizes of a node's view.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Number of Services.
    pub services: i64,
    /// Number of endpoints.
    pub endpoints: i64,
}

/// Intentional differences between the kernel and the view.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviationCounts {
    /// Number of items refused by the kernel or by the agent's limits.
    pub refused: i64,
    /// Number of pools and frontends that the delete budget keeps in the kernel although the view no longer has them.
    #[serde(default)]
    pub held: i64,
    /// Sample of at most 16 deviations: item and reason.
    #[serde(default)]
    pub samples: Vec<String>,
}

/// Last failure on a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// Reason in CamelCase.
    pub reason: String,
    /// Description of the failure and instructions.
    pub message: String,
    /// Error number of the kernel; 0 if the failure did not occur in the kernel.
    #[serde(default)]
    pub errno: i32,
    /// Generation that failed; 0 if none was being applied.
    #[serde(default)]
    pub generation: i64,
}
