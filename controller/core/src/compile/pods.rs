//! Ready endpoints by node, as far as they differ between two versions of an EndpointSlice.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::locality::PodChange;
use crate::model::EndpointSlice;

fn of(slice: Option<&EndpointSlice>) -> BTreeSet<(&Arc<str>, IpAddr)> {
    let endpoints = slice.map(|slice| slice.endpoints.as_slice()).unwrap_or_default();
    let ready = endpoints.iter().filter(|endpoint| endpoint.ready);
    ready.filter_map(|endpoint| Some((endpoint.node.as_ref()?, endpoint.address))).collect()
}

/// Returns the changes between two versions; costs the size of both.
pub(super) fn difference(
    old: Option<&EndpointSlice>,
    new: Option<&EndpointSlice>,
    changes: &mut Vec<PodChange>,
) {
    let (old, new) = (of(old), of(new));
    let change = |(node, address): &(&Arc<str>, IpAddr), present| PodChange {
        node: (*node).clone(),
        address: *address,
        present,
    };
    changes.extend(old.difference(&new).map(|pod| change(pod, false)));
    changes.extend(new.difference(&old).map(|pod| change(pod, true)));
}
