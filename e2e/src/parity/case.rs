//! One case of the differential test: a cluster state and changes to it, as plain data.
//!
//! A case is generated from a seed, written to a file when both proxies disagree, shrunk, and read again with
//! `--replay`. Everything is named by small numbers so that a shrunk case reads well.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::settings::Settings;

/// The pods of the laboratory that can be endpoints: two on the node under test (zone a), two on another node
/// of the same zone, two on a node of zone b.
pub const PODS: [Pod; 6] = [
    Pod { name: "p1", node: "n1", number: 11 },
    Pod { name: "p2", node: "n1", number: 12 },
    Pod { name: "p3", node: "n2", number: 11 },
    Pod { name: "p4", node: "n2", number: 12 },
    Pod { name: "p5", node: "n3", number: 11 },
    Pod { name: "p6", node: "n3", number: 12 },
];

/// A pod of the laboratory.
#[derive(Debug, Clone, Copy)]
pub struct Pod {
    /// Its name, and what its servers answer.
    pub name: &'static str,
    /// The node it is on.
    pub node: &'static str,
    /// The last part of its addresses.
    pub number: u8,
}

/// Ports on which every pod serves, over TCP, UDP and SCTP.
pub const TARGET_PORTS: [u16; 2] = [8080, 8081];

/// A cluster state and the changes that follow it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Where it came from, for people.
    pub name: String,
    /// What both proxies are told.
    #[serde(default)]
    pub settings: Settings,
    /// Services at the start.
    pub services: Vec<Service>,
    /// Changes, one after the other; probes run after each.
    #[serde(default)]
    pub steps: Vec<Step>,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Step {
    /// Creates the Service, or replaces the one with its name (and its endpoints).
    Apply(Service),
    /// Deletes the Service with its endpoints.
    Delete(String),
}

/// IP families of a Service, in order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Families {
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both, IPv4 first.
    Dual,
}

/// Service types that have a ClusterIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    /// ClusterIP.
    ClusterIP,
    /// NodePort.
    NodePort,
    /// LoadBalancer.
    LoadBalancer,
}

/// A Service with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Name; the namespace is `default`.
    pub name: String,
    /// Type.
    pub service_type: ServiceType,
    /// Families.
    pub families: Families,
    /// Ports.
    pub ports: Vec<Port>,
    /// internalTrafficPolicy Local.
    #[serde(default)]
    pub internal_local: bool,
    /// externalTrafficPolicy Local; only with a type that has one.
    #[serde(default)]
    pub external_local: bool,
    /// ClientIP affinity with this timeout.
    #[serde(default)]
    pub affinity_seconds: Option<u32>,
    /// External addresses.
    #[serde(default)]
    pub external_ips: Vec<IpAddr>,
    /// Addresses in the status; only with type LoadBalancer.
    #[serde(default)]
    pub load_balancer_ips: Vec<IpAddr>,
    /// The addresses in the status have ipMode Proxy: they are the load balancer's own affair.
    #[serde(default)]
    pub load_balancer_proxy: bool,
    /// loadBalancerSourceRanges; only with type LoadBalancer.
    #[serde(default)]
    pub source_ranges: Vec<String>,
    /// allocateLoadBalancerNodePorts false; only with type LoadBalancer.
    #[serde(default)]
    pub without_node_ports: bool,
    /// Labels, such as service.kubernetes.io/service-proxy-name.
    #[serde(default)]
    pub labels: Vec<(String, String)>,
    /// Endpoints; one or two slices for each family.
    pub endpoints: Vec<Endpoint>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// Name.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Protocol,
    /// The Service's port.
    pub port: u16,
    /// The node port, for types that have one.
    #[serde(default)]
    pub node_port: Option<u16>,
    /// The endpoints' port; the slices leave this port out if it is absent.
    #[serde(default)]
    pub target: Option<u16>,
}

/// Transport protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    TCP,
    /// UDP.
    UDP,
    /// SCTP.
    SCTP,
}

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Index into [`PODS`].
    pub pod: usize,
    /// Condition.
    pub ready: bool,
    /// Condition.
    pub serving: bool,
    /// Condition.
    pub terminating: bool,
    /// Zone hints.
    #[serde(default)]
    pub zones: Vec<String>,
    /// Node hints.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// The slice does not say on which node it is.
    #[serde(default)]
    pub nowhere: bool,
    /// Conditions that are what their absence means are left out.
    #[serde(default)]
    pub bare: bool,
    /// It stands in the second slice.
    #[serde(default)]
    pub second: bool,
}

impl Case {
    /// Smaller cases, one piece less each, the coarsest first. A case that cannot get smaller gives none.
    pub fn shrink(&self) -> Vec<Case> {
        let mut smaller = Vec::new();
        for index in (0..self.steps.len()).rev() {
            let mut case = self.clone();
            case.steps.remove(index);
            smaller.push(case);
        }
        for settings in self.settings.shrink() {
            smaller.push(Case { settings, ..self.clone() });
        }
        for index in 0..self.services.len() {
            let mut case = self.clone();
            case.services.remove(index);
            smaller.push(case);
        }
        for (index, service) in self.services.iter().enumerate() {
            for service in service.shrink() {
                let mut case = self.clone();
                case.services[index] = service;
                smaller.push(case);
            }
        }
        for (index, step) in self.steps.iter().enumerate() {
            let Step::Apply(service) = step else { continue };
            for service in service.shrink() {
                let mut case = self.clone();
                case.steps[index] = Step::Apply(service);
                smaller.push(case);
            }
        }
        smaller
    }
}

impl Service {
    fn shrink(&self) -> Vec<Service> {
        let mut smaller = Vec::new();
        let mut less = |change: &dyn Fn(&mut Service)| {
            let mut service = self.clone();
            change(&mut service);
            if service != *self {
                smaller.push(service);
            }
        };
        for index in 0..self.endpoints.len() {
            less(&|service| drop(service.endpoints.remove(index)));
        }
        for index in 0..self.ports.len() {
            if self.ports.len() > 1 {
                less(&|service| drop(service.ports.remove(index)));
            }
        }
        less(&|service| service.external_ips.clear());
        less(&|service| service.load_balancer_ips.clear());
        less(&|service| service.load_balancer_proxy = false);
        less(&|service| service.source_ranges.clear());
        less(&|service| service.affinity_seconds = None);
        less(&|service| service.internal_local = false);
        less(&|service| service.external_local = false);
        less(&|service| service.labels.clear());
        less(&|service| service.endpoints.iter_mut().for_each(|endpoint| endpoint.zones.clear()));
        less(&|service| service.endpoints.iter_mut().for_each(|endpoint| endpoint.nodes.clear()));
        less(&|service| service.endpoints.iter_mut().for_each(|endpoint| endpoint.nowhere = false));
        less(&|service| service.endpoints.iter_mut().for_each(|endpoint| endpoint.bare = false));
        less(&|service| service.endpoints.iter_mut().for_each(|endpoint| endpoint.second = false));
        if self.families == Families::Dual {
            less(&|service| service.families = Families::Ipv4);
            less(&|service| service.families = Families::Ipv6);
        }
        smaller
    }
}
