//! The layers of the view, and the updates that bring a node from its acknowledged revision to the current one.
//!
//! A node's view is the sum of the layers that it subscribes to. Each layer is kept once for all nodes,
//! together with a log of its latest changes in encoded form: nodes at the same revision get the same bytes.
//!
//! Invariants:
//! * The cost of [`Layers::apply`] and of a delta follows the change, not the cluster's size.
//! * Applying a plan of [`Layers::plan`] always yields the layers' items and digest, regardless of the starting cursor.
//! * The logs are bounded; a node that is too far behind gets a snapshot of the layer.
//! * A large snapshot is compressed once. Until its layer's log forgets it, it is sent with the changes since.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io::Write as _;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::{Change, ChangeInfo, HealthCheckKey, LayerKind, Part, PartKind, Source};

use crate::drain::Moves;
use crate::model::LayerId;
use crate::view::View;

mod health_checks;
mod items;
mod log;
mod moves;

#[cfg(test)]
mod tests;

pub use health_checks::HealthCheckPlacement;
use log::{Layer, Publication};

/// Maximum payload bytes in a part, with room for what deflate adds to bytes that do not compress.
const PART: usize = (1 << 20) - (32 << 10);
/// Maximum number of change descriptions in an update.
const INFOS: usize = 16;

/// The layers that a node gets, one of each kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subscription {
    /// The node.
    pub node: Arc<str>,
    /// Its zone; without one it has no layer of that kind.
    pub zone: Option<Arc<str>>,
    /// Profile and revision of its settings.
    pub settings: (Arc<str>, u64),
    /// Layer in which its agent takes health check node ports.
    pub health_checks: HealthCheckPlacement,
}

impl Subscription {
    /// The layers in the order of [`KINDS`].
    fn layers(&self) -> [Option<LayerId>; KINDS.len()] {
        let shared = self.health_checks == HealthCheckPlacement::Shared;
        [
            Some(LayerId::Cluster),
            self.zone.clone().map(LayerId::Zone),
            Some(LayerId::Node(self.node.clone())),
            Some(LayerId::Settings(self.settings.0.clone(), self.settings.1)),
            shared.then_some(LayerId::HealthChecks),
        ]
    }
}

const KINDS: [LayerKind; 5] =
    [LayerKind::Cluster, LayerKind::Zone, LayerKind::Node, LayerKind::Settings, LayerKind::HealthChecks];

/// A place that a node's view has reached.
#[derive(Debug, Clone, PartialEq)]
pub struct Cursor {
    revision: u64,
    subscription: Subscription,
    digests: [Digest; KINDS.len()],
}

impl Cursor {
    /// The revision of the layers.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Components of the view.
    #[must_use]
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// The digest of the view.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digests.iter().fold(Digest::default(), |sum, digest| sum.plus(*digest))
    }
}

/// Bounds of a layer's log. It also never grows beyond a quarter of its layer (but for 64 KiB).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLimits {
    /// Maximum number of entries.
    pub entries: usize,
    /// Maximum size in bytes, bookkeeping included.
    pub bytes: usize,
    /// Maximum number of entries in the logs of all layers other than CLUSTER together.
    pub node_entries: usize,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { entries: 4_096, bytes: 8 << 20, node_entries: 1 << 16 }
    }
}

/// Result of [`Layers::apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The new revision.
    pub revision: u64,
    /// Layers whose content is different now, removed ones among them.
    pub touched: Vec<LayerId>,
    /// Changes that were malformed and dropped; a defect of the compiler.
    pub dropped: usize,
    /// Changes of the number of pools per endpoint; `None` unless [`Layers::track`] was called.
    pub moves: Option<Moves>,
}

/// An update for one node.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// It replaces everything: `Update.from` stays empty.
    pub whole: bool,
    /// Some layer is sent as a snapshot.
    pub snapshot: bool,
    /// Parts to send, in order.
    pub parts: Vec<Part>,
    /// Number of changes of the node's layers in it, at least 1.
    pub changes: u64,
    /// Descriptions of the latest changes, at most 16.
    pub infos: Vec<ChangeInfo>,
    /// Cursor of the node after the update.
    pub after: Cursor,
    /// Up to where each resource is processed.
    pub source: Source,
}

/// Result of [`Layers::plan`].
#[derive(Debug)]
pub enum Planned {
    /// The node has everything; it may be taken to be at this place.
    Nothing(Cursor),
    /// This is to be sent.
    Update(Box<Plan>),
    /// Compress this ([`RawSnapshot::compress`]), hand it to [`Layers::keep`], and plan again. Encoding and compressing
    /// take a while and need no access to the layers.
    Compress(Box<RawSnapshot>),
}

