//! Identifiers of spans: the roots have those that travelled with their change, all others are random.

use std::sync::{Arc, Mutex};

use opentelemetry::trace::{SpanId, TraceId};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};
use switchtower_core::propagation::TraceContext;

use crate::sync::lock;

/// Gives the next root span the identifiers that were chosen for it. There is one user: the task that builds
/// traces, which builds one span after the other.
#[derive(Debug, Clone, Default)]
pub(super) struct ChosenIds {
    next: Arc<Mutex<(Option<TraceId>, Option<SpanId>)>>,
    random: RandomIdGenerator,
}

impl ChosenIds {
    /// The next span is this one.
    pub(super) fn choose(&self, context: TraceContext) {
        let trace = TraceId::from_bytes(context.trace.to_be_bytes());
        let span = SpanId::from_bytes(context.span.to_be_bytes());
        *lock(&self.next) = (Some(trace), Some(span));
    }
}

impl IdGenerator for ChosenIds {
    fn new_trace_id(&self) -> TraceId {
        let chosen = lock(&self.next).0.take();
        chosen.unwrap_or_else(|| self.random.new_trace_id())
    }

    fn new_span_id(&self) -> SpanId {
        let chosen = lock(&self.next).1.take();
        chosen.unwrap_or_else(|| self.random.new_span_id())
    }
}
