//! Traces the first packet of a connection through a node's view.
//!
//! The tracer follows the rules that the kernel is programmed with, step by step, and says which it took:
//! tests compare it with the rules of kube-proxy, and it is what an explanation of a packet's fate is made of.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use switchtower_proto::v1::{
    Cidr, Endpoint, Family, Frontend, FrontendKey, FrontendKind, LocalDetection, Protocol, Role, Target,
    Verdict,
};

use crate::names;
use crate::view::View;
use crate::wire::{self, address, net, octets};

/// Origin of a packet, as the node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A pod of this node.
    LocalPod(IpAddr),
    /// A process of the node itself, with the node's address.
    Host(IpAddr),
    /// Anything else: a pod of another node, a client outside the cluster.
    Other(IpAddr),
}

impl Source {
    /// The packet's source address.
    pub fn address(self) -> IpAddr {
        match self {
            Source::LocalPod(address) | Source::Host(address) | Source::Other(address) => address,
        }
    }

    /// Classification of a source address by a node. If local pods are detected by interface, an address within the
    /// node's pod CIDRs counts as one.
    pub fn of(view: &View, address: IpAddr) -> Self {
        let within = |cidrs: &[Cidr]| cidrs.iter().filter_map(net).any(|net| net.contains(&address));
        let node = view.node();
        if node.is_some_and(|node| node.addresses.contains(&octets(address))) {
            return Source::Host(address);
        }
        let own_pods = || node.is_some_and(|node| within(&node.pod_cidrs));
        let local = view.settings().is_some_and(|settings| match settings.local_detection() {
            LocalDetection::ClusterCidr => within(&settings.cluster_cidrs),
            LocalDetection::None | LocalDetection::Unspecified => false,
            LocalDetection::NodeCidr
            | LocalDetection::BridgeInterface
            | LocalDetection::InterfaceNamePrefix => own_pods(),
        });
        if local { Source::LocalPod(address) } else { Source::Other(address) }
    }
}

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source.
    pub source: Source,
    /// Destination address.
    pub destination: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

/// Outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It goes to one of these endpoints.
    Forward {
        /// All that it may go to.
        endpoints: BTreeSet<Endpoint>,
        /// The endpoint sees the node's address instead of the client's.
        masquerade: bool,
        /// The endpoint among them that is the source itself: a connection to it is masqueraded in any case, or
        /// it would never see its own answer.
        hairpin: Option<Endpoint>,
    },
    /// The client receives a rejection immediately.
    Reject(Cause),
    /// The client times out.
    Drop(Cause),
    /// No Service is concerned: the packet goes where it would without a proxy.
    Pass,
}

/// Why a packet goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The service port has no usable endpoint.
    NoEndpoints,
    /// internalTrafficPolicy Local, and no endpoint on this node.
    NoLocalEndpointsInside,
    /// externalTrafficPolicy Local, and no endpoint on this node.
    NoLocalEndpointsOutside,
    /// The source is in none of loadBalancerSourceRanges.
    SourceRange,
    /// A ClusterIP without this port.
    UndefinedPort,
    /// An address of a ServiceCIDR that no Service has.
    UnallocatedAddress,
}

/// The fate and how it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The outcome.
    pub fate: Fate,
    /// Readable steps that led to it, in the terms of the kernel's maps.
    pub path: Vec<String>,
}

/// Follows a packet through a node's view.
pub fn trace(view: &View, packet: &Packet) -> Trace {
    let mut tracer = Tracer { view, packet, path: Vec::new() };
    let fate = tracer.run();
    Trace { fate, path: tracer.path }
}

struct Tracer<'a> {
    view: &'a View,
    packet: &'a Packet,
    path: Vec<String>,
}

