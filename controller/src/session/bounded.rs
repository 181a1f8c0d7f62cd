//! What agents say about themselves, cut to the lengths and counts that are kept.

use switchtower_proto::v1::{Deviations, TrialStatus};

use crate::text::sanitized;

/// Most samples of deviations that are kept.
const SAMPLES: usize = 16;
/// Most results of a trial's probes that are kept: 16 probes with two families and two addresses each.
const RESULTS: usize = 64;

/// Deviations of a Hello or an Ack.
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

/// A trial's standing of a Hello or a Report.
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
