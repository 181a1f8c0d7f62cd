//! One kind of packet: origin, transport, destination.

use std::fmt;
use std::net::SocketAddr;

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

/// All origins.
pub const ORIGINS: [Origin; 5] =
    [Origin::LocalPod, Origin::EndpointPod, Origin::RemotePod, Origin::Host, Origin::Client];

/// What kind of address a probe goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The Service's own address.
    ClusterIP,
    /// spec.externalIPs.
    ExternalIP,
    /// An address of the load balancer.
    LoadBalancer,
    /// A node port on the Node's own address.
    NodePort,
    /// A node port on another address of the node.
    SecondaryNodePort,
    /// A node port on the address of the node that is its pods' gateway.
    GatewayNodePort,
    /// A node port on a loopback address of the node.
    LoopbackNodePort,
    /// A port of the Service's own address that it does not define.
    UnusedPort,
    /// A port of the Service's own address that it defines for another protocol.
    OtherProtocol,
    /// An address of the ServiceCIDR that no Service has.
    UnusedAddress,
}

impl Kind {
    /// Whether it is a node port.
    pub(super) fn of_node(self) -> bool {
        matches!(
            self,
            Self::NodePort | Self::SecondaryNodePort | Self::GatewayNodePort | Self::LoopbackNodePort
        )
    }
}

/// One kind of packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Source.
    pub origin: Origin,
    /// Transport.
    pub transport: Transport,
    /// Destination.
    pub to: SocketAddr,
    /// The Service's name.
    pub service: String,
    /// What kind of address.
    pub kind: Kind,
    /// The port's name.
    pub port: String,
    /// The Service has affinity: one client sees one backend, and which is up to chance.
    pub sticky: bool,
}

impl fmt::Display for Probe {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Probe { origin, transport, to, service, kind, port, .. } = self;
        write!(formatter, "{service} {kind:?} {port}: {transport:?} from {origin:?} to {to}")
    }
}
