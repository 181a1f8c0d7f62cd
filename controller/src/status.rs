//! One `ProxyStatus` per Node: what the node should hold and what its kernel holds, for `kubectl`.
//!
//! `row` says what a row should be, `schedule` when it may be written, `writer` writes it. What holds:
//! every matching Node has a row, also without an agent; rows never hold up the serving of agents; a row
//! that another replica took over is left to it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, RwLock};

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry as Metrics};
use switchtower_crds::{NodeState, ProxyStatusStatus};

use crate::ingest::NodeIdentity;
use crate::sync::{read, write};

pub mod absence;
mod assignments;
pub mod backlog;
mod local_detection;
pub mod observation;
mod requests;
pub mod row;
mod schedule;
mod writer;

pub use assignments::{Assignments, StoredAssignment};
pub use observation::Observation;
pub use writer::{Writer, WriterSettings};

/// What the writer needs of the registry of streams.
pub trait Registry: Send + Sync + 'static {
    /// What is known of a node's agent; `None` if none came since this process started.
    fn observe(&self, node: &str) -> Option<Observation>;

    /// Agents have had the time to come back: a missing one is news.
    fn settled(&self) -> bool;

    /// Waits until something changed, and names the nodes. May be dropped and called again at any time.
    fn changed(&self) -> impl Future<Output = Vec<Arc<str>>> + Send;
}

/// A Node came, changed its identity, or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEvent {
    /// The Node exists and matches the selector.
    Applied(NodeIdentity),
    /// It does not any more.
    Gone(Arc<str>),
    /// All Nodes are known: rows of others are left over.
    Synced,
}

/// Where a new session of a node starts from, as its row says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Floor {
    /// The highest generation that was ever desired, sent or applied.
    pub generation: u64,
    /// The number of its last session.
    pub session: u64,
}

/// Floors of all nodes, shared with the sessions.
#[derive(Debug, Clone, Default)]
pub struct Floors(Arc<RwLock<HashMap<Arc<str>, Floor>>>);

impl Floors {
    /// The floor of one node; zero if it has no row.
    #[must_use]
    pub fn get(&self, node: &str) -> Floor {
        read(&self.0).get(node).copied().unwrap_or_default()
    }

    pub(crate) fn set(&self, node: &Arc<str>, status: Option<&ProxyStatusStatus>) {
        let Some(status) = status else { return };
        let generations = &status.generation;
        let highest = generations.desired.max(generations.sent).max(generations.applied);
        let floor = Floor {
            generation: u64::try_from(highest).unwrap_or(0),
            session: status.connection.as_ref().map_or(0, |known| u64::try_from(known.session).unwrap_or(0)),
        };
        write(&self.0).insert(node.clone(), floor);
    }

    pub(crate) fn remove(&self, node: &str) {
        write(&self.0).remove(node);
    }
}

/// Counters of the rows.
#[derive(Debug, Clone)]
pub struct StatusMetrics {
    nodes: IntGaugeVec,
    writes: IntCounterVec,
}

impl StatusMetrics {
    /// Creates and registers them.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &Metrics) -> Result<Self, prometheus::Error> {
        let nodes =
            IntGaugeVec::new(Opts::new("switchtower_nodes", "Nodes by the STATE of their row."), &["state"])?;
        let writes = IntCounterVec::new(
            Opts::new("switchtower_status_writes_total", "Requests that write rows, by outcome."),
            &["outcome"],
        )?;
        registry.register(Box::new(nodes.clone()))?;
        registry.register(Box::new(writes.clone()))?;
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
