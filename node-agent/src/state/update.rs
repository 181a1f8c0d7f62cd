//! Receiving one update: begin, parts, end. Nothing is applied before the end.

use std::io::Read as _;
use std::time::Instant;

use switchtower_proto::digest::Digest;
use switchtower_proto::v1::{
    Change, LayerKind, NackReason, Part, PartKind, Resume, Settings, Source, Update, UpdateEnd,
};

use super::holds::Arriving;
use super::layer::{Layer, Overlay, StagedLayer};
use super::pack::{Malformed, PoolRole};
use super::{Applied, FEATURES, KINDS, RefusedUpdate, State, limits, merge, position, wire};
use crate::kernel::change::KernelChange;

/// The update that is being received.
pub(super) struct Staging {
    pub(super) to: u64,
    digest: Digest,
    source: Option<Source>,
    resume: Option<Resume>,
    pub(super) layers: [StagedLayer; KINDS.len()],
    parts: usize,
    bytes: usize,
    changes: usize,
}

impl State {
    /// Starts an update. One that was being received is dropped.
    ///
    /// # Errors
    /// The update continues from another generation than the view's, requires a feature that is unknown, or
    /// is malformed.
    pub fn begin(&mut self, update: &Update) -> Result<(), RefusedUpdate> {
        self.abandon();
        if let Some(feature) = update.required_features.iter().find(|name| !FEATURES.contains(&name.as_str()))
        {
            return Err(RefusedUpdate::unknown_feature(format!(
                "the update requires the feature {feature:?}"
            )));
        }
        let Some(digest) = Digest::from_bytes(&update.digest) else {
            return Err(Malformed("the update's digest is not 16 bytes".into()).into());
        };
        let snapshot = update.from.is_none();
        if let Some(from) = update.from {
            if !self.loaded || from != self.generation {
                let held = if self.loaded { self.generation.to_string() } else { "no view".into() };
                let detail = format!("the update continues from generation {from}, this node holds {held}");
                return Err(RefusedUpdate { reason: NackReason::FromMismatch, detail });
            }
            if update.to <= from {
                return Err(Malformed(format!("the update goes from {from} to {}", update.to)).into());
            }
        }
        let layers = KINDS.map(|kind| {
            if snapshot { StagedLayer::Replaced(Box::new(Layer::new(kind))) } else { StagedLayer::Unchanged }
        });
        self.staging = Some(Staging {
            to: update.to,
            digest,
            source: update.source,
            resume: update.resume.clone(),
            layers,
            parts: 0,
            bytes: 0,
            changes: 0,
        });
        Ok(())
    }

    /// The generation that is being received, if one is.
    pub fn receiving(&self) -> Option<u64> {
        self.staging.as_ref().map(|staging| staging.to)
    }

    /// Takes a part in.
    ///
    /// # Errors
    /// The part is malformed, over a limit, or no update was begun; the update is dropped.
    pub fn part(&mut self, part: &Part) -> Result<(), RefusedUpdate> {
        let Some(mut staging) = self.staging.take() else {
            return Err(Malformed("a part came without an update".into()).into());
        };
        let result = staging.take_part(part, self);
        match result {
            Ok(()) => self.staging = Some(staging),
            Err(_) => self.ports.sweep(),
        }
        result
    }

    /// Ends the update: checks it whole, applies it to the view, and returns the changes. Removals beyond the delete
    /// budget are not among them.
    ///
    /// # Errors
    /// The update is not whole, or its content has another digest than announced; the view is as before.
    pub fn end(&mut self, end: &UpdateEnd, now: Instant) -> Result<Applied, RefusedUpdate> {
        let Some(staging) = self.staging.take() else {
            return Err(Malformed("an update's end came without its beginning".into()).into());
        };
        let result = self.check(&staging, end).map(|()| self.fold(staging, now));
        self.ports.sweep();
        result
    }

    /// Replaces the view by one that was kept: begin, changes, end in one step.
    ///
    /// # Errors
    /// As for [`State::begin`], [`State::part`] and [`State::end`]; the view is as before.
    pub fn restore(
        &mut self,
        update: &Update,
        changes: &mut dyn Iterator<Item = Result<(LayerKind, Change), RefusedUpdate>>,
        now: Instant,
    ) -> Result<(), RefusedUpdate> {
        self.begin(&Update { from: None, ..update.clone() })?;
        let Some(mut staging) = self.staging.take() else { return Ok(()) };
        for change in changes {
            let result = change.and_then(|(layer, change)| {
                let at = position(layer).ok_or_else(|| Malformed("an item is in no layer".into()))?;
                staging.take_change(at, &change, self)
            });
            if let Err(refusal) = result {
                self.ports.sweep();
                return Err(refusal);
            }
        }
        self.staging = Some(staging);
        self.end(&UpdateEnd { to: update.to }, now).map(|_| ())
    }

