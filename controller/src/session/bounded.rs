//! Truncation of agents' reports to the lengths and counts that are stored.

use switchtower_proto::v1::{Deviations, TrialStatus};

use crate::text::sanitized;

/// Maximum number of stored samples of deviations.
const SAMPLES: usize = 16;
/// Maximum number of stored probe results of a trial: 16 probes with two families and two addresses each.
const RESULTS: usize = 64;

/// Truncates the deviations of a Hello or an Ack.
pub(super) fn deviations(mut deviations: Deviations) -> Deviations {
    deviations.samples.truncate(SAMPLES);
    for sample in &mut deviations.samples {
        sample.item = sanitized(&sample.item);
        sample.reason = sanitized(&sample.reason);
    }
    if let Some(settings) = &mut deviations.settings {
        settings.profile = sanitized(&settings.profile);
    }
    deviations
}

/// Truncates the trial status of a Hello or a Report.
pub(super) fn trial(mut trial: TrialStatus) -> TrialStatus {
    trial.profile = sanitized(&trial.profile);
    trial.results.truncate(RESULTS);
    for result in &mut trial.results {
        result.probe = sanitized(&result.probe);
        result.address = sanitized(&result.address);
        result.detail = sanitized(&result.detail);
        result.source_before.truncate(16);
        result.source_after.truncate(16);
    }
    trial
}
