//! A case of the differential test: a cluster state and changes to it, as plain data.
//!
//! A case is generated from a seed, written to a file if the proxies disagree, shrunk, and replayed with `--replay`.
//! Small numbers serve as names, so that a shrunk case is readable.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::settings::Settings;

/// Pods of the laboratory that can be endpoints: two on the node under test (zone a), two on another node of the same
/// zone, two on a node of zone b.
pub const PODS: [Pod; 6] = [
    Pod { name: "p1", node: "n1", number: 11 },
    Pod { name: "p2", node: "n1", number: 12 },
    Pod { name: "p3", node: "n2", number: 11 },
    Pod { name: "p4", node: "n2", number: 12 },
    Pod { name: "p5", node: "n3", number: 11 },
    Pod { name: "p6", node: "n3", number: 12 },
];

#[derive(Debug, Clone, Copy)]
pub struct Pod {
    /// Name, which the pod's servers send as answer.
    pub name: &'static str,
    pub node: &'static str,
    /// Last part of the pod's addresses.
    pub number: u8,
}

/// Ports on which every pod serves TCP, UDP and SCTP.
pub const TARGET_PORTS: [u16; 2] = [8080, 8081];

/// A cluster state and subsequent changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Origin of the case, for reports.
    pub name: String,
    /// Settings of both proxies.
    #[serde(default)]
    pub settings: Settings,
    /// Services of the initial state.
    pub services: Vec<Service>,
    /// Changes, one after the other, with probes after each.
    #[serde(default)]
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Step {
    /// Creates a Service, or replaces the Service of that name and its endpoints.
    Apply(Service),
    /// Deletes a Service with its endpoints.
    Delete(String),
}

/// IP families of a Service, in order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Families {
    Ipv4,
    Ipv6,
    /// Both, IPv4 first.
    Dual,
}

/// Service types that have a ClusterIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    ClusterIP,
    NodePort,
    LoadBalancer,
}

/// A Service with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Name; the namespace is `default`.
    pub name: String,
    pub service_type: ServiceType,
    pub families: Families,
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
    /// The addresses in the status have ipMode Proxy: only the load balancer handles them.
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

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    /// The node port, for types that have one.
    #[serde(default)]
    pub node_port: Option<u16>,
    /// The endpoints' port; omitted from the slices if absent.
    #[serde(default)]
    pub target: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    TCP,
    UDP,
    SCTP,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Index into [`PODS`].
    pub pod: usize,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    #[serde(default)]
    pub zones: Vec<String>,
    #[serde(default)]
    pub nodes: Vec<String>,
    /// Omits the node name from the slice.
    #[serde(default)]
    pub nowhere: bool,
    /// Omits conditions whose value equals the default.
    #[serde(default)]
    pub bare: bool,
    /// Puts the endpoint into the second slice.
    #[serde(default)]
    pub second: bool,
}

impl Case {
    /// Smaller cases with one piece less each, the coarsest first; empty if the case cannot be shrunk.
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