    /// Drops the update that is being received, if there is one.
    pub fn abandon(&mut self) {
        if self.staging.take().is_some() {
            self.ports.sweep();
        }
    }

    fn check(&self, staging: &Staging, end: &UpdateEnd) -> Result<(), RefusedUpdate> {
        if end.to != staging.to {
            return Err(Malformed(format!("update {} was ended as {}", staging.to, end.to)).into());
        }
        let after = staging.layers.iter().zip(&self.layers).fold(Digest::default(), |sum, (staged, base)| {
            sum.plus(match staged {
                StagedLayer::Unchanged => base.digest,
                StagedLayer::Changed(overlay) => overlay.digest(base),
                StagedLayer::Replaced(layer) => layer.digest,
            })
        });
        if after != staging.digest {
            let detail = format!("the content has digest {after}, announced was {}", staging.digest);
            return Err(RefusedUpdate { reason: NackReason::DigestMismatch, detail });
        }
        Ok(())
    }

    fn fold(&mut self, staging: Staging, now: Instant) -> Applied {
        let settings = position(LayerKind::Settings)
            .is_some_and(|at| !matches!(staging.layers[at], StagedLayer::Unchanged));
        let mut difference = merge::difference(&self.layers, &staging.layers, &self.ports);
        let arriving = Arriving { before: &self.layers, to: staging.to, first: !self.loaded, now };
        let (held, traces) = self.holds.intercept(&mut difference, &arriving, &mut self.ports);
        let mut applied = Applied { held, ..difference.into_applied() };
        self.endpoints =
            self.endpoints.saturating_add_signed(cluster_endpoints(&self.layers, &staging.layers));
        for (base, staged) in self.layers.iter_mut().zip(staging.layers) {
            match staged {
                StagedLayer::Unchanged => {}
                StagedLayer::Changed(overlay) => overlay.fold_into(base, Some(&mut self.ports)),
                StagedLayer::Replaced(layer) => {
                    layer.count_references(|id| self.ports.retain(id));
                    base.count_references(|id| self.ports.release(id));
                    *base = *layer;
                }
            }
        }
        if !self.holds.is_settled() {
            let released = self.holds.settle(traces, &self.layers, &mut self.ports);
            applied.changes.extend(released.changes);
            applied.udp.merge(released.udp);
            applied.health_checks |= released.health_checks;
        }
        if settings {
            self.desire(&mut applied);
        }
        self.generation = staging.to;
        self.resume = staging.resume;
        self.source = staging.source;
        self.loaded = true;
        applied
    }
}

impl State {
    /// Decides which settings are in force after an update that may have changed the desired ones.
    fn desire(&mut self, applied: &mut Applied) {
        let desired = match self.layer(LayerKind::Settings).settings.as_deref() {
            Some(desired) => desired.clone(),
            // The view never had settings.
            None if self.settings().is_none() => return,
            None => Settings::default(),
        };
        let moved = self.trials.desire(&desired);
        if moved.settings {
            let in_force = self.settings().cloned().unwrap_or_default();
            applied.changes.insert(0, KernelChange::Settings(in_force));
        }
        applied.trial = moved.status;
    }
}

/// Returns the change of the number of endpoints in the CLUSTER layer's pools of role CLUSTER.
fn cluster_endpoints(before: &[Layer; KINDS.len()], staged: &[StagedLayer; KINDS.len()]) -> isize {
    let Some(at) = position(LayerKind::Cluster) else { return 0 };
    let count = |layer: &Layer| -> isize {
        let pools = layer.pools.iter().filter(|(id, _)| id.role == PoolRole::Cluster);
        pools.map(|(_, members)| members.len() as isize).sum()
    };
    match &staged[at] {
        StagedLayer::Unchanged => 0,
        StagedLayer::Replaced(layer) => count(layer) - count(&before[at]),
        StagedLayer::Changed(overlay) => {
            let pools = overlay.pools.iter().filter(|(id, _)| id.role == PoolRole::Cluster);
            pools
                .map(|(id, pool)| {
                    let below = before[at].pools.get(id).map_or(0, |members| members.len() as isize);
                    let kept = if pool.cleared { 0 } else { below - pool.removed.len() as isize };
                    kept + pool.added.len() as isize - below
                })
                .sum()
        }
    }
}

