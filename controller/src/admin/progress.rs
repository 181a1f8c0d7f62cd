//! Progress of changes: the barrier of `kubectl switchtower wait`.

use serde::Deserialize;
use switchtower_admin_api::Progress;

use crate::fleet::Fleet;

/// Maximum number of names in an answer.
const NAMES: usize = 50;

/// The changes to wait for: resourceVersions that must have been processed, or a revision from an earlier answer.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Parameters {
    #[serde(default)]
    services: u64,
    #[serde(default, rename = "endpointSlices")]
    endpoint_slices: u64,
    revision: Option<u64>,
    instance: Option<String>,
}

pub(super) fn progress(fleet: &Fleet, parameters: &Parameters) -> Progress {
    let instance = fleet.instance_name();
    let (source, head) = fleet.processed();
    let known = parameters.revision.filter(|_| parameters.instance.as_ref() == Some(&instance));
    let seen = source.services >= parameters.services && source.endpoint_slices >= parameters.endpoint_slices;
    let revision = known.or(seen.then_some(head));
    let reach = fleet.reach(revision.unwrap_or(u64::MAX));
    let names = |names: &[std::sync::Arc<str>]| names.iter().take(NAMES).map(ToString::to_string).collect();
    Progress {
        instance,
        revision,
        connected: reach.reached + reach.waiting.len(),
        reached: if revision.is_some() { reach.reached } else { 0 },
        waiting: names(&reach.waiting),
        excluded: names(&reach.excluded),
        excluded_total: reach.excluded.len(),
    }
}