impl Tracer<'_> {
    fn run(&mut self) -> Fate {
        let Packet { destination, protocol, port, .. } = *self.packet;
        let key = FrontendKey {
            family: self.family().into(),
            address: octets(destination),
            protocol: protocol.into(),
            port: port.into(),
        };
        let Some(frontend) = self.view.frontend(&key) else { return self.unserved() };
        self.path.push(format!("frontends {} ({})", names::frontend(&key), names::kind(frontend.kind())));
        let ranges = self.source_ranges(frontend);
        if !ranges.is_empty() {
            let allowed = self.source_allowed(frontend, &ranges);
            let verdict = if allowed { "is allowed" } else { "is in no allowed range" };
            self.path.push(format!("source ranges: {} {verdict}", self.packet.source.address()));
            if !allowed {
                return Fate::Drop(Cause::SourceRange);
            }
        }
        let detected = self.detection();
        let local_pod = detected && matches!(self.packet.source, Source::LocalPod(_));
        let inside = local_pod || matches!(self.packet.source, Source::Host(_));
        let (inner, outer) = (frontend.inside.unwrap_or_default(), frontend.outside.unwrap_or_default());
        let target = if inside { inner } else { outer };
        if inner != outer {
            let who = match (self.packet.source, local_pod) {
                (Source::Host(_), _) => "a process of the node",
                (_, true) => "a local pod",
                _ => "not a local pod",
            };
            self.path.push(format!("{}: the source is {who}", if inside { "inside" } else { "outside" }));
        }
        let masquerade = self.masquerades(frontend, local_pod);
        self.pick(frontend, &target, masquerade)
    }

    fn family(&self) -> Family {
        wire::family(self.packet.destination)
    }

    /// No frontend: ports of a ClusterIP that are not defined are refused, ServiceCIDR addresses that are not
    /// allocated are dropped.
    fn unserved(&mut self) -> Fate {
        let address = octets(self.packet.destination);
        let of_address = |frontend: &&Frontend| {
            frontend.kind() == FrontendKind::ClusterIp
                && frontend.key.as_ref().is_some_and(|key| key.address == address)
        };
        if self.view.frontends().find(of_address).is_some() {
            self.path.push(format!("cluster_ips {}: no such port", self.packet.destination));
            return Fate::Reject(Cause::UndefinedPort);
        }
        if self.view.service_cidrs().filter_map(net).any(|net| net.contains(&self.packet.destination)) {
            self.path.push(format!("service_cidrs: no Service has {}", self.packet.destination));
            return Fate::Drop(Cause::UnallocatedAddress);
        }
        Fate::Pass
    }

    /// The source ranges that count: a family without one of its own is open.
    fn source_ranges(&self, frontend: &Frontend) -> Vec<IpNet> {
        let ipv6 = self.packet.destination.is_ipv6();
        let ranges = frontend.source_ranges.iter().filter_map(net);
        let balanced = frontend.kind() == FrontendKind::LoadBalancer;
        ranges.filter(|range| balanced && range.addr().is_ipv6() == ipv6).collect()
    }

    /// A node whose own address is allowed may also use the addresses that the balancer gave the Service: where
    /// they are bound on the node, its connections have one of them as their source.
    fn source_allowed(&self, frontend: &Frontend, ranges: &[IpNet]) -> bool {
        let source = self.packet.source.address();
        let within = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
        let node = self.view.node().map(|node| node.addresses.as_slice()).unwrap_or_default();
        let ipv6 = self.packet.destination.is_ipv6();
        let primary =
            node.iter().filter_map(|octets| address(octets)).find(|address| address.is_ipv6() == ipv6);
        let balanced = |other: &Frontend| {
            other.kind() == FrontendKind::LoadBalancer
                && other.service_port == frontend.service_port
                && other.key.as_ref().is_some_and(|key| key.address == octets(source))
        };
        within(&source) || (primary.is_some_and(|node| within(&node)) && self.view.frontends().any(balanced))
    }

    /// Returns true if the node can recognize local pods of this family.
    fn detection(&self) -> bool {
        detects_local_pods(self.view, self.family())
    }

    fn masquerades(&self, frontend: &Frontend, local_pod: bool) -> bool {
        if frontend.kind() == FrontendKind::ClusterIp {
            return match cluster_ip_masquerade(self.view, self.family()) {
                ClusterIpMasquerade::All => true,
                ClusterIpMasquerade::NotLocalPods => !local_pod,
                ClusterIpMasquerade::Never => false,
            };
        }
        match frontend.outside.unwrap_or_default().role() {
            Role::Local => matches!(self.packet.source, Source::Host(_)),
            _ => true,
        }
    }

    fn pick(&mut self, frontend: &Frontend, target: &Target, masquerade: bool) -> Fate {
        let service_port = frontend.service_port.clone().unwrap_or_default();
        let pool = self.view.pool(&service_port, self.family(), target.role());
        let name = format!("slots {} {}", names::service_port(&service_port), names::role(target.role()));
        match pool.filter(|pool| !pool.is_empty()) {
            Some(pool) => {
                self.path.push(format!("{name}: one of {}", pool.len()));
                let own = pool.iter().find(|endpoint| {
                    endpoint.address == octets(self.packet.source.address())
                        && self.view.is_local_endpoint(self.packet.protocol, endpoint)
                });
                Fate::Forward { endpoints: pool.clone(), masquerade, hairpin: own.cloned() }
            }
            None if target.when_empty() == Verdict::Drop => {
                self.path.push(format!("{name}: none on this node, dropped"));
                let internal = frontend.kind() == FrontendKind::ClusterIp
                    || frontend.outside.unwrap_or_default().role() != Role::Local;
                let cause =
                    if internal { Cause::NoLocalEndpointsInside } else { Cause::NoLocalEndpointsOutside };
                Fate::Drop(cause)
            }
            None => {
                self.path.push(format!("{name}: none, refused"));
                Fate::Reject(Cause::NoEndpoints)
            }
        }
    }
}

/// Sources whose connections to a ClusterIP are masqueraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterIpMasquerade {
    /// All.
    All,
    /// Those that do not come from a pod of the node.
    NotLocalPods,
    /// None, because the node cannot recognize local pods.
    Never,
}

/// Masquerading by a node's settings of connections to a ClusterIP of a family.
#[must_use]
pub fn cluster_ip_masquerade(view: &View, family: Family) -> ClusterIpMasquerade {
    if view.settings().is_some_and(|settings| settings.masquerade_all) {
        ClusterIpMasquerade::All
    } else if detects_local_pods(view, family) {
        ClusterIpMasquerade::NotLocalPods
    } else {
        ClusterIpMasquerade::Never
    }
}

fn detects_local_pods(view: &View, family: Family) -> bool {
    let Some(settings) = view.settings() else { return false };
    let of_family = |cidrs: &[Cidr]| {
        cidrs.iter().filter_map(net).any(|net| net.addr().is_ipv6() == (family == Family::Ipv6))
    };
    match settings.local_detection() {
        LocalDetection::NodeCidr => view.node().is_some_and(|node| of_family(&node.pod_cidrs)),
        LocalDetection::ClusterCidr => of_family(&settings.cluster_cidrs),
        LocalDetection::BridgeInterface | LocalDetection::InterfaceNamePrefix => true,
        LocalDetection::None | LocalDetection::Unspecified => false,
    }
}
