//! Endpoints of host-network pods: those that have an address of their Node.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use switchtower_proto::v1::Protocol;

use super::categorize::Endpoints;
use crate::drain::Socket;
use crate::drain::host_pods::{HostEndpoint, HostPodChange};

/// Returns true if the address is one of the Node's own.
pub(super) type IsHost<'a> = &'a dyn Fn(&str, IpAddr) -> bool;

/// Adds the host-network endpoints of a service port.
pub(super) fn collect(
    protocol: Protocol,
    endpoints: &Endpoints<'_>,
    is_host: IsHost<'_>,
    found: &mut BTreeSet<HostEndpoint>,
) {
    for ((address, port), endpoint) in endpoints {
        let (Some(pod), Some(node)) = (endpoint.pod, &endpoint.node) else { continue };
        if is_host(node, *address) {
            let socket = Socket { address: *address, protocol: protocol.into(), port: *port };
            found.insert(HostEndpoint { pod, node: node.clone(), socket, ready: endpoint.ready });
        }
    }
}

/// Adds the changes between two compiles of a Service.
pub(super) fn difference(
    old: &BTreeSet<HostEndpoint>,
    new: &BTreeSet<HostEndpoint>,
    changes: &mut Vec<HostPodChange>,
) {
    let change = |endpoint: &HostEndpoint, present| HostPodChange { endpoint: endpoint.clone(), present };
    // Additions first: an endpoint that is no longer ready does not disappear in between.
    changes.extend(new.difference(old).map(|endpoint| change(endpoint, true)));
    changes.extend(old.difference(new).map(|endpoint| change(endpoint, false)));
}

/// Removes the endpoints of a deleted Node. They return with the Node.
pub(super) fn forget_node(
    hosts: &mut BTreeSet<HostEndpoint>,
    node: &Arc<str>,
    changes: &mut Vec<HostPodChange>,
) {
    let kept = hosts.iter().filter(|endpoint| endpoint.node != *node).cloned().collect();
    difference(hosts, &kept, changes);
    *hosts = kept;
}
