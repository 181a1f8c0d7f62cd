//! Trials of settings: keeps and tells where one stands, starts its probes, puts other settings in force.

use std::time::{Duration, Instant};

use super::Engine;
use crate::kernel::change::KernelChange;
use crate::state::{Measured, UdpChanges};
use crate::storage::files::Content;
use crate::storage::trial_file::TrialFile;

/// How long a change of settings waits for its record to be on disk.
const RECORDED: Duration = Duration::from_secs(1);

impl Engine {
    /// A trial's standing changed: the next agent and the controller must know it.
    pub(super) fn trial_moved(&mut self) {
        let record = self.state.trial_record();
        if let Some(file) = &self.parts.trial {
            let bytes = record.map(TrialFile::encode);
            self.parts.files.put(file.path(), bytes.map_or(Content::Removed, Content::Bytes), None);
            if !self.parts.files.flush(RECORDED) {
                tracing::warn!(
                    "a trial's standing is not on disk yet; an agent that starts now does not know it"
                );
            }
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
            self.passes.add(UdpChanges::all());
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
