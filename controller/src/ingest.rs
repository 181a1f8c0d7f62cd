//! Conversion of API objects to the core's compact model, one object at a time.
//!
//! Each conversion is total: it yields the part that can be served and a list of problems with the rest. Nothing of
//! the API type is kept. Reference: kube-proxy's servicechangetracker.go, serviceport.go and endpointslicecache.go.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use switchtower_core::compiled::{Problem, ProblemObject, ProblemReason};
use switchtower_core::model::{Input, Node, ObjectKey};

pub mod address;
mod node;
mod origin;
mod service;
mod slice;

#[cfg(test)]
mod tests;

pub use node::{node, service_cidr};
pub use origin::Origin;
pub use service::service;
pub use slice::slice;

/// Properties of a Node that are not compiled, for its row and for rollouts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// Name of the Node and of its row.
    pub name: Arc<str>,
    /// UID of the Node; changes if the Node is recreated.
    pub uid: Arc<str>,
    /// Message of the Node's Ready condition if the kubelet has stopped reporting.
    pub kubelet_lost: Option<Arc<str>>,
    /// Labels, for the selectors of profiles and rollout steps.
    pub labels: Arc<BTreeMap<String, String>>,
}

/// One object, or its deletion, as input of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// Input of the compiler (Services and EndpointSlices).
    Input(Input),
    /// A Node, added or changed.
    Node(Node, NodeIdentity),
    /// A Node that was deleted or no longer matches the node selector.
    NodeDeleted(Arc<str>),
    /// A ServiceCIDR by name, added or changed. The compiler takes all of them together.
    ServiceCidr(Arc<str>, Vec<IpNet>),
    /// A deleted ServiceCIDR.
    ServiceCidrDeleted(Arc<str>),
}

/// Result of one conversion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingested {
    /// The part that can be served.
    pub fact: Fact,
    /// Origin of the change.
    pub origin: Origin,
    /// Problems with the rest; at most one per reason.
    pub problems: Vec<Problem>,
}

impl Ingested {
    /// Returns the result for a deleted object.
    #[must_use]
    pub fn gone(fact: Fact) -> Self {
        Self { fact, origin: Origin::default(), problems: Vec::new() }
    }
}

/// Collects the problems of one object: one per reason, however many values are affected.
struct Findings {
    object: ProblemObject,
    found: Vec<(ProblemReason, u32, String)>,
}

impl Findings {
    fn new(object: ProblemObject) -> Self {
        Self { object, found: Vec::new() }
    }

    /// Adds one value. The message quotes the first one per reason and counts the others.
    fn note(&mut self, reason: ProblemReason, message: impl FnOnce() -> String) {
        match self.found.iter_mut().find(|(known, ..)| *known == reason) {
            Some((_, more, _)) => *more += 1,
            None => self.found.push((reason, 0, message())),
        }
    }

    fn finish(self) -> Vec<Problem> {
        let object = self.object;
        self.found
            .into_iter()
            .map(|(reason, more, message)| Problem {
                object: object.clone(),
                reason,
                message: match more {
                    0 => message,
                    _ => format!("{message} (and {more} more like it)"),
                },
            })
            .collect()
    }
}

/// Namespace and name of an object; empty where the object has none.
#[must_use]
pub fn object_key(metadata: &ObjectMeta) -> ObjectKey {
    ObjectKey {
        namespace: metadata.namespace.as_deref().unwrap_or_default().into(),
        name: metadata.name.as_deref().unwrap_or_default().into(),
    }
}

/// Parses a protocol as the API spells it; absent means TCP.
fn protocol(text: Option<&str>) -> Option<switchtower_proto::v1::Protocol> {
    use switchtower_proto::v1::Protocol;
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

/// A port number in 1..65535.
fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}
