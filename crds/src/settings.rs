//! Data-plane settings and Node selectors, shared by profiles and rollouts.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Data-plane settings. An absent field has its built-in value: the value that the controller took over from kube-proxy
/// during installation (ConfigMap switchtower-builtin-settings in its namespace), or the default documented here. Every
/// change takes effect without a restart of the agent and without losing connections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxySettings {
    /// Active: the node's rules translate connections. Shadow: the agent programs the same tables without hooks, so that
    /// they affect no packet, closes the ports of kube-proxy, and changes neither kernel settings nor conntrack entries:
    /// another service proxy serves the node. Default: Active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<ProxyMode>,
    /// Method for recognising connections from the node's own pods. Default: the pod CIDRs of the Node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_detection: Option<LocalDetection>,
    /// Masquerade all connections to ClusterIPs, including connections from the node's own pods. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masquerade_all: Option<bool>,
    /// Bit of the packet mark that selects packets for masquerading, 0 to 31. Default: 14.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31))]
    pub masquerade_bit: Option<i32>,
    /// CIDRs of the node addresses on which NodePorts are served, at most 64. The single entry primary selects the
    /// primary addresses of the Node. 0.0.0.0/0 and ::/0 select all addresses except loopback. If only one family is
    /// listed, all addresses of the other family except loopback are selected. Default: primary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = [
        {"rule": "size(self) == 1 || !self.exists(address, address == 'primary')",
         "message": "primary cannot be combined with CIDRs"}
    ]))]
    pub node_port_addresses: Vec<NodePortAddress>,
    /// Connection tracking settings of the node's kernel. Values that the agent has no permission to write are counted
    /// by its metric switchtower_sysctl_failures and named in its log; the init container of the manifests writes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conntrack: Option<Conntrack>,
    /// Minimum interval between two kernel transactions, in milliseconds, 0 to 1000. Default: 0, no delay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000))]
    pub minimum_interval_milliseconds: Option<i32>,
    /// Log level of the agent. Default: the level on its command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_level: Option<LogLevel>,
    /// Drain gate: lets the preStop hook of a pod wait until no node sends new connections to the pod. Default: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_gate: Option<DrainGate>,
}

/// Mode of the agents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProxyMode {
    /// The node's rules translate connections.
    #[default]
    Active,
    /// The node's rules are loaded without effect.
    Shadow,
}

/// Drain gate of the node's pods. A pod uses it with the hook preStop: {httpGet: {port: 9910, path: /drained}}.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DrainGate {
    /// TCP port of the hooks, 1 to 65535. Connections from the node to its own pods and to its own addresses on this
    /// port reach the agent, not the pod. The agent also listens on this port of the node's loopback addresses. The
    /// node needs local detection.
    #[schemars(range(min = 1, max = 65_535))]
    pub port: i32,
}

/// IPv4 or IPv6 network, such as 10.0.0.0/8.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend(
    "maxLength" = 43,
    "x-kubernetes-validations" = [{"rule": "isCIDR(self)", "message": "must be a CIDR such as 10.0.0.0/8 or fd00::/8"}]
))]
pub struct Cidr(pub String);

/// IPv4 or IPv6 network such as 192.0.2.0/24, or primary.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend(
    "maxLength" = 43,
    "x-kubernetes-validations" = [{"rule": "self == 'primary' || isCIDR(self)",
        "message": "must be a CIDR such as 10.0.0.0/8 or fd00::/8, or primary"}]
))]
pub struct NodePortAddress(pub String);

impl NodePortAddress {
    /// Selects the primary addresses of the Node.
    pub const PRIMARY: &str = "primary";
    /// Maximum number of entries in a list.
    pub const MAXIMUM: usize = 64;
}

