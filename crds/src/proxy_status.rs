//! `ProxyStatus`: one row per Node, absent agents included.

#![allow(
    clippy::duplicated_attributes,
    reason = "one printcolumn for each column, told apart by their names"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one node's proxy should hold and what its kernel holds.
///
/// `spec` is written by the elected controller replica, `status` by the replica that serves the node.
/// Rows lag by about a second: a row's Ready is not a barrier for one change.
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
    doc = "What one node's proxy should hold and what its kernel holds. One for every Node.",
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
    /// The profile revision assigned to this node. Absent: the built-in settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileAssignment>,
}

/// A revision of a profile.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileAssignment {
    /// The ProxyProfile's name.
    pub name: String,
    /// Its revision.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// When it was assigned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assigned_at: Option<Time>,
    /// Trace of the assignment, 32 hexadecimal digits. Nodes that got the revision together have the same.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "traceID")]
    #[schemars(length(max = 32))]
    pub trace_id: Option<String>,
    /// What the node had of another profile before a rollout gave it this revision. It returns to it if the rollout
    /// fails, is aborted or is superseded, as long as that profile is there. Absent: it returns to what the rollout
    /// says is stable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousRevision>,
}

/// A revision that a node returns to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreviousRevision {
    /// The profile's name; `builtin` for the built-in settings.
    #[schemars(length(min = 1, max = 52))]
    pub name: String,
    /// Its revision; 0 for the built-in settings.
    #[schemars(range(min = 0))]
    pub revision: i64,
}

/// What the controller knows of the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatusStatus {
    /// The generation of this object's spec that the status reflects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word, derived from the conditions: Synced, Progressing, Stale, ApplyFailed, Deviating, Drifted,
    /// PodsNotLocal, NotExclusive, Unknown, Absent.
    #[serde(default)]
    pub state: String,
    /// When a controller last confirmed this status. It is renewed although nothing changes, at an interval that grows
    /// with the number of nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Time>,
    /// After this time the status is out of date: no controller has confirmed it for too long, and the conditions may no
    /// longer be true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_after: Option<Time>,
    /// The node's generations. They count changes that concern this node; those of two nodes cannot be
    /// compared.
    #[serde(default)]
    pub generation: Generations,
    /// Digest of what the agent acknowledged last, 32 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Since when the node is behind what it should hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind_since: Option<Time>,
    /// The settings in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileInForce>,
    /// Which replica writes this status, and for which session: a replica that sees a higher session stops
    /// writing for the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,
    /// The agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,
    /// The node's kernel release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// What the node's view holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<Counts>,
    /// Where the kernel differs from the view on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deviations: Option<DeviationCounts>,
    /// How often foreign changes of the agent's tables were repaired since the agent started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift_repaired: Option<i64>,
    /// The last error, kept until the node is in order again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// Ready, Connected, Programmed, Consistent, Exclusive, LocalDetection, KernelSettings.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Generations of one node, each 0 or more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Generations {
    /// What the node should hold.
    #[schemars(range(min = 0))]
    pub desired: i64,
    /// What was sent last.
    #[schemars(range(min = 0))]
    pub sent: i64,
    /// What the kernel holds.
    #[schemars(range(min = 0))]
    pub applied: i64,
}

/// Settings in force on the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileInForce {
    /// The profile's name; `builtin` before any ProxyProfile applies.
    pub name: String,
    /// Its revision.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// `name@revision`, for the column.
    pub revision_name: String,
}

/// The stream that the status comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// The controller replica.
    pub replica: String,
    /// Grows by one with every stream of the node.
    #[schemars(range(min = 0))]
    pub session: i64,
}

/// The node's agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// Its version.
    pub version: String,
    /// The replica it is connected to; absent while it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected_to: Option<String>,
    /// Since when it is connected, or disconnected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

/// Sizes of the node's view.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Services.
    pub services: i64,
    /// Endpoints.
    pub endpoints: i64,
}

/// Deviations of the kernel from the view.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviationCounts {
    /// Items refused by the kernel or by the agent's limits.
    pub refused: i64,
    /// At most 16, for people: item and reason.
    #[serde(default)]
    pub samples: Vec<String>,
}

/// The last failure on the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// One CamelCase word.
    pub reason: String,
    /// What happened and what to do.
    pub message: String,
    /// The kernel's error number, 0 if it was not the kernel.
    #[serde(default)]
    pub errno: i32,
    /// The generation that failed; 0 if none was being applied.
    #[serde(default)]
    pub generation: i64,
}
