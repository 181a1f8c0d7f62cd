//! The four kinds of objects that the controller watches.

use std::fmt::Debug;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde::de::DeserializeOwned;
use switchtower_core::model::{Input, ObjectKey};

use crate::ingest::{self, Fact, Ingested};

/// A watched kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WatchedResource {
    /// v1 Services.
    Services,
    /// discovery.k8s.io/v1 EndpointSlices.
    EndpointSlices,
    /// v1 Nodes.
    Nodes,
    /// networking.k8s.io/v1 ServiceCIDRs.
    ServiceCidrs,
}

impl WatchedResource {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Services, Self::EndpointSlices, Self::Nodes, Self::ServiceCidrs];

    /// The resource's name in the API, also the metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::ServiceCidrs => "servicecidrs",
        }
    }

    /// Returns the position in [`WatchedResource::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }
}

/// An API type that can be watched and turned into facts.
pub trait Watched:
    kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
    /// The resource.
    const RESOURCE: WatchedResource;
    /// Converts the object.
    fn ingest(&self) -> Ingested;
    /// Returns the fact that the object was deleted.
    fn forget(key: ObjectKey) -> Fact;
}

impl Watched for Service {
    const RESOURCE: WatchedResource = WatchedResource::Services;

    fn ingest(&self) -> Ingested {
        ingest::service(self)
    }

    fn forget(key: ObjectKey) -> Fact {
        Fact::Input(Input::ServiceDeleted(key))
    }
}

impl Watched for EndpointSlice {
    const RESOURCE: WatchedResource = WatchedResource::EndpointSlices;

    fn ingest(&self) -> Ingested {
        ingest::slice(self)
    }

    fn forget(key: ObjectKey) -> Fact {
        Fact::Input(Input::SliceDeleted(key))
    }
}

impl Watched for Node {
    const RESOURCE: WatchedResource = WatchedResource::Nodes;

    fn ingest(&self) -> Ingested {
        ingest::node(self)
    }

    fn forget(key: ObjectKey) -> Fact {
        Fact::NodeDeleted(key.name)
    }
}

impl Watched for ServiceCIDR {
    const RESOURCE: WatchedResource = WatchedResource::ServiceCidrs;

    fn ingest(&self) -> Ingested {
        ingest::service_cidr(self)
    }

    fn forget(key: ObjectKey) -> Fact {
        Fact::ServiceCidrDeleted(key.name)
    }
}
