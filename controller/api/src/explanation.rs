//! Response types of `GET /v1/services/{namespace}/{name}/explanation`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// `GET /v1/services/{namespace}/{name}/explanation`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// `namespace/name`.
    pub service: String,
    /// The node asked for; `null`: all.
    pub node: Option<String>,
    /// Groups of nodes; one with one node where one was asked for. Those with the worst outcome first, then larger ones.
    pub groups: Vec<NodeGroup>,
    /// Nodes on which this may not be in force: not connected, behind, or refusing. At most 50.
    pub not_current: Vec<NodeStatus>,
    /// Total number of such nodes.
    pub not_current_total: usize,
}

/// Nodes where a Service behaves in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeGroup {
    /// Number of nodes.
    pub nodes: usize,
    /// Names of the first of them.
    pub names: Vec<String>,
    /// Findings common to every node of the group.
    pub findings: Vec<Finding>,
}

/// One address of a Service, from one kind of source, on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// `10.96.0.10:80/TCP`; a NodePort of several nodes has `NODE` in place of the address.
    pub frontend: String,
    /// `namespace/name:port`.
    pub service_port: String,
    /// ClusterIP, NodePort, LoadBalancer, externalIP.
    pub kind: String,
    /// Kind of client.
    pub from: String,
    /// The source address that was tried; absent where the nodes of a group have different ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// Outcome of the connection.
    pub outcome: ConnectionOutcome,
    /// The message code, unless it is forwarded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// Explanation, in a sentence.
    pub why: String,
    /// Possible endpoints. Empty if the nodes of a group have different endpoints: `example` has those of one.
    pub endpoints: Vec<String>,
    /// The endpoint sees the node's address.
    pub masquerade: bool,
    /// The endpoint that is the source itself, which is masqueraded in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hairpin: Option<String>,
    /// A client stays with its endpoint for this long; 0: it does not.
    pub affinity_seconds: u32,
    /// The steps through the maps. Empty where they differ between the nodes of a group.
    pub path: Vec<String>,
    /// One node of a group, where its nodes differ in frontend, source, endpoints, hairpin or path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub example: Option<Example>,
    /// Comparison with the kernel; absent if no node was queried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelCheck>,
}

/// Outcome of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ConnectionOutcome {
    /// It reaches an endpoint.
    Forwarded,
    /// No Service is concerned.
    NotServed,
    /// The client receives a rejection immediately.
    Refused,
    /// The client times out.
    Dropped,
}

/// Details of one node of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Example {
    /// The node.
    pub node: String,
    /// Its frontend.
    pub frontend: String,
    /// The source address that was tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// Explanation, in a sentence.
    pub why: String,
    /// Possible endpoints.
    pub endpoints: Vec<String>,
    /// The steps through its maps.
    pub path: Vec<String>,
}

/// Result of the comparison with a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state", content = "detail")]
pub enum KernelCheck {
    /// It holds exactly this.
    Agrees,
    /// It holds something else.
    Differs(String),
    /// The query failed.
    Unknown(String),
}

/// A node in an explanation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Its agent has a stream.
    pub connected: bool,
    /// Generation that it should hold.
    pub desired: u64,
    /// Generation that its kernel holds.
    pub applied: u64,
    /// Latest rejection by the agent, unless resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}