/// A large layer as it is at a revision. Holding it costs nothing until the layer changes.
#[derive(Debug)]
pub struct RawSnapshot {
    layer: LayerId,
    kind: LayerKind,
    revision: u64,
    items: Arc<items::Items>,
}

impl RawSnapshot {
    /// Encodes and compresses it.
    #[must_use]
    pub fn compress(self) -> Snapshot {
        let parts = log::encode(&self.items).into_iter().map(|raw| compress(self.kind, raw)).collect();
        Snapshot { layer: self.layer, revision: self.revision, parts }
    }
}

/// A large layer, compressed.
#[derive(Debug)]
pub struct Snapshot {
    layer: LayerId,
    revision: u64,
    parts: Vec<Part>,
}

fn compress(kind: LayerKind, raw: Vec<u8>) -> Part {
    let mut encoder = DeflateEncoder::new(Vec::with_capacity(raw.len() / 4), Compression::fast());
    // Writing to memory does not fail; if it ever did, the raw form is as good.
    let compressed = encoder.write_all(&raw).and_then(|()| encoder.finish());
    let (kind_of_part, payload) = match compressed {
        Ok(compressed) => (PartKind::SnapshotDeflate, compressed),
        Err(_) => (PartKind::Snapshot, raw),
    };
    Part { layer: kind as i32, kind: kind_of_part as i32, payload: payload.into() }
}

/// The state of a layer that a node has.
#[derive(Clone, Copy)]
struct Place {
    revision: u64,
    digest: Digest,
    /// It is the layer that the node needs now.
    same: bool,
}

/// All layers of this process.
#[derive(Debug)]
pub struct Layers {
    layers: HashMap<LayerId, Layer>,
    revision: u64,
    /// Revision of the last removal of a layer, by kind: of layers of that kind that are absent since then it is
    /// known that they were empty.
    last_removal: [u64; KINDS.len()],
    source: Source,
    limits: LogLimits,
    /// Entries in the logs of layers other than CLUSTER, oldest first, as far as they were not dropped before. A node
    /// resumes only where all of its layers cover its place, so entries below CLUSTER's floor are useless; without
    /// this queue a layer would keep them until it changes often.
    logged: VecDeque<(u64, LayerId)>,
    /// Record the pools of each endpoint.
    tracked: bool,
}

impl Layers {
    /// No layers, at revision 0.
    #[must_use]
    pub fn new(limits: LogLimits) -> Self {
        Self {
            layers: HashMap::new(),
            revision: 0,
            last_removal: [0; KINDS.len()],
            source: Source::default(),
            limits,
            logged: VecDeque::new(),
            tracked: false,
        }
    }

