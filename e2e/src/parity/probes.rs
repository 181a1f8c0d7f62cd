//! A kind of packet: origin, transport, destination.

use std::fmt;
use std::net::SocketAddr;

use crate::probe::Transport;

/// Origin of a probe, relative to node n1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A pod on the node that is not an endpoint.
    LocalPod,
    /// A pod on the node that may be an endpoint and thus reach itself.
    EndpointPod,
    /// A pod of another node, whose traffic passes n1.
    RemotePod,
    /// A process on the node.
    Host,
    /// A client outside the cluster.
    Client,
}

pub const ORIGINS: [Origin; 5] =
    [Origin::LocalPod, Origin::EndpointPod, Origin::RemotePod, Origin::Host, Origin::Client];

/// Kind of destination address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    ClusterIP,
    ExternalIP,
    LoadBalancer,
    /// A node port on the Node's own address.
    NodePort,
    /// A node port on another address of the node.
    SecondaryNodePort,
    /// A node port on the address of the node that is its pods' gateway.
    GatewayNodePort,
    /// A node port on a loopback address of the node.
    LoopbackNodePort,
    /// A port of the ClusterIP that the Service does not define.
    UnusedPort,
    /// A port of the ClusterIP that the Service defines for another protocol.
    OtherProtocol,
    /// An address of the ServiceCIDR without a Service.
    UnusedAddress,
}

impl Kind {
    /// Checks whether the kind is a node port.
    pub(super) fn of_node(self) -> bool {
        matches!(
            self,
            Self::NodePort | Self::SecondaryNodePort | Self::GatewayNodePort | Self::LoopbackNodePort
        )
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub origin: Origin,
    pub transport: Transport,
    pub to: SocketAddr,
    /// Name of the Service.
    pub service: String,
    pub kind: Kind,
    /// Name of the port.
    pub port: String,
    /// The Service has affinity: one client reaches one backend, chosen at random.
    pub sticky: bool,
}

impl fmt::Display for Probe {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Probe { origin, transport, to, service, kind, port, .. } = self;
        write!(formatter, "{service} {kind:?} {port}: {transport:?} from {origin:?} to {to}")
    }
}
