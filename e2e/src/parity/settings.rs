//! Data-plane settings of a case: as kube-proxy's configuration, and as the settings of a ProxyProfile.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The networks of all pods of the laboratory.
const CLUSTER_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/32"];

/// What operators set on both proxies; the default is both proxies' default on a cluster whose Nodes have pod CIDRs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// How local pods are told from others.
    pub detection: Detection,
    /// Networks of the addresses on which node ports are served; none: the Node's primary addresses.
    pub node_port_addresses: Vec<String>,
    /// Everything to a ClusterIP is masqueraded.
    pub masquerade_all: bool,
}

/// How a connection of one of the node's own pods is told from others (kube-proxy: detectLocalMode).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Detection {
    /// The source is in the Node's pod CIDRs.
    #[default]
    NodeCidr,
    /// The source is in the networks of all pods.
    ClusterCidr,
    /// The packet comes in through this interface.
    BridgeInterface(String),
    /// The packet comes in through an interface whose name begins so.
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
    /// As kube-proxy's configuration has them.
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

    /// As a ProxyProfile has them.
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

    /// With one setting less each.
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
