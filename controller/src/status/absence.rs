//! Why an agent is not connected: what its Pod's status, the kubelet, or the agent itself says.
//!
//! [`pod`] reads a Pod (pure), [`follow`] watches the agents' Pods in the controller's own namespace, [`ask`]
//! asks agents that run and do not come. The rows take one [`Obstacle`] per node from here. What holds: a node
//! whose agent is connected costs nothing, and nothing here is needed to serve agents.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::sync::lock;

pub mod ask;
pub mod follow;
pub mod pod;

#[cfg(test)]
mod tests;

use ask::Answer;
use pod::{AgentPod, Stage};

/// Why a node's agent is not connected, as it stands in the node's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// One CamelCase word; the kubelet's own where it has one.
    pub reason: Cow<'static, str>,
    /// For people: what was seen, and where to look.
    pub message: String,
}

impl Obstacle {
    /// An obstacle with a reason of our own.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason: Cow::Borrowed(reason), message: message.into() }
    }
}

/// What is known of the agents' Pods, shared by the tasks that learn it and the rows that show it.
#[derive(Debug, Clone, Default)]
pub struct Agents(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    known: Mutex<Known>,
    changed: Notify,
    missing: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// All Pods are known.
    synced: bool,
    nodes: HashMap<Arc<str>, NodeAgents>,
    /// How many Pods there are on all nodes.
    pods: usize,
    /// Nodes to look at again.
    changed: BTreeSet<Arc<str>>,
    /// Nodes whose agent is not connected.
    missing: BTreeSet<Arc<str>>,
    /// The controller does not accept agents.
    closed: Option<Obstacle>,
}

/// The agents of one node; during an update there can be two.
#[derive(Debug, Default)]
struct NodeAgents {
    pods: BTreeMap<Arc<str>, AgentPod>,
    answer: Option<Answer>,
}

impl NodeAgents {
    /// The Pod that counts: one that stays before one that leaves, then the youngest.
    fn current(&self) -> Option<&AgentPod> {
        self.pods.values().max_by_key(|pod| (!matches!(pod.stage, Stage::Leaving), &pod.created))
    }
}

