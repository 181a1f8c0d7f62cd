//! Number of pools that contain an address, as changes of the layers affect it. Pools that no node programs do not count.

use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change, Endpoint, PoolKey, Role};

use super::items::Items;
use crate::drain::Moves;
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
    if key.role() == Role::Serving {
        return;
    }
    for address in endpoints.iter().filter_map(|endpoint| wire::address(&endpoint.address)) {
        *moves.entry(address).or_default() += change;
    }
}
