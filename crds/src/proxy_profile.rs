//! `ProxyProfile`: settings for a set of nodes, and the strategy for rolling out changes.

#![allow(clippy::duplicated_attributes, reason = "one printcolumn per column; their names differ")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{NodeSelector, ProxySettings, RolloutStrategy};

/// Data-plane settings for a set of nodes.
///
/// A change of settings, nodeSelector or changeCause creates a new revision, and the controller creates a ProxyRollout
/// that rolls it out in steps. To undo a change, apply the previous spec. The controller never modifies spec.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "switchtower.dev",
    version = "v1alpha1",
    kind = "ProxyProfile",
    plural = "proxyprofiles",
    singular = "proxyprofile",
    shortname = "pxp",
    category = "switchtower",
    status = "ProxyProfileStatus",
    derive = "Default",
    derive = "PartialEq",
    doc = "Data-plane settings for a set of nodes. Changes are rolled out by a ProxyRollout.",
    // The name of a revision must be a valid label value.
    validation = Rule::new("size(self.metadata.name) <= 52")
        .message("the name of a ProxyProfile must have at most 52 characters because rollout names contain it"),
    validation = Rule::new("self.metadata.name != 'builtin'")
        .message("the name builtin is reserved for the settings that apply without a ProxyProfile"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#
    ),
    printcolumn(name = "Stable", type_ = "string", json_path = ".status.stableName"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.targetName"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.nodes"),
    printcolumn(name = "Rollout", type_ = "string", json_path = ".status.rollout"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#
    ),
    printcolumn(name = "Priority", type_ = "integer", json_path = ".spec.priority", priority = 1),
    printcolumn(name = "Change-Cause", type_ = "string", json_path = ".spec.changeCause", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ProxyProfileSpec {
    /// If several profiles select a Node, the one with the highest priority applies, then the oldest, then the first by
    /// name. The others get the condition Overlapping. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Selects the Nodes that use the profile. Absent or empty: all Nodes. A Node that starts to match because its
    /// labels change keeps its settings until the next rollout of the profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<NodeSelector>,
    /// Data-plane settings.
    #[serde(default)]
    pub settings: ProxySettings,
    /// Strategy for rolling out a new revision. A change takes effect with the next rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<RolloutStrategy>,
    /// Reason for the last change of the profile. Changing it starts a new rollout even if the settings are unchanged:
    /// use this to retry a failed rollout, or to include nodes that started to match nodeSelector. At most 256
    /// characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub change_cause: Option<String>,
}

/// Observed state of the profile.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyProfileStatus {
    /// Generation of `spec` that the status reflects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Last completed revision, which every rollback returns to. Counted from 1; absent before the first completed
    /// rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub stable_revision: Option<i64>,
    /// Revision that rollbacks return to, `name@revision`, except for nodes that used another profile before. Names
    /// another profile or the built-in settings before the first completed rollout.
    #[serde(default)]
    pub stable_name: String,
    /// Revision that corresponds to `spec`, counted from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub target_revision: Option<i64>,
    /// Target revision, `name@revision`.
    #[serde(default)]
    pub target_name: String,
    /// Name of the latest ProxyRollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<String>,
    /// Number of Nodes that use the profile, excluding Nodes of profiles with precedence.
    #[serde(default)]
    pub nodes: i64,
    /// Conditions: Ready, Reconciling, Stalled, Overlapping.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
