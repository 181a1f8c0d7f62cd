//! Compiles one Service: its frontends, and its items in each layer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use switchtower_proto::v1::{
    Family, Frontend, FrontendKey, FrontendKind, LocalEndpoint, PoolKey, Protocol, Role, ServicePort, Target,
    Verdict,
};

use super::categorize::{Address, Categories, Endpoints, categorize, gather};
use super::host_endpoints::{self, IsHost};
use super::limits::{Bound, Usage};
use super::ports::{Ports, distinct_ports};
use crate::compiled::{Problem, ProblemObject, ProblemReason};
use crate::drain::host_pods::HostEndpoint;
use crate::model::{EndpointSlice, LayerId, Service, ServicePortSpec, TrafficPolicy};
use crate::wire;

/// Members of one pool at most; the rest is left out and reported.
pub const MAX_POOL_MEMBERS: usize = 65_000;
/// Source ranges of one frontend at most; a Service with more is reported, and its surplus left out.
pub const MAX_SOURCE_RANGES: usize = 1_000;

/// Everything that a Service contributes, to be compared with what it contributed before.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Output {
    /// Frontends that it would have without other claims.
    pub(super) frontends: BTreeMap<FrontendKey, Frontend>,
    /// Pools by layer.
    pub(super) pools: BTreeMap<LayerId, BTreeMap<PoolKey, BTreeSet<Address>>>,
    /// Local endpoints by node.
    pub(super) local: BTreeMap<Arc<str>, BTreeSet<LocalEndpoint>>,
    /// Health check port and ready addresses by node.
    pub(super) health: Option<(u16, ReadyCounts)>,
    /// Endpoints of host-network pods.
    pub(super) hosts: BTreeSet<HostEndpoint>,
    /// Nodes that endpoints or hints name, whether the Node exists or not.
    pub(super) nodes: BTreeSet<Arc<str>>,
    pub(super) problems: Vec<Problem>,
    /// Bound that the Service exceeds.
    pub(super) bound: Option<Bound>,
    /// Distinct endpoints, for counts.
    pub(super) endpoints: usize,
    /// Members of all pools.
    members: usize,
    /// Maximum of `members`.
    room: usize,
}

impl Output {
    /// Contributes nothing but the problem of a refused Service.
    pub(super) fn refused(problem: Problem, bound: Bound) -> Self {
        Self { problems: vec![problem], bound: Some(bound), ..Self::default() }
    }

    /// Reports an exceeded limit, once for all ports and families that exceed it alike.
    fn exceeds(&mut self, service: &Service, message: String) {
        let problem = Problem::of_service(service, ProblemReason::LimitExceeded, message);
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}

/// Compiles one Service from its slices, in the order of their keys.
pub(super) fn compile(
    service: &Service,
    slices: &[&EndpointSlice],
    limit: Usage,
    is_host: IsHost<'_>,
) -> Output {
    let mut output = Output { room: limit.endpoints, ..Output::default() };
    let mut ports = distinct_ports(service, &mut output.problems);
    let external_addresses = bound_frontends(service, &mut ports, limit.frontends, &mut output.problems);
    output.problems.extend(slices.iter().filter_map(|slice| foreign_addresses(slice)));
    for cluster_ip in &service.cluster_ips {
        for port in ports.values() {
            let endpoints = gather(slices.iter().copied(), port, cluster_ip.is_ipv6());
            CompiledPort::new(service, port, *cluster_ip, external_addresses, &endpoints).write(&mut output);
            host_endpoints::collect(port.protocol, &endpoints, is_host, &mut output.hosts);
        }
    }
    output.health = service.health_check_port.map(|port| (port, ready_addresses(service, slices)));
    let over_limit = output.problems.iter().any(|problem| problem.reason == ProblemReason::LimitExceeded);
    output.bound = over_limit.then_some(Bound::Service);
    output
}

/// Leaves out ports beyond the limit. Returns how many external addresses of a family each of the others may have:
/// every port has two frontends of its own, by its ClusterIP and its node port.
fn bound_frontends(
    service: &Service,
    ports: &mut Ports<'_>,
    limit: usize,
    problems: &mut Vec<Problem>,
) -> usize {
    let families = service.cluster_ips.len().max(1);
    let (wanted, most) = (ports.len(), (limit / (2 * families)).max(1));
    while ports.len() > most {
        ports.pop_last();
    }
    if wanted > most {
        let message = format!("{wanted} ports: the first {most} in the order of their names are used");
        problems.push(Problem::of_service(service, ProblemReason::LimitExceeded, message));
    }
    let room = (limit / (families * ports.len().max(1))).saturating_sub(2);
    let addresses = |ipv6: bool| {
        let all = service.external_ips.iter().chain(&service.load_balancer_ips);
        all.filter(|address| address.is_ipv6() == ipv6).count()
    };
    let wanted = addresses(false).max(addresses(true));
    if wanted > room {
        let message = format!("{wanted} external addresses of {} ports: {room} are used", ports.len());
        problems.push(Problem::of_service(service, ProblemReason::LimitExceeded, message));
    }
    room
}

/// Addresses that are not of the slice's own family are left out.
fn foreign_addresses(slice: &EndpointSlice) -> Option<Problem> {
    let foreign = slice.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() != slice.ipv6).count();
    let family = if slice.ipv6 { "IPv6" } else { "IPv4" };
    (foreign > 0).then(|| Problem {
        object: ProblemObject::EndpointSlice(slice.key.clone()),
        reason: ProblemReason::InvalidAddress,
        message: format!("{foreign} addresses are not {family}, the slice's addressType: they are not used"),
    })
}

