//! Data-plane settings of a case, as configuration of kube-proxy and as settings of a ProxyProfile.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Networks of all pods of the laboratory.
const CLUSTER_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/32"];

/// Settings of both proxies; the default is both proxies' default on a cluster whose Nodes have pod CIDRs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// Detection of local pods.
    pub detection: Detection,
    /// Networks of the addresses on which node ports are served; empty: the Node's primary addresses.
    pub node_port_addresses: Vec<String>,
    /// Masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
}

/// Detection of connections from the node's own pods (kube-proxy: detectLocalMode).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Detection {
    /// The source is in the Node's pod CIDRs.
    #[default]
    NodeCidr,
    /// The source is in the networks of all pods.
    ClusterCidr,
    /// The packet arrives through this interface.
    BridgeInterface(String),
    /// The packet arrives through an interface whose name has this prefix.
    InterfaceNamePrefix(String),
    /// No connection counts as a local pod's; kube-proxy: ClusterCIDR without a CIDR.
    None,
}

impl fmt::Display for Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.detection)?;
        if !self.node_port_addresses.is_empty() {
            write!(formatter, ", node ports on {}", self.node_port_addresses.join(" "))?;
        }
        if self.masquerade_all { formatter.write_str(", masquerade all") } else { Ok(()) }
    }
}

impl Settings {
    /// As fields of kube-proxy's configuration.
    pub(super) fn kube_proxy(&self) -> Value {
        let (mode, detect, cluster) = match &self.detection {
            Detection::NodeCidr => ("NodeCIDR", json!({}), String::new()),
            Detection::ClusterCidr => ("ClusterCIDR", json!({}), CLUSTER_CIDRS.join(",")),
            Detection::BridgeInterface(name) => {
                ("BridgeInterface", json!({"bridgeInterface": name}), String::new())
            }
            Detection::InterfaceNamePrefix(prefix) => {
                ("InterfaceNamePrefix", json!({"interfaceNamePrefix": prefix}), String::new())
            }
            Detection::None => ("ClusterCIDR", json!({}), String::new()),
        };
        json!({
            "detectLocalMode": mode, "detectLocal": detect, "clusterCIDR": cluster,
            "nodePortAddresses": self.node_port_addresses,
            "nftables": {
                "masqueradeAll": self.masquerade_all, "minSyncPeriod": "0s", "syncPeriod": "30s",
            },
        })
    }

    /// As settings of a ProxyProfile.
    pub(super) fn profile(&self) -> Value {
        let detection = match &self.detection {
            Detection::NodeCidr => json!({"mode": "NodeCIDR"}),
            Detection::ClusterCidr => json!({"mode": "ClusterCIDR", "clusterCIDRs": CLUSTER_CIDRS}),
            Detection::BridgeInterface(name) => json!({"mode": "BridgeInterface", "interface": name}),
            Detection::InterfaceNamePrefix(prefix) => {
                json!({"mode": "InterfaceNamePrefix", "interface": prefix})
            }
            Detection::None => json!({"mode": "None"}),
        };
        json!({
            "localDetection": detection,
            "nodePortAddresses": self.node_port_addresses,
            "masqueradeAll": self.masquerade_all,
        })
    }

    /// Simpler settings, with one setting less each.
    pub(super) fn shrink(&self) -> Vec<Settings> {
        let less = [
            Settings::default(),
            Settings { detection: Detection::default(), ..self.clone() },
            Settings { node_port_addresses: Vec::new(), ..self.clone() },
            Settings { masquerade_all: false, ..self.clone() },
        ];
        less.into_iter().filter(|smaller| smaller != self).collect()
    }
}
