//! How a revision of settings goes through the fleet.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::NodeSelector;

/// How a new revision goes through the nodes. Updates of Services and endpoints are never part of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStrategy {
    /// The steps, one after the other, at most 16; the last one must be 100% of all nodes. Default: one node and a soak of 60
    /// seconds, then 25%, then 100%.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = [
        {"rule": "size(self) == 0 || (self[size(self) - 1].nodes == '100%' && !has(self[size(self) - 1].nodeSelector))",
         "message": "the last step must be nodes: 100% without a nodeSelector; otherwise the rollout would never be complete"},
    ]))]
    pub steps: Vec<RolloutStep>,
    /// How many nodes may be out of order at the same time: those that are being updated, and those that were
    /// unhealthy before. A number from 1, or a share of the eligible nodes such as 10%, which is at least one node.
    /// Default: 10%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // Bounds apply to numbers and the pattern to strings.
    #[schemars(extend("minimum" = 1, "pattern" = "^(100|[1-9][0-9]?)%$"))]
    pub max_unavailable: Option<IntOrString>,
    /// A connected node that has not taken the revision after this many seconds, 1 to 3600, has failed. Default: 60.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3_600))]
    pub apply_deadline_seconds: Option<i32>,
    /// A step in which no node advances for this many seconds, 1 to 86400, shows as stalled; nothing else follows.
    /// Soaking, waiting for an approval and pauses do not count. Default: 600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub progress_deadline_seconds: Option<i32>,
    /// What a node has to pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gates: Option<RolloutGates>,
}

/// One step. It is done when its nodes hold the revision and have passed the gates, the soak is over, and it is
/// approved if it needs that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStep {
    /// For people; appears in messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub name: Option<String>,
    /// Only these of the profile's nodes (canaries). A step whose selector matches no node waits, and is never
    /// passed. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<NodeSelector>,
    /// How many of them hold the revision at the end of the step: a number from 1, or a share such as 25%, rounded up.
    // Bounds apply to numbers and the pattern to strings.
    #[schemars(extend("minimum" = 1, "pattern" = "^(100|[1-9][0-9]?)%$"))]
    pub nodes: IntOrString,
    /// Label keys of Nodes, such as topology.kubernetes.io/zone, at most 4: the step's nodes are taken in turn from the
    /// groups with equal values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), inner(length(min = 1, max = 317)))]
    pub spread_by: Vec<String>,
    /// How long the step's nodes are watched after all of them hold the revision, in seconds, 0 to 604800. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604_800))]
    pub soak_seconds: Option<i64>,
    /// Manual: after the soak the next step waits until approvedStep of the rollout is at least this step's number,
    /// counted from 1. Default: Automatic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
}

/// Who lets a rollout go on after a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Approval {
    /// Nobody is asked.
    #[default]
    Automatic,
    /// A person sets approvedStep.
    Manual,
}

/// What a node has to pass. That its kernel takes the settings and refuses nothing is always asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutGates {
    /// Connections that each node opens through its own data plane, before and after the switch; at most 16. What failed
    /// before does not count. Absent: the ClusterIP of the Service default/kubernetes. An empty list: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), extend(
        "x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]
    ))]
    pub probes: Option<Vec<ServiceProbe>>,
    /// How long a node repeats its probes after the switch, in seconds, 0 to 3600; a node that fails meanwhile goes back by
    /// itself. Default: 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3_600))]
    pub window_seconds: Option<i32>,
    /// A node whose agent lost its connection more often than this, 0 to 1000, since it got the revision has failed.
    /// Default: 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000))]
    pub maximum_reconnects: Option<i32>,
    /// When more than this share of the nodes that the rollout has not touched is unhealthy, in percent, 1 to 100, the
    /// cause is elsewhere: the rollout freezes, and goes on when they are well again. Default: 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub freeze_percent: Option<i32>,
}

/// A TCP connection through a Service, opened by the agent from its node's own network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.httpPath) || (has(self.compareSource) && self.compareSource)",
     "message": "httpPath has a meaning only with compareSource: true"},
]))]
pub struct ServiceProbe {
    /// Unique among the probes; appears in messages.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// The Service.
    pub service: ServiceReference,
    /// ClusterIP: through the Service's ClusterIPs. NodePort: through its NodePort on the Node's primary addresses.
    /// Default: ClusterIP.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<ProbeType>,
    /// The backend tells which source address it sees, as the first line that it writes; another address than before
    /// the switch is a failure. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compare_source: Option<bool>,
    /// With compareSource: the backend tells in answer to an HTTP GET of this path, such as /clientip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^/[^ \t\r\n]{0,255}$"))]
    pub http_path: Option<String>,
    /// Deadline of one connection with its answer, in milliseconds, 10 to 10000. Default: 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 10_000))]
    pub timeout_milliseconds: Option<i32>,
}

/// TCP ports of a Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReference {
    /// The Service's namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// The Service's name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// The port's name, or the Service's number of it (also for a NodePort). Absent: all its TCP ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub port: Option<String>,
}

/// Through which address of a Service a probe goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProbeType {
    /// Its ClusterIPs.
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// Its NodePort on the node's own addresses.
    NodePort,
}
