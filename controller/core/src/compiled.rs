//! Output of the compiler: changes per layer, and problems of the objects.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use switchtower_proto::v1::Change;

use crate::drain::host_pods::HostPodChange;
use crate::locality::PodChange;
use crate::model::{LayerId, ObjectKey, Service};

/// The outcome of one compile: exactly what differs from the one before.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Compiled {
    /// Changes per layer, in the order in which they are to be applied. Never an empty list.
    pub changes: BTreeMap<LayerId, Vec<Change>>,
    /// Layers that are gone (a deleted node).
    pub removed: Vec<LayerId>,
    /// Problems that appeared.
    pub problems: Vec<Problem>,
    /// Ready endpoints that appeared or went, in their order.
    pub pods: Vec<PodChange>,
    /// Endpoints of host-network pods that appeared or disappeared, in their order.
    pub host_pods: Vec<HostPodChange>,
}

/// Which object a problem is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProblemObject {
    /// A Service.
    Service(ObjectKey),
    /// An EndpointSlice.
    EndpointSlice(ObjectKey),
    /// A Node.
    Node(String),
    /// A pod of a node.
    Pod {
        /// The node.
        node: Arc<str>,
        /// The pod.
        pod: PodIdentity,
    },
}

/// A pod as the drain gate knows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PodIdentity {
    /// The pod with this address.
    Address(IpAddr),
    /// A pod that shares the address of its node.
    HostNetwork(ObjectKey),
}

impl fmt::Display for PodIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(formatter),
            Self::HostNetwork(ObjectKey { namespace, name }) => write!(formatter, "{namespace}/{name}"),
        }
    }
}

/// The reason of an Event: one CamelCase word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProblemReason {
    /// Another Service claims the same address, protocol and port, and wins.
    AddressConflict,
    /// The control plane needs an address, protocol and port that the Service claims.
    ControlPlaneAddress,
    /// Two ports of one Service are the same.
    DuplicatePort,
    /// An address or CIDR cannot be parsed, or is of the wrong family.
    InvalidAddress,
    /// A port that is 0, missing, or out of range.
    InvalidPort,
    /// The Node has no address, or no pod CIDR for local detection.
    IncompleteNode,
    /// Pods of the Node have addresses that its local detection does not cover.
    PodsOutside,
    /// More endpoints or ports than the limits allow; the rest was left out.
    LimitExceeded,
    /// A node cannot listen on the Service's health check node port (kube-proxy's word).
    FailedToStartServiceHealthcheck,
    /// The drain gate stopped waiting for the removal of the pod from its Services.
    DrainGateTimedOut,
    /// The drain gate stopped waiting for a ready endpoint that replaces the pod.
    DrainGateLastEndpoint,
    /// A node keeps removed Services and endpoints because too many were removed at once.
    DeletionsHeld,
}

/// Something wrong with one object. It never stops the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The object.
    pub object: ProblemObject,
    /// Why.
    pub reason: ProblemReason,
    /// Human-readable problem and consequence.
    pub message: String,
}

impl Problem {
    pub(crate) fn of_service(service: &Service, reason: ProblemReason, message: String) -> Self {
        Self { object: ProblemObject::Service(service.key.clone()), reason, message }
    }
}
