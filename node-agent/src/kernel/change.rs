//! The boundary between the pure state and the kernel: changes of the merged view.
//!
//! [`crate::state`] merges the layers and returns the changes; [`crate::kernel::nft`] turns them into one batch. A pool
//! here is the merged one (that of the most specific layer), and only the roles CLUSTER and LOCAL appear: SERVING is
//! used for conntrack and never programmed.

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
    /// Replaces the addresses of the controllers: only ClusterIP frontends are programmed there.
    Controllers(Vec<SocketAddr>),
}
