//! Checks that a node recognizes its own pods: compares their addresses with its local detection.
//!
//! A pod that local detection misses loses its source address on the way to a ClusterIP, and finds no short cut
//! behind externalTrafficPolicy Local. The agent cannot notice (it knows no pods), the controller can.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use switchtower_proto::v1::{LocalDetection, Settings};

use crate::wire;

/// Maximum number of addresses that a report names.
const SAMPLES: usize = 3;

/// Local detection of a node, as far as addresses decide.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Detection {
    /// Not at all.
    #[default]
    Nothing,
    /// By the interface that packets come in through: addresses say nothing.
    Interface(String),
    /// The source is inside one of the Node's pod CIDRs.
    PodCidrs(Vec<IpNet>),
    /// The source is inside one of these networks.
    ClusterCidrs(Vec<IpNet>),
}

impl Detection {
    /// Resolves settings for a node with these pod CIDRs.
    #[must_use]
    pub fn of(settings: &Settings, pod_cidrs: &[IpNet]) -> Self {
        match settings.local_detection() {
            LocalDetection::NodeCidr => Self::PodCidrs(pod_cidrs.to_vec()),
            LocalDetection::ClusterCidr => {
                Self::ClusterCidrs(settings.cluster_cidrs.iter().filter_map(wire::net).collect())
            }
            LocalDetection::BridgeInterface => Self::Interface(settings.interface.clone()),
            LocalDetection::InterfaceNamePrefix => Self::Interface(format!("{}*", settings.interface)),
            LocalDetection::None | LocalDetection::Unspecified => Self::Nothing,
        }
    }

    /// The networks that decide, if any do.
    #[must_use]
    pub fn networks(&self) -> &[IpNet] {
        match self {
            Self::PodCidrs(networks) | Self::ClusterCidrs(networks) => networks,
            Self::Nothing | Self::Interface(_) => &[],
        }
    }

    /// The node takes a pod with this address for a foreign source. Never where no network of its family is known: then
    /// nothing of the family is masqueraded.
    #[must_use]
    pub fn misses(&self, pod: IpAddr) -> bool {
        let mut known =
            self.networks().iter().filter(|network| network.addr().is_ipv6() == pod.is_ipv6()).peekable();
        known.peek().is_some() && !known.any(|network| network.contains(&pod))
    }
}

/// A ready endpoint appeared on a node, or went away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodChange {
    /// The node that the endpoint names, whether or not that Node exists.
    pub node: Arc<str>,
    /// Its address.
    pub address: IpAddr,
    /// Whether the endpoint appeared.
    pub present: bool,
}

/// State of a node's local detection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    /// The way of detection.
    pub detection: Detection,
    /// Number of missed pods.
    pub missed: usize,
    /// The first of their addresses.
    pub samples: Vec<IpAddr>,
}

impl Locality {
    /// Human-readable problem and solution if pods are missed.
    #[must_use]
    pub fn missed_message(&self) -> String {
        let list = |items: Vec<String>| items.join(", ");
        let samples = list(self.samples.iter().map(ToString::to_string).collect());
        let networks = list(self.detection.networks().iter().map(ToString::to_string).collect());
        let what = match self.detection {
            Detection::PodCidrs(_) => "the Node's pod CIDRs",
            _ => "the cluster CIDRs",
        };
        format!(
            "{} ready endpoints on the node are outside of {what} ({networks}), for example {samples}: such pods are not \
             recognised as local, and their connections to ClusterIPs lose their source address. Set localDetection in a \
             ProxyProfile.",
            self.missed
        )
    }
}

#[derive(Debug, Default)]
struct Pods {
    /// In how many EndpointSlices each address stands.
    slices: HashMap<IpAddr, u32>,
    /// The Node's own addresses: pods of the host's network have them.
    own: Vec<IpAddr>,
    detection: Detection,
    missed: BTreeSet<IpAddr>,
}

impl Pods {
    fn is_missed(&self, address: IpAddr) -> bool {
        self.detection.misses(address) && !self.own.contains(&address)
    }

    fn is_empty(&self) -> bool {
        self.slices.is_empty() && self.own.is_empty() && self.detection == Detection::Nothing
    }
}

/// The pods of all nodes. A change costs its own size; a node that gets other settings or CIDRs costs its own pods.
#[derive(Debug, Default)]
pub struct Localities {
    nodes: HashMap<Arc<str>, Pods>,
}

impl Localities {
    /// Records a change of an endpoint; returns whether [`Localities::of`] changed for its node.
    pub fn change(&mut self, change: &PodChange) -> bool {
        let PodChange { node, address, present } = change;
        let pods = self.nodes.entry(node.clone()).or_default();
        if *present {
            *pods.slices.entry(*address).or_default() += 1;
            return pods.is_missed(*address) && pods.missed.insert(*address);
        }
        match pods.slices.get_mut(address) {
            Some(count) if *count > 1 => {
                *count -= 1;
                false
            }
            _ => {
                pods.slices.remove(address);
                let changed = pods.missed.remove(address);
                if pods.is_empty() {
                    self.nodes.remove(node);
                }
                changed
            }
        }
    }

