//! `ProxyRollout`: the rollout of one revision of a profile.

#![allow(clippy::duplicated_attributes, reason = "one printcolumn per column; their names differ")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ProxySettings, RolloutStrategy};

/// Rollout of one revision of a ProxyProfile.
///
/// The controller creates one for each new revision of a ProxyProfile. Settings and strategy are copies that never
/// change. Three fields can be changed, with `kubectl patch` or `kubectl edit`: paused, approvedStep and abort.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "switchtower.dev",
    version = "v1alpha1",
    kind = "ProxyRollout",
    plural = "proxyrollouts",
    singular = "proxyrollout",
    shortname = "pxr",
    category = "switchtower",
    status = "ProxyRolloutStatus",
    derive = "Default",
    derive = "PartialEq",
    doc = "Rollout of one revision of a ProxyProfile. Created by the controller.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#
    ),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Step", type_ = "string", json_path = ".status.progress.step"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "Updated/Eligible", type_ = "string", json_path = ".status.progress.updated"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.failed"),
    printcolumn(name = "Waiting-On", type_ = "string", json_path = ".status.waitingOn"),
    printcolumn(name = "Stable", type_ = "string", json_path = ".status.stable", priority = 1),
    printcolumn(name = "Excluded", type_ = "integer", json_path = ".status.excluded.count", priority = 1),
    printcolumn(name = "Change-Cause", type_ = "string", json_path = ".spec.changeCause", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].message"#,
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.approvedStep) || self.approvedStep <= size(self.strategy.steps)",
     "message": "approvedStep must not exceed the number of steps"},
    {"rule": "!has(oldSelf.approvedStep) || (has(self.approvedStep) && self.approvedStep >= oldSelf.approvedStep)",
     "message": "approvedStep cannot be decreased; to stop the rollout set abort"},
    {"rule": "!has(oldSelf.abort) || !oldSelf.abort || (has(self.abort) && self.abort)",
     "message": "abort cannot be reverted; to roll out the revision again, change changeCause of the ProxyProfile"},
]))]
pub struct ProxyRolloutSpec {
    /// Name of the ProxyProfile.
    #[schemars(length(min = 1, max = 52), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "profile is immutable"}
    ]))]
    pub profile: String,
    /// Revision of the profile, counted from 1.
    #[schemars(range(min = 1), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "revision is immutable"}
    ]))]
    pub revision: i64,
    /// Hash of the revision's content: settings, node selector and change cause.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "hash is immutable"}
    ]))]
    pub hash: String,
    /// Copy of the profile's change cause.
    #[serde(default)]
    #[schemars(length(max = 256), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "changeCause is immutable"}
    ]))]
    pub change_cause: String,
    /// Copy of the profile's settings.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "settings are immutable; change the ProxyProfile"}
    ]))]
    pub settings: ProxySettings,
    /// Revision that was stable when the rollout was created or, if no revision of the profile has been completed, the
    /// revision that the majority of its nodes used. A node whose probes fail returns to it automatically, or to the
    /// revision of another profile that it used before.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "fallback is immutable"}
    ]))]
    pub fallback: RolloutFallback,
    /// Copy of the profile's strategy; contains the default steps if the profile has none.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "strategy is immutable; change the ProxyProfile"}
    ]))]
    pub strategy: RolloutStrategy,
    /// Revision that the nodes of a deleted profile move to. Its settings are rolled out here before the nodes are
    /// assigned the revision itself. Set only while the profile is being deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "handover is immutable"}
    ]))]
    pub handover: Option<Handover>,
    /// Pauses the rollout: no further node is updated while this is true. Setting it back to false restarts the soak
    /// of the current step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// Approves all steps up to this one, counted from 1, at most 16: steps with manual approval, and steps that wait
    /// for unreachable nodes that were assigned the revision. Cannot be decreased.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 16))]
    pub approved_step: Option<i32>,
    /// Aborts the rollout and returns its nodes to the stable revision. Cannot be reverted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<bool>,
}

