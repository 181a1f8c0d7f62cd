//! Exchange with the other replicas: what this one reports about itself, and what it knows of them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use switchtower_proto::v1::Source;
use tokio::time::Instant;

use super::Fleet;
use crate::replicas::nodes::{ObservedNode, milliseconds};
use crate::sync::lock;

/// Path of [`ReplicaState`].
pub(crate) const STATE: &str = "/v1/replica/state";
/// Interval between queries for the states of the other replicas.
const INTERVAL: Duration = Duration::from_secs(2);
/// Timeout of a query.
const TIMEOUT: Duration = Duration::from_millis(1_500);
/// A replica is stale if the API server last responded on its watches this much longer ago than to another one. Watches
/// are renewed every ten seconds.
const STALE_WATCHES: Duration = Duration::from_secs(10);
/// The same for requests about the Leases of the replicas, which are sent every two seconds.
const STALE_LEASES: Duration = Duration::from_secs(4);

/// State of one replica.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReplicaState {
    upstream_age_milliseconds: Option<u64>,
    #[serde(default)]
    lease_age_milliseconds: Option<u64>,
    services: u64,
    endpoint_slices: u64,
    nodes: u64,
    service_cidrs: u64,
    /// Nodes with an open stream to it.
    pub(crate) connected: Vec<String>,
}

impl ReplicaState {
    fn source(&self) -> Source {
        let Self { services, endpoint_slices, nodes, service_cidrs, .. } = *self;
        Source { services, endpoint_slices, nodes, service_cidrs }
    }

    fn ages(&self) -> Ages {
        let duration = |age: Option<u64>| age.map(Duration::from_millis);
        Ages {
            watches: duration(self.upstream_age_milliseconds),
            leases: duration(self.lease_age_milliseconds),
        }
    }
}

/// Latest knowledge of the other replicas.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    connected: Mutex<Arc<HashSet<Arc<str>>>>,
    stale: AtomicBool,
}

/// Returns true if every resource is processed at least up to the version in `seen`.
#[must_use]
pub(crate) fn covers(processed: &Source, seen: &Source) -> bool {
    let Source { services, endpoint_slices, nodes, service_cidrs } = *processed;
    services >= seen.services
        && endpoint_slices >= seen.endpoint_slices
        && nodes >= seen.nodes
        && service_cidrs >= seen.service_cidrs
}

/// Times since the API server last responded to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ages {
    /// On the watch that has been silent for the longest time; `None` before each had a response.
    watches: Option<Duration>,
    /// To a request about Leases; `None` before the first response, and from versions that do not report it.
    leases: Option<Duration>,
}

/// Returns true if agents should leave a replica with these ages for one of the others. If the API server is down for all
/// of them, every agent stays.
fn is_stale(own: Ages, others: &[Ages]) -> bool {
    let later = |age: fn(&Ages) -> Option<Duration>, than: Duration| {
        let best = others.iter().filter_map(age).min();
        best.is_some_and(|best| age(&own).is_none_or(|own| own >= best + than))
    };
    later(|ages| ages.watches, STALE_WATCHES) || later(|ages| ages.leases, STALE_LEASES)
}

impl Fleet {
    fn ages(&self) -> Ages {
        Ages { watches: self.upstream_age(), leases: self.others.replicas().age() }
    }

    /// Returns the state of this replica.
    pub(crate) fn replica_state(&self) -> ReplicaState {
        let (Source { services, endpoint_slices, nodes, service_cidrs }, _) = self.processed();
        let Ages { watches, leases } = self.ages();
        ReplicaState {
            upstream_age_milliseconds: watches.map(milliseconds),
            lease_age_milliseconds: leases.map(milliseconds),
            services,
            endpoint_slices,
            nodes,
            service_cidrs,
            connected: self.connected_names(),
        }
    }

