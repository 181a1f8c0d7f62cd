//! The compiler: from Services, EndpointSlices and Nodes to the changes of each layer.
//!
//! Invariants: a change of one object recompiles the Services it concerns and nothing else; the result is
//! exactly the difference from before; the same objects give the same layers regardless of their order of arrival.

mod categorize;
mod claims;
mod emit;
mod host_endpoints;
mod limits;
mod nodes;
mod pods;
mod ports;
mod reserved;
mod service;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use switchtower_proto::v1::Protocol;

pub use self::limits::{Bound, Limits, Usage};
pub use self::service::{MAX_POOL_MEMBERS, MAX_SOURCE_RANGES};

use self::claims::Claims;
use self::emit::Emitter;
use self::limits::{Admission, Demand};
use self::nodes::Nodes;
use self::reserved::ControlPlane;
use self::service::Output;
use crate::compiled::{Compiled, Problem, ProblemReason};
use crate::drain::host_pods::HostPodChange;
use crate::locality::PodChange;
use crate::model::{EndpointSlice, Input, ObjectKey, Service};
use crate::wire;

/// Namespace and name of the Service through which pods reach the API server.
const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// Sizes of what is compiled, for status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Services.
    pub services: usize,
    /// Endpoints, counted once for each service port and family.
    pub endpoints: usize,
    /// Nodes.
    pub nodes: usize,
}

/// Holds the objects and what was compiled from them.
#[derive(Debug, Default)]
pub struct Compiler {
    services: BTreeMap<ObjectKey, Service>,
    slices: BTreeMap<ObjectKey, EndpointSlice>,
    /// Slices by the Service they name, whether it exists or not.
    slices_of: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    nodes: Nodes,
    service_cidrs: BTreeSet<IpNet>,
    published_cidrs: BTreeSet<IpNet>,
    claims: Claims,
    /// Slices of the API server's own Service changed since the last compile.
    api_servers_changed: bool,
    /// Contribution of every Service at the last compile.
    outputs: BTreeMap<ObjectKey, Output>,
    dirty: BTreeSet<ObjectKey>,
    admission: Admission,
    /// Number of Services by the bound that they exceed.
    bounded: BTreeMap<Bound, usize>,
    endpoints: usize,
    /// Ready endpoints that appeared or went since the last compile.
    pods: Vec<PodChange>,
    /// Host-network endpoints that appeared or went since the last compile.
    host_pods: Vec<HostPodChange>,
}

impl Compiler {
    /// A compiler that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bounds what Services may occupy.
    #[must_use]
    pub fn limited(mut self, limits: Limits) -> Self {
        self.admission.limits = limits;
        self
    }

    /// Keeps Services from taking the addresses and ports at which agents reach their controllers.
    #[must_use]
    pub fn reserving(mut self, controllers: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.reserve(controllers.into_iter().collect());
        self
    }

    /// Replaces the addresses and ports of the controllers. Takes effect with the next compile.
    pub fn reserve(&mut self, controllers: BTreeSet<SocketAddr>) {
        self.claims.reserve(ControlPlane::Controllers, controllers);
    }

    /// Takes note of an event. Costs the object's own size; nothing is compiled yet. Returns false if the event changes
    /// nothing that is compiled, such as a heartbeat of a Node.
    pub fn apply(&mut self, input: Input) -> bool {
        match input {
            Input::Service(service) => {
                let changed = self.services.get(&service.key) != Some(&service);
                if changed {
                    self.dirty.insert(service.key.clone());
                    self.services.insert(service.key.clone(), service);
                }
                changed
            }
            Input::ServiceDeleted(key) => {
                let changed = self.services.remove(&key).is_some();
                if changed {
                    self.dirty.insert(key);
                }
                changed
            }
            Input::Slice(slice) => self.apply_slice(slice),
            Input::SliceDeleted(key) => self.remove_slice(&key),
            Input::Node(node) => {
                self.claims.nodes_changed(self.nodes.addresses(&node.name), &node.addresses);
                let concerned = self.nodes.apply(node);
                let changed = concerned.is_some();
                self.dirty.extend(concerned.into_iter().flatten());
                changed
            }
            Input::NodeDeleted(name) => {
                let existed = self.nodes.contains(&name);
                self.claims.nodes_changed(self.nodes.addresses(&name), &[]);
                for key in self.nodes.remove(&name) {
                    // The items of the node's layer go with the layer, and return with the Node.
                    if let Some(output) = self.outputs.get_mut(&key) {
                        emit::forget_node(output, &name);
                        host_endpoints::forget_node(&mut output.hosts, &name, &mut self.host_pods);
                    }
                }
                existed
            }
            Input::ServiceCidrs(cidrs) => {
                let cidrs = cidrs.iter().map(IpNet::trunc).collect();
                std::mem::replace(&mut self.service_cidrs, cidrs) != self.service_cidrs
            }
        }
    }

    fn apply_slice(&mut self, slice: EndpointSlice) -> bool {
        if self.slices.get(&slice.key) == Some(&slice) {
            return false;
        }
        let service = service_of(&slice);
        if self.slices.get(&slice.key).is_some_and(|old| old.service != slice.service) {
            self.remove_slice(&slice.key);
        }
        pods::difference(self.slices.get(&slice.key), Some(&slice), &mut self.pods);
        self.slices_of.entry(service.clone()).or_default().insert(slice.key.clone());
        self.slices.insert(slice.key.clone(), slice);
        self.service_changed(service);
        true
    }