/// A port of a Service in the family of one of its ClusterIPs.
struct CompiledPort<'a> {
    service: &'a Service,
    port: &'a ServicePortSpec,
    cluster_ip: IpAddr,
    key: ServicePort,
    outside: Outside,
    endpoints: &'a Endpoints<'a>,
    categories: Categories,
    /// Some frontend uses the Cluster pool.
    uses_cluster: bool,
    /// Some frontend uses the Local pools.
    uses_local: bool,
}

impl<'a> CompiledPort<'a> {
    /// At most `external_addresses` of the family get a frontend.
    fn new(
        service: &'a Service,
        port: &'a ServicePortSpec,
        cluster_ip: IpAddr,
        external_addresses: usize,
        endpoints: &'a Endpoints<'a>,
    ) -> Self {
        let outside = Outside::of(service, port, wire::family(cluster_ip), external_addresses);
        Self {
            service,
            port,
            cluster_ip,
            key: ServicePort {
                namespace: service.key.namespace.to_string(),
                name: service.key.name.to_string(),
                port: port.name.to_string(),
                protocol: port.protocol.into(),
            },
            endpoints,
            categories: categorize(endpoints),
            uses_cluster: service.internal_policy == TrafficPolicy::Cluster || !outside.is_empty(),
            uses_local: service.internal_policy == TrafficPolicy::Local
                || (service.external_policy == TrafficPolicy::Local && !outside.is_empty()),
            outside,
        }
    }

    fn write(&self, output: &mut Output) {
        output.endpoints += self.endpoints.len();
        output.nodes.extend(self.endpoints.values().filter_map(|endpoint| endpoint.node.clone()));
        output.nodes.extend(self.categories.nodes.keys().cloned());
        let ranges = source_ranges(self.service, wire::family(self.cluster_ip), output);
        for frontend in self.frontends(&ranges) {
            let frontend_key = frontend.key.clone().unwrap_or_default();
            output.frontends.insert(frontend_key, frontend);
        }
        self.pools(output);
        self.local_endpoints(output);
    }

    fn frontends(&self, ranges: &[IpNet]) -> Vec<Frontend> {
        let Self { service, port, cluster_ip, .. } = *self;
        let family = wire::family(cluster_ip);
        // A Cluster pool is empty only where nothing is usable anywhere.
        let when_empty = |role| match (role, self.categories.any) {
            (Role::Local, true) => Verdict::Drop,
            _ => Verdict::Reject,
        };
        let target = |policy| {
            let role = if policy == TrafficPolicy::Local { Role::Local } else { Role::Cluster };
            Target { role: role.into(), when_empty: when_empty(role).into() }
        };
        let frontend = |kind, address: Vec<u8>, number: u16, outside: Target, inside: Target| Frontend {
            key: Some(FrontendKey {
                family: family.into(),
                address,
                protocol: port.protocol.into(),
                port: number.into(),
            }),
            kind: FrontendKind::into(kind),
            service_port: Some(self.key.clone()),
            outside: Some(outside),
            inside: Some(inside),
            affinity_seconds: service.affinity_seconds.unwrap_or(0).min(86_400),
            source_ranges: if kind == FrontendKind::LoadBalancer {
                ranges.iter().map(|net| wire::cidr(*net)).collect()
            } else {
                Vec::new()
            },
        };
        let internal = target(service.internal_policy);
        let (external, inside) = (target(service.external_policy), target(TrafficPolicy::Cluster));
        let mut all =
            vec![frontend(FrontendKind::ClusterIp, wire::octets(cluster_ip), port.port, internal, internal)];
        for (kind, address) in &self.outside.addresses {
            if *address != cluster_ip {
                all.push(frontend(*kind, wire::octets(*address), port.port, external, inside));
            }
        }
        if let Some(number) = self.outside.node_port {
            all.push(frontend(FrontendKind::NodePort, Vec::new(), number, external, inside));
        }
        all
    }

