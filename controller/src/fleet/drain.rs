//! The drain gate of the fleet ([`switchtower_core::drain`]): feeds it with publications and acknowledgements, and waits
//! for its answers.
//!
//! Invariants: without settings that have a drain gate and without a query, only host-network endpoints are recorded. The
//! gate's lock is taken after that of the nodes, before that of the layers, and never across an await.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use switchtower_core::compiled::PodIdentity;
use switchtower_core::drain::host_pods::{HostPodChange, HostPods};
use switchtower_core::drain::{Answer, Answers, Gate, Moves, Names, QueryId, Target, Verdict};
use switchtower_core::layer::Layers;
use switchtower_core::model::PodId;
use switchtower_proto::v1::DrainVerdict;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Fleet, Nodes};
use crate::sync::lock;

mod everywhere;
mod reports;

pub(crate) use everywhere::{LOCAL, LocalQuery};

/// Maximum timeout of a query.
pub const TIMEOUT_LIMIT: Duration = Duration::from_secs(600);

/// Outcome of a query with its duration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drained {
    /// The gate's answer.
    pub answer: Answer,
    /// The address is in a pool only because the Service has no ready endpoint; a terminating endpoint is left.
    pub last_endpoint: bool,
    /// Time from the query to the answer.
    pub took: Duration,
}

impl Drained {
    /// Returns the verdict as reported to the agent.
    #[must_use]
    pub fn verdict(&self) -> DrainVerdict {
        match self.answer.verdict {
            Verdict::Drained => DrainVerdict::Drained,
            Verdict::StillMember if self.last_endpoint => DrainVerdict::LastEndpoint,
            Verdict::StillMember | Verdict::NotAcknowledged => DrainVerdict::TimedOut,
            Verdict::NotAnEndpoint => DrainVerdict::NotAnEndpoint,
            Verdict::Overloaded => DrainVerdict::Overloaded,
        }
    }

    /// Returns the name of the verdict in the metric and in JSON.
    #[must_use]
    pub fn verdict_name(&self) -> &'static str {
        match self.verdict() {
            DrainVerdict::Drained => "Drained",
            DrainVerdict::LastEndpoint => "LastEndpoint",
            DrainVerdict::TimedOut | DrainVerdict::Unspecified => "TimedOut",
            DrainVerdict::NotAnEndpoint => "NotAnEndpoint",
            DrainVerdict::Overloaded => "Overloaded",
        }
    }
}

#[derive(Debug)]
struct Open {
    gate: Gate,
    replies: HashMap<QueryId, oneshot::Sender<Answer>>,
    /// A task waits for the next node whose grace period ends.
    timed: bool,
}

impl Open {
    fn reply(&mut self, answers: Answers) {
        for (id, answer) in answers {
            if let Some(reply) = self.replies.remove(&id) {
                // The caller may have given up.
                let _ = reply.send(answer);
            }
        }
    }
}

/// The gate, once it is used.
#[derive(Debug)]
pub(super) struct Drains {
    started: Instant,
    open: Mutex<Option<Open>>,
    host_pods: Mutex<HostPods>,
}

impl Default for Drains {
    fn default() -> Self {
        Self { started: Instant::now(), open: Mutex::default(), host_pods: Mutex::default() }
    }
}

impl Drains {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Applies a change to the gate if it is used, and sends the answers.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut Gate, Duration) -> Answers) {
        let mut guard = lock(&self.open);
        let Some(open) = guard.as_mut() else { return };
        let answers = change(&mut open.gate, self.now());
        open.reply(answers);
        if !open.timed
            && open.gate.next_expiry().is_some()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            open.timed = true;
            runtime.spawn(Self::expire(self.clone()));
        }
    }

    /// Ends the grace periods of nodes, until none is left.
    async fn expire(self: Arc<Self>) {
        loop {
            let next = {
                let mut guard = lock(&self.open);
                let Some(open) = guard.as_mut() else { return };
                let answers = open.gate.expire(self.now());
                open.reply(answers);
                let Some(next) = open.gate.next_expiry() else {
                    open.timed = false;
                    return;
                };
                next
            };
            tokio::time::sleep_until(self.started + next).await;
        }
    }

    pub(super) fn published(self: &Arc<Self>, revision: u64, moves: &Moves, woken: &[Arc<str>]) {
        self.change(|gate, _| gate.published(revision, moves, woken));
    }

    pub(super) fn opened(self: &Arc<Self>, node: &Arc<str>, session: u64) {
        self.change(|gate, now| {
            gate.opened(node, session, now);
            Answers::new()
        });
    }

    pub(super) fn closed(self: &Arc<Self>, node: &Arc<str>, session: u64) {
        self.change(|gate, now| {
            gate.closed(node, session, now);
            Answers::new()
        });
    }

    pub(super) fn expect<'a>(self: &Arc<Self>, nodes: impl Iterator<Item = &'a Arc<str>>) {
        self.change(|gate, now| {
            nodes.for_each(|node| gate.expect(node, now));
            Answers::new()
        });
    }

    pub(super) fn removed(self: &Arc<Self>, node: &Arc<str>) {
        self.change(|gate, _| gate.removed(node));
    }

    pub(super) fn elsewhere(self: &Arc<Self>, nodes: &HashSet<Arc<str>>) {
        self.change(|gate, _| gate.elsewhere(nodes));
    }

    pub(super) fn restart(self: &Arc<Self>) {
        self.change(|gate, now| {
            gate.restart(now);
            Answers::new()
        });
    }
}

