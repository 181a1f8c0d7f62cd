//! `ProxyRollout`: one revision of a profile on its way through the fleet.

#![allow(
    clippy::duplicated_attributes,
    reason = "one printcolumn for each column, told apart by their names"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ProxySettings, RolloutStrategy};

/// One revision of a profile on its way through the fleet.
///
/// Created by the controller for each new revision of a ProxyProfile. Settings and strategy are copies that never
/// change. People change three fields, with `kubectl patch` or `kubectl edit`: paused, approvedStep and abort.
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
    doc = "One revision of a ProxyProfile on its way through the fleet. Created by the controller.",
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
     "message": "approvedStep is beyond the last step"},
    {"rule": "!has(oldSelf.approvedStep) || (has(self.approvedStep) && self.approvedStep >= oldSelf.approvedStep)",
     "message": "approvedStep only grows; to stop the rollout set abort"},
    {"rule": "!has(oldSelf.abort) || !oldSelf.abort || (has(self.abort) && self.abort)",
     "message": "an abort is final; to roll the revision out again change changeCause of the ProxyProfile"},
]))]
pub struct ProxyRolloutSpec {
    /// The ProxyProfile's name.
    #[schemars(length(min = 1, max = 52), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "profile never changes"}
    ]))]
    pub profile: String,
    /// The revision of the profile, counted from 1.
    #[schemars(range(min = 1), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "revision never changes"}
    ]))]
    pub revision: i64,
    /// Hash of what makes the revision: equal settings, node selector and change cause give an equal hash.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "hash never changes"}
    ]))]
    pub hash: String,
    /// The profile's change cause.
    #[serde(default)]
    #[schemars(length(max = 256), extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "changeCause never changes"}
    ]))]
    pub change_cause: String,
    /// The settings: a copy of the profile's.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "settings never change; change the ProxyProfile"}
    ]))]
    pub settings: ProxySettings,
    /// What was stable when the rollout was created; before any revision of the profile was complete, what most of its
    /// nodes had. A node whose probes fail returns to it by itself, or to what it had of another profile.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "fallback never changes"}
    ]))]
    pub fallback: RolloutFallback,
    /// The strategy: a copy of the profile's, with the default steps if that has none.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "strategy never changes; change the ProxyProfile"}
    ]))]
    pub strategy: RolloutStrategy,
    /// Set while the profile is being deleted: its nodes get the settings of this revision here, and afterwards the
    /// revision itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self == oldSelf", "message": "handover never changes"}
    ]))]
    pub handover: Option<Handover>,
    /// No further node is touched while this is true. Setting it back to false starts the soak of the current step
    /// anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// Approves all steps up to this one, counted from 1, at most 16: those with a manual approval, and those that wait
    /// for nodes that got the revision and cannot be reached. Only grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 16))]
    pub approved_step: Option<i32>,
    /// Ends the rollout and returns its nodes to the stable revision. Final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<bool>,
}

/// The revision that nodes of a deleted profile are given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Handover {
    /// Its profile; `builtin` for the built-in settings.
    #[schemars(length(min = 1, max = 52))]
    pub profile: String,
    /// Its revision; 0 for the built-in settings.
    #[schemars(range(min = 0))]
    pub revision: i64,
}

/// Settings to return to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutFallback {
    /// Their profile; `builtin` for the built-in settings.
    #[schemars(length(min = 1, max = 52))]
    pub profile: String,
    /// Their revision; 0 for the built-in settings.
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// The settings: a copy.
    #[serde(default)]
    pub settings: ProxySettings,
}

/// Where the rollout stands. Numbers are counted anew at each write.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyRolloutStatus {
    /// The generation of spec that the status reflects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Pending, Progressing, Soaking, Paused, Frozen, RollingBack; at the end Complete, Failed, Aborted or Superseded.
    /// Ignored: not created by the controller.
    #[serde(default)]
    pub state: String,
    /// `name@revision` that is rolled out.
    #[serde(default)]
    pub target: String,
    /// `name@revision` that nodes return to, but for those that had something else of another profile before.
    #[serde(default)]
    pub stable: String,
    /// How far it is.
    #[serde(default)]
    pub progress: RolloutProgress,
    /// What has to happen before it goes on: Nodes, Soak, Approval, Resume, CanaryNodes, EligibleNodes, HealthyNodes,
    /// Stable, UnreachableNodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_on: Option<String>,
    /// How many nodes failed.
    #[serde(default)]
    pub failed: i64,
    /// Nodes that failed, at most 16, the first ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<NodeFailure>,
    /// Nodes of the profile that are left out for now.
    #[serde(default)]
    pub excluded: ExcludedNodes,
    /// How long nodes took to acknowledge the revision. Reported only: a slow node does not stop a rollout before its
    /// deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledgements: Option<RolloutAcknowledgements>,
    /// Ready: the rollout is complete. Reconciling: it is under way. Stalled: it failed, was aborted, or does not get on.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How far a rollout is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutProgress {
    /// How many steps are done.
    #[serde(default)]
    pub steps_done: i32,
    /// The current step, counted from 1; 0 before the first.
    #[serde(default)]
    pub current_step: i32,
    /// `current/all`, for the column.
    #[serde(default)]
    pub step: String,
    /// How many nodes have the revision assigned.
    #[serde(default)]
    pub touched_nodes: i64,
    /// How many nodes hold the revision and have passed the gates.
    #[serde(default)]
    pub updated_nodes: i64,
    /// How many nodes can take part: those of the profile whose agent is connected, and those touched.
    #[serde(default)]
    pub eligible_nodes: i64,
    /// `updated/eligible`, for the column.
    #[serde(default)]
    pub updated: String,
    /// When the first node of the current step got the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_began_at: Option<Time>,
    /// Since when all nodes of the current step hold the revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soaking_since: Option<Time>,
    /// When a node or a step advanced last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advanced_at: Option<Time>,
}

/// A node that failed, with the evidence.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeFailure {
    /// The node.
    pub node: String,
    /// One CamelCase word.
    pub reason: String,
    /// What happened.
    pub message: String,
    /// The kernel's error number, 0 if there is none.
    #[serde(default)]
    pub errno: i32,
    /// Trace of the change, 32 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "traceID")]
    pub trace_id: Option<String>,
}

/// How long nodes took from being sent the revision to acknowledging it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutAcknowledgements {
    /// Of how many nodes that is known.
    pub nodes: i64,
    /// Half of them took no longer, in milliseconds.
    pub median_milliseconds: i64,
    /// None took longer, in milliseconds.
    pub slowest_milliseconds: i64,
    /// The node that took longest.
    pub slowest_node: String,
}

/// Nodes that are left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExcludedNodes {
    /// How many.
    #[serde(default)]
    pub count: i64,
    /// The first 16 of them by name, with the reason: `edge-4 (Disconnected)`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
}
