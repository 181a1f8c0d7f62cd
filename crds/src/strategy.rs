//! Strategy for rolling out a revision of settings.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::NodeSelector;

/// Strategy for rolling out a new revision. Does not apply to updates of Services and endpoints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStrategy {
    /// Steps in order, at most 16; the last one must cover 100% of all nodes. Default: one node with a soak of 60
    /// seconds, then 25%, then 100%.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = [
        {"rule": "size(self) == 0 || (self[size(self) - 1].nodes == '100%' && !has(self[size(self) - 1].nodeSelector))",
         "message": "the last step must have nodes: 100% and no nodeSelector; otherwise the rollout could not complete"},
    ]))]
    pub steps: Vec<RolloutStep>,
    /// Maximum number of nodes that may be unavailable at the same time: nodes that are being updated, and nodes that
    /// were already unhealthy. A number from 1, or a percentage of the eligible nodes such as 10%, which allows at
    /// least one node. Default: 10%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // Bounds apply to numbers and the pattern to strings.
    #[schemars(extend("minimum" = 1, "pattern" = "^(100|[1-9][0-9]?)%$"))]
    pub max_unavailable: Option<IntOrString>,
    /// Time in seconds, 1 to 3600, after which a connected node that has not applied the revision counts as failed.
    /// Default: 60.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3_600))]
    pub apply_deadline_seconds: Option<i32>,
    /// Time in seconds, 1 to 86400, without progress of any node after which the rollout is reported as stalled; it
    /// continues nevertheless. Soaking, waiting for approval and pauses do not count. Default: 600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub progress_deadline_seconds: Option<i32>,
    /// Requirements that a node must meet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gates: Option<RolloutGates>,
}

/// Step of a rollout. A step is complete when its nodes hold the revision and have passed the gates, the soak is over,
/// and the step is approved if it requires approval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStep {
    /// Name shown in messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub name: Option<String>,
    /// Restricts the step to matching nodes of the profile (canaries). A step whose selector matches no node waits and
    /// is never skipped. Default: all nodes of the profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<NodeSelector>,
    /// Number of selected nodes that hold the revision at the end of the step: a number from 1, or a percentage such as
    /// 25%, rounded up.
    // Bounds apply to numbers and the pattern to strings.
    #[schemars(extend("minimum" = 1, "pattern" = "^(100|[1-9][0-9]?)%$"))]
    pub nodes: IntOrString,
    /// Label keys of Nodes, such as topology.kubernetes.io/zone, at most 4. The step selects nodes in turn from the
    /// groups that share the values of these labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), inner(length(min = 1, max = 317)))]
    pub spread_by: Vec<String>,
    /// Time in seconds, 0 to 604800, for which the nodes of the step are observed after all of them hold the revision.
    /// Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604_800))]
    pub soak_seconds: Option<i64>,
    /// Automatic or Manual. With Manual, the next step starts only after approvedStep of the rollout is at least the
    /// number of this step, counted from 1. Default: Automatic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
}

/// Approval that a step requires.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Approval {
    /// No approval is required.
    #[default]
    Automatic,
    /// A user must set approvedStep.
    Manual,
}

/// Requirements that a node must meet, in addition to applying the revision without refused items.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutGates {
    /// Connections that each node opens through its own data plane, before and after the switch; at most 16. Probes
    /// that failed before the switch are ignored. Absent: the ClusterIP of the Service default/kubernetes. Empty list:
    /// no probes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), extend(
        "x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]
    ))]
    pub probes: Option<Vec<ServiceProbe>>,
    /// Time in seconds, 0 to 3600, for which a node repeats its probes after the switch. A node whose probes fail in
    /// this time rolls back automatically. Default: 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3_600))]
    pub window_seconds: Option<i32>,
    /// Maximum number of reconnects of a node's agent after the assignment, 0 to 1000; a node that exceeds it counts as
    /// failed. Default: 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000))]
    pub maximum_reconnects: Option<i32>,
    /// Maximum share of unhealthy nodes among the nodes that the rollout has not updated, in percent, 1 to 100. Above
    /// it the cause is outside the rollout: the rollout freezes until these nodes recover. Default: 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub freeze_percent: Option<i32>,
}

/// TCP connection through a Service, opened by the agent from the host network of its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!has(self.httpPath) || (has(self.compareSource) && self.compareSource)",
     "message": "httpPath requires compareSource: true"},
]))]
pub struct ServiceProbe {
    /// Unique name, shown in messages.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Service to connect to.
    pub service: ServiceReference,
    /// ClusterIP: connect to the ClusterIPs of the Service. NodePort: connect to the NodePort on the primary addresses
    /// of the Node. Default: ClusterIP.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<ProbeType>,
    /// Compare the source address that the backend observes. The backend must report the address in the first line that
    /// it writes; a different address than before the switch is a failure. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compare_source: Option<bool>,
    /// With compareSource: path of an HTTP GET request, such as /clientip, whose response contains the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^/[^ \t\r\n]{0,255}$"))]
    pub http_path: Option<String>,
    /// Timeout of one connection including the response, in milliseconds, 10 to 10000. Default: 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 10_000))]
    pub timeout_milliseconds: Option<i32>,
}

/// TCP ports of a Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReference {
    /// Namespace of the Service.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Name of the Service.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Name or number of the Service port (`port`, not `nodePort`, also for type NodePort). Absent: all TCP ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub port: Option<String>,
}

/// Address of a Service that a probe connects to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProbeType {
    /// The ClusterIPs of the Service.
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// The NodePort on the primary addresses of the Node.
    NodePort,
}
