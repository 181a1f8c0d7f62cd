//! Addresses and ports that no Service may take: those through which nodes and the control plane reach each other.
//!
//! A LoadBalancer address or externalIP equal to one of them would send the control plane's own connections to
//! the Service's endpoints, on every node and for as long as the Service exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use switchtower_proto::v1::{Family, FrontendKey, Protocol};

use crate::wire;

/// Port of the kubelet on every node.
const KUBELET_PORT: u16 = 10_250;
/// Health check port of the node agent on every node.
const AGENT_HEALTH_PORT: u16 = 10_256;

/// Owner of a reserved address and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Controller,
    ApiServer,
    Kubelet,
    Agent,
}

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Owner::Controller => "the Switchtower controller",
            Owner::ApiServer => "the API server",
            Owner::Kubelet => "the kubelet of a node",
            Owner::Agent => "the node agent's health checks",
        })
    }
}

/// Part of the control plane whose endpoints are reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ControlPlane {
    /// All replicas of the controller.
    Controllers,
    ApiServers,
}

#[derive(Debug, Default)]
pub(super) struct Reserved {
    controllers: BTreeSet<SocketAddr>,
    api_servers: BTreeSet<SocketAddr>,
    /// Number of Nodes with the address.
    nodes: BTreeMap<IpAddr, usize>,
}

impl Reserved {
    pub(super) fn endpoints(&self, part: ControlPlane) -> &BTreeSet<SocketAddr> {
        match part {
            ControlPlane::Controllers => &self.controllers,
            ControlPlane::ApiServers => &self.api_servers,
        }
    }

    pub(super) fn set_endpoints(&mut self, part: ControlPlane, endpoints: BTreeSet<SocketAddr>) {
        match part {
            ControlPlane::Controllers => self.controllers = endpoints,
            ControlPlane::ApiServers => self.api_servers = endpoints,
        }
    }

    pub(super) fn add_node(&mut self, address: IpAddr) {
        *self.nodes.entry(address).or_default() += 1;
    }

    pub(super) fn remove_node(&mut self, address: IpAddr) {
        if let Some(count) = self.nodes.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.nodes.remove(&address);
            }
        }
    }

    /// Returns true if a Node has this address.
    pub(super) fn is_node(&self, address: IpAddr) -> bool {
        self.nodes.contains_key(&address)
    }

    /// Returns the owner of the address and port of a frontend that is no ClusterIP.
    pub(super) fn owner(&self, key: &FrontendKey) -> Option<Owner> {
        let port = u16::try_from(key.port).ok().filter(|_| key.protocol() == Protocol::Tcp)?;
        let of_node = match port {
            KUBELET_PORT => Some(Owner::Kubelet),
            AGENT_HEALTH_PORT => Some(Owner::Agent),
            _ => None,
        };
        match wire::address(&key.address) {
            Some(address) => {
                let endpoint = SocketAddr::new(address, port);
                if self.controllers.contains(&endpoint) {
                    Some(Owner::Controller)
                } else if self.api_servers.contains(&endpoint) {
                    Some(Owner::ApiServer)
                } else {
                    of_node.filter(|_| self.is_node(address))
                }
            }
            // A node port is served on every node's addresses.
            None => {
                let on_a_node = |endpoints: &BTreeSet<SocketAddr>| {
                    endpoints.iter().any(|endpoint| {
                        endpoint.port() == port
                            && wire::family(endpoint.ip()) == key.family()
                            && self.is_node(endpoint.ip())
                    })
                };
                of_node
                    .or_else(|| on_a_node(&self.controllers).then_some(Owner::Controller))
                    .or_else(|| on_a_node(&self.api_servers).then_some(Owner::ApiServer))
            }
        }
    }

    /// The node ports of a family that the control plane may need, depending on which Nodes there are.
    pub(super) fn node_ports(&self, family: Family) -> BTreeSet<u16> {
        let endpoints = self.controllers.iter().chain(&self.api_servers);
        endpoints.filter(|endpoint| wire::family(endpoint.ip()) == family).map(SocketAddr::port).collect()
    }
}
