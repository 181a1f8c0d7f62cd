//! `ProxyProfile`: settings for a set of nodes, and how a change of them goes through the fleet.

#![allow(
    clippy::duplicated_attributes,
    reason = "one printcolumn for each column, told apart by their names"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{NodeSelector, ProxySettings, RolloutStrategy};

/// Settings of the data plane for a set of nodes.
///
/// A change of settings, nodeSelector or changeCause makes a new revision, and the controller creates a ProxyRollout
/// that takes it through the nodes step by step. To undo a change, apply the previous spec. Nothing in spec is ever
/// filled in or changed by the controller.
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
    doc = "Settings of the data plane for a set of nodes. A change goes through the nodes as a ProxyRollout.",
    // A revision's name has to fit a label value.
    validation = Rule::new("size(self.metadata.name) <= 52")
        .message("the name of a ProxyProfile has at most 52 characters: a rollout's name is made of it"),
    validation = Rule::new("self.metadata.name != 'builtin'")
        .message("builtin is the name of the settings that hold without any ProxyProfile"),
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
    /// Of several profiles that select a node the one with the highest priority counts; then the oldest; then the
    /// first by name. The others get the condition Overlapping. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Which Nodes the profile is for. Absent or empty: all. A Node that comes under the profile by a change of its
    /// labels keeps its settings until the next rollout of the profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<NodeSelector>,
    /// The settings.
    #[serde(default)]
    pub settings: ProxySettings,
    /// How a new revision goes through the nodes. A change counts from the next rollout on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<RolloutStrategy>,
    /// Why the profile was changed last, for people. Changing it starts a new rollout, also of unchanged settings: to
    /// try again what failed, or to take in nodes that came under the profile by their labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub change_cause: Option<String>,
}

/// Where the profile stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyProfileStatus {
    /// The generation of spec that the status reflects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The last revision that was rolled out completely; every rollback returns to it. Counted from 1; absent: none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub stable_revision: Option<i64>,
    /// `name@revision` that every rollback returns to, but for nodes that had something else of another profile before;
    /// of another profile, or the built-in settings, before any revision was rolled out completely.
    #[serde(default)]
    pub stable_name: String,
    /// The revision that spec stands for, counted from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub target_revision: Option<i64>,
    /// `name@revision` of it, for the column.
    #[serde(default)]
    pub target_name: String,
    /// The latest ProxyRollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<String>,
    /// How many Nodes the profile is for, after others with precedence.
    #[serde(default)]
    pub nodes: i64,
    /// Ready, Reconciling, Stalled, Overlapping.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
