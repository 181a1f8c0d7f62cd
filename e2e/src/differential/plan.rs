//! Which packets are sent in a state.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1;

use super::case::{Families, Protocol, Service};
use super::world::World;
use crate::probe::Transport;

/// Where probes come from, as seen from node n1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A pod on the node that is no endpoint.
    LocalPod,
    /// A pod on the node that may be an endpoint: it may reach itself.
    EndpointPod,
    /// A pod of another node, whose traffic comes through this one.
    RemotePod,
    /// A process of the node.
    Host,
    /// A client outside the cluster.
    Client,
}

const ORIGINS: [Origin; 5] =
    [Origin::LocalPod, Origin::EndpointPod, Origin::RemotePod, Origin::Host, Origin::Client];

/// One kind of packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Source.
    pub origin: Origin,
    /// TCP or UDP.
    pub transport: Transport,
    /// Destination.
    pub to: SocketAddr,
    /// What it is, for people.
    pub what: String,
    /// The Service has affinity: one client sees one backend, and which is up to chance.
    pub sticky: bool,
}

pub(super) fn probes(world: &World, services: &[Service]) -> Result<Vec<Probe>> {
    let mut probes = Vec::new();
    for service in services {
        let object: v1::Service =
            world.kube().get("default", &service.name)?.context("a Service of the case is gone")?;
        let spec = object.spec.context("a Service without spec")?;
        let cluster_ips: Vec<IpAddr> =
            spec.cluster_ips.unwrap_or_default().iter().filter_map(|ip| ip.parse().ok()).collect();
        for port in &service.ports {
            let transport = match port.protocol {
                Protocol::TCP => Transport::Tcp,
                Protocol::UDP => Transport::Udp,
            };
            let mut add = |kind: &str, ip: IpAddr, number: u16| {
                for origin in ORIGINS {
                    probes.push(Probe {
                        origin,
                        transport,
                        to: SocketAddr::new(ip, number),
                        what: format!("{} {kind} port {}", service.name, port.name),
                        sticky: service.affinity_seconds.is_some(),
                    });
                }
            };
            for ip in &cluster_ips {
                add("ClusterIP", *ip, port.port);
            }
            for ip in service.external_ips.iter().filter(|ip| served(service, **ip)) {
                add("externalIP", *ip, port.port);
            }
            for ip in service.load_balancer_ips.iter().filter(|ip| served(service, **ip)) {
                add("LoadBalancer", *ip, port.port);
            }
            if let Some(number) = port.node_port {
                for ipv6 in [false, true] {
                    add("NodePort", world.node_address(ipv6), number);
                }
            }
        }
        for ip in cluster_ips.iter().take(1) {
            let origin = Origin::LocalPod;
            let what = format!("{} a port that is not defined", service.name);
            let to = SocketAddr::new(*ip, 9);
            probes.push(Probe { origin, transport: Transport::Tcp, to, what, sticky: false });
        }
    }
    Ok(probes)
}

/// Addresses of a family that the Service does not have meet nobody, in both worlds: one of them is enough.
fn served(service: &Service, ip: IpAddr) -> bool {
    match service.families {
        Families::Ipv4 => ip.is_ipv4(),
        Families::Ipv6 => ip.is_ipv6(),
        Families::Dual => true,
    }
}