    /// Records a Node's own addresses and the detection in force there. Returns true if the Node's report changed.
    pub fn set(&mut self, node: &Arc<str>, own: &[IpAddr], detection: Detection) -> bool {
        let pods = self.nodes.entry(node.clone()).or_default();
        if pods.own == own && pods.detection == detection {
            return false;
        }
        pods.own = own.to_vec();
        pods.detection = detection;
        let missed = pods.slices.keys().copied().filter(|address| pods.is_missed(*address)).collect();
        pods.missed = missed;
        true
    }

    /// The Node is gone; its endpoints may still be there.
    pub fn forget(&mut self, node: &str) {
        let Some(pods) = self.nodes.get_mut(node) else { return };
        (pods.own, pods.detection, pods.missed) = Default::default();
        if pods.is_empty() {
            self.nodes.remove(node);
        }
    }

    /// Returns true if the address is a ready endpoint on the node.
    #[must_use]
    pub fn is_ready(&self, node: &str, address: IpAddr) -> bool {
        self.nodes.get(node).is_some_and(|pods| pods.slices.contains_key(&address))
    }

    /// Returns the number of missed pods of a node.
    #[must_use]
    pub fn missed(&self, node: &str) -> usize {
        self.nodes.get(node).map_or(0, |pods| pods.missed.len())
    }

    /// Returns the state of a node; `None` if it is unknown.
    #[must_use]
    pub fn of(&self, node: &str) -> Option<Locality> {
        let pods = self.nodes.get(node)?;
        Some(Locality {
            detection: pods.detection.clone(),
            missed: pods.missed.len(),
            samples: pods.missed.iter().take(SAMPLES).copied().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn pod(address: &str, present: bool) -> PodChange {
        PodChange { node: "n".into(), address: address.parse().unwrap(), present }
    }

    fn missed(localities: &Localities) -> Vec<String> {
        localities.of("n").unwrap_or_default().samples.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn settings_and_cidrs_define_local() {
        let own = networks(&["10.244.77.0/24"]);
        let settings = |mode: LocalDetection| Settings {
            local_detection: mode as i32,
            cluster_cidrs: networks(&["10.244.0.0/16"]).into_iter().map(wire::cidr).collect(),
            interface: "cali".into(),
            ..Settings::default()
        };
        let of = |mode| Detection::of(&settings(mode), &own);
        let outside: IpAddr = "10.244.3.11".parse().unwrap();
        assert!(of(LocalDetection::NodeCidr).misses(outside));
        assert!(!of(LocalDetection::NodeCidr).misses("10.244.77.9".parse().unwrap()));
        assert!(!of(LocalDetection::NodeCidr).misses("fd00::1".parse().unwrap()), "no CIDR of the family");
        assert!(!of(LocalDetection::ClusterCidr).misses(outside));
        assert!(of(LocalDetection::ClusterCidr).misses("10.9.0.1".parse().unwrap()));
        for mode in [LocalDetection::None, LocalDetection::BridgeInterface] {
            assert!(!of(mode).misses(outside), "{mode:?}");
        }
        assert_eq!(of(LocalDetection::InterfaceNamePrefix), Detection::Interface("cali*".into()));
    }

    #[test]
    fn address_counts_until_its_last_slice_is_deleted() {
        let (mut localities, node) = (Localities::default(), "n".into());
        assert!(localities.set(&node, &[], Detection::PodCidrs(networks(&["10.244.77.0/24"]))));
        assert!(!localities.change(&pod("10.244.77.9", true)));
        assert!(localities.change(&pod("10.244.3.11", true)));
        assert!(!localities.change(&pod("10.244.3.11", true)), "known already");
        assert!(!localities.change(&pod("10.244.3.11", false)), "the other slice still has it");
        assert_eq!(missed(&localities), ["10.244.3.11"]);
        assert!(localities.change(&pod("10.244.3.11", false)));
        assert_eq!(missed(&localities), [""; 0]);
    }

    #[test]
    fn order_of_node_settings_and_pods_irrelevant() {
        let (mut localities, node): (_, Arc<str>) = (Localities::default(), "n".into());
        let host: IpAddr = "192.0.2.1".parse().unwrap();
        for address in ["10.244.3.11", "192.0.2.1"] {
            assert!(!localities.change(&pod(address, true)), "no Node yet");
        }
        assert!(localities.set(&node, &[host], Detection::PodCidrs(networks(&["10.244.77.0/24"]))));
        assert_eq!(missed(&localities), ["10.244.3.11"], "the host's own address is no pod's");
        assert!(localities.set(&node, &[host], Detection::ClusterCidrs(networks(&["10.244.0.0/16"]))));
        assert_eq!(missed(&localities), [""; 0]);
        assert!(!localities.set(&node, &[host], Detection::ClusterCidrs(networks(&["10.244.0.0/16"]))));
    }

    #[test]
    fn deleted_objects_leave_no_state() {
        let (mut localities, node) = (Localities::default(), "n".into());
        localities.set(&node, &["192.0.2.1".parse().unwrap()], Detection::PodCidrs(Vec::new()));
        localities.change(&pod("10.244.3.11", true));
        localities.forget("n");
        localities.change(&pod("10.244.3.11", false));
        assert!(localities.nodes.is_empty());
        localities.change(&pod("10.244.3.12", false));
        assert!(localities.nodes.is_empty(), "what was never there does not stay either");
    }
}
