//! What agents say about themselves, cut to the lengths and counts that are kept.

use switchtower_core::compiled::{Problem, ProblemObject, ProblemReason};
use switchtower_core::model::ObjectKey;
use switchtower_proto::v1::{Deviations, HealthCheckFailure, TrialStatus};

use super::shortened;

/// Most samples of deviations that are kept.
const SAMPLES: usize = 16;
/// Most health checks that a node cannot listen on.
const FAILURES: usize = 16;
/// Most results of a trial's probes that are kept: 16 probes with two families and two addresses each.
const RESULTS: usize = 64;

/// Deviations of a Hello or an Ack.
pub(super) fn deviations(mut deviations: Deviations) -> Deviations {
    deviations.samples.truncate(SAMPLES);
    for sample in &mut deviations.samples {
        sample.item = shortened(&sample.item);
        sample.reason = shortened(&sample.reason);
    }
    if let Some(settings) = &mut deviations.settings {
        settings.profile = shortened(&settings.profile);
    }
    deviations
}

/// Health checks that a node cannot listen on, as what is wrong with their Services.
pub(super) fn health_check_failures(
    node: &str,
    failures: &[HealthCheckFailure],
) -> impl Iterator<Item = Problem> {
    failures.iter().take(FAILURES).filter_map(move |failure| {
        let HealthCheckFailure { key, address, error } = failure;
        let key = key.as_ref()?;
        let object = ObjectKey { namespace: shortened(&key.namespace).into(), name: shortened(&key.name).into() };
        Some(Problem {
            object: ProblemObject::Service(object),
            reason: ProblemReason::FailedToStartServiceHealthcheck,
            message: format!(
                "node {node} cannot listen on {} for the health check node port: {}; it tries again every five seconds",
                shortened(address),
                shortened(error)
            ),
        })
    })
}

/// A trial's standing of a Hello or a Report.
pub(super) fn trial(mut trial: TrialStatus) -> TrialStatus {
    trial.profile = shortened(&trial.profile);
    trial.results.truncate(RESULTS);
    for result in &mut trial.results {
        result.probe = shortened(&result.probe);
        result.address = shortened(&result.address);
        result.detail = shortened(&result.detail);
        result.source_before.truncate(16);
        result.source_after.truncate(16);
    }
    trial
}
