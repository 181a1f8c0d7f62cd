//! The boundary between the pure state and the kernel: what changed in the merged view.
//!
//! [`crate::state`] merges the layers and says what changed; [`crate::kernel::nft`] turns it into one batch. A pool
//! here is the merged one (the most specific layer's), and only the roles CLUSTER and LOCAL appear: SERVING
//! is for conntrack and never programmed.

use std::net::{IpAddr, SocketAddr};

use switchtower_proto::v1::{
    Cidr, Endpoint, Frontend, FrontendKey, LocalEndpoint, NodeRecord, PoolKey, Settings,
};

/// One change of the merged view. A list of them is applied in order, in one kernel transaction.
#[derive(Debug, Clone, PartialEq)]
pub enum KernelChange {
    /// Adds or replaces a frontend.
    Frontend(Frontend),
    /// Removes a frontend.
    FrontendRemoved(FrontendKey),
    /// Changes a pool's members; creates the pool if it is absent.
    Pool {
        /// The pool.
        key: PoolKey,
        /// Endpoints that are not members yet.
        added: Vec<Endpoint>,
        /// Endpoints that are members.
        removed: Vec<Endpoint>,
    },
    /// Removes a pool with all its members.
    PoolRemoved(PoolKey),
    /// Adds a local endpoint (hairpin).
    LocalEndpoint(LocalEndpoint),
    /// Removes a local endpoint.
    LocalEndpointRemoved(LocalEndpoint),
    /// Adds a ServiceCIDR.
    ServiceCidr(Cidr),
    /// Removes a ServiceCIDR.
    ServiceCidrRemoved(Cidr),
    /// Replaces the facts of the Node object.
    Node(NodeRecord),
    /// Replaces the settings in force.
    Settings(Settings),
    /// Replaces the addresses of the node's own interfaces, loopback excluded.
    HostAddresses(Vec<IpAddr>),
    /// Replaces the addresses at which the agent reaches its controllers: no frontend but a ClusterIP is programmed
    /// there.
    Controllers(Vec<SocketAddr>),
}
