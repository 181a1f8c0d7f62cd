//! Response types of `GET /v1/nodes/{node}/diff`, `GET /v1/nodes/{node}/frontends` and `GET /v1/nodes/{node}/rules`.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// `GET /v1/nodes/{node}/diff`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeDiff {
    /// The node.
    pub node: String,
    /// State that the controller wants.
    pub desired: Stage,
    /// State that the agent acknowledged.
    pub acknowledged: Stage,
    /// Stamp in the kernel; `null` if there is none.
    pub kernel: Option<Stage>,
    /// Frontends that the kernel must have.
    pub frontends: usize,
    /// Differences of the kernel's content, one per line; empty if it matches.
    pub differences: Vec<String>,
    /// Total number of differences; at most 200 are listed.
    pub differences_total: usize,
    /// Human-readable deviations: items that the agent left out deliberately.
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
    /// Elements as lines, up to the requested limit.
    pub elements: Vec<String>,
    /// Number of matching elements.
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
    /// Hook of the chain; empty for a regular chain.
    pub hook: String,
    /// Its rules.
    pub rules: u32,
    /// Rules that are not Switchtower's.
    pub foreign: u32,
}

/// `GET /v1/nodes/{node}/frontends`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeFrontends {
    /// The node.
    pub node: String,
    /// Frontends of the node's desired state.
    pub frontends: Vec<FrontendTreatment>,
}

/// Treatment of new connections to a frontend on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendTreatment {
    /// `10.96.0.10:80/TCP`; a NodePort has the unspecified address.
    pub frontend: String,
    /// `namespace/name:port`.
    pub service_port: String,
    /// For pods and processes of the node.
    pub inside: Destination,
    /// For other clients.
    pub outside: Destination,
    /// A client stays with its endpoint.
    pub affinity: bool,
    /// Permitted sources; empty: all.
    pub sources: Vec<String>,
}

/// Destination of a new connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Destination {
    /// One of these endpoints.
    Endpoints(BTreeSet<String>),
    /// The client receives a rejection immediately.
    Refused,
    /// The client times out.
    Dropped,
}

impl FrontendTreatment {
    /// Returns whether a connection can reach an endpoint.
    #[must_use]
    pub fn has_endpoints(&self) -> bool {
        [&self.inside, &self.outside].into_iter().any(|side| matches!(side, Destination::Endpoints(_)))
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoints(endpoints) => {
                let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
                out.write_str(&endpoints.join(" "))
            }
            Self::Refused => out.write_str("refused"),
            Self::Dropped => out.write_str("dropped"),
        }
    }
}
