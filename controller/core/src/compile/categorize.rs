//! Which endpoints a service port uses, for the cluster, for a zone and for a node.
//!
//! The rules are kube-proxy's `CategorizeEndpoints` (pkg/proxy/topology.go): readiness, terminating
//! endpoints as a fallback, and topology hints that hold for all ready endpoints or for none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{EndpointSlice, ServicePortSpec, SliceEndpoint, SlicePort};

/// Address and port of an endpoint.
pub(super) type Address = (IpAddr, u16);

/// The endpoints of one service port and family, one entry for each address and port.
pub(super) type Endpoints<'a> = BTreeMap<Address, &'a SliceEndpoint>;

/// Gathers the endpoints of a port from the Service's slices of one family.
///
/// If two slices name the same address and port (a pod's address is reused), an entry that is not
/// terminating replaces the other; among several of those the last slice wins (kube-proxy: undefined).
pub(super) fn gather<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePortSpec,
    ipv6: bool,
) -> Endpoints<'a> {
    let mut endpoints = Endpoints::new();
    for slice in slices.filter(|slice| slice.ipv6 == ipv6) {
        let matching = |p: &&SlicePort| p.name == port.name && p.protocol == port.protocol && p.port != 0;
        for slice_port in slice.ports.iter().filter(matching) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.address.is_ipv6() == ipv6) {
                let address = (endpoint.address, slice_port.port);
                if !endpoint.terminating || !endpoints.contains_key(&address) {
                    endpoints.insert(address, endpoint);
                }
            }
        }
    }
    endpoints
}

/// The sets of a service port.
#[derive(Debug, Default)]
pub(super) struct Categories {
    /// Policy Cluster where no topology rule holds.
    pub(super) cluster: BTreeSet<Address>,
    /// Policy Cluster in a zone whose hints hold.
    pub(super) zones: BTreeMap<Arc<str>, BTreeSet<Address>>,
    /// Policy Cluster on a node whose hints hold.
    pub(super) nodes: BTreeMap<Arc<str>, BTreeSet<Address>>,
    /// Policy Local, for each node that has any.
    pub(super) local: BTreeMap<Arc<str>, BTreeSet<Address>>,
    /// All serving endpoints.
    pub(super) serving: BTreeSet<Address>,
    /// Any endpoint is usable anywhere: distinguishes DROP from REJECT.
    pub(super) any: bool,
}

/// Ready, or the fallback of a port without ready endpoints.
fn is_fallback(endpoint: &SliceEndpoint) -> bool {
    endpoint.serving && endpoint.terminating
}

/// Sorts endpoints into the sets.
pub(super) fn categorize(endpoints: &Endpoints<'_>) -> Categories {
    let select = |test: fn(&SliceEndpoint) -> bool| -> Endpoints<'_> {
        endpoints.iter().filter(|(_, endpoint)| test(endpoint)).map(|(a, e)| (*a, *e)).collect()
    };
    let ready = select(|endpoint| endpoint.ready);
    let mut categories = Categories {
        serving: select(|endpoint| endpoint.serving).into_keys().collect(),
        ..Default::default()
    };
    if ready.is_empty() {
        categories.cluster = select(is_fallback).into_keys().collect();
    } else {
        categories.cluster = ready.keys().copied().collect();
        categories.zones = by_hint(&ready, |endpoint| &endpoint.zones);
        categories.nodes = by_hint(&ready, |endpoint| &endpoint.nodes);
    }
    categories.any = !categories.cluster.is_empty();
    categories.local = by_node(&ready);
    for (node, addresses) in by_node(&select(is_fallback)) {
        categories.local.entry(node).or_insert(addresses);
    }
    categories
}

/// The sets that hints select. A single ready endpoint without a hint disables the rule for everyone.
fn by_hint<'a>(
    ready: &Endpoints<'a>,
    hints: fn(&SliceEndpoint) -> &[Arc<str>],
) -> BTreeMap<Arc<str>, BTreeSet<Address>> {
    let mut selected: BTreeMap<Arc<str>, BTreeSet<Address>> = BTreeMap::new();
    if ready.values().any(|endpoint| hints(endpoint).is_empty()) {
        return selected;
    }
    for (address, endpoint) in ready {
        for hint in hints(endpoint) {
            selected.entry(hint.clone()).or_default().insert(*address);
        }
    }
    selected
}

fn by_node(endpoints: &Endpoints<'_>) -> BTreeMap<Arc<str>, BTreeSet<Address>> {
    let mut nodes: BTreeMap<Arc<str>, BTreeSet<Address>> = BTreeMap::new();
    for (address, endpoint) in endpoints {
        if let Some(node) = &endpoint.node {
            nodes.entry(node.clone()).or_default().insert(*address);
        }
    }
    nodes
}