/// Method for recognising connections from the node's own pods (kube-proxy: detectLocalMode).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "(self.mode == 'ClusterCIDR') == (has(self.clusterCIDRs) && size(self.clusterCIDRs) > 0)",
     "message": "clusterCIDRs is required with mode ClusterCIDR and forbidden with other modes"},
    {"rule": "(self.mode in ['BridgeInterface', 'InterfaceNamePrefix']) == has(self.interface)",
     "message": "interface is required with modes BridgeInterface and InterfaceNamePrefix and forbidden with other modes"},
]))]
pub struct LocalDetection {
    /// NodeCIDR: the source is in the pod CIDRs of the Node. ClusterCIDR: the source is in clusterCIDRs.
    /// BridgeInterface: the packet arrives on the interface. InterfaceNamePrefix: the packet arrives on an interface
    /// whose name has this prefix. None: no connection counts as local.
    pub mode: LocalDetectionMode,
    /// Networks of the pods, for mode ClusterCIDR; at most 16.
    #[serde(default, rename = "clusterCIDRs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub cluster_cidrs: Vec<Cidr>,
    /// Interface name for mode BridgeInterface, or name prefix for mode InterfaceNamePrefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_.@-]{1,15}$"))]
    pub interface: Option<String>,
}

/// Mode of local detection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LocalDetectionMode {
    /// The source is in the pod CIDRs of the Node.
    #[default]
    #[serde(rename = "NodeCIDR")]
    NodeCidr,
    /// The source is in the configured cluster CIDRs.
    #[serde(rename = "ClusterCIDR")]
    ClusterCidr,
    /// The packet arrives on the named interface.
    BridgeInterface,
    /// The packet arrives on an interface whose name has the prefix.
    InterfaceNamePrefix,
    /// No connection is local.
    None,
}

/// Connection tracking settings of the node's kernel. A value of 0 keeps the kernel's setting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Conntrack {
    /// Maximum number of connections per CPU core, 0 to 1048576. Default: 32768. 0: do not change nf_conntrack_max.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_048_576))]
    pub max_per_core: Option<i32>,
    /// Lower bound of nf_conntrack_max, independent of the number of cores; 0 or more. Default: 131072.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub min: Option<i32>,
    /// Timeout of idle established TCP connections, in seconds, 0 to 2147483. Default: 86400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub tcp_established_timeout_seconds: Option<i64>,
    /// Timeout of TCP connections in state CLOSE_WAIT, in seconds, 0 to 2147483. Default: 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub tcp_close_wait_timeout_seconds: Option<i64>,
    /// Do not mark TCP packets outside the window as invalid. Default: false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_be_liberal: Option<bool>,
    /// Timeout of unanswered UDP flows, in seconds, 0 to 2147483. Default: 0, the kernel's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub udp_timeout_seconds: Option<i64>,
    /// Timeout of answered UDP flows, in seconds, 0 to 2147483. Default: 0, the kernel's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483))]
    pub udp_stream_timeout_seconds: Option<i64>,
}

/// Log level of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Errors only.
    Error,
    /// Errors and warnings.
    Warn,
    /// Also regular events.
    Info,
    /// Also details for debugging.
    Debug,
    /// All messages.
    Trace,
}

impl LogLevel {
    /// Returns the name of the level.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Selects Nodes by labels: all of matchLabels and matchExpressions must match. Empty: all Nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// Required labels with their values; at most 32.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub match_labels: BTreeMap<String, String>,
    /// Further label requirements; at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub match_expressions: Vec<NodeSelectorRequirement>,
}

/// Requirement on the labels of a Node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
     "message": "values is required with operators In and NotIn and forbidden with other operators"},
]))]
pub struct NodeSelectorRequirement {
    /// Label key.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// In, NotIn, Exists or DoesNotExist. NotIn also matches Nodes without the label.
    pub operator: SelectorOperator,
    /// Values for operators In and NotIn; at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    pub values: Vec<String>,
}

/// Operator of a label requirement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectorOperator {
    /// The label has one of the values.
    In,
    /// The label has none of the values, or is absent.
    NotIn,
    /// The label exists.
    Exists,
    /// The label does not exist.
    DoesNotExist,
}
