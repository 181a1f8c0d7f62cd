//! Trials of settings: keeps and tells where one stands, starts its probes, puts other settings in force.

use std::time::Instant;

use super::Engine;
use crate::kernel_change::KernelChange;
use crate::state::Measured;

impl Engine {
    /// Takes what was kept of a trial before a restart. An unusable file leaves the desired settings in force.
    pub(super) fn remember_trial(&mut self) {
        let Some(file) = &self.parts.trial else { return };
        match file.read() {
            Ok(Some(record)) => {
                self.state.remember(record);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the trial file is ignored"),
        }
    }

    /// A trial's standing changed: the next agent and the controller must know it.
    pub(super) fn trial_moved(&mut self) {
        let record = self.state.trial_record();
        if let Some(file) = &self.parts.trial
            && let Err(error) = file.write(record)
        {
            tracing::warn!(%error, "a trial's standing is not kept across a restart");
        }
        let Some(record) = record else { return };
        tracing::info!(
            profile = record.tried.profile,
            revision = record.tried.revision,
            phase = record.phase.as_str_name().trim_start_matches("TRIAL_PHASE_").to_lowercase(),
            "trial of settings"
        );
        self.tell("", self.state.trial_status());
    }

    /// Starts the probes that are due, if the kernel holds what they are to look at.
    pub(super) fn probe(&mut self) {
        if self.queued || self.hold || self.kernel.is_none() {
            return;
        }
        if let Some(round) = self.state.next_round(Instant::now()) {
            self.parts.prober.start(round);
        }
    }

    /// What a round of probes found.
    pub(super) fn probed(&mut self, number: u64, measured: Vec<Measured>) {
        let moved = self.state.measured(number, measured, Instant::now());
        if moved.standing {
            self.trial_moved();
        }
        if moved.settings {
            let in_force = self.state.settings().cloned().unwrap_or_default();
            self.pending.push(KernelChange::Settings(in_force));
            // The deviations change with the commit, and so does what was acknowledged.
            self.unacknowledged = true;
            self.queue_and_sync();
        } else {
            self.probe();
        }
    }
}
