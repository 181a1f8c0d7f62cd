//! What explanations and barriers ask of the fleet. Nothing here changes anything, and no lock is held for longer
//! than one node's share.

use std::sync::Arc;

use switchtower_admin_api::ChangeReport;
use switchtower_admin_api::NodeStatus;
use switchtower_core::layer::{Layers, Subscription};
use switchtower_core::model::ObjectKey;
use switchtower_core::view::View;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::Source;

use super::{Fleet, lock};
use crate::status::Observation;

/// How far a revision has got.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Reach {
    /// Connected nodes whose kernel holds it.
    pub reached: usize,
    /// Connected nodes whose kernel does not.
    pub waiting: Vec<Arc<str>>,
    /// Nodes without a stream.
    pub excluded: Vec<Arc<str>>,
}

impl Fleet {
    /// Names of all served nodes, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<Arc<str>> {
        let nodes = lock(&self.nodes);
        let served = nodes.nodes.iter().filter(|(_, node)| node.subscription.is_some());
        let mut names: Vec<Arc<str>> = served.map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// How many nodes are served, and how many of them have a stream.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let nodes = lock(&self.nodes);
        let served = || nodes.nodes.values().filter(|node| node.subscription.is_some());
        (served().count(), served().filter(|node| node.signal.is_some()).count())
    }

    /// What is known of a node's agent.
    #[must_use]
    pub fn observation(&self, node: &str) -> Option<Observation> {
        lock(&self.nodes).nodes.get(node)?.observation.clone()
    }

    /// Where a node stands; `None`: it is not served.
    #[must_use]
    pub fn standing(&self, node: &str) -> Option<NodeStatus> {
        let nodes = lock(&self.nodes);
        let entry = nodes.nodes.get(node).filter(|entry| entry.subscription.is_some())?;
        let known = entry.observation.as_ref();
        let failure = known.and_then(|known| known.failure.as_ref());
        Some(NodeStatus {
            node: node.to_owned(),
            connected: entry.signal.is_some(),
            desired: known.map_or(0, |known| known.desired),
            applied: known.map_or(0, |known| known.applied),
            failure: failure.map(|failure| format!("{}: {}", failure.reason, failure.detail)),
        })
    }

    /// What a node is sent; `None`: it is not served.
    #[must_use]
    pub fn subscribed(&self, node: &str) -> Option<Subscription> {
        self.subscription(node)
    }

    /// A node's view, of one Service (namespace, name) or whole, with the digest of the whole.
    #[must_use]
    pub fn view(&self, node: &str, service: Option<(&str, &str)>) -> Option<(View, Digest)> {
        let subscription = self.subscription(node)?;
        let addresses = self.observation(node).map(|known| known.addresses).unwrap_or_default();
        let (mut view, digest) =
            self.read(|layers| (layers.view(&subscription, service), layers.head(&subscription).digest()));
        view.set_host_addresses(addresses);
        Some((view, digest))
    }

    /// The digest of what a node should hold now.
    #[must_use]
    pub fn desired_digest(&self, node: &str) -> Option<Digest> {
        let subscription = self.subscription(node)?;
        Some(self.read(|layers| layers.head(&subscription)).digest())
    }

    /// Up to where each resource is processed, and the revision that has it all.
    #[must_use]
    pub fn processed(&self) -> (Source, u64) {
        self.read(|layers| (layers.source(), layers.revision()))
    }

    /// The latest changes of a Service and what became of them, the latest first.
    #[must_use]
    pub fn changes(&self, limit: usize, namespace: &str, name: &str) -> Vec<ChangeReport> {
        let of = |key: &ObjectKey| (&*key.namespace, &*key.name) == (namespace, name);
        self.propagation.changes(limit, |change| change.service.as_ref().is_some_and(of))
    }

    /// This process: revisions mean nothing to another.
    #[must_use]
    pub fn instance_name(&self) -> String {
        self.instance.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// How far a revision has got. A node that nothing is pending for has it, whether or not it was touched.
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