    fn remove_slice(&mut self, key: &ObjectKey) -> bool {
        let Some(slice) = self.slices.remove(key) else { return false };
        pods::difference(Some(&slice), None, &mut self.pods);
        let service = service_of(&slice);
        if let Some(slices) = self.slices_of.get_mut(&service) {
            slices.remove(key);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        self.service_changed(service);
        true
    }

    fn service_changed(&mut self, service: ObjectKey) {
        self.api_servers_changed |= is_api_server(&service);
        self.dirty.insert(service);
    }

    /// Compiles what changed since the last call.
    pub fn compile(&mut self) -> Compiled {
        let mut emitter = Emitter::default();
        self.nodes.publish(&mut emitter);
        for added in self.service_cidrs.difference(&self.published_cidrs) {
            emitter.service_cidr(wire::cidr(*added), true);
        }
        for gone in self.published_cidrs.difference(&self.service_cidrs) {
            emitter.service_cidr(wire::cidr(*gone), false);
        }
        self.published_cidrs.clone_from(&self.service_cidrs);
        if std::mem::take(&mut self.api_servers_changed) {
            self.claims.reserve(ControlPlane::ApiServers, self.api_servers());
        }
        // A Service that grows beyond a bound, or shrinks below it, makes others dirty.
        while let Some(key) = self.dirty.pop_first() {
            self.compile_service(&key, &mut emitter);
        }
        self.claims.settle(&mut emitter);
        let host_pods = std::mem::take(&mut self.host_pods);
        Compiled { pods: std::mem::take(&mut self.pods), host_pods, ..emitter.finish() }
    }

    /// Addresses of the API servers: the endpoints of the Service default/kubernetes.
    fn api_servers(&self) -> BTreeSet<SocketAddr> {
        let service = ObjectKey { namespace: API_SERVER.0.into(), name: API_SERVER.1.into() };
        let keys = self.slices_of.get(&service).into_iter().flatten();
        let slices = keys.filter_map(|key| self.slices.get(key));
        let of_slice = |slice: &EndpointSlice| {
            let ports = slice.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
            let pairs = ports.flat_map(|port| {
                slice.endpoints.iter().map(|endpoint| SocketAddr::new(endpoint.address, port.port))
            });
            pairs.collect::<Vec<_>>()
        };
        slices.flat_map(of_slice).collect()
    }

    fn compile_service(&mut self, key: &ObjectKey, emitter: &mut Emitter) {
        let service = self.services.get(key);
        let keys = self.slices_of.get(key).into_iter().flatten();
        let slices: Vec<_> = keys.filter_map(|slice| self.slices.get(slice)).collect();
        let limits = self.admission.limits;
        let demand = service.map(|service| Demand {
            created: service.created,
            usage: limits::demand(service, &slices, limits.service),
        });
        self.dirty.extend(self.admission.update(key, demand));
        let is_host = |node: &str, address| self.nodes.addresses(node).contains(&address);
        let mut new = match (service, self.admission.refusal(key)) {
            (None, _) => Output::default(),
            (Some(service), None) => service::compile(service, &slices, limits.service, &is_host),
            (Some(service), Some(bound)) => refused(service, bound, limits),
        };
        let old = self.outputs.remove(key).unwrap_or_default();
        emitter.problems(&old.problems, &new.problems);
        self.nodes.index(key, &old, &new);
        self.nodes.restrict(&mut new);
        self.claims.update(service, key, &old.frontends, &new.frontends);
        emitter.pools(&old.pools, &new.pools);
        self.nodes.local_endpoints(&old, &new, emitter);
        host_endpoints::difference(&old.hosts, &new.hosts, &mut self.host_pods);
        Nodes::health(key, &old, &new, emitter);
        self.endpoints = self.endpoints + new.endpoints - old.endpoints;
        let (before, now) = (old.bound, new.bound);
        if service.is_some() {
            self.outputs.insert(key.clone(), new);
        }
        self.count_bounds(before, now);
    }

    fn count_bounds(&mut self, old: Option<Bound>, new: Option<Bound>) {
        if let Some(count) = old.and_then(|bound| self.bounded.get_mut(&bound)) {
            *count -= 1;
        }
        if let Some(bound) = new {
            *self.bounded.entry(bound).or_default() += 1;
        }
    }

    /// Number of Services that exceed a bound.
    pub fn bounded(&self, bound: Bound) -> usize {
        self.bounded.get(&bound).copied().unwrap_or_default()
    }

    #[cfg(test)]
    fn claims_touched(&self) -> usize {
        self.claims.touched()
    }

    /// Sizes.
    pub fn counts(&self) -> Counts {
        Counts { services: self.services.len(), endpoints: self.endpoints, nodes: self.nodes.len() }
    }

    /// Returns true if a Node of this name exists.
    pub fn has_node(&self, name: &str) -> bool {
        self.nodes.contains(name)
    }

    /// The zone of a Node; `None` if it has none or does not exist.
    pub fn zone_of(&self, name: &str) -> Option<Arc<str>> {
        self.nodes.zone(name)
    }
}

/// A Service that is not programmed, and the reason for its owner.
fn refused(service: &Service, bound: Bound, limits: Limits) -> Output {
    let (scope, limit) = match bound {
        Bound::Namespace => (format!("namespace {} has", service.key.namespace), limits.namespace),
        Bound::Service | Bound::Total => ("the cluster has".to_owned(), limits.total),
    };
    let message = format!(
        "not programmed: {scope} more than {} addresses with ports or {} endpoints in its Services, and the oldest \
         Services take precedence",
        limit.frontends, limit.endpoints
    );
    Output::refused(Problem::of_service(service, ProblemReason::LimitExceeded, message), bound)
}

fn is_api_server(service: &ObjectKey) -> bool {
    (&*service.namespace, &*service.name) == API_SERVER
}

fn service_of(slice: &EndpointSlice) -> ObjectKey {
    ObjectKey { namespace: slice.key.namespace.clone(), name: slice.service.clone() }
}
