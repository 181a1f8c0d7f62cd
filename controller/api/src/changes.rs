//! Response types of `GET /v1/services/{namespace}/{name}/changes?limit=N`, which returns a list of [`ChangeReport`].

use serde::{Deserialize, Serialize};

/// One change. Durations are in microseconds since it was received, on the controller's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChangeReport {
    /// The replica that reports it, for the nodes that it serves.
    #[serde(default)]
    pub replica: String,
    /// Its number in this controller process.
    pub change: u64,
    /// Its trace, 32 hexadecimal digits.
    pub trace_id: String,
    /// "EndpointSlice default/web-x7".
    pub object: String,
    /// "namespace/name" of the Service that it concerns; empty if unknown.
    pub service: String,
    /// The layers' revision that contains it.
    pub revision: u64,
    /// Time of delivery by the watch, in nanoseconds since 1970.
    pub received_unix_nanoseconds: u64,
    /// Start time recorded by the cluster, in nanoseconds since 1970 on another clock.
    pub triggered_unix_nanoseconds: Option<u64>,
    /// Number of changes compiled together, this one included.
    pub compiled_together: u32,
    /// Its compile began.
    pub compiling: u64,
    /// The streams were woken.
    pub published: u64,
    /// Half of the nodes held it; like the next two absent until then, or if there were no nodes.
    pub half: Option<u64>,
    /// 99 percent of the nodes held it.
    pub most: Option<u64>,
    /// All nodes held it.
    pub all: Option<u64>,
    /// Nodes that it concerned and whose agents were connected.
    pub eligible: u32,
    /// Nodes that hold it.
    pub acknowledged: u32,
    /// Nodes whose stream ended before.
    pub excluded: u32,
    /// Nodes given up after the timeout.
    pub given_up: u32,
    /// Nodes that have yet to acknowledge it.
    pub outstanding: u32,
    /// The first of them by name.
    pub waiting: Vec<String>,
    /// The nodes that held it last, the last one first.
    pub slowest: Vec<NodeReport>,
    /// Updates with it that nodes refused.
    pub refusals: Vec<RefusalReport>,
}

/// One node's part. Stages are absent if the node needed no update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// The node.
    pub node: String,
    /// Time from receipt until the node held the change, in microseconds.
    pub after: u64,
    /// Time from receipt until sending began, in microseconds. It is 0 if the update was under way
    /// before.
    pub sending: Option<u64>,
    /// From the end of sending to the acknowledgement, in microseconds.
    pub round_trip: Option<u64>,
    /// The agent's planning, in microseconds.
    pub plan: Option<u64>,
    /// The kernel's transaction, in microseconds.
    pub commit: Option<u64>,
    /// The node's generation.
    pub generation: Option<u64>,
}

/// A refused update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusalReport {
    /// The node.
    pub node: String,
    /// Time since receipt of the change, in microseconds.
    pub after: u64,
    /// Machine-readable reason in CamelCase.
    pub reason: String,
}

/// State of an address in the drain gate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainReport {
    /// `Drained` and `NotAnEndpoint`: no node sends new connections to the address. `LastEndpoint`, `TimedOut` and
    /// `Overloaded`: not in time.
    pub verdict: String,
    /// The address is in the endpoints of a Service.
    pub endpoint: bool,
    /// First nodes that have not acknowledged the removal, or the last node that did.
    pub waited_for: Vec<String>,
    /// Number of these nodes.
    pub waited_for_total: usize,
    /// First nodes without a connected agent, which do not count.
    pub missing: Vec<String>,
    /// Number of these nodes.
    pub missing_total: usize,
}
