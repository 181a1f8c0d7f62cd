//! What the controller's admin API answers, as JSON; kubectl-switchtower prints it.
//!
//! `GET /v1/services/{namespace}/{name}/changes?limit=N` answers a list of [`crate::propagation::ChangeReport`].
//!
//! Names of fields are part of the API: `-o json` shows them as they are. Times are milliseconds.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

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
    /// The replica's name.
    pub replica: String,
    /// Its version.
    pub version: String,
    /// How old what the API server said last is; `null` before anything was heard.
    pub upstream_age_milliseconds: Option<u64>,
    /// Revision of the layers, one counter per process.
    pub revision: u64,
    /// Nodes that it serves.
    pub nodes: usize,
    /// Nodes with an open stream.
    pub connected: usize,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It reaches an endpoint.
    Forwarded,
    /// No Service is concerned.
    NotServed,
    /// The client is told at once.
    Refused,
    /// The client times out.
    Dropped,
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
    /// Who connects.
    pub from: String,
    /// The source address that was tried; absent where the nodes of a group have different ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// What becomes of it.
    pub outcome: Outcome,
    /// The message code, unless it is forwarded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// Why, in a sentence.
    pub why: String,
    /// Where it may go. Empty where the nodes of a group have different endpoints: `example` has those of one.
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
    /// What the kernel holds; absent where no node was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelCheck>,
}

/// What holds on one node of a group.
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
    /// Why, in a sentence.
    pub why: String,
    /// Where it may go.
    pub endpoints: Vec<String>,
    /// The steps through its maps.
    pub path: Vec<String>,
}

/// Whether a kernel agrees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state", content = "detail")]
pub enum KernelCheck {
    /// It holds exactly this.
    Agrees,
    /// It holds something else.
    Differs(String),
    /// It could not be asked.
    Unknown(String),
}

/// A node in an explanation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStanding {
    /// Its name.
    pub node: String,
    /// Its agent has a stream.
    pub connected: bool,
    /// Generation that it should hold.
    pub desired: u64,
    /// Generation that its kernel holds.
    pub applied: u64,
    /// What its agent refused last, if that still stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// Nodes where a Service behaves in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeGroup {
    /// How many nodes.
    pub nodes: usize,
    /// Names of the first of them.
    pub names: Vec<String>,
    /// What holds on every node of the group.
    pub findings: Vec<Finding>,
}

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
    pub not_current: Vec<NodeStanding>,
    /// How many those are.
    pub not_current_total: usize,
}

/// `GET /v1/nodes/{node}/diff`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeDiff {
    /// The node.
    pub node: String,
    /// What the controller wants there.
    pub desired: Stage,
    /// What the agent acknowledged.
    pub acknowledged: Stage,
    /// What the kernel's own stamp says; `null` without one.
    pub kernel: Option<Stage>,
    /// Frontends that the kernel must have.
    pub frontends: usize,
    /// How the kernel's content differs, a line each. Empty: it does not.
    pub differences: Vec<String>,
    /// How many there are, of which at most 200 are listed.
    pub differences_total: usize,
    /// What the agent left out on purpose, for people.
    pub deviations: Vec<String>,
}

/// A place on the way from the controller to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// Generation of the node.
    pub generation: u64,
    /// Digest of the view, 32 hexadecimal digits; empty if it is not known.
    pub digest: String,
}

/// `GET /v1/nodes/{node}/rules`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRules {
    /// The node.
    pub node: String,
    /// The kernel's stamp.
    pub kernel: Option<Stage>,
    /// Asked for one Service: what the kernel does with its packets, as rules in the manner of nft. The rest is empty.
    #[serde(default)]
    pub services: Vec<String>,
    /// Chains, by family and name.
    pub chains: Vec<ChainInfo>,
    /// Elements as lines, at most as many as asked for.
    pub elements: Vec<String>,
    /// How many elements match.
    pub elements_total: u64,
}

/// A chain of a node's tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChainInfo {
    /// `ip` or `ip6`.
    pub family: String,
    /// Its name.
    pub name: String,
    /// Where it is hooked; empty for a chain that others jump to.
    pub hook: String,
    /// Its rules.
    pub rules: u32,
    /// Rules that are not Switchtower's.
    pub foreign: u32,
}

/// `GET /v1/progress`: how far changes have got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// The process that answered: a revision means nothing to another.
    pub instance: String,
    /// The revision that has everything that was asked for; `null`: the watches have not delivered it yet.
    pub revision: Option<u64>,
    /// Nodes that are connected.
    pub connected: usize,
    /// Connected nodes whose kernel holds it.
    pub reached: usize,
    /// Connected nodes that do not, at most 50.
    pub waiting: Vec<String>,
    /// Nodes left out, because they are not connected, at most 50.
    pub excluded: Vec<String>,
    /// How many those are.
    pub excluded_total: usize,
}

/// Any failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// What happened and what to do.
    pub message: String,
    /// The message code, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}
