//! Queries of the drain gate in the trace of the change that removed the endpoint.

use std::sync::Arc;

use super::{Change, Record, TraceContext, UnixNanoseconds};
use crate::compiled::PodIdentity;
use crate::drain::{Names, Removal};
use crate::model::ObjectKey;

/// A query of the drain gate that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrainRecord {
    /// Node of the pod.
    pub node: Arc<str>,
    /// The pod.
    pub pod: PodIdentity,
    /// Verdict in CamelCase.
    pub verdict: &'static str,
    /// Arrival of the query.
    pub started: UnixNanoseconds,
    /// Time of the answer.
    pub ended: UnixNanoseconds,
    /// As in [`crate::drain::Answer`].
    pub waited_for: Names,
    /// Nodes that were not waited for.
    pub missing: Names,
}

impl Record {
    /// Returns the trace of the change that removed an endpoint of the Service in this revision, if the trace is exported.
    /// Of several changes of the Service, that is the last.
    pub(super) fn trace_of(&self, service: Option<&ObjectKey>) -> Option<TraceContext> {
        let changes = &self.publication.changes;
        let of_service = |change: &&Change| change.service.is_some() && change.service.as_ref() == service;
        // A deleted EndpointSlice does not name its Service.
        let deleted =
            |change: &&Change| change.service.is_none() && change.object.starts_with("EndpointSlice ");
        let found = changes.iter().rev().find(of_service).or_else(|| changes.iter().rev().find(deleted));
        let trace = found.or(changes.first())?.trace;
        (trace.sampled || self.troubled).then_some(trace)
    }
}

impl super::Tracker {
    /// Returns the trace of the change that removed an endpoint; `None` if it is not exported or not remembered.
    #[must_use]
    pub fn trace_of(&self, removal: &Removal) -> Option<TraceContext> {
        self.record(removal.revision)?.trace_of(removal.service.as_deref())
    }
}
