//! Data-plane settings, and selectors of Nodes: what profiles and rollouts have in common.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of the data plane. What is left out has its built-in value: what the controller took over from kube-proxy
/// when it was installed (ConfigMap switchtower-builtin-settings in its namespace), or else the default named here.
/// Every change takes effect without a restart of the agent and without a lost connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxySettings {
    /// How a connection of one of the node's own pods is told from others. Default: the Node's pod CIDRs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_detection: Option<LocalDetection>,
    /// Masquerade every connection to a ClusterIP, also those of the node's own pods. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masquerade_all: Option<bool>,
    /// Which bit of the packet mark tells packets that are to be masqueraded, 0 to 31. Default: 14.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31))]
    pub masquerade_bit: Option<i32>,
    /// NodePorts are served on the node's addresses inside these CIDRs, at most 64. The word primary, alone, stands for
    /// the primary addresses of the Node. 0.0.0.0/0 and ::/0 stand for all addresses but loopback; so does leaving out
    /// a family, where the other is named. Default: primary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = [
        {"rule": "size(self) == 1 || !self.exists(address, address == 'primary')",
         "message": "primary cannot be combined with CIDRs"}
    ]))]
    pub node_port_addresses: Vec<NodePortAddress>,
    /// Connection tracking of the node's kernel. What the agent may not write is counted by its metric
    /// switchtower_sysctl_failures and named in its log; the init container of the manifests writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conntrack: Option<Conntrack>,
    /// The shortest time between two changes of the kernel, in milliseconds, 0 to 1000. Default: 0, each change
    /// at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000))]
    pub minimum_interval_milliseconds: Option<i32>,
    /// Level of the agent's log. Default: as its command line says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_level: Option<LogLevel>,
}

/// An IPv4 or IPv6 network, such as 10.0.0.0/8.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend(
    "maxLength" = 43,
    "x-kubernetes-validations" = [{"rule": "isCIDR(self)", "message": "must be a CIDR such as 10.0.0.0/8 or fd00::/8"}]
))]
pub struct Cidr(pub String);

/// An IPv4 or IPv6 network such as 192.0.2.0/24, or the word primary.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend(
    "maxLength" = 43,
    "x-kubernetes-validations" = [{"rule": "self == 'primary' || isCIDR(self)",
        "message": "must be a CIDR such as 10.0.0.0/8 or fd00::/8, or primary"}]
))]
pub struct NodePortAddress(pub String);

impl NodePortAddress {
    /// The Node's primary addresses.
    pub const PRIMARY: &str = "primary";
    /// The most entries of a list.
    pub const MOST: usize = 64;
}

/// How a connection of one of the node's own pods is told from others (kube-proxy: detectLocalMode).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "(self.mode == 'ClusterCIDR') == (has(self.clusterCIDRs) && size(self.clusterCIDRs) > 0)",
     "message": "clusterCIDRs is required with mode ClusterCIDR, and has no meaning with another"},
    {"rule": "(self.mode in ['BridgeInterface', 'InterfaceNamePrefix']) == has(self.interface)",
     "message": "interface is required with mode BridgeInterface or InterfaceNamePrefix, and has no meaning with another"},
]))]
pub struct LocalDetection {
    /// NodeCIDR: the source is inside the Node's pod CIDRs. ClusterCIDR: inside clusterCIDRs. BridgeInterface: the
    /// packet comes in through the interface. InterfaceNamePrefix: through an interface whose name begins so.
    /// None: no connection counts as one of the node's own pods.
    pub mode: LocalDetectionMode,
    /// The pods' networks, for mode ClusterCIDR; at most 16.
    #[serde(default, rename = "clusterCIDRs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub cluster_cidrs: Vec<Cidr>,
    /// Name of an interface or beginning of names, for modes BridgeInterface and InterfaceNamePrefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_.@-]{1,15}$"))]
    pub interface: Option<String>,
}

/// Where "local pod" is decided from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LocalDetectionMode {
    /// The source is inside the Node's pod CIDRs.
    #[default]
    #[serde(rename = "NodeCIDR")]
    NodeCidr,
    /// The source is inside the cluster's CIDRs.
    #[serde(rename = "ClusterCIDR")]
    ClusterCidr,
    /// The packet comes in through one interface.
    BridgeInterface,
    /// The packet comes in through an interface with such a name.
    InterfaceNamePrefix,
    /// Nothing is local.
    None,
}

/// Connection tracking of the node's kernel. A value of 0 leaves the kernel's own setting alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Conntrack {
    /// Connections per CPU core, 0 to 1048576. Default: 32768. 0: leave nf_conntrack_max alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_048_576))]
    pub max_per_core: Option<i32>,
    /// The fewest connections, whatever the number of cores; 0 or more. Default: 131072.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub min: Option<i32>,
    /// How long an idle established TCP connection is remembered, in seconds, 0 to 2147483. Default: 86400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub tcp_established_timeout_seconds: Option<i64>,
    /// How long a TCP connection in CLOSE_WAIT is remembered, in seconds, 0 to 2147483. Default: 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub tcp_close_wait_timeout_seconds: Option<i64>,
    /// Do not mark TCP packets outside of the window as invalid. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_be_liberal: Option<bool>,
    /// How long an unanswered UDP flow is remembered, in seconds, 0 to 2147483. Default: 0, as the kernel has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub udp_timeout_seconds: Option<i64>,
    /// How long an answered UDP flow is remembered, in seconds, 0 to 2147483. Default: 0, as the kernel has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub udp_stream_timeout_seconds: Option<i64>,
}

/// Level of the agent's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And what may become one.
    Warn,
    /// And what happens.
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Selects Nodes by their labels: all of matchLabels and all of matchExpressions must hold. Empty: every Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// Labels that a Node must have, with these values; at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub match_labels: BTreeMap<String, String>,
    /// Further requirements, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub match_expressions: Vec<NodeSelectorRequirement>,
}

/// One requirement on a Node's labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
     "message": "values is required with operator In or NotIn, and has no meaning with another"},
]))]
pub struct NodeSelectorRequirement {
    /// The label's key.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// In, NotIn, Exists or DoesNotExist. NotIn also holds where the label is absent.
    pub operator: SelectorOperator,
    /// The values, for In and NotIn; at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectorOperator {
    /// The label has one of the values.
    In,
    /// It has none of them, or is absent.
    NotIn,
    /// It is there.
    Exists,
    /// It is absent.
    DoesNotExist,
}
