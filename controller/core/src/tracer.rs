//! What happens to the first packet of a connection on a node, by the node's view.
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

use crate::view::View;
use crate::wire::{self, address, net, octets};

/// Where a packet comes from, as the node sees it.
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
    fn address(self) -> IpAddr {
        match self {
            Source::LocalPod(address) | Source::Host(address) | Source::Other(address) => address,
        }
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

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It goes to one of these endpoints.
    Forward {
        /// All that it may go to.
        endpoints: BTreeSet<Endpoint>,
        /// The endpoint sees the node's address instead of the client's.
        masquerade: bool,
    },
    /// The client is told at once.
    Reject,
    /// The client times out.
    Drop,
    /// No Service is concerned: the packet goes where it would without a proxy.
    Pass,
}

/// The fate and how it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The outcome.
    pub fate: Fate,
    /// The steps that led to it, for people.
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
        self.path.push(format!("frontend {destination}:{port} ({:?})", frontend.kind()));
        if !self.source_allowed(frontend) {
            self.path.push("source is in none of loadBalancerSourceRanges".to_owned());
            return Fate::Drop;
        }
        let detected = self.detection();
        let local_pod = detected && matches!(self.packet.source, Source::LocalPod(_));
        let inside = local_pod || matches!(self.packet.source, Source::Host(_));
        let target = if inside { frontend.inside } else { frontend.outside }.unwrap_or_default();
        self.path.push(format!("{} target", if inside { "inside" } else { "outside" }));
        let masquerade = self.masquerades(frontend, detected, local_pod);
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
            self.path.push("a ClusterIP without this port".to_owned());
            return Fate::Reject;
        }
        if self.view.service_cidrs().filter_map(net).any(|net| net.contains(&self.packet.destination)) {
            self.path.push("an address of a ServiceCIDR that no Service has".to_owned());
            return Fate::Drop;
        }
        Fate::Pass
    }

    /// A node whose own address is allowed may also use the address that the balancer gave, which is then
    /// both source and destination (kube-proxy: the firewall chain's own exception).
    fn source_allowed(&self, frontend: &Frontend) -> bool {
        let ranges: Vec<IpNet> = frontend.source_ranges.iter().filter_map(net).collect();
        let source = self.packet.source.address();
        let within = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
        let node = self.view.node().map(|node| node.addresses.as_slice()).unwrap_or_default();
        let node_allowed = node.iter().filter_map(|octets| address(octets)).any(|address| within(&address));
        ranges.is_empty() || within(&source) || (source == self.packet.destination && node_allowed)
    }

    /// Whether local pods can be told from other sources in this family.
    fn detection(&self) -> bool {
        let Some(settings) = self.view.settings() else { return false };
        let of_family = |cidrs: &[Cidr]| {
            cidrs.iter().filter_map(net).any(|net| net.addr().is_ipv6() == self.packet.destination.is_ipv6())
        };
        match settings.local_detection() {
            LocalDetection::NodeCidr => self.view.node().is_some_and(|node| of_family(&node.pod_cidrs)),
            LocalDetection::ClusterCidr => of_family(&settings.cluster_cidrs),
            LocalDetection::BridgeInterface | LocalDetection::InterfaceNamePrefix => true,
            LocalDetection::None | LocalDetection::Unspecified => false,
        }
    }

    fn masquerades(&self, frontend: &Frontend, detected: bool, local_pod: bool) -> bool {
        let all = self.view.settings().is_some_and(|settings| settings.masquerade_all);
        if frontend.kind() == FrontendKind::ClusterIp {
            return all || (detected && !local_pod);
        }
        match frontend.outside.unwrap_or_default().role() {
            Role::Local => matches!(self.packet.source, Source::Host(_)),
            _ => true,
        }
    }

    fn pick(&mut self, frontend: &Frontend, target: &Target, masquerade: bool) -> Fate {
        let service_port = frontend.service_port.clone().unwrap_or_default();
        let pool = self.view.pool(&service_port, self.family(), target.role());
        match pool.filter(|pool| !pool.is_empty()) {
            Some(pool) => {
                self.path.push(format!("pool {:?} with {} endpoints", target.role(), pool.len()));
                Fate::Forward { endpoints: pool.clone(), masquerade }
            }
            None => {
                self.path.push(format!("pool {:?} is empty", target.role()));
                if target.when_empty() == Verdict::Drop { Fate::Drop } else { Fate::Reject }
            }
        }
    }
}
