//! Nodes: their records, and the items that only one node has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{HealthCheck, HealthCheckKey, LocalEndpoint, NodeRecord};

use super::emit::Emitter;
use super::service::{Output, ReadyCounts};
use crate::compiled::{Problem, ProblemObject, ProblemReason};
use crate::model::{LayerId, Node, ObjectKey};
use crate::wire;

#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: BTreeMap<Arc<str>, Node>,
    /// Nodes whose record changed since the last compile; true: the layer is new.
    changed: BTreeMap<Arc<str>, bool>,
    removed: BTreeSet<Arc<str>>,
    /// Services whose endpoints or hints name a node, whether the Node exists or not.
    concerned: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    /// Number of service ports with a local endpoint.
    local: BTreeMap<Arc<str>, BTreeMap<LocalEndpoint, usize>>,
}

impl Nodes {
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.known.contains_key(name)
    }

    pub(super) fn zone(&self, name: &str) -> Option<Arc<str>> {
        self.known.get(name)?.zone.clone()
    }

    /// The addresses of a Node; none if it does not exist.
    pub(super) fn addresses(&self, name: &str) -> &[IpAddr] {
        self.known.get(name).map(|node| node.addresses.as_slice()).unwrap_or_default()
    }

    /// Takes note of a Node. Returns the Services that have something for it if it is new or has other addresses; `None` if
    /// nothing changed.
    pub(super) fn apply(&mut self, node: Node) -> Option<BTreeSet<ObjectKey>> {
        let name = node.name.clone();
        let old = self.known.insert(name.clone(), node);
        if old.as_ref() == self.known.get(&name) {
            return None;
        }
        let moved = old.as_ref().is_some_and(|old| old.addresses != self.addresses(&name));
        let new = old.is_none();
        let pending = self.changed.entry(name.clone()).or_default();
        *pending |= new;
        let concerned = new || moved;
        Some(if concerned { self.concerned.get(&name).cloned().unwrap_or_default() } else { BTreeSet::new() })
    }

    /// Forgets a Node and all that its layer held. Returns the Services that had something in it.
    pub(super) fn remove(&mut self, name: &Arc<str>) -> BTreeSet<ObjectKey> {
        if self.known.remove(name).is_none() {
            return BTreeSet::new();
        }
        // A Node that came and went between two compiles never had a layer.
        if self.changed.remove(name) != Some(true) {
            self.removed.insert(name.clone());
        }
        self.local.remove(name);
        self.concerned.get(name).cloned().unwrap_or_default()
    }

    /// Publishes removed layers and changed records.
    pub(super) fn publish(&mut self, emitter: &mut Emitter) {
        for name in std::mem::take(&mut self.removed) {
            emitter.layer_removed(LayerId::Node(name));
        }
        for name in std::mem::take(&mut self.changed).into_keys() {
            let Some(node) = self.known.get(&name) else { continue };
            if let Some(problem) = incomplete(node) {
                emitter.problem(problem);
            }
            emitter.push(LayerId::Node(name), Kind::Node(record(node)));
        }
    }

    /// Keeps the index of Services by node.
    pub(super) fn index(&mut self, key: &ObjectKey, old: &Output, new: &Output) {
        for node in old.nodes.difference(&new.nodes) {
            if let Some(services) = self.concerned.get_mut(node) {
                services.remove(key);
                if services.is_empty() {
                    self.concerned.remove(node);
                }
            }
        }
        for node in new.nodes.difference(&old.nodes) {
            self.concerned.entry(node.clone()).or_default().insert(key.clone());
        }
    }

    /// Takes out what is for Nodes that do not exist: they have no layer yet.
    pub(super) fn restrict(&self, output: &mut Output) {
        output.pools.retain(|layer, _| match layer {
            LayerId::Node(name) => self.known.contains_key(name),
            _ => true,
        });
        output.local.retain(|name, _| self.known.contains_key(name));
        if let Some((_, ready)) = &mut output.health {
            ready.retain(|name, _| self.known.contains_key(name));
        }
    }

    /// Counts references: the same endpoint may serve several Services.
    pub(super) fn local_endpoints(&mut self, old: &Output, new: &Output, emitter: &mut Emitter) {
        let none = BTreeSet::new();
        for (node, endpoints) in &new.local {
            let before = old.local.get(node).unwrap_or(&none);
            let counts = self.local.entry(node.clone()).or_default();
            for endpoint in endpoints.difference(before) {
                let count = counts.entry(endpoint.clone()).or_default();
                *count += 1;
                if *count == 1 {
                    emitter.push(LayerId::Node(node.clone()), Kind::LocalEndpoint(endpoint.clone()));
                }
            }
        }
        for (node, endpoints) in &old.local {
            let now = new.local.get(node).unwrap_or(&none);
            let Some(counts) = self.local.get_mut(node) else { continue };
            for endpoint in endpoints.difference(now) {
                let Some(count) = counts.get_mut(endpoint) else { continue };
                *count -= 1;
                if *count == 0 {
                    counts.remove(endpoint);
                    emitter.push(LayerId::Node(node.clone()), Kind::LocalEndpointRemoved(endpoint.clone()));
                }
            }
        }
    }

    /// The port is in the layer of all nodes; only a node with ready addresses has counts in its own layer.
    pub(super) fn health(key: &ObjectKey, old: &Output, new: &Output, emitter: &mut Emitter) {
        if old.health == new.health {
            return;
        }
        let port = |output: &Output| output.health.as_ref().map(|(port, _)| *port);
        match (port(old), port(new)) {
            (before, Some(port)) if before != Some(port) => {
                emitter.push(LayerId::HealthChecks, Kind::HealthCheck(health_check(key, port, [0, 0])));
            }
            (Some(_), None) => {
                emitter.push(LayerId::HealthChecks, Kind::HealthCheckRemoved(health_check_key(key)));
            }
            _ => {}
        }
        let (before, now) = (counted(old), counted(new));
        for (name, (port, ready)) in &now {
            if before.get(name) != Some(&(*port, *ready)) {
                let change = Kind::HealthCheck(health_check(key, *port, *ready));
                emitter.push(LayerId::Node((*name).clone()), change);
            }
        }
        for name in before.keys().filter(|name| !now.contains_key(*name)) {
            let removed = Kind::HealthCheckRemoved(health_check_key(key));
            emitter.push(LayerId::Node((*name).clone()), removed);
        }
    }
}

