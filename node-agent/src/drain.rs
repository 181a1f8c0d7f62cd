//! The drain gate: a pod's `preStop` hook waits here until no node sends new connections to the pod any more.
//!
//! The kubelet sends the hook's request from the host to the pod's address. A rule of the agent redirects it to a listener
//! on loopback ([`server`]), which learns the pod's address from connection tracking. The controller answers over the
//! open stream ([`requests`]).
//!
//! Host-network pods share the address of the node. Only for this address the path of the request ([`path`]) names the
//! pod: a process of the host may name any host-network pod of the node, and learns nothing but the pod's verdict.

mod pace;
pub(crate) mod path;
pub mod requests;
pub(crate) mod server;

use std::net::IpAddr;
use std::time::Duration;

/// Timeout of a request without `?timeout=`.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(25);
/// Maximum timeout of a request.
pub(crate) const TIMEOUT_LIMIT: Duration = Duration::from_secs(600);

/// Settings of the listener.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct GateSettings {
    /// Port; `None`: no drain gate.
    pub(crate) port: Option<u16>,
    /// The node's own addresses, which host-network pods share.
    pub(crate) node_addresses: Vec<IpAddr>,
}

/// A pod that waits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Pod {
    /// A pod with an address of its own.
    Address(IpAddr),
    /// A host-network pod.
    Host {
        /// The node's address.
        address: IpAddr,
        /// The pod.
        name: PodName,
    },
}

impl Pod {
    /// Returns the address.
    #[must_use]
    pub(crate) fn address(&self) -> IpAddr {
        match self {
            Self::Address(address) | Self::Host { address, .. } => *address,
        }
    }
}

/// Namespace and name of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PodName {
    /// Namespace.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
}
