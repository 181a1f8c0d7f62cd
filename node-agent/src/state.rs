//! The node's view: the layers exactly as received, and the resulting changes of the kernel. Pure: no clock, no IO.
//!
//! An update is staged while its parts arrive and has no effect. [`State::end`] checks the digest, folds the stage into
//! the layers, and returns the difference of the merged views, at a cost proportional to the changes.
//!
//! Invariants:
//! * A refused update has no effect.
//! * The layers are exactly as the controller sent them; only refused items, removals held by the delete budget and
//!   trials of settings make the kernel deviate.

mod budget;
mod evidence;
mod holds;
mod layer;
mod locality;
mod merge;
mod pack;
mod settings;
mod targets;
mod trial;
mod update;
mod wire;

use std::time::Instant;
use switchtower_proto::digest::Digest;

use switchtower_proto::v1::{
    Change, HealthCheck, LayerKind, NackReason, NodeRecord, Resume, Settings, SettingsDeviation, Source,
    TrialStatus,
};

use crate::kernel::change::KernelChange;
pub use evidence::{Measured, ProbeOutcome, Seen};
use holds::Holds;
pub use holds::{HeldItem, Released, StoredHolds};
use layer::Layer;
pub(crate) use locality::WithoutLocal;
pub(crate) use merge::{Flow, UdpChanges};
use pack::{Interner, Malformed};
pub use targets::{Round, Target};
use trial::Trials;
pub use trial::{TrialEffect, TrialRecord};
use update::Staging;

/// Limits of an update; the agent refuses a larger one as a whole and never truncates it.
pub mod limits {
    /// Payload of one part in bytes.
    pub const PART: usize = 1 << 20;
    /// A compressed part inflated, in bytes.
    pub const INFLATED: usize = 16 << 20;
    /// Items in all layers together.
    pub const ITEMS: usize = 4_000_000;
    /// Parts of one update.
    pub const PARTS: usize = 65_536;
    /// Inflated payload of one update in bytes.
    pub const UPDATE: usize = 1 << 30;
    /// Changes of one update.
    pub const CHANGES: usize = 8_000_000;
}

/// An update that was refused and had no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("update refused ({reason:?}): {detail}")]
pub struct RefusedUpdate {
    /// The reason for the NACK.
    pub reason: NackReason,
    /// Description of the fault.
    pub detail: String,
}

impl RefusedUpdate {
    fn over_limit(detail: String) -> Self {
        RefusedUpdate { reason: NackReason::OverLimit, detail }
    }

    fn unknown_feature(detail: String) -> Self {
        RefusedUpdate { reason: NackReason::UnknownFeature, detail }
    }
}

impl From<Malformed> for RefusedUpdate {
    fn from(Malformed(detail): Malformed) -> Self {
        RefusedUpdate { reason: NackReason::Malformed, detail }
    }
}

/// Effect of an update.
#[derive(Debug, Default)]
pub struct Applied {
    /// Difference of the merged views, in the order of application.
    pub changes: Vec<KernelChange>,
    /// Work for the conntrack reconciler.
    pub(crate) udp: UdpChanges,
    /// The set of health checks, or a count in it, changed.
    pub health_checks: bool,
    /// A trial of settings began or ended.
    pub trial: bool,
    /// Number of removals that this update added to the held ones.
    pub held: usize,
}

/// Size of the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Distinct Services.
    pub services: usize,
    /// Frontends.
    pub frontends: usize,
    /// Pools of all layers.
    pub pools: usize,
    /// Members of the CLUSTER layer's pools of role CLUSTER.
    pub endpoints: usize,
    /// Items of all layers.
    pub items: usize,
}

/// Features of this agent, for `Hello.features` and `Update.required_features`.
pub const FEATURES: &[&str] = &[
    switchtower_proto::HEALTH_CHECK_LAYER,
    switchtower_proto::DRAIN_GATE,
    switchtower_proto::SHADOW_MODE,
    switchtower_proto::HEARTBEAT,
];

/// The layers as received, the place in the controller's log, and the update that is being received.
pub struct State {
    layers: [Layer; KINDS.len()],
    ports: Interner,
    staging: Option<Staging>,
    generation: u64,
    resume: Option<Resume>,
    source: Option<Source>,
    loaded: bool,
    endpoints: usize,
    trials: Trials,
    holds: Holds,
}

impl Default for State {
    fn default() -> Self {
        State::new()
    }
}

/// Position of a layer in [`State::layers`], most specific last.
const KINDS: [LayerKind; 5] =
    [LayerKind::Settings, LayerKind::HealthChecks, LayerKind::Cluster, LayerKind::Zone, LayerKind::Node];

