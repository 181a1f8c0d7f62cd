//! Publishes one `ProxyStatus` per Node: the desired and the applied state, for `kubectl`.
//!
//! [`absence`] explains why an agent is absent, [`row`] computes a row, `ownership` decides which replica writes it,
//! `schedule` limits the writes, and `writer` performs them.
//!
//! Invariants: every matching Node has a row, with or without an agent. Rows never delay the serving of agents. Every write
//! carries the version of the row that it is based on. One replica writes a status: the one that serves the node, otherwise
//! the leader, which alone creates, assigns and deletes rows.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, RwLock};

use prometheus::{
    IntCounterVec, IntGaugeVec, register_int_counter_vec_with_registry, register_int_gauge_vec_with_registry,
};
use switchtower_admin_api::NodeState;
use switchtower_crds::ProxyStatusStatus;

use crate::ingest::NodeIdentity;
use crate::sync::{read, write};

pub mod absence;
mod assignments;
pub mod backlog;
mod condition;
mod local_detection;
pub mod observation;
mod ownership;
mod requests;
pub mod row;
mod schedule;
mod writer;

pub use assignments::{Assignments, StoredAssignment};
pub use observation::Observation;
pub use writer::{Writer, WriterClients, WriterSettings};

/// Significance of a change of an observation for the node's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// Figures changed that the row shows when it is next written.
    Progress,
    /// A condition may have changed: the row is compared now.
    Transition,
}

/// Interface of the writer to the registry of streams.
pub trait Registry: Send + Sync + 'static {
    /// Returns the latest observation of a node's agent; `None` if no agent connected since this process started. Marks
    /// earlier changes as read.
    fn observe(&self, node: &str) -> Option<Observation>;

    /// Ends the node's open stream: the agent has a later one to another replica.
    fn supersede(&self, node: &str);

    /// Forgets the node's last stream, which ended before its agent connected to another replica.
    fn moved(&self, node: &str);

    /// Sends the node's agent the `releaseHeldBefore` of its row, if it changed.
    fn release_held(&self, node: &str, before: u64);

    /// Returns true once agents had enough time to reconnect, so that a missing agent counts as absent.
    fn settled(&self) -> bool;

    /// Waits for changes and returns them. Progress of a node is reported once until the node is observed. Cancel-safe.
    fn changed(&self) -> impl Future<Output = Vec<(Arc<str>, News)>> + Send;
}

/// A change of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEvent {
    /// The Node exists and matches the selector.
    Applied(NodeIdentity),
    /// The Node was deleted or no longer matches the selector.
    Gone(Arc<str>),
    /// The initial list of Nodes is complete: other rows are left over.
    Synced,
}

/// High-water marks of a node, read from its row. A new session continues above the first two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Floor {
    /// The highest generation that was ever desired, sent or applied.
    pub generation: u64,
    /// The number of the last session.
    pub session: u64,
    /// `spec.releaseHeldBefore`; 0: absent.
    pub release_held_before: u64,
}

/// High-water marks of all nodes, shared with the sessions.
#[derive(Debug, Clone, Default)]
pub struct Floors(Arc<RwLock<HashMap<Arc<str>, Floor>>>);

impl Floors {
    /// Returns the high-water mark of one node; zero if it has no row.
    #[must_use]
    pub fn get(&self, node: &str) -> Floor {
        read(&self.0).get(node).copied().unwrap_or_default()
    }

    pub(crate) fn set(&self, node: &Arc<str>, release_held_before: u64, status: Option<&ProxyStatusStatus>) {
        let mut floors = write(&self.0);
        let floor = floors.entry(node.clone()).or_default();
        floor.release_held_before = release_held_before;
        let Some(status) = status else { return };
        let generations = &status.generation;
        let highest = generations.desired.max(generations.sent).max(generations.applied);
        floor.generation = u64::try_from(highest).unwrap_or(0);
        let session = status.connection.as_ref().map_or(0, |known| u64::try_from(known.session).unwrap_or(0));
        floor.session = if session > ownership::SESSION_LIMIT { 0 } else { session };
    }

    pub(crate) fn remove(&self, node: &str) {
        write(&self.0).remove(node);
    }
}

/// Metrics of the rows.
#[derive(Debug, Clone)]
pub struct StatusMetrics {
    nodes: IntGaugeVec,
    writes: IntCounterVec,
}

impl StatusMetrics {
    /// Creates and registers the metrics.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let nodes = register_int_gauge_vec_with_registry!(
            "switchtower_nodes",
            "Nodes by the STATE of their row.",
            &["state"],
            registry
        )?;
        let writes = register_int_counter_vec_with_registry!(
            "switchtower_status_writes_total",
            "Requests that write rows, by outcome.",
            &["outcome"],
            registry
        )?;
        for outcome in requests::OUTCOMES {
            writes.with_label_values(&[outcome]);
        }
        for state in NodeState::ALL {
            nodes.with_label_values(&[state.as_str()]).set(0);
        }
        Ok(Self { nodes, writes })
    }

    fn moved(&self, from: Option<NodeState>, to: Option<NodeState>) {
        if let Some(state) = from {
            self.nodes.with_label_values(&[state.as_str()]).dec();
        }
        if let Some(state) = to {
            self.nodes.with_label_values(&[state.as_str()]).inc();
        }
    }

    fn written(&self, outcome: &str) {
        self.writes.with_label_values(&[outcome]).inc();
    }
}