/// Revision that the nodes of a deleted profile move to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Handover {
    /// Name of the profile; `builtin` for the built-in settings.
    #[schemars(length(min = 1, max = 52))]
    pub profile: String,
    /// Revision of the profile; 0 for the built-in settings.
    #[schemars(range(min = 0))]
    pub revision: i64,
}

/// Settings that nodes return to after a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutFallback {
    /// Name of the profile; `builtin` for the built-in settings.
    #[schemars(length(min = 1, max = 52))]
    pub profile: String,
    /// Revision of the profile; 0 for the built-in settings.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// Copy of the settings.
    #[serde(default)]
    pub settings: ProxySettings,
}

/// Progress of the rollout. All numbers are recomputed at each write.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyRolloutStatus {
    /// Generation of `spec` that the status reflects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Pending, Progressing, Soaking, Paused, Frozen or RollingBack; finally Complete, Failed, Aborted or Superseded.
    /// Ignored: the object was not created by the controller. Later versions may add values.
    #[serde(default)]
    pub state: String,
    /// Target revision, `name@revision`.
    #[serde(default)]
    pub target: String,
    /// Stable revision, `name@revision`, that nodes return to, except for nodes that used another profile before.
    #[serde(default)]
    pub stable: String,
    /// Progress in steps and nodes.
    #[serde(default)]
    pub progress: RolloutProgress,
    /// Event that the rollout needs to continue: Nodes, Soak, Approval, Resume, CanaryNodes, EligibleNodes,
    /// HealthyNodes, Stable or UnreachableNodes. Later versions may add values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_on: Option<String>,
    /// Number of nodes that failed.
    #[serde(default)]
    pub failed: i64,
    /// The first 16 nodes that failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<NodeFailure>,
    /// Nodes of the profile that are currently excluded.
    #[serde(default)]
    pub excluded: ExcludedNodes,
    /// Time that nodes took to acknowledge the revision. Informational: a slow node stops a rollout only at its
    /// deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledgements: Option<RolloutAcknowledgements>,
    /// Ready: the rollout is complete. Reconciling: it is in progress. Stalled: it failed, was aborted, or makes no
    /// progress.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Progress of a rollout.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutProgress {
    /// Number of completed steps.
    #[serde(default)]
    pub steps_done: i32,
    /// Current step, counted from 1; 0 before the first.
    #[serde(default)]
    pub current_step: i32,
    /// Current step and number of steps, `current/all`.
    #[serde(default)]
    pub step: String,
    /// Number of nodes that are assigned the revision.
    #[serde(default)]
    pub touched_nodes: i64,
    /// Number of nodes that hold the revision and have passed the gates.
    #[serde(default)]
    pub updated_nodes: i64,
    /// Number of nodes that can take part: nodes of the profile whose agent is connected, and nodes that are already
    /// assigned the revision.
    #[serde(default)]
    pub eligible_nodes: i64,
    /// Updated and eligible nodes, `updated/eligible`.
    #[serde(default)]
    pub updated: String,
    /// Time at which the first node of the current step was assigned the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_began_at: Option<Time>,
    /// Time since which all nodes of the current step have held the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soaking_since: Option<Time>,
    /// Time of the last progress of a node or step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advanced_at: Option<Time>,
}

/// A node that failed, with the evidence.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeFailure {
    /// Name of the node.
    pub node: String,
    /// Reason in CamelCase.
    pub reason: String,
    /// Description of the failure.
    pub message: String,
    /// Error number of the kernel; 0 if there is none.
    #[serde(default)]
    pub errno: i32,
    /// Trace ID of the change, 32 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "traceID")]
    pub trace_id: Option<String>,
}

/// Time from sending the revision to a node to its acknowledgement.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutAcknowledgements {
    /// Number of nodes measured.
    pub nodes: i64,
    /// Median, in milliseconds.
    pub median_milliseconds: i64,
    /// Maximum, in milliseconds.
    pub slowest_milliseconds: i64,
    /// Name of the slowest node.
    pub slowest_node: String,
}

/// Excluded nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExcludedNodes {
    /// Number of excluded nodes.
    #[serde(default)]
    pub count: i64,
    /// The first 16 excluded nodes by name, with the reason: `edge-4 (Disconnected)`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
}
