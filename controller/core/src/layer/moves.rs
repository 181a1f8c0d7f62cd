//! Number of pools that contain an endpoint, as changes of the layers affect it. Pools that no node programs do not count.

use std::sync::Arc;

use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change, Endpoint, PoolKey, Role};

use super::items::Items;
use crate::drain::{Moves, Socket};
use crate::model::ObjectKey;
use crate::wire;

/// Counts all endpoints of a layer.
pub(super) fn count(items: &Items, change: i64, moves: &mut Moves) {
    items.each_pool(|key, endpoints| add(key, endpoints, change, moves));
}

/// Takes note of a change before it is applied: the removal of a pool does not name its members.
pub(super) fn before(items: &Items, change: &Change, moves: &mut Moves) {
    if let Some(Op::PoolRemoved(key)) = &change.change {
        add(key, &items.endpoints(key), -1, moves);
    }
}

/// Takes note of a change that was applied, as it took effect.
pub(super) fn after(change: &Change, moves: &mut Moves) {
    if let Some(Op::Pool(patch)) = &change.change
        && let Some(key) = &patch.key
    {
        add(key, &patch.removed, -1, moves);
        add(key, &patch.added, 1, moves);
    }
}

fn add(key: &PoolKey, endpoints: &[Endpoint], change: i64, moves: &mut Moves) {
    let Some(service) = key.service_port.as_ref().filter(|_| key.role() != Role::Serving) else { return };
    let left =
        || ObjectKey { namespace: service.namespace.as_str().into(), name: service.name.as_str().into() };
    let left = (change < 0 && !endpoints.is_empty()).then(left).map(Arc::new);
    for endpoint in endpoints {
        let (Some(address), Ok(port)) = (wire::address(&endpoint.address), u16::try_from(endpoint.port))
        else {
            continue;
        };
        let moved = moves.entry(Socket { address, protocol: service.protocol, port }).or_default();
        moved.change += change;
        if left.is_some() {
            moved.left.clone_from(&left);
        }
    }
}
