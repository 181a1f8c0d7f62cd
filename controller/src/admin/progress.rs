//! Progress of changes: the barrier of `kubectl switchtower wait`.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use switchtower_admin_api::Progress;
use switchtower_proto::v1::Source;

use crate::fleet::Fleet;
use crate::fleet::elsewhere::covers;
use crate::replicas::Reply;

/// Path of [`LocalProgress`], with [`Parameters`].
pub(super) const LOCAL: &str = "/v1/replica/progress";
/// Maximum number of names in an answer.
const NAMES: usize = 50;

/// The changes to wait for: resourceVersions that must have been processed, or the revisions of an earlier answer.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Parameters {
    #[serde(default)]
    services: u64,
    #[serde(default, rename = "endpointSlices")]
    endpoint_slices: u64,
    /// `instance` of an earlier answer.
    #[serde(default)]
    instance: String,
}

impl Parameters {
    /// Returns the path of the same query to another replica.
    pub(super) fn local_path(&self) -> String {
        let Self { services, endpoint_slices, instance } = self;
        // An `instance` of an answer has no reserved characters; another one is of no use.
        let instance: String =
            instance.chars().filter(|c| c.is_ascii_alphanumeric() || "._".contains(*c)).collect();
        format!("{LOCAL}?services={services}&endpointSlices={endpoint_slices}&instance={instance}")
    }

    /// The versions that must have been processed.
    fn versions(&self) -> Source {
        let Self { services, endpoint_slices, .. } = *self;
        Source { services, endpoint_slices, ..Source::default() }
    }

    /// Returns the revision of this process in an earlier answer.
    fn revision(&self, process: &str) -> Option<u64> {
        let pairs = self.instance.split('_').filter_map(|pair| pair.split_once('.'));
        pairs.filter(|(known, _)| *known == process).find_map(|(_, revision)| revision.parse().ok())
    }
}

/// Progress of the nodes that one replica serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LocalProgress {
    process: String,
    revision: Option<u64>,
    /// Nodes with an open stream.
    connected: Vec<String>,
    /// Those of them whose kernel does not hold the revision.
    waiting: Vec<String>,
}

/// Returns the progress of the nodes that this replica serves.
pub(super) fn local(fleet: &Fleet, parameters: &Parameters) -> LocalProgress {
    let process = fleet.instance_name();
    let (source, head) = fleet.processed();
    let seen = covers(&source, &parameters.versions());
    let revision = parameters.revision(&process).or(seen.then_some(head));
    let reach = fleet.reach(revision.unwrap_or(u64::MAX));
    let waiting = reach.waiting.iter().map(ToString::to_string).collect();
    LocalProgress { process, revision, connected: fleet.connected_names(), waiting }
}

/// Combines the progress of this replica with the answers of the others. As long as one of them is missing, nothing is
/// reached.
pub(super) fn everywhere(
    names: &[Arc<str>],
    own: LocalProgress,
    replies: Vec<Reply<LocalProgress>>,
) -> Progress {
    let complete = replies.iter().all(|reply| reply.answer.is_ok());
    let others = replies.into_iter().filter_map(|reply| reply.answer.ok());
    let all: Vec<LocalProgress> = std::iter::once(own).chain(others).collect();
    let revision = all[0].revision.filter(|_| complete && all.iter().all(|one| one.revision.is_some()));
    let pairs = all.iter().filter_map(|one| Some(format!("{}.{}", one.process, one.revision?)));
    let instance = pairs.collect::<Vec<_>>().join("_");
    let connected: HashSet<&str> = all.iter().flat_map(|one| &one.connected).map(String::as_str).collect();
    let waiting: BTreeSet<&str> = all.iter().flat_map(|one| &one.waiting).map(String::as_str).collect();
    let excluded: Vec<&str> =
        names.iter().map(|name| &**name).filter(|name| !connected.contains(name)).collect();
    let shown = |names: &mut dyn Iterator<Item = &&str>| names.take(NAMES).map(ToString::to_string).collect();
    Progress {
        instance,
        revision,
        connected: connected.len(),
        reached: if revision.is_some() { connected.len().saturating_sub(waiting.len()) } else { 0 },
        waiting: shown(&mut waiting.iter()),
        excluded: shown(&mut excluded.iter()),
        excluded_total: excluded.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicas::AskError;

    fn names(names: &[&str]) -> Vec<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    fn progress(process: &str, revision: Option<u64>, connected: &[&str], waiting: &[&str]) -> LocalProgress {
        LocalProgress {
            process: process.to_owned(),
            revision,
            connected: strings(connected),
            waiting: strings(waiting),
        }
    }

    fn reply(answer: Result<LocalProgress, AskError>) -> Reply<LocalProgress> {
        Reply { replica: "b".to_owned(), answer }
    }

    #[test]
    fn nodes_of_all_replicas_are_counted() {
        let all = names(&["n1", "n2", "n3", "n4"]);
        let (own, other) =
            (progress("a", Some(3), &["n1"], &[]), progress("b", Some(9), &["n2", "n3"], &["n3"]));
        let found = everywhere(&all, own, vec![reply(Ok(other))]);
        assert_eq!((found.revision, found.connected, found.reached), (Some(3), 3, 2));
        assert_eq!(
            (found.waiting, found.excluded, found.excluded_total),
            (vec!["n3".into()], vec!["n4".into()], 1)
        );
        let again = Parameters { instance: found.instance, ..Parameters::default() };
        assert_eq!([again.revision("a"), again.revision("b"), again.revision("c")], [Some(3), Some(9), None]);
        assert!(again.local_path().ends_with("&instance=a.3_b.9"), "{}", again.local_path());
    }

    #[test]
    fn nothing_is_reached_while_a_replica_is_missing_or_behind() {
        let own = || progress("a", Some(3), &["n1"], &[]);
        let gone = AskError::Unreachable { replica: "b".to_owned(), reason: "stopped".to_owned() };
        let behind = progress("b", None, &["n2"], &["n2"]);
        for reply in [reply(Err(gone)), reply(Ok(behind))] {
            let found = everywhere(&names(&["n1", "n2"]), own(), vec![reply]);
            assert_eq!((found.revision, found.reached), (None, 0));
        }
    }
}