/// Withdraws a query whose caller is dropped.
struct Withdraw<'a> {
    drains: &'a Drains,
    id: QueryId,
}

impl Withdraw<'_> {
    /// Returns the state of the query as its answer, unless it has been answered.
    fn give_up(&self) -> Option<Answer> {
        let mut guard = lock(&self.drains.open);
        let open = guard.as_mut()?;
        open.replies.remove(&self.id);
        open.gate.give_up(self.id)
    }
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Fleet {
    /// Records endpoints of host-network pods that appeared or disappeared.
    pub fn host_pods_changed(&self, changes: &[HostPodChange]) {
        let mut host_pods = lock(&self.drains.host_pods);
        changes.iter().for_each(|change| host_pods.change(change));
    }

    /// Waits until no node that this replica serves sends new connections to the pod, at most for `timeout`. `node`: the node of the pod; a node has
    /// no host-network pods of others.
    pub async fn drain(&self, node: Option<&str>, pod: &PodIdentity, timeout: Duration) -> Drained {
        let asked = Instant::now();
        let target = match pod {
            PodIdentity::Address(address) => Target::Address(*address),
            PodIdentity::HostNetwork(name) => {
                let pod = PodId::of(&name.namespace, &name.name);
                let host_pods = lock(&self.drains.host_pods);
                Target::Sockets(node.map_or_else(Vec::new, |node| host_pods.sockets(pod, node)))
            }
        };
        let answer = self.wait_for_drain(target, asked + timeout.min(TIMEOUT_LIMIT)).await;
        let last_endpoint = answer.verdict == Verdict::StillMember && !self.is_ready(node, pod);
        Drained { answer, last_endpoint, took: asked.elapsed() }
    }

    async fn wait_for_drain(&self, target: Target, deadline: Instant) -> Answer {
        let asked = self.with_drain_gate(&lock(&self.nodes), |open, now| {
            let id = match open.gate.ask(target, now) {
                Ok(answer) => return Err(answer),
                Err(id) => id,
            };
            let (reply, answered) = oneshot::channel();
            open.replies.insert(id, reply);
            Ok((id, answered))
        });
        let (id, mut answered) = match asked {
            Ok(asked) => asked,
            Err(answer) => return answer,
        };
        let query = Withdraw { drains: &self.drains, id };
        if let Ok(Ok(answer)) = tokio::time::timeout_at(deadline, &mut answered).await {
            return answer;
        }
        // The answer may have been sent at the last moment.
        let late = || answered.try_recv().ok();
        query.give_up().or_else(late).unwrap_or(Answer {
            verdict: Verdict::Overloaded,
            waited_for: Names::default(),
            missing: Names::default(),
            removal: None,
        })
    }

    fn is_ready(&self, node: Option<&str>, pod: &PodIdentity) -> bool {
        let address = match pod {
            PodIdentity::Address(address) => *address,
            PodIdentity::HostNetwork(name) => {
                let pod = PodId::of(&name.namespace, &name.name);
                return node.is_some_and(|node| lock(&self.drains.host_pods).is_ready(pod, node));
            }
        };
        let nodes = lock(&self.nodes);
        match node {
            Some(node) => nodes.localities.is_ready(node, address),
            None => nodes.nodes.keys().any(|node| nodes.localities.is_ready(node, address)),
        }
    }

    /// Starts to record pools and acknowledgements if some settings have a drain gate. Stops if none have and no query
    /// waits.
    pub(super) fn follow_drain_gate(&self, nodes: &Nodes) {
        if nodes.settings.values().any(|settings| settings.drain_gate_port != 0) {
            self.with_drain_gate(nodes, |_, _| ());
            return;
        }
        let mut guard = lock(&self.drains.open);
        if guard.as_ref().is_some_and(|open| open.gate.waiting() == 0) {
            *guard = None;
            self.write(Layers::untrack);
        }
    }

    /// Calls `work` with the gate, which starts to record if it does not yet.
    fn with_drain_gate<T>(&self, nodes: &Nodes, work: impl FnOnce(&mut Open, Duration) -> T) -> T {
        let now = self.drains.now();
        let mut guard = lock(&self.drains.open);
        let result = work(guard.get_or_insert_with(|| self.new_drain_gate(nodes, now)), now);
        drop(guard);
        // Grace periods may have begun.
        self.drains.change(|_, _| Answers::new());
        result
    }

    /// Returns a gate that waits for every node to confirm what it holds.
    fn new_drain_gate(&self, nodes: &Nodes, now: Duration) -> Open {
        // Nothing is published while the nodes are locked.
        let (moves, revision) = self.write(|layers| (layers.track(), layers.revision()));
        let mut gate = Gate::new(moves, revision, now);
        for (name, node) in &nodes.nodes {
            if node.subscription.is_some() {
                gate.expect(name, now);
            }
            if let (Some(signal), Some(known)) = (&node.signal, &node.observation) {
                gate.opened(name, known.session, now);
                signal.changed();
            }
        }
        // There are no queries yet that could be answered.
        gate.elsewhere(&self.connected_elsewhere());
        Open { gate, replies: HashMap::new(), timed: false }
    }

    /// Records that a node's kernel holds a revision of the layers.
    pub(crate) fn holds(&self, node: &Arc<str>, session: u64, revision: u64) {
        self.drains.change(|gate, _| gate.held(node, session, revision));
    }
}

#[cfg(test)]
mod tests;
