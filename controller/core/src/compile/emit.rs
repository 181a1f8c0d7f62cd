//! Collects the changes of one compile, layer by layer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{Change, Cidr, Frontend, FrontendKey, PoolKey, PoolPatch};

use super::categorize::Address;
use super::service::Output;
use crate::compiled::{Compiled, Problem};
use crate::model::LayerId;
use crate::wire;

type Pools = BTreeMap<LayerId, BTreeMap<PoolKey, BTreeSet<Address>>>;

#[derive(Debug, Default)]
pub(super) struct Emitter {
    compiled: Compiled,
}

impl Emitter {
    pub(super) fn push(&mut self, layer: LayerId, change: Kind) {
        self.compiled.changes.entry(layer).or_default().push(Change { change: Some(change) });
    }

    pub(super) fn layer_removed(&mut self, layer: LayerId) {
        self.compiled.removed.push(layer);
    }

    pub(super) fn service_cidr(&mut self, cidr: Cidr, added: bool) {
        let change = if added { Kind::ServiceCidr(cidr) } else { Kind::ServiceCidrRemoved(cidr) };
        self.push(LayerId::Cluster, change);
    }

    pub(super) fn frontend(&mut self, frontend: Frontend) {
        self.push(LayerId::Cluster, Kind::Frontend(frontend));
    }

    pub(super) fn frontend_removed(&mut self, key: FrontendKey) {
        self.push(LayerId::Cluster, Kind::FrontendRemoved(key));
    }

    /// Adds the problems that are new.
    pub(super) fn problems(&mut self, old: &[Problem], new: &[Problem]) {
        let appeared = new.iter().filter(|problem| !old.contains(problem));
        self.compiled.problems.extend(appeared.cloned());
    }

    pub(super) fn problem(&mut self, problem: Problem) {
        self.compiled.problems.push(problem);
    }

    /// The difference between the pools of one Service before and now.
    pub(super) fn pools(&mut self, old: &Pools, new: &Pools) {
        let (no_pools, no_members) = (BTreeMap::new(), BTreeSet::new());
        let layers: BTreeSet<_> = old.keys().chain(new.keys()).collect();
        for layer in layers {
            let (before, now) = (old.get(layer).unwrap_or(&no_pools), new.get(layer).unwrap_or(&no_pools));
            for key in before.keys().filter(|key| !now.contains_key(*key)) {
                self.push(layer.clone(), Kind::PoolRemoved(key.clone()));
            }
            for (key, members) in now {
                let earlier = before.get(key);
                if earlier == Some(members) {
                    continue;
                }
                let earlier = earlier.unwrap_or(&no_members);
                let patch = PoolPatch {
                    key: Some(key.clone()),
                    added: members.difference(earlier).map(|a| wire::endpoint(*a)).collect(),
                    removed: earlier.difference(members).map(|a| wire::endpoint(*a)).collect(),
                };
                self.push(layer.clone(), Kind::Pool(patch));
            }
        }
    }

    pub(super) fn finish(self) -> Compiled {
        self.compiled
    }
}

/// Takes a node's items out of what was published: they went with the node's layer.
pub(super) fn forget_node(output: &mut Output, node: &Arc<str>) {
    output.pools.remove(&LayerId::Node(node.clone()));
    output.local.remove(node);
    if let Some((_, ready)) = &mut output.health {
        ready.remove(node);
    }
}
