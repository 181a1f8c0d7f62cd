//! Health check node ports for agents that take them in their NODE layer.
//!
//! The ports are published once, in a layer of all nodes, and a NODE layer only has the checks with local endpoints. For
//! an agent without the feature, both are merged when its update is planned. Such an agent gets its NODE layer as a
//! snapshot when a port changes, and while there are ports it does not resume at an earlier revision.

use switchtower_proto::digest::{Digest, ItemRef};
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change, LayerKind, Part, PartKind};

use super::items::Items;
use super::log::{self, Layer};
use super::{Layers, Plan, Subscription, note};
use crate::model::LayerId;

/// Layer in which an agent takes health check node ports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HealthCheckPlacement {
    /// One layer for all nodes.
    #[default]
    Shared,
    /// The NODE layer: the agent lacks the feature.
    Node,
}

impl HealthCheckPlacement {
    /// Feature of agents that take the shared layer, as in `Hello.features`.
    pub const FEATURE: &str = switchtower_proto::HEALTH_CHECK_LAYER;

    /// Returns the placement for an agent with these features.
    #[must_use]
    pub fn of(features: &[String]) -> Self {
        if features.iter().any(|feature| feature == Self::FEATURE) { Self::Shared } else { Self::Node }
    }
}

impl Subscription {
    /// Returns true if the layer's items are merged with the health checks of all Services.
    pub(super) fn merges(&self, id: &LayerId) -> bool {
        self.health_checks == HealthCheckPlacement::Node && matches!(id, LayerId::Node(_))
    }
}

/// A NODE layer, and the health checks of all Services that it does not have itself.
pub(super) struct Merged<'a> {
    own: Option<&'a Layer>,
    shared: Option<&'a Layer>,
}

impl Layers {
    pub(super) fn merged(&self, node: &LayerId) -> Merged<'_> {
        Merged { own: self.layers.get(node), shared: self.layers.get(&LayerId::HealthChecks) }
    }
}

impl<'a> Merged<'a> {
    /// Digest of the items that the node's own layer lacks. Costs the checks with local endpoints.
    fn added(&self) -> Digest {
        let Some(shared) = self.shared else { return Digest::default() };
        let mut digest = shared.items.checks_in_node();
        for (key, _) in self.own.iter().flat_map(|own| own.items.health_checks()) {
            if let Some(replaced) = shared.items.health_check(key) {
                digest.remove(LayerKind::Node, ItemRef::HealthCheck(replaced));
            }
        }
        digest
    }

    pub(super) fn digest(&self) -> Digest {
        let own = self.own.map_or_else(Digest::default, |own| own.items.digest());
        own.plus(self.added())
    }

    /// The own layer, if its log has all that changed since the view at `revision` had `digest`.
    fn logged(&self, revision: u64, digest: Digest) -> Option<&'a Layer> {
        let own = self.own.filter(|own| own.covers(revision))?;
        (own.digest_at(revision)?.plus(self.added()) == digest).then_some(own)
    }

    /// The digest at an earlier revision, if it is known: the past of merged items is not kept.
    pub(super) fn digest_at(&self, revision: u64) -> Option<Digest> {
        let never_merged = |shared: &Layer| {
            shared.covers(revision)
                && shared.since(revision).len() == 0
                && shared.items.health_checks().len() == 0
        };
        self.own.filter(|_| self.shared.is_none_or(never_merged))?.digest_at(revision)
    }

    /// Number of changes after a place.
    pub(super) fn pending(&self, revision: u64, digest: Digest) -> u64 {
        if self.digest() == digest {
            return 0;
        }
        self.logged(revision, digest).map_or(1, |own| own.since(revision).len() as u64)
    }

    /// Adds what leads from `place`, a revision and the digest there, to the present.
    pub(super) fn plan(&self, place: Option<(u64, Digest)>, plan: &mut Plan) {
        let (revision, digest) = place.unwrap_or_default();
        if self.digest() == digest {
            return;
        }
        if place.is_some()
            && let Some(own) = self.logged(revision, digest)
        {
            let entries = own.since(revision);
            plan.changes += entries.len() as u64;
            note(&mut plan.infos, entries.map(|entry| &*entry.infos));
            own.delta(revision, &mut plan.parts);
            return;
        }
        for layer in [self.shared, self.own].into_iter().flatten() {
            note(&mut plan.infos, layer.since(revision).map(|entry| &*entry.infos));
        }
        let kind = PartKind::Snapshot as i32;
        let part = |payload: Vec<u8>| Part { layer: LayerKind::Node as i32, kind, payload: payload.into() };
        plan.parts.extend(log::encode(&self.items()).into_iter().map(part));
        plan.snapshot = true;
        plan.changes += 1;
    }

    fn items(&self) -> Items {
        let mut items = self.own.map_or_else(|| Items::new(LayerKind::Node), |own| Items::clone(&own.items));
        let mut ignored = Vec::new();
        for (key, check) in self.shared.iter().flat_map(|shared| shared.items.health_checks()) {
            if items.health_check(key).is_none() {
                items.apply(Change { change: Some(Op::HealthCheck(check.clone())) }, &mut ignored);
            }
        }
        items
    }
}