    /// Revision of the layers; grows by one with each [`Layers::apply`].
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Up to where each resource is processed.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }
    /// Applies changes and removes layers, as one revision.
    pub fn apply(
        &mut self,
        changes: BTreeMap<LayerId, Vec<Change>>,
        removed: &[LayerId],
        infos: Vec<ChangeInfo>,
        source: Source,
    ) -> Applied {
        self.revision += 1;
        self.source = source;
        let infos: Arc<[ChangeInfo]> = infos.into();
        let mut applied = Applied {
            revision: self.revision,
            touched: Vec::new(),
            dropped: 0,
            moves: self.tracked.then(Moves::new),
        };
        let mut gone = HashSet::new();
        for id in removed {
            if let Some(layer) = self.layers.remove(id) {
                if let Some(moves) = &mut applied.moves {
                    moves::count(&layer.items, -1, moves);
                }
                self.last_removal[position(id)] = self.revision;
                applied.touched.push(id.clone());
                gone.insert(id);
            }
        }
        for (id, changes) in changes {
            let floor = self.last_removal[position(&id)];
            let layer = self.layers.entry(id.clone()).or_insert_with(|| Layer::new(kind(&id), floor));
            let publication = Publication { revision: self.revision, infos: &infos, limits: &self.limits };
            let (dropped, touched) = layer.apply(changes, &publication, applied.moves.as_mut());
            applied.dropped += dropped;
            // Hints may name any zone: an empty layer is removed even if nodes subscribe to it.
            let empty = matches!(id, LayerId::Zone(_)) && layer.items.digest() == Digest::default();
            if empty {
                self.layers.remove(&id);
                self.last_removal[position(&id)] = self.revision;
            }
            if touched && !empty && id != LayerId::Cluster {
                self.logged.push_back((self.revision, id.clone()));
            }
            if touched && !gone.contains(&id) {
                applied.touched.push(id);
            }
        }
        self.forget_useless_entries();
        applied
    }

    /// Drops log entries that no node can resume from, and the oldest beyond a total: amortised O(change).
    fn forget_useless_entries(&mut self) {
        let floor = self.layers.get(&LayerId::Cluster).map_or(0, Layer::floor);
        while let Some((revision, _)) = self.logged.front()
            && (*revision <= floor || self.logged.len() > self.limits.node_entries)
        {
            let Some((revision, id)) = self.logged.pop_front() else { break };
            if let Some(layer) = self.layers.get_mut(&id) {
                layer.forget(revision);
            }
        }
    }

    /// Records changes of the number of pools per endpoint from now on. Returns the current numbers.
    pub fn track(&mut self) -> Moves {
        self.tracked = true;
        let mut moves = Moves::new();
        self.layers.values().for_each(|layer| moves::count(&layer.items, 1, &mut moves));
        moves
    }

    /// Ends [`Layers::track`].
    pub fn untrack(&mut self) {
        self.tracked = false;
    }

    /// Entries in all logs.
    #[must_use]
    pub fn log_entries(&self) -> usize {
        self.layers.values().map(Layer::entries).sum()
    }

    fn digests(&self, subscription: &Subscription) -> [Digest; KINDS.len()] {
        subscription.layers().map(|id| {
            let Some(id) = id else { return Digest::default() };
            if subscription.merges(&id) {
                return self.merged(&id).digest();
            }
            self.layers.get(&id).map_or_else(Digest::default, |layer| layer.items.digest())
        })
    }

    /// The place of a view that has everything.
    #[must_use]
    pub fn head(&self, subscription: &Subscription) -> Cursor {
        Cursor {
            revision: self.revision,
            subscription: subscription.clone(),
            digests: self.digests(subscription),
        }
    }

    /// A node's view, for explanations. `service` (namespace, name): only what concerns this Service and those in
    /// its bucket; costs their size, and a glance at each frontend's bucket.
    #[must_use]
    pub fn view(&self, subscription: &Subscription, service: Option<(&str, &str)>) -> View {
        let only = service.map(|(namespace, name)| items::bucket16(namespace, name));
        let mut view = View::default();
        for (kind, id) in KINDS.into_iter().zip(subscription.layers()) {
            let Some(layer) = id.and_then(|id| self.layers.get(&id)) else { continue };
            let changes = layer.items.changes(only);
            changes.values().flatten().for_each(|change| view.apply(kind, change));
        }
        view
    }

    /// Returns true if a Service has a health check node port, which all nodes serve.
    #[must_use]
    pub fn has_health_check(&self, key: &HealthCheckKey) -> bool {
        let layer = self.layers.get(&LayerId::HealthChecks);
        layer.is_some_and(|layer| layer.items.health_check(key).is_some())
    }

    /// Finds the place of a view by the revision that its holder remembers and by its digest.
    ///
    /// `revision` is `None` if it was given out by another process; then only a view that equals the present
    /// one is found.
    #[must_use]
    pub fn resume(
        &self,
        subscription: &Subscription,
        revision: Option<u64>,
        digest: Digest,
    ) -> Option<Cursor> {
        let remembered = revision.filter(|revision| *revision <= self.revision).and_then(|revision| {
            let mut digests = [Digest::default(); KINDS.len()];
            for (slot, id) in digests.iter_mut().zip(subscription.layers()) {
                let Some(id) = id else { continue };
                if subscription.merges(&id) {
                    *slot = self.merged(&id).digest_at(revision)?;
                    continue;
                }
                *slot = match self.layers.get(&id) {
                    Some(layer) => layer.digest_at(revision)?,
                    None if revision >= self.last_removal[position(&id)] => Digest::default(),
                    None => return None,
                };
            }
            Some(Cursor { revision, subscription: subscription.clone(), digests })
        });
        remembered
            .filter(|cursor| cursor.digest() == digest)
            .or_else(|| Some(self.head(subscription)).filter(|cursor| cursor.digest() == digest))
    }

    /// Number of changes of a node's layers after its cursor.
    #[must_use]
    pub fn pending(&self, subscription: &Subscription, from: &Cursor) -> u64 {
        let (now, then) = (subscription.layers(), from.subscription.layers());
        let mut pending = 0;
        for ((id, old), known) in now.iter().zip(&then).zip(from.digests) {
            if let Some(id) = id.as_ref().filter(|id| subscription.merges(id)) {
                pending += self.merged(id).pending(from.revision, known);
                continue;
            }
            let same = id == old && subscription.health_checks == from.subscription.health_checks;
            let layer = id.as_ref().and_then(|id| self.layers.get(id));
            pending += match layer {
                Some(layer) if same && layer.covers(from.revision) => layer.since(from.revision).len() as u64,
                Some(layer) if layer.items.digest() != known => 1,
                Some(_) => 0,
                None => u64::from(known != Digest::default()),
            };
        }
        pending
    }

    /// Plans the update of a node. `from` is its cursor, `None` if it has no state to resume from.
    #[must_use]
    pub fn plan(&self, subscription: &Subscription, from: Option<&Cursor>) -> Planned {
        let mut plan = Plan {
            whole: from.is_none(),
            snapshot: from.is_none(),
            parts: Vec::new(),
            changes: 0,
            infos: Vec::new(),
            after: self.head(subscription),
            source: self.source,
        };
        let then = from.map(|from| from.subscription.layers()).unwrap_or_default();
        for (at, id) in subscription.layers().into_iter().enumerate() {
            if let Some(id) = id.as_ref().filter(|id| subscription.merges(id)) {
                let place = from.map(|from| (from.revision, from.digests[at]));
                self.merged(id).plan(place, &mut plan);
                continue;
            }
            let place = from.map(|from| Place {
                revision: from.revision,
                digest: from.digests[at],
                same: id == then[at] && from.subscription.health_checks == subscription.health_checks,
            });
            if let Err(raw) = self.plan_layer(at, id.as_ref(), place, &mut plan) {
                return Planned::Compress(raw);
            }
        }
        if plan.parts.is_empty() && !plan.whole {
            return Planned::Nothing(plan.after);
        }
        plan.changes = plan.changes.max(1);
        Planned::Update(Box::new(plan))
    }

    /// Plans the update of one layer, the one at index `at` of a subscription.
    fn plan_layer(
        &self,
        at: usize,
        id: Option<&LayerId>,
        place: Option<Place>,
        plan: &mut Plan,
    ) -> Result<(), Box<RawSnapshot>> {
        let found = id.and_then(|id| Some((id, self.layers.get(id)?)));
        match (found, place) {
            (Some((_, layer)), Some(Place { revision, same: true, .. })) if layer.covers(revision) => {
                let entries = layer.since(revision);
                plan.changes += entries.len() as u64;
                note(&mut plan.infos, entries.map(|entry| &*entry.infos));
                layer.delta(revision, &mut plan.parts);
            }
            // The other layer, or the older state of this one, is the same content.
            (Some((_, layer)), Some(place)) if layer.items.digest() == place.digest => {}
            (Some((id, layer)), place) => {
                layer.snapshot(id, self.revision, &mut plan.parts)?;
                note(
                    &mut plan.infos,
                    layer.since(place.map_or(0, |place| place.revision)).map(|entry| &*entry.infos),
                );
                plan.snapshot = true;
                plan.changes += 1;
            }
            (None, Some(place)) if place.digest != Digest::default() => {
                let kind = PartKind::Snapshot as i32;
                plan.parts.push(Part { layer: KINDS[at] as i32, kind, payload: bytes::Bytes::new() });
                plan.changes += 1;
            }
            (None, _) => {}
        }
        Ok(())
    }

    /// Keeps a compressed snapshot for everybody who needs one.
    pub fn keep(&self, snapshot: Snapshot) {
        if let Some(layer) = self.layers.get(&snapshot.layer) {
            layer.keep(snapshot);
        }
    }
}

/// Adds descriptions, each once, and keeps the latest.
fn note<'a>(infos: &mut Vec<ChangeInfo>, entries: impl ExactSizeIterator<Item = &'a [ChangeInfo]>) {
    // Older entries than these cannot have one of the latest descriptions.
    let skip = entries.len().saturating_sub(INFOS);
    for info in entries.skip(skip).flatten() {
        if !infos.iter().any(|known| known.id == info.id) {
            infos.push(info.clone());
        }
    }
    let excess = infos.len().saturating_sub(INFOS);
    infos.drain(..excess);
}

/// Index of a layer's kind in [`KINDS`].
fn position(id: &LayerId) -> usize {
    let kind = kind(id);
    KINDS.iter().position(|other| *other == kind).unwrap_or_default()
}

fn kind(id: &LayerId) -> LayerKind {
    match id {
        LayerId::Cluster => LayerKind::Cluster,
        LayerId::Zone(_) => LayerKind::Zone,
        LayerId::Node(_) => LayerKind::Node,
        LayerId::Settings(..) => LayerKind::Settings,
        LayerId::HealthChecks => LayerKind::HealthChecks,
    }
}
