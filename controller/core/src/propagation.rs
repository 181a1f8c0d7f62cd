//! Progress of each change: when it was received, compiled, and held by how many nodes. Pure: time and
//! identifiers are arguments.
//!
//! Changes that were compiled together share one revision of the layers and one [`Record`]. A node is followed
//! while its stream is open and it has acknowledged something in it; its first synchronisation is never
//! counted as latency.
//!
//! Invariants:
//! * An acknowledgement costs the revisions that it covers, a publication one bit per node that it concerns.
//! * Everything is bounded ([`Limits`]). Dropped entries are counted.
//! * A node that leaves before it acknowledged is excluded from the record, not waited for; a change that no
//!   node was there for has no time at which "all" nodes held it.

use std::sync::Arc;

use crate::model::ObjectKey;

mod drain_record;
mod nodes;
mod pacing;
mod record;
mod report;
mod trace_context;
mod tracker;

#[cfg(test)]
mod tests;

pub use drain_record::DrainRecord;
pub use pacing::{Pacer, PacerLimits};
pub use record::{Milestone, NodeAck, Record, RefusedUpdate};
pub use trace_context::TraceContext;
pub use tracker::{Limits, Slot, StepResult, Tracker};

/// Nanoseconds since 1970, of the controller's clock.
pub type UnixNanoseconds = u64;

/// One change of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its number in this process, from 1; 0 for an assignment of settings.
    pub id: u64,
    /// "EndpointSlice default/web-x7", "ProxyRollout default-7".
    pub object: Arc<str>,
    /// The Service that it concerns, if the object names one.
    pub service: Option<ObjectKey>,
    /// Time of delivery by the watch.
    pub received: UnixNanoseconds,
    /// Start of the change according to the cluster (`endpoints.kubernetes.io/last-change-trigger-time`), on another
    /// clock and in whole seconds.
    pub triggered: Option<UnixNanoseconds>,
    /// The trace of this change; the span is its root.
    pub trace: TraceContext,
    /// The trace in which the object was written (annotation `tracing.k8s.io/traceparent`).
    pub origin: Option<TraceContext>,
}

/// Changes compiled together, with times.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Publication {
    /// The first of the changes, at most 16, oldest first.
    pub changes: Vec<Change>,
    /// Total number of changes.
    pub total: u32,
    /// Start of the compile.
    pub compiling: UnixNanoseconds,
    /// Time at which the layers had the result and the streams were woken.
    pub published: UnixNanoseconds,
}

/// One update on its way to one node and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delivery {
    /// Start of sending.
    pub started: UnixNanoseconds,
    /// Time at which the connection took the last part.
    pub sent: UnixNanoseconds,
    /// Arrival of the acknowledgement.
    pub acknowledged: UnixNanoseconds,
    /// The node's generation.
    pub generation: u64,
    /// Payload bytes.
    pub bytes: u64,
    /// It replaced whole layers.
    pub snapshot: bool,
    /// The agent's planning, in microseconds; like the next as the agent measured it.
    pub plan: u64,
    /// The kernel's transaction, in microseconds.
    pub commit: u64,
    /// Operations in the kernel's transaction.
    pub operations: u32,
    /// The agent exports its part as spans of its own.
    pub traced: bool,
}
