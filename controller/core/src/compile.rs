//! The compiler: from Services, EndpointSlices and Nodes to the changes of each layer.
//!
//! What holds: a change of one object recompiles the Services it concerns and nothing else; the outcome is
//! exactly what differs from before; the same objects give the same layers whatever the order in which they
//! arrived.

mod categorize;
mod claims;
mod emit;
mod nodes;
mod pods;
mod ports;
mod service;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

pub use self::service::{MAX_FRONTENDS, MAX_POOL_MEMBERS, MAX_SERVICE_MEMBERS, MAX_SOURCE_RANGES};

use self::claims::Claims;
use self::emit::Emitter;
use self::nodes::Nodes;
use self::service::Output;
use crate::compiled::Compiled;
use crate::locality::PodChange;
use crate::model::{EndpointSlice, Input, ObjectKey, Service};
use crate::wire;

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
    /// What every Service contributed at the last compile.
    outputs: BTreeMap<ObjectKey, Output>,
    dirty: BTreeSet<ObjectKey>,
    endpoints: usize,
    /// Ready endpoints that appeared or went since the last compile.
    pods: Vec<PodChange>,
}

impl Compiler {
    /// A compiler that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of an event. Costs the object's own size; nothing is compiled yet.
    pub fn apply(&mut self, input: Input) {
        match input {
            Input::Service(service) => {
                if self.services.get(&service.key) != Some(&service) {
                    self.dirty.insert(service.key.clone());
                    self.services.insert(service.key.clone(), service);
                }
            }
            Input::ServiceDeleted(key) => {
                if self.services.remove(&key).is_some() {
                    self.dirty.insert(key);
                }
            }
            Input::Slice(slice) => self.apply_slice(slice),
            Input::SliceDeleted(key) => self.remove_slice(&key),
            Input::Node(node) => {
                if let Some(concerned) = self.nodes.apply(node) {
                    self.dirty.extend(concerned);
                }
            }
            Input::NodeDeleted(name) => {
                for key in self.nodes.remove(&name) {
                    // What stood in the node's layer goes with the layer, and comes back with the Node.
                    if let Some(output) = self.outputs.get_mut(&key) {
                        emit::forget_node(output, &name);
                    }
                }
            }
            Input::ServiceCidrs(cidrs) => self.service_cidrs = cidrs.iter().map(IpNet::trunc).collect(),
        }
    }

    fn apply_slice(&mut self, slice: EndpointSlice) {
        if self.slices.get(&slice.key) == Some(&slice) {
            return;
        }
        let service = service_of(&slice);
        if self.slices.get(&slice.key).is_some_and(|old| old.service != slice.service) {
            self.remove_slice(&slice.key);
        }
        pods::difference(self.slices.get(&slice.key), Some(&slice), &mut self.pods);
        self.slices_of.entry(service.clone()).or_default().insert(slice.key.clone());
        self.slices.insert(slice.key.clone(), slice);
        self.dirty.insert(service);
    }

    fn remove_slice(&mut self, key: &ObjectKey) {
        let Some(slice) = self.slices.remove(key) else { return };
        pods::difference(Some(&slice), None, &mut self.pods);
        let service = service_of(&slice);
        if let Some(slices) = self.slices_of.get_mut(&service) {
            slices.remove(key);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
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
        for key in std::mem::take(&mut self.dirty) {
            self.compile_service(&key, &mut emitter);
        }
        self.claims.settle(&mut emitter);
        Compiled { pods: std::mem::take(&mut self.pods), ..emitter.finish() }
    }

    fn compile_service(&mut self, key: &ObjectKey, emitter: &mut Emitter) {
        let service = self.services.get(key);
        let mut new = match service {
            None => Output::default(),
            Some(service) => {
                let keys = self.slices_of.get(key).into_iter().flatten();
                let slices: Vec<_> = keys.filter_map(|slice| self.slices.get(slice)).collect();
                service::compile(service, &slices)
            }
        };
        let old = self.outputs.remove(key).unwrap_or_default();
        emitter.problems(&old.problems, &new.problems);
        self.nodes.index(key, &old, &new);
        self.nodes.restrict(&mut new);
        self.claims.update(service, key, &old.frontends, &new.frontends);
        emitter.pools(&old.pools, &new.pools);
        self.nodes.local_endpoints(&old, &new, emitter);
        self.nodes.health(key, &old, &new, emitter);
        self.endpoints = self.endpoints + new.endpoints - old.endpoints;
        if service.is_some() {
            self.outputs.insert(key.clone(), new);
        }
    }

    /// Sizes.
    pub fn counts(&self) -> Counts {
        Counts { services: self.services.len(), endpoints: self.endpoints, nodes: self.nodes.len() }
    }

    /// Whether a Node of this name exists.
    pub fn has_node(&self, name: &str) -> bool {
        self.nodes.contains(name)
    }

    /// The zone of a Node; `None` if it has none or does not exist.
    pub fn zone_of(&self, name: &str) -> Option<Arc<str>> {
        self.nodes.zone(name)
    }
}

fn service_of(slice: &EndpointSlice) -> ObjectKey {
    ObjectKey { namespace: slice.key.namespace.clone(), name: slice.service.clone() }
}