impl Agents {
    fn lock(&self) -> MutexGuard<'_, Known> {
        lock(&self.0.known)
    }

    /// A Pod came or changed.
    pub fn pod(&self, pod: AgentPod) {
        let mut known = self.lock();
        let node = pod.node.clone();
        let entry = known.nodes.entry(node.clone()).or_default();
        if entry.pods.get(&pod.name) == Some(&pod) {
            return;
        }
        let is_new = entry.pods.insert(pod.name.clone(), pod).is_none();
        known.pods += usize::from(is_new);
        known.changed.insert(node);
        drop(known);
        self.0.changed.notify_one();
    }

    /// A Pod is gone.
    pub fn pod_gone(&self, node: &str, name: &str) {
        let mut known = self.lock();
        let Some(entry) = known.nodes.get_mut(node) else { return };
        if entry.pods.remove(name).is_none() {
            return;
        }
        if entry.pods.is_empty() {
            known.nodes.remove(node);
        }
        known.pods = known.pods.saturating_sub(1);
        known.changed.insert(node.into());
        drop(known);
        self.0.changed.notify_one();
    }

    /// Every Pod of a complete list: others are gone.
    pub fn pods_listed(&self, pods: Vec<AgentPod>) {
        let listed: BTreeSet<_> = pods.iter().map(|pod| (pod.node.clone(), pod.name.clone())).collect();
        let left: Vec<_> = {
            let mut known = self.lock();
            if !std::mem::replace(&mut known.synced, true) {
                let missing = known.missing.clone();
                known.changed.extend(missing);
            }
            let all = known
                .nodes
                .iter()
                .flat_map(|(node, entry)| entry.pods.keys().map(move |name| (node.clone(), name.clone())));
            all.filter(|pod| !listed.contains(pod)).collect()
        };
        left.iter().for_each(|(node, name)| self.pod_gone(node, name));
        pods.into_iter().for_each(|pod| self.pod(pod));
        self.0.changed.notify_one();
    }

    /// The controller does not accept agents, or does again (`None`).
    pub fn closed(&self, obstacle: Option<Obstacle>) {
        let mut known = self.lock();
        if known.closed == obstacle {
            return;
        }
        known.closed = obstacle;
        let missing = known.missing.clone();
        known.changed.extend(missing);
        drop(known);
        self.0.changed.notify_one();
    }

    /// The controller does not accept agents.
    #[must_use]
    pub fn are_kept_out(&self) -> bool {
        self.lock().closed.is_some()
    }

    /// Whether a node's agent is not connected. What it answered before it connected is forgotten.
    pub fn set_missing(&self, node: &Arc<str>, missing: bool) {
        let mut known = self.lock();
        if missing {
            if known.missing.insert(node.clone()) {
                drop(known);
                self.0.missing.notify_one();
            }
        } else if known.missing.remove(node)
            && let Some(entry) = known.nodes.get_mut(node)
        {
            entry.answer = None;
        }
    }

    /// What keeps a node's agent from being connected. `kubelet`: why the Node is not heard of, if it is not.
    #[must_use]
    pub fn obstacle(&self, node: &str, kubelet: Option<&str>) -> Option<Obstacle> {
        let known = self.lock();
        if known.closed.is_some() {
            return known.closed.clone();
        }
        if let Some(message) = kubelet {
            let message = format!("The node's kubelet does not report: {message}");
            return Some(Obstacle::new("NodeStatusUnknown", message));
        }
        let Some((pod, answer)) =
            known.nodes.get(node).and_then(|entry| Some((entry.current()?, entry.answer.as_ref())))
        else {
            // Where agents are no Pods at all, a missing Pod explains nothing.
            return (known.synced && known.pods > 0).then(|| {
                Obstacle::new(
                    "NoAgentPod",
                    "The node agent has no Pod on this node; do the DaemonSet's nodeSelector and tolerations match it?",
                )
            });
        };
        match &pod.stage {
            Stage::Pending | Stage::Leaving => None,
            Stage::Obstructed(obstacle) => Some(obstacle.clone()),
            Stage::Running { last_words, .. } => match answer {
                Some(answer) => answer.obstacle(&pod.name, last_words.as_deref()),
                None => last_words.as_ref().map(|words| {
                    Obstacle::new("AgentRestarted", format!("Pod {} was restarted: {words}", pod.name))
                }),
            },
        }
    }

    /// Waits until something changed, and names the nodes. May be dropped and called again at any time.
    pub async fn changed(&self) -> Vec<Arc<str>> {
        loop {
            let changed = std::mem::take(&mut self.lock().changed);
            if !changed.is_empty() {
                return changed.into_iter().collect();
            }
            self.0.changed.notified().await;
        }
    }

    /// Waits until an agent is missing; returns those that run all the same, and where they answer.
    pub async fn to_ask(&self) -> Vec<(Arc<str>, SocketAddr)> {
        loop {
            {
                let known = self.lock();
                if !known.missing.is_empty() {
                    return known
                        .missing
                        .iter()
                        .filter_map(|node| Some((node.clone(), known.address(node)?)))
                        .collect();
                }
            }
            self.0.missing.notified().await;
        }
    }

    /// A missing agent answered, or did not.
    pub fn answered(&self, node: &Arc<str>, answer: Answer) {
        let mut known = self.lock();
        if !known.missing.contains(node) {
            return;
        }
        let Some(entry) = known.nodes.get_mut(node) else { return };
        if entry.answer.as_ref() == Some(&answer) {
            return;
        }
        entry.answer = Some(answer);
        known.changed.insert(node.clone());
        drop(known);
        self.0.changed.notify_one();
    }
}

impl Known {
    fn address(&self, node: &str) -> Option<SocketAddr> {
        match &self.nodes.get(node)?.current()?.stage {
            Stage::Running { address, .. } => *address,
            _ => None,
        }
    }
}
