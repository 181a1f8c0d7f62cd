//! Response types of `GET /v1/nodes/{node}/diff` and `GET /v1/nodes/{node}/rules`.

use serde::{Deserialize, Serialize};

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
