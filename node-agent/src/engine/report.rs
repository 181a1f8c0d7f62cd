//! Messages about the node: acknowledgements, reports, deviations, answers to queries.

use std::time::Duration;

use switchtower_proto::v1::{
    Ack, ApplyTimings, Deviation, Deviations, DriftCause, HealthCheckFailure, Report, Stamp as WireStamp,
    TrialStatus, View,
};

use super::sync::Confidence;
use super::{AgentStatus, Engine, Event};
use crate::kernel::dataplane::{Committed, Refused, Stamp};
use crate::traces::Applying;

/// Maximum number of deviating items that an Ack names.
const SAMPLES: usize = 16;

/// Findings that no generation covers; every report carries them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Conditions {
    /// Rules of kube-proxy exist alongside ours.
    pub(super) foreign_proxy: bool,
    /// healthCheckNodePorts that cannot be bound.
    pub(super) health_check_failures: Vec<HealthCheckFailure>,
    /// Reason why the agent cannot listen for the drain gate.
    pub(super) drain_gate_unheard: Option<String>,
    /// The settings have a drain gate, but no way to recognise the node's pods.
    pub(super) pods_undetected: bool,
}

impl Conditions {
    /// Returns the reason why the drain gate does not work, or an empty string.
    fn drain_gate_failure(&self) -> String {
        match &self.drain_gate_unheard {
            Some(failure) => failure.clone(),
            None if self.pods_undetected => {
                "the node has no local detection, so the requests of its kubelet cannot be recognised; set \
                 localDetection in the ProxyProfile"
                    .to_owned()
            }
            None => String::new(),
        }
    }
}

impl Engine {
    /// Returns the status that opens a stream.
    pub(super) fn status(&mut self) -> AgentStatus {
        // Without a readable kernel there is no proof that it holds the view, so the controller must not resume it.
        let view = (self.state.is_loaded() && self.confidence != Confidence::Unread).then(|| View {
            digest: self.state.digest().to_bytes().to_vec(),
            generation: self.state.generation(),
            resume: self.state.resume().cloned(),
            source: self.state.source().copied(),
        });
        let kernel = self.kernel.map(|stamp| WireStamp {
            generation: stamp.generation,
            digest: stamp.digest.to_le_bytes().to_vec(),
        });
        // A view that the kernel does not hold yet is acknowledged once it does.
        self.acknowledgement.due |= self.sync.is_queued();
        AgentStatus {
            kernel,
            view,
            addresses: self.parts.host_addresses.clone(),
            deviations: self.kernel.and_then(|stamp| self.deviations(stamp.digest)),
            trial: self.state.trial_status(),
            mode: self.mode(),
        }
    }

    /// Returns the stamp of the view.
    pub(super) fn stamp(&self) -> Stamp {
        Stamp {
            generation: self.state.generation(),
            digest: self.state.digest().0,
            facts: self.facts(),
            deviations: (self.refused.len() + self.state.held()) as u32
                + u32::from(self.state.settings_deviation().is_some()),
        }
    }

    fn facts(&self) -> u64 {
        use prost::Message as _;
        let mut hasher = blake3::Hasher::new();
        if let Some(settings) = self.state.settings() {
            hasher.update(&settings.encode_to_vec());
        }
        if let Some(node) = self.state.node() {
            hasher.update(&node.encode_to_vec());
        }
        for address in &self.parts.host_addresses {
            hasher.update(address.to_string().as_bytes());
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    }

    pub(super) fn ack(&self, stamp: Stamp, committed: &Committed) -> Ack {
        let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let counts = self.state.counts();
        Ack {
            session: 0,
            generation: stamp.generation,
            digest: stamp.digest.to_le_bytes().to_vec(),
            deviations: self.deviations(stamp.digest),
            timings: Some(ApplyTimings {
                plan_microseconds: microseconds(committed.plan),
                commit_microseconds: microseconds(committed.commit),
                operations: committed.operations,
                services: counts.services as u32,
                endpoints: counts.endpoints as u32,
                traced: self.applying.as_ref().is_some_and(Applying::is_of_change),
            }),
            mode: self.mode().into(),
        }
    }

    /// Reports the conditions that no generation covers.
    pub(super) fn report_conditions(&mut self) {
        self.report(DriftCause::Unspecified, None);
    }

    /// Reports a repair of foreign changes.
    pub(super) fn report_drift(&mut self, cause: DriftCause) {
        self.report(cause, None);
    }

    /// Reports the status of the trial of settings.
    pub(super) fn report_trial(&mut self) {
        self.report(DriftCause::Unspecified, self.state.trial_status());
    }

    fn report(&mut self, drift_cause: DriftCause, trial: Option<TrialStatus>) {
        let report = Report {
            session: 0,
            drift_repaired: self.drift.repaired,
            drift_cause: drift_cause.into(),
            foreign_proxy: self.conditions.foreign_proxy,
            trial,
            health_check_failures: self.conditions.health_check_failures.clone(),
            unset_kernel_settings: self.parts.sysctls.unset().to_vec(),
            drain_gate_failure: self.conditions.drain_gate_failure(),
        };
        self.send(Event::Report(report));
    }

    /// Returns the intended differences from `desired`: refused items, held removals, and settings of a trial.
    pub(super) fn deviations(&self, desired: u128) -> Option<Deviations> {
        let settings = self.state.settings_deviation();
        let held = self.state.held();
        if self.refused.is_empty() && held == 0 && settings.is_none() {
            return None;
        }
        // Equal for equal deviations from equal views; the controller compares it and never decodes it.
        let in_force =
            settings.as_ref().map(|settings| format!("{}@{}", settings.profile, settings.revision));
        let items = self.refused.iter().map(|refused| &refused.item).chain(&in_force);
        let effective = items.fold(desired.wrapping_add(self.state.held_digest()), |digest, item| {
            let mut first = [0; 16];
            first.copy_from_slice(&blake3::hash(item.as_bytes()).as_bytes()[..16]);
            digest.wrapping_sub(u128::from_le_bytes(first))
        });
        let samples = self.refused.iter().take(SAMPLES).map(|Refused { item, reason, errno }| Deviation {
            item: item.clone(),
            reason: reason.clone(),
            errno: *errno,
        });
        let held_items = self.state.held_items().map(|(item, since)| Deviation {
            item,
            reason: format!("removal held by the delete budget since generation {since}"),
            errno: 0,
        });
        let samples = samples.chain(held_items).take(SAMPLES);
        Some(Deviations {
            held: u32::try_from(held).unwrap_or(u32::MAX),
            refused: self.refused.len() as u32,
            settings,
            effective_digest: effective.to_le_bytes().to_vec(),
            samples: samples.collect(),
        })
    }
}
