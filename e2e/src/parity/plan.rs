//! Selects the probes of a state.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1;

use super::case::{Families, Protocol, Service};
use super::probes::{Kind, ORIGINS, Origin, Probe};
use super::world::World;
use crate::probe::Transport;

/// An address of the ServiceCIDR that is never allocated.
const UNUSED_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 254);

pub(super) fn probes(world: &World, services: &[Service]) -> Result<Vec<Probe>> {
    let mut probes = Vec::new();
    for service in services {
        let cluster_ips = cluster_ips(world, service)?;
        for port in &service.ports {
            let transport = match port.protocol {
                Protocol::TCP => Transport::Tcp,
                Protocol::UDP => Transport::Udp,
                Protocol::SCTP => Transport::Sctp,
            };
            let mut add = |origins: &[Origin], kind: Kind, ip: IpAddr, number: u16| {
                probes.extend(origins.iter().map(|origin| Probe {
                    origin: *origin,
                    transport,
                    to: SocketAddr::new(ip, number),
                    service: service.name.clone(),
                    kind,
                    port: port.name.clone(),
                    sticky: service.affinity_seconds.is_some(),
                }));
            };
            for ip in &cluster_ips {
                add(&ORIGINS, Kind::ClusterIP, *ip, port.port);
            }
            for ip in service.external_ips.iter().filter(|ip| served(service, **ip)) {
                add(&ORIGINS, Kind::ExternalIP, *ip, port.port);
            }
            for ip in service.load_balancer_ips.iter().filter(|ip| served(service, **ip)) {
                add(&ORIGINS, Kind::LoadBalancer, *ip, port.port);
            }
            if let Some(number) = port.node_port {
                for ipv6 in [false, true] {
                    let loopback: IpAddr =
                        if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
                    add(&ORIGINS, Kind::NodePort, world.node_address(ipv6), number);
                    // The other origins would exercise the same rules as these.
                    let few = [Origin::LocalPod, Origin::Host, Origin::Client];
                    add(&few, Kind::SecondaryNodePort, world.secondary_address(ipv6), number);
                    add(&few, Kind::GatewayNodePort, world.gateway_address(ipv6), number);
                    add(&[Origin::Host], Kind::LoopbackNodePort, loopback, number);
                }
            }
        }
        probes.extend(unused(service, services, &cluster_ips));
    }
    Ok(probes)
}

/// Probes to addresses, ports and protocols that no Service defines.
fn unused(service: &Service, all: &[Service], cluster_ips: &[IpAddr]) -> Vec<Probe> {
    let probe = |origin, kind, transport, to| Probe {
        origin,
        transport,
        to,
        service: service.name.clone(),
        kind,
        port: String::new(),
        sticky: false,
    };
    let mut probes = Vec::new();
    for origin in [Origin::LocalPod, Origin::Host] {
        probes.push(probe(origin, Kind::UnusedAddress, Transport::Tcp, (UNUSED_ADDRESS, 80).into()));
    }
    let Some(ip) = cluster_ips.first() else { return probes };
    let defined =
        |number, protocol| service.ports.iter().any(|port| port.port == number && protocol == port.protocol);
    // A port that no Service has, and a port of another Service.
    let others = all.iter().flat_map(|other| &other.ports).map(|port| port.port);
    let foreign = others.filter(|number| !service.ports.iter().any(|port| port.port == *number)).min();
    for number in [Some(9), foreign].into_iter().flatten() {
        let to = SocketAddr::new(*ip, number);
        probes.push(probe(Origin::LocalPod, Kind::UnusedPort, Transport::Tcp, to));
    }
    for port in &service.ports {
        let (other, transport) = match port.protocol {
            Protocol::TCP => (Protocol::UDP, Transport::Udp),
            Protocol::UDP | Protocol::SCTP => (Protocol::TCP, Transport::Tcp),
        };
        if !defined(port.port, other) {
            let to = SocketAddr::new(*ip, port.port);
            probes.push(probe(Origin::LocalPod, Kind::OtherProtocol, transport, to));
        }
    }
    probes
}

fn cluster_ips(world: &World, service: &Service) -> Result<Vec<IpAddr>> {
    let object: Option<v1::Service> = world.kube().get("default", &service.name)?;
    let spec =
        object.context("a Service of the case does not exist")?.spec.context("the Service has no spec")?;
    Ok(spec.cluster_ips.unwrap_or_default().iter().filter_map(|ip| ip.parse().ok()).collect())
}

/// Filters addresses by family: one in a family that the Service lacks gets no answer in both worlds, and one probe
/// of those is enough.
fn served(service: &Service, ip: IpAddr) -> bool {
    match service.families {
        Families::Ipv4 => ip.is_ipv4(),
        Families::Ipv6 => ip.is_ipv6(),
        Families::Dual => true,
    }
}
