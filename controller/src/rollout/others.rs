//! Observations of nodes that other replicas serve.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::replicas::Client;
use crate::replicas::nodes::{ObservedNode, PATH};
use crate::status::Observation;

/// Timeout of a query. A round waits for it.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The latest answers of the other replicas.
pub(super) struct Others {
    client: Client,
    /// Per node, the observation of its latest stream.
    nodes: HashMap<Arc<str>, Observation>,
    /// Every present replica answered.
    complete: bool,
}

impl Others {
    pub(super) fn new(client: Client) -> Self {
        Self { client, nodes: HashMap::new(), complete: true }
    }

    /// Queries all other replicas.
    pub(super) async fn refresh(&mut self) {
        let replies = self.client.ask::<Vec<ObservedNode>>(PATH, TIMEOUT).await;
        let now = Instant::now();
        self.nodes.clear();
        self.complete = true;
        for reply in replies {
            match reply.answer {
                Ok(nodes) => nodes.iter().for_each(|node| self.add(node, now)),
                Err(error) => {
                    self.complete = false;
                    tracing::debug!(%error, "rollouts wait for the nodes of a replica");
                }
            }
        }
    }

    fn add(&mut self, node: &ObservedNode, now: Instant) {
        let name: Arc<str> = node.status.node.as_str().into();
        let later = self.nodes.get(&name).is_none_or(|known| known.session < node.session);
        if later {
            self.nodes.insert(name, node.observation(now));
        }
    }

    /// Returns the observations of nodes whose latest stream is not to this replica.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&Arc<str>, &Observation)> {
        self.nodes.iter()
    }

    /// Returns true if a node that no replica reports has no stream.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }
}
