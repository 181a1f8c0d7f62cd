//! Read-only queries of explanations and barriers. No lock is held for longer than one node takes, except in
//! [`Fleet::reach`].

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use switchtower_admin_api::ChangeReport;
use switchtower_admin_api::NodeStatus;
use switchtower_core::layer::{Layers, Subscription};
use switchtower_core::model::ObjectKey;
use switchtower_core::view::View;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::Source;

use super::Fleet;
use crate::status::Observation;
use crate::sync::lock;

/// Progress of a revision.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Reach {
    /// Number of connected nodes whose kernel holds it.
    pub reached: usize,
    /// Connected nodes whose kernel does not.
    pub waiting: Vec<Arc<str>>,
    /// Nodes without a stream.
    pub excluded: Vec<Arc<str>>,
}

impl Fleet {
    /// Returns the names of all served nodes, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<Arc<str>> {
        let nodes = lock(&self.nodes);
        let served = nodes.nodes.iter().filter(|(_, node)| node.subscription.is_some());
        let mut names: Vec<Arc<str>> = served.map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Returns the number of served nodes, and of those with a stream.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let nodes = lock(&self.nodes);
        let served = || nodes.nodes.values().filter(|node| node.subscription.is_some());
        (served().count(), served().filter(|node| node.signal.is_some()).count())
    }

    /// Returns the nodes that are behind, each with the time since when.
    #[must_use]
    pub fn behind(&self) -> Vec<(Timestamp, Arc<str>)> {
        let nodes = lock(&self.nodes);
        let served = nodes.nodes.iter().filter(|(_, node)| node.subscription.is_some());
        let since = |node: &super::Node| {
            let known = node.observation.as_ref()?;
            // Without a stream no session records that changes are pending.
            let pending = || match (&node.subscription, &node.cursor) {
                (Some(subscription), Some(cursor)) => {
                    self.read(|layers| layers.pending(subscription, cursor))
                }
                _ => 0,
            };
            known.behind_since.or_else(|| known.lost_since.filter(|_| pending() > 0))
        };
        served.filter_map(|(name, node)| Some((since(node)?, name.clone()))).collect()
    }

    /// Returns the last observation of a node's agent.
    #[must_use]
    pub fn observation(&self, node: &str) -> Option<Observation> {
        lock(&self.nodes).nodes.get(node)?.observation.clone()
    }

    /// Returns the progress of a node, or `None` if it is not served.
    #[must_use]
    pub fn standing(&self, node: &str) -> Option<NodeStatus> {
        let nodes = lock(&self.nodes);
        let entry = nodes.nodes.get(node).filter(|entry| entry.subscription.is_some())?;
        let known = self.observed(&nodes, node);
        let known = known.as_ref();
        let failure = known.and_then(|known| known.failure.as_ref());
        Some(NodeStatus {
            node: node.to_owned(),
            connected: entry.signal.is_some(),
            desired: known.map_or(0, |known| known.desired),
            applied: known.map_or(0, |known| known.applied),
            failure: failure.map(|failure| format!("{}: {}", failure.reason.as_str(), failure.detail)),
        })
    }

    /// Returns the subscription of a node, or `None` if it is not served.
    #[must_use]
    pub fn subscribed(&self, node: &str) -> Option<Subscription> {
        self.subscription(node)
    }

    /// Returns a node's view, complete or of one Service (namespace, name), and the digest of the complete view.
    #[must_use]
    pub fn view(&self, node: &str, service: Option<(&str, &str)>) -> Option<(View, Digest)> {
        let subscription = self.subscription(node)?;
        let addresses = self.observation(node).map(|known| known.addresses).unwrap_or_default();
        let (mut view, digest) =
            self.read(|layers| (layers.view(&subscription, service), layers.head(&subscription).digest()));
        view.set_host_addresses(addresses);
        Some((view, digest))
    }

    /// Returns the digest of a node's current view.
    #[must_use]
    pub fn desired_digest(&self, node: &str) -> Option<Digest> {
        let subscription = self.subscription(node)?;
        Some(self.read(|layers| layers.head(&subscription)).digest())
    }

    /// Returns the processed version of each resource, and the revision that includes them.
    #[must_use]
    pub fn processed(&self) -> (Source, u64) {
        // The versions first: the revision then includes them.
        let processed = *lock(&self.processed);
        (processed, self.revision())
    }

    /// Returns the propagation of the latest changes of a Service, newest first.
    #[must_use]
    pub fn changes(&self, limit: usize, namespace: &str, name: &str) -> Vec<ChangeReport> {
        let of = |key: &ObjectKey| (&*key.namespace, &*key.name) == (namespace, name);
        self.propagation.changes(limit, |change| change.service.as_ref().is_some_and(of))
    }

    /// Returns the identifier of this process. Revisions are only valid within one process.
    #[must_use]
    pub fn instance_name(&self) -> String {
        self.instance.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Progress of a revision. A node has reached it if nothing is pending for it, even if the revision did not
    /// change its view.
    #[must_use]
    pub fn reach(&self, revision: u64) -> Reach {
        let mut reach = Reach::default();
        let nodes = lock(&self.nodes);
        let pending = |layers: &Layers, node: &super::Node| match (&node.subscription, &node.cursor) {
            (Some(subscription), Some(cursor)) => {
                cursor.revision() < revision && layers.pending(subscription, cursor) > 0
            }
            _ => true,
        };
        self.read(|layers| {
            for (name, node) in nodes.nodes.iter().filter(|(_, node)| node.subscription.is_some()) {
                if node.signal.is_none() {
                    reach.excluded.push(name.clone());
                } else if pending(layers, node) {
                    reach.waiting.push(name.clone());
                } else {
                    reach.reached += 1;
                }
            }
        });
        reach.waiting.sort_unstable();
        reach.excluded.sort_unstable();
        reach
    }
}
