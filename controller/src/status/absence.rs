//! Finds the blocker of an absent agent in the status of its Pod, the status of its Node, or the agent's health port.
//!
//! [`pod`] reads a Pod (pure), [`follow`] watches the agents' Pods in the controller's namespace, and [`ask`] queries
//! agents that run and do not connect. Each row takes one [`Blocker`] from here.
//!
//! Invariants: a node with a connected agent costs nothing. Serving agents does not depend on this module.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use switchtower_admin_api::NodeReason;
use tokio::sync::Notify;

use crate::sync::lock;

pub mod ask;
pub mod follow;
pub mod pod;

#[cfg(test)]
mod tests;

use ask::Answer;
use pod::{AgentPod, Stage};

/// The reason why a node's agent is absent, as shown in the node's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// CamelCase reason; that of the kubelet if it has one.
    pub reason: Cow<'static, str>,
    /// Observation and the place to look for details.
    pub message: String,
}

impl Blocker {
    /// Creates a blocker with a reason of this controller.
    pub fn new(reason: NodeReason, message: impl Into<String>) -> Self {
        Self { reason: Cow::Borrowed(reason.as_str()), message: message.into() }
    }
}

/// Known Pods and answers of agents. Clones share them.
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
    /// The initial list of Pods is complete.
    synced: bool,
    nodes: HashMap<Arc<str>, NodeAgents>,
    /// Number of Pods on all nodes.
    pods: usize,
    /// Nodes whose rows must be computed again.
    changed: BTreeSet<Arc<str>>,
    /// Nodes whose agent is not connected.
    missing: BTreeSet<Arc<str>>,
    /// Reason why the controller rejects all agents.
    closed: Option<Blocker>,
}

/// The agents of one node; there can be two during an update.
#[derive(Debug, Default)]
struct NodeAgents {
    pods: BTreeMap<Arc<str>, AgentPod>,
    answer: Option<Answer>,
}

impl NodeAgents {
    /// Returns the relevant Pod: the newest one, preferring Pods that are not being deleted.
    fn current(&self) -> Option<&AgentPod> {
        self.pods.values().max_by_key(|pod| (!matches!(pod.stage, Stage::Leaving), &pod.created))
    }
}

impl Agents {
    fn lock(&self) -> MutexGuard<'_, Known> {
        lock(&self.0.known)
    }

    /// Records a new or changed Pod.
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

    /// Removes a Pod.
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

    /// Replaces all Pods by a complete list.
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

    /// Records why the controller rejects all agents; `None` if it accepts them.
    pub fn closed(&self, blocker: Option<Blocker>) {
        let mut known = self.lock();
        if known.closed == blocker {
            return;
        }
        known.closed = blocker;
        let missing = known.missing.clone();
        known.changed.extend(missing);
        drop(known);
        self.0.changed.notify_one();
    }

    /// Returns true if the controller rejects all agents.
    #[must_use]
    pub fn are_rejected(&self) -> bool {
        self.lock().closed.is_some()
    }

    /// Records whether a node's agent is disconnected. Drops the answer of an agent that connected.
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

    /// Returns the blocker of a node's agent. `kubelet` is the message of a Node whose kubelet does not report.
    #[must_use]
    pub fn blocker(&self, node: &str, kubelet: Option<&str>) -> Option<Blocker> {
        let known = self.lock();
        if known.closed.is_some() {
            return known.closed.clone();
        }
        if let Some(message) = kubelet {
            let message = format!("The node's kubelet does not report: {message}");
            return Some(Blocker::new(NodeReason::NodeStatusUnknown, message));
        }
        let Some((pod, answer)) =
            known.nodes.get(node).and_then(|entry| Some((entry.current()?, entry.answer.as_ref())))
        else {
            // If agents do not run as Pods, a missing Pod explains nothing.
            return (known.synced && known.pods > 0).then(|| {
                Blocker::new(
                    NodeReason::NoAgentPod,
                    "The node agent has no Pod on this node. Check that the DaemonSet's nodeSelector and tolerations \
                     match the node.",
                )
            });
        };
        match &pod.stage {
            Stage::Pending | Stage::Leaving => None,
            Stage::Blocked(blocker) => Some(blocker.clone()),
            Stage::Running { last_exit, .. } => match answer {
                Some(answer) => answer.blocker(&pod.name, last_exit.as_deref()),
                None => last_exit.as_ref().map(|exit| {
                    Blocker::new(
                        NodeReason::AgentRestarted,
                        format!("Pod {} was restarted: {exit}", pod.name),
                    )
                }),
            },
        }
    }

    /// Waits for changes and returns the nodes. Cancel-safe.
    pub async fn changed(&self) -> Vec<Arc<str>> {
        loop {
            let changed = std::mem::take(&mut self.lock().changed);
            if !changed.is_empty() {
                return changed.into_iter().collect();
            }
            self.0.changed.notified().await;
        }
    }

    /// Waits for missing agents and returns the addresses of those that run.
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

    /// Records the answer of a missing agent.
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