    fn pools(&self, output: &mut Output) {
        let categories = &self.categories;
        let family = wire::family(self.cluster_ip).into();
        let pool = |role: Role| PoolKey { service_port: Some(self.key.clone()), family, role: role.into() };
        let mut put = |layer: LayerId, role: Role, addresses: &BTreeSet<Address>| {
            let room = MAX_POOL_MEMBERS.min(output.room - output.members);
            let members: BTreeSet<Address> = addresses.iter().copied().take(room).collect();
            output.members += members.len();
            if !members.is_empty() {
                output.pools.entry(layer).or_default().insert(pool(role), members);
            }
            if addresses.len() > room {
                let message = if room == MAX_POOL_MEMBERS {
                    format!(
                        "{} endpoints of one port: the first {MAX_POOL_MEMBERS} are used",
                        addresses.len()
                    )
                } else {
                    format!("more than {} endpoints of all ports: the others are left out", output.room)
                };
                output.exceeds(self.service, message);
            }
        };
        if self.uses_cluster && !categories.cluster.is_empty() {
            put(LayerId::Cluster, Role::Cluster, &categories.cluster);
            for (zone, addresses) in &categories.zones {
                if *addresses != categories.cluster {
                    put(LayerId::Zone(zone.clone()), Role::Cluster, addresses);
                }
            }
            for (node, addresses) in &categories.nodes {
                put(LayerId::Node(node.clone()), Role::Cluster, addresses);
            }
        }
        if self.uses_local {
            for (node, addresses) in &categories.local {
                put(LayerId::Node(node.clone()), Role::Local, addresses);
            }
        }
        if self.port.protocol == Protocol::Udp && !categories.serving.is_empty() {
            put(LayerId::Cluster, Role::Serving, &categories.serving);
        }
    }

    /// Endpoints that can reach themselves through the Service.
    ///
    /// Topology hints are not applied: an entry for an endpoint that its own node does not use is never matched.
    fn local_endpoints(&self, output: &mut Output) {
        let categories = &self.categories;
        if output.members >= output.room {
            return; // What no pool has a member for is not used.
        }
        for (address, endpoint) in self.endpoints {
            let Some(node) = &endpoint.node else { continue };
            let by_local = || categories.local.get(node).is_some_and(|local| local.contains(address));
            if (self.uses_cluster && categories.cluster.contains(address)) || (self.uses_local && by_local())
            {
                output.local.entry(node.clone()).or_default().insert(LocalEndpoint {
                    address: wire::octets(address.0),
                    protocol: self.port.protocol.into(),
                    port: address.1.into(),
                });
            }
        }
    }
}

/// External addresses and the node port of a service port, in one family.
struct Outside {
    addresses: Vec<(FrontendKind, IpAddr)>,
    node_port: Option<u16>,
}

impl Outside {
    /// At most `most` addresses, the load balancer's before others.
    fn of(service: &Service, port: &ServicePortSpec, family: Family, most: usize) -> Self {
        let of_family = |kind, addresses: &[IpAddr], most| -> Vec<_> {
            let same = addresses.iter().filter(|address| wire::family(**address) == family);
            same.take(most).map(|address| (kind, *address)).collect()
        };
        // The load balancer's own address comes last and wins over the same address as an externalIP.
        let of_balancer = of_family(FrontendKind::LoadBalancer, &service.load_balancer_ips, most);
        let room = most - of_balancer.len();
        let mut addresses = of_family(FrontendKind::ExternalIp, &service.external_ips, room);
        addresses.extend(of_balancer);
        Outside { addresses, node_port: port.node_port.filter(|number| *number != 0) }
    }

    fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.node_port.is_none()
    }
}

/// Every frontend of a load balancer has the ranges: with many frontends each has fewer.
fn source_ranges(service: &Service, family: Family, output: &mut Output) -> Vec<IpNet> {
    let of_family = |net: &&IpNet| wire::family(net.addr()) == family;
    let ranges: BTreeSet<IpNet> = service.source_ranges.iter().filter(of_family).map(IpNet::trunc).collect();
    let frontends = service.ports.len() * service.load_balancer_ips.len();
    let most = (output.room / frontends.max(1)).clamp(1, MAX_SOURCE_RANGES);
    if ranges.len() > most {
        let message = format!("{} loadBalancerSourceRanges: the first {most} are used", ranges.len());
        output.exceeds(service, message);
    }
    ranges.into_iter().take(most).collect()
}

/// Distinct ready addresses by node, IPv4 and IPv6.
pub(super) type ReadyCounts = BTreeMap<Arc<str>, [u32; 2]>;

/// Distinct ready addresses by node, over all ports, in the Service's families.
fn ready_addresses(service: &Service, slices: &[&EndpointSlice]) -> ReadyCounts {
    let mut distinct: BTreeMap<Arc<str>, BTreeSet<IpAddr>> = BTreeMap::new();
    for ipv6 in service.cluster_ips.iter().map(IpAddr::is_ipv6) {
        for port in &service.ports {
            let endpoints = gather(slices.iter().copied(), port, ipv6);
            for (address, endpoint) in endpoints.iter().filter(|(_, endpoint)| endpoint.ready) {
                if let Some(node) = &endpoint.node {
                    distinct.entry(node.clone()).or_default().insert(address.0);
                }
            }
        }
    }
    let count = |addresses: BTreeSet<IpAddr>| {
        let ipv6 = addresses.iter().filter(|address| address.is_ipv6()).count();
        [(addresses.len() - ipv6) as u32, ipv6 as u32]
    };
    distinct.into_iter().map(|(node, addresses)| (node, count(addresses))).collect()
}
