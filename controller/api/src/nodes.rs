//! Response types of `GET /v1/nodes/{node}/diff` and `GET /v1/nodes/{node}/rules`.

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