    /// Queries the other replicas for their states for as long as the process runs.
    pub async fn follow_replicas(self: Arc<Self>) {
        loop {
            let replies = self.others.ask::<ReplicaState>(STATE, TIMEOUT).await;
            let states: Vec<ReplicaState> =
                replies.into_iter().filter_map(|reply| reply.answer.ok()).collect();
            let ages: Vec<Ages> = states.iter().map(ReplicaState::ages).collect();
            let stale = is_stale(self.ages(), &ages);
            if self.elsewhere.stale.swap(stale, Ordering::Relaxed) != stale && stale {
                tracing::warn!(
                    "the API server responds to another replica and not to this one; agents leave"
                );
                self.wake_all();
            }
            let connected: HashSet<Arc<str>> =
                states.iter().flat_map(|state| &state.connected).map(|name| name.as_str().into()).collect();
            if **lock(&self.elsewhere.connected) != connected {
                self.drains.elsewhere(&connected);
                *lock(&self.elsewhere.connected) = Arc::new(connected);
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Returns the nodes that other replicas serve, as they reported it last.
    pub(super) fn connected_elsewhere(&self) -> Arc<HashSet<Arc<str>>> {
        lock(&self.elsewhere.connected).clone()
    }

    /// Returns true if agents should leave this replica for a fresher one.
    pub(crate) fn is_stale(&self) -> bool {
        self.elsewhere.stale.load(Ordering::Relaxed)
    }

    /// Returns true if another replica has processed everything up to the versions in `seen`.
    pub(crate) async fn is_fresher_elsewhere(&self, seen: &Source) -> bool {
        let replies = self.others.ask::<ReplicaState>(STATE, TIMEOUT).await;
        replies
            .iter()
            .filter_map(|reply| reply.answer.as_ref().ok())
            .any(|state| covers(&state.source(), seen))
    }

    /// Returns the nodes with a stream to this replica, now or before.
    pub(crate) fn observed_nodes(&self) -> Vec<ObservedNode> {
        let now = Instant::now();
        let names: Vec<Arc<str>> = {
            let nodes = lock(&self.nodes);
            let observed = nodes.nodes.iter().filter(|(_, node)| node.observation.is_some());
            observed.map(|(name, _)| name.clone()).collect()
        };
        let observed =
            |name: &Arc<str>| Some(ObservedNode::new(self.standing(name)?, &self.observation(name)?, now));
        names.iter().filter_map(observed).collect()
    }

    /// Returns true if the node has an open stream to this replica.
    pub(crate) fn is_connected(&self, node: &str) -> bool {
        self.signal(node).is_some()
    }

    /// Returns the names of the nodes with an open stream to this replica.
    pub(crate) fn connected_names(&self) -> Vec<String> {
        let nodes = lock(&self.nodes);
        let open =
            nodes.nodes.iter().filter(|(_, node)| node.signal.is_some() && node.subscription.is_some());
        open.map(|(name, _)| name.to_string()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_is_behind_if_any_resource_is() {
        let seen = Source { services: 5, endpoint_slices: 7, nodes: 3, service_cidrs: 1 };
        assert!(covers(&seen, &seen));
        assert!(covers(&Source { services: 9, ..seen }, &seen));
        assert!(covers(&seen, &Source::default()), "an agent without a view has seen nothing");
        for behind in [
            Source { services: 4, ..seen },
            Source { endpoint_slices: 6, ..seen },
            Source { nodes: 2, ..seen },
            Source { service_cidrs: 0, services: 100, ..seen },
        ] {
            assert!(!covers(&behind, &seen), "{behind:?}");
        }
    }

    /// During an update of the controller, replicas of two versions ask each other.
    #[test]
    fn state_of_other_versions_is_understood() {
        let mut state = serde_json::json!({
            "upstreamAgeMilliseconds": 5, "services": 1, "endpointSlices": 2, "nodes": 3, "serviceCidrs": 4,
            "connected": ["a"],
        });
        let earlier: ReplicaState = serde_json::from_value(state.clone()).unwrap();
        assert_eq!(earlier.source(), Source { services: 1, endpoint_slices: 2, nodes: 3, service_cidrs: 4 });
        assert_eq!(earlier.ages(), Ages { watches: Some(Duration::from_millis(5)), leases: None });
        state["leaseAgeMilliseconds"] = 7.into();
        state["aLaterField"] = "value".into();
        let later: ReplicaState = serde_json::from_value(state).unwrap();
        assert_eq!(later.ages().leases, Some(Duration::from_millis(7)));
    }

    #[test]
    fn agents_leave_only_for_a_much_fresher_replica() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let ages = |watches, leases| Ages { watches, leases };
        let watches = |own: Option<Duration>, others: &[Option<Duration>]| {
            let others: Vec<Ages> = others.iter().map(|age| ages(*age, seconds(1))).collect();
            is_stale(ages(own, seconds(1)), &others)
        };
        assert!(watches(seconds(12), &[seconds(2), seconds(40)]));
        assert!(!watches(seconds(11), &[seconds(2)]), "less than ten seconds better");
        assert!(!watches(seconds(600), &[seconds(595), seconds(601)]), "the API server is down");
        assert!(!watches(seconds(600), &[None]), "the other one has just started");
        assert!(!watches(seconds(600), &[]), "there is no other one");
        assert!(watches(None, &[seconds(1)]));
        let leases = |own, other| is_stale(ages(seconds(1), own), &[ages(seconds(1), other)]);
        assert!(leases(seconds(5), seconds(1)));
        assert!(!leases(seconds(4), seconds(1)));
        assert!(!leases(seconds(60), seconds(57)), "the API server is down");
        assert!(!leases(seconds(60), None), "the other one has an earlier version");
    }
}