/// Nodes with ready addresses of a Service, with the Service's health check port.
fn counted<'a>(output: &'a Output) -> BTreeMap<&'a Arc<str>, (u16, [u32; 2])> {
    let counts =
        |(port, ready): &'a (u16, ReadyCounts)| ready.iter().map(|(name, counts)| (name, (*port, *counts)));
    output.health.iter().flat_map(counts).collect()
}

fn health_check_key(key: &ObjectKey) -> HealthCheckKey {
    HealthCheckKey { namespace: key.namespace.to_string(), name: key.name.to_string() }
}

fn health_check(key: &ObjectKey, port: u16, [ready_ipv4, ready_ipv6]: [u32; 2]) -> HealthCheck {
    HealthCheck { key: Some(health_check_key(key)), port: port.into(), ready_ipv4, ready_ipv6 }
}

fn record(node: &Node) -> NodeRecord {
    let Node { name, addresses, pod_cidrs, zone, eligible } = node;
    NodeRecord {
        name: name.to_string(),
        addresses: addresses.iter().map(|address| wire::octets(*address)).collect(),
        pod_cidrs: pod_cidrs.iter().map(|cidr| wire::cidr(*cidr)).collect(),
        eligible: *eligible,
        zone: zone.as_deref().unwrap_or_default().to_owned(),
    }
}

fn incomplete(node: &Node) -> Option<Problem> {
    let missing = match (node.addresses.is_empty(), node.pod_cidrs.is_empty()) {
        (false, false) => return None,
        (true, false) => "no address: its NodePorts are served nowhere",
        (false, true) => "no pod CIDR: localDetection NodeCIDR cannot recognize its pods",
        (true, true) => {
            "no address and no pod CIDR: its NodePorts are served nowhere, and localDetection NodeCIDR cannot recognize \
             its pods"
        }
    };
    let object = ProblemObject::Node(node.name.to_string());
    let message = format!("the Node has {missing}");
    Some(Problem { object, reason: ProblemReason::IncompleteNode, message })
}