impl Staging {
    fn take_part(&mut self, part: &Part, state: &mut State) -> Result<(), RefusedUpdate> {
        let Part { layer, kind, payload } = part;
        self.parts += 1;
        if self.parts > limits::PARTS {
            return Err(RefusedUpdate::over_limit(format!(
                "an update has more than {} parts",
                limits::PARTS
            )));
        }
        if payload.len() > limits::PART {
            let detail =
                format!("a part has {} bytes of payload, the limit is {}", payload.len(), limits::PART);
            return Err(RefusedUpdate::over_limit(detail));
        }
        let at = LayerKind::try_from(*layer).ok().and_then(position);
        let Some(at) = at else { return Err(Malformed(format!("layer {layer} is unknown")).into()) };
        let kind =
            PartKind::try_from(*kind).map_err(|_| Malformed(format!("part kind {kind} is unknown")))?;
        let inflated;
        let payload = match kind {
            PartKind::SnapshotDeflate => {
                inflated = inflate(payload)?;
                inflated.as_slice()
            }
            PartKind::Snapshot | PartKind::Delta => &payload[..],
            PartKind::Unspecified => return Err(Malformed("a part has no kind".into()).into()),
        };
        self.bytes += payload.len();
        if self.bytes > limits::UPDATE {
            return Err(RefusedUpdate::over_limit(format!(
                "an update has more than {} bytes",
                limits::UPDATE
            )));
        }
        if kind == PartKind::Delta {
            wire::segment(payload, &mut |change| self.take_change(at, &change, state))
        } else {
            if !matches!(self.layers[at], StagedLayer::Replaced(_)) {
                self.layers[at] = StagedLayer::Replaced(Box::new(Layer::new(KINDS[at])));
            }
            wire::buckets(payload, &mut |change| self.take_change(at, &change, state))
        }
    }

    fn take_change(&mut self, at: usize, change: &Change, state: &mut State) -> Result<(), RefusedUpdate> {
        self.changes += 1;
        if self.changes > limits::CHANGES {
            return Err(RefusedUpdate::over_limit(format!(
                "an update has more than {} changes",
                limits::CHANGES
            )));
        }
        let staged = &mut self.layers[at];
        if matches!(staged, StagedLayer::Unchanged) {
            *staged = StagedLayer::Changed(Box::default());
        }
        match staged {
            StagedLayer::Unchanged => {}
            StagedLayer::Changed(overlay) => overlay.apply(&state.layers[at], change, &mut state.ports)?,
            // A new layer has no readers yet: check each change by a separate overlay and fold it immediately.
            StagedLayer::Replaced(layer) => {
                let mut overlay = Overlay::default();
                overlay.apply(layer, change, &mut state.ports)?;
                overlay.fold_into(layer, None);
            }
        }
        let items: usize = self.layers.iter().zip(&state.layers).fold(0, |sum, (staged, base)| {
            sum + match staged {
                StagedLayer::Unchanged => base.items,
                StagedLayer::Changed(overlay) => overlay.items(base),
                StagedLayer::Replaced(layer) => layer.items,
            }
        });
        if items > limits::ITEMS {
            return Err(RefusedUpdate::over_limit(format!(
                "the view would have more than {} items",
                limits::ITEMS
            )));
        }
        Ok(())
    }
}

fn inflate(payload: &[u8]) -> Result<Vec<u8>, RefusedUpdate> {
    let mut inflated = Vec::with_capacity(payload.len().saturating_mul(4).min(limits::INFLATED));
    let mut reader = flate2::read::DeflateDecoder::new(payload).take(limits::INFLATED as u64 + 1);
    if let Err(error) = reader.read_to_end(&mut inflated) {
        return Err(Malformed(format!("a part cannot be inflated: {error}")).into());
    }
    if inflated.len() > limits::INFLATED {
        return Err(RefusedUpdate::over_limit(format!(
            "a part inflates to more than {} bytes",
            limits::INFLATED
        )));
    }
    Ok(inflated)
}