fn position(kind: LayerKind) -> Option<usize> {
    KINDS.iter().position(|candidate| *candidate == kind)
}

impl State {
    /// Creates an empty view, which cannot be resumed.
    pub fn new() -> Self {
        State {
            layers: KINDS.map(Layer::new),
            ports: Interner::default(),
            staging: None,
            generation: 0,
            resume: None,
            source: None,
            loaded: false,
            endpoints: 0,
            trials: Trials::default(),
            holds: Holds::default(),
        }
    }

    /// Returns whether an update or a snapshot file was applied.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// The generation of the view.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns the digest of the view: the sum of the layers' digests.
    pub fn digest(&self) -> Digest {
        self.layers.iter().fold(Digest::default(), |sum, layer| sum.plus(layer.digest))
    }

    /// Position of the view in the controller's log.
    pub fn resume(&self) -> Option<&Resume> {
        self.resume.as_ref()
    }

    /// Source of the view.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// The facts of the Node object, if the view has them.
    pub(crate) fn node(&self) -> Option<&NodeRecord> {
        self.layer(LayerKind::Node).node.as_deref()
    }

    /// Settings in force, if the view has any: the desired ones, or those of a trial.
    pub(crate) fn settings(&self) -> Option<&Settings> {
        self.trials.in_force()
    }

    /// Restores the record of a trial from before a restart.
    pub(crate) fn remember(&mut self, record: TrialRecord) -> TrialEffect {
        self.trials.remember(record)
    }

    /// Time of the next round of probes, if one is scheduled.
    pub(crate) fn round_due(&self) -> Option<Instant> {
        self.trials.due()
    }

    /// Evaluates a round of probes.
    pub(crate) fn measured(&mut self, number: u64, measured: Vec<Measured>, now: Instant) -> TrialEffect {
        self.trials.measured(number, measured, now)
    }

    /// Record of the trial for a restart.
    pub(crate) fn trial_record(&self) -> Option<&TrialRecord> {
        self.trials.record()
    }

    /// Status of the last trial of settings.
    pub(crate) fn trial_status(&self) -> Option<TrialStatus> {
        self.trials.status()
    }

    /// Settings in force that are not the desired ones.
    pub(crate) fn settings_deviation(&self) -> Option<SettingsDeviation> {
        self.trials.deviation()
    }

    /// The health checks to serve: those of the NODE layer, which have local endpoints, and all others; held ones
    /// instead of those that became empty.
    pub(crate) fn health_checks(&self) -> impl Iterator<Item = HealthCheck> {
        let own = &self.layer(LayerKind::Node).health_checks;
        let shared = &self.layer(LayerKind::HealthChecks).health_checks;
        self.holds.health_checks(own, shared)
    }

    /// Number of removals held by the delete budget: pools and frontends.
    pub fn held(&self) -> usize {
        self.holds.len()
    }

    /// Hash of the held removals, independent of their order.
    pub(crate) fn held_digest(&self) -> u128 {
        self.holds.digest()
    }

    /// Descriptions of the held removals, each with the generation that would have removed the item.
    pub fn held_items(&self) -> impl Iterator<Item = (String, u64)> {
        self.holds.describe(&self.ports)
    }

    /// Releases held removals of generations below `before`; later removals of such generations are not held.
    pub fn release_held(&mut self, before: u64) -> Released {
        let released = self.holds.release_before(before, &self.layers, &mut self.ports);
        self.ports.sweep();
        released
    }

    /// Size of the view, counted incrementally.
    pub fn counts(&self) -> Counts {
        Counts {
            services: self.ports.services(),
            frontends: self.layer(LayerKind::Cluster).frontends.len(),
            pools: self.layers.iter().map(|layer| layer.pools.len()).sum(),
            endpoints: self.endpoints,
            items: self.layers.iter().map(|layer| layer.items).sum(),
        }
    }

    /// Calls `each` for every item of every layer, as the change that would add it.
    ///
    /// # Errors
    /// What `each` returns.
    pub fn export<E>(&self, each: &mut dyn FnMut(LayerKind, Change) -> Result<(), E>) -> Result<(), E> {
        for layer in &self.layers {
            layer.export(&self.ports, &mut |change| each(layer.kind, change))?;
        }
        Ok(())
    }

    fn layer(&self, kind: LayerKind) -> &Layer {
        // Parsing refuses the only kind without a position, the unspecified one.
        &self.layers[position(kind).unwrap_or_default()]
    }
}

#[cfg(test)]
impl State {
    /// Forgets the removals of the last minute.
    pub(crate) fn forget_window(&mut self) {
        self.holds.forget_window();
    }
}

#[cfg(test)]
mod tests;
