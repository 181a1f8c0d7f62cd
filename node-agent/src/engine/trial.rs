//! Trials of settings: persists and reports their status, starts their probes, switches settings.

use std::time::{Duration, Instant};

use super::{Engine, SyncState};
use crate::kernel::change::KernelChange;
use crate::state::{Measured, UdpChanges};
use crate::storage::files::Content;
use crate::storage::trial_file::TrialFile;

/// Maximum delay of a change of settings until its record is on disk.
const RECORDED: Duration = Duration::from_secs(1);

impl Engine {
    /// Persists and reports a new status of the trial.
    pub(super) fn trial_changed(&mut self) {
        let record = self.state.trial_record();
        if let Some(file) = &self.parts.trial {
            let bytes = record.map(TrialFile::encode);
            self.parts.files.put(file.path(), bytes.map_or(Content::Removed, Content::Bytes), None);
            if !self.parts.files.flush(RECORDED) {
                tracing::warn!(
                    "timeout while writing the trial file; an agent that starts now does not know the trial"
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
        self.report_trial();
    }

    /// Starts the probes that are due, if the kernel holds the settings under trial.
    pub(super) fn probe(&mut self) {
        if self.sync != SyncState::Idle || self.kernel.is_none() {
            return;
        }
        if let Some(round) = self.state.next_round(Instant::now()) {
            self.parts.prober.start(round);
        }
    }

    /// Evaluates a round of probes.
    pub(super) fn probed(&mut self, number: u64, measured: Vec<Measured>) {
        let moved = self.state.measured(number, measured, Instant::now());
        if moved.status {
            self.trial_changed();
        }
        if moved.settings {
            self.flow_checks.add(UdpChanges::all());
            let in_force = self.state.settings().cloned().unwrap_or_default();
            self.pending.push(KernelChange::Settings(in_force));
            // The deviations change with the commit, so it needs another acknowledgement.
            self.acknowledgement.due = true;
            self.queue_and_sync();
        } else {
            self.probe();
        }
    }
}
