//! Conversion of records to spans.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use opentelemetry::trace::{
    Event, Link, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags,
    TraceId, TraceState, Tracer as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SdkTracer;
use switchtower_core::compiled::PodIdentity;
use switchtower_core::propagation::{
    Change, Delivery, DrainRecord, Milestone, NodeAck, Record, TraceContext, UnixNanoseconds,
};

use super::ids::ChosenIds;
use super::names;

/// Maximum age of a trigger time: an older one is the annotation of an earlier change.
const TRIGGER_HORIZON: u64 = 300_000_000_000;

/// Builds the spans of records.
pub(super) struct Emitter {
    tracer: SdkTracer,
    ids: ChosenIds,
}

fn time(at: UnixNanoseconds) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(at)
}

fn number(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

fn span_context(context: TraceContext) -> SpanContext {
    SpanContext::new(
        TraceId::from_bytes(context.trace.to_be_bytes()),
        SpanId::from_bytes(context.span.to_be_bytes()),
        if context.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() },
        true,
        TraceState::default(),
    )
}

/// A span with its times.
struct Part {
    name: &'static str,
    kind: SpanKind,
    start: UnixNanoseconds,
    end: UnixNanoseconds,
    attributes: Vec<KeyValue>,
    events: Vec<Event>,
    links: Vec<Link>,
    status: Status,
}

impl Part {
    fn new(name: &'static str, start: UnixNanoseconds, end: UnixNanoseconds) -> Self {
        Self {
            name,
            kind: SpanKind::Internal,
            start,
            end: end.max(start),
            attributes: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            status: Status::Unset,
        }
    }
}

impl Emitter {
    pub(super) fn new(tracer: SdkTracer, ids: ChosenIds) -> Self {
        Self { tracer, ids }
    }

    /// The traces of a record's changes that are worth keeping.
    pub(super) fn emit(&self, record: &Record) {
        for change in &record.publication.changes {
            if change.trace.sampled || record.troubled {
                self.change(record, change);
            }
        }
    }

    /// A query of the drain gate, in the trace of the change that removed the endpoint. It may begin before the change, when
    /// the hook is faster than the EndpointSlice, and end after it.
    pub(super) fn drain(&self, trace: TraceContext, record: &DrainRecord) {
        let parent = Context::new().with_remote_span_context(span_context(trace));
        let mut drain = Part::new(names::DRAIN, record.started, record.ended);
        drain.attributes = vec![
            KeyValue::new(names::NODE, record.node.to_string()),
            KeyValue::new(names::VERDICT, record.verdict),
            KeyValue::new(names::MISSING, number(record.missing.total)),
        ];
        match &record.pod {
            PodIdentity::Address(address) => {
                drain.attributes.push(KeyValue::new(names::ENDPOINT, address.to_string()));
            }
            PodIdentity::HostNetwork(pod) => {
                drain.attributes.push(KeyValue::new(names::POD, pod.name.to_string()));
                drain.attributes.push(KeyValue::new(names::NAMESPACE, pod.namespace.to_string()));
            }
        }
        if let Some(last) = record.waited_for.names.first() {
            drain.attributes.push(KeyValue::new(names::WAITED_FOR, last.to_string()));
        }
        if record.verdict != "Drained" {
            drain.status = Status::error("the drain gate gave up");
        }
        self.span(&parent, drain);
    }

    fn change(&self, record: &Record, change: &Change) {
        let publication = &record.publication;
        let end = end(record);
        self.ids.choose(change.trace);
        let root = self.begin(&Context::new(), root(record, change, end));
        self.span(&root, Part::new(names::INGEST, change.received, publication.compiling));
        let mut compile = Part::new(names::COMPILE, publication.compiling, publication.published);
        compile.attributes = vec![
            KeyValue::new(names::REVISION, number(record.revision)),
            KeyValue::new(names::TOGETHER, i64::from(publication.total)),
        ];
        self.span(&root, compile);
        let shown = shown(record);
        let distribute = self.begin(&root, distribute(record, change, &shown, end));
        for ack in shown.iter().filter(|ack| ack.carrier == change.trace) {
            if let Some(delivery) = &ack.delivery {
                self.node(&distribute, ack, delivery, publication.published);
            }
        }
        finish(&distribute, end);
        finish(&root, end);
    }

    fn node(&self, parent: &Context, ack: &NodeAck, delivery: &Delivery, published: UnixNanoseconds) {
        let start = delivery.started.max(published);
        let mut send = Part::new(names::SEND, start, delivery.acknowledged);
        let node = KeyValue::new(names::NODE, ack.node.to_string());
        send.kind = SpanKind::Producer;
        send.attributes = vec![
            node.clone(),
            KeyValue::new(names::GENERATION, number(delivery.generation)),
            KeyValue::new(names::BYTES, number(delivery.bytes)),
            KeyValue::new(names::QUEUE, (start - published) as f64 / 1e6),
        ];
        send.events = vec![Event::new(names::SENT, time(delivery.sent.max(start)), Vec::new(), 0)];
        let end = send.end;
        let send = self.begin(parent, send);
        if !delivery.traced {
            self.apply(&send, &node, delivery, start);
        }
        finish(&send, end);
    }

    /// The agent's clock differs: its timings are centered in the time between send and acknowledgement.
    fn apply(&self, parent: &Context, node: &KeyValue, delivery: &Delivery, earliest: UnixNanoseconds) {
        let stages = [(names::PLAN, delivery.plan), (names::COMMIT, delivery.commit)];
        let (begin, end) = (delivery.sent.max(earliest), delivery.acknowledged.max(earliest));
        let room = end.saturating_sub(begin);
        let total: u64 = stages.iter().map(|(_, microseconds)| microseconds.saturating_mul(1_000)).sum();
        let total = total.min(room);
        let start = begin + (room - total) / 2;
        let mut apply = Part::new(names::APPLY, start, start + total);
        apply.kind = SpanKind::Consumer;
        let mode = if delivery.snapshot { "full" } else { "delta" };
        apply.attributes = vec![node.clone(), KeyValue::new(names::MODE, mode)];
        let apply = self.begin(parent, apply);
        let mut at = start;
        for (name, microseconds) in stages {
            let until = at.saturating_add(microseconds.saturating_mul(1_000)).min(start + total);
            let mut stage = Part::new(name, at, until);
            if name == names::COMMIT {
                stage.attributes = vec![KeyValue::new(names::OPERATIONS, i64::from(delivery.operations))];
            }
            self.span(&apply, stage);
            at = until;
        }
        finish(&apply, start + total);
    }

    /// A span without children.
    fn span(&self, parent: &Context, part: Part) {
        let end = part.end;
        finish(&self.begin(parent, part), end);
    }

    /// A span that is ended by [`finish`].
    fn begin(&self, parent: &Context, part: Part) -> Context {
        let Part { name, kind, start, end: _, attributes, events, links, status } = part;
        let builder = SpanBuilder::from_name(name)
            .with_kind(kind)
            .with_start_time(time(start))
            .with_attributes(attributes)
            .with_events(events)
            .with_links(links);
        let context = parent.with_span(self.tracer.build_with_context(builder, parent));
        context.span().set_status(status);
        context
    }
}

fn finish(context: &Context, end: UnixNanoseconds) {
    context.span().end_with_timestamp(time(end));
}

/// Returns the time at which all nodes held it, or else of the last event. No span of a node ends later.
fn end(record: &Record) -> UnixNanoseconds {
    let acks = || record.kept.iter().chain(&record.slowest);
    let acknowledged = |ack: &NodeAck| ack.delivery.as_ref().map_or(0, |delivery| delivery.acknowledged);
    let last = acks().map(|ack| ack.at.max(acknowledged(ack))).max().unwrap_or(0);
    let refused = record.refusals.iter().map(|refusal| refusal.at).max().unwrap_or(0);
    record.publication.published.max(last).max(refused)
}

/// Returns the nodes in the trace, each once.
fn shown(record: &Record) -> Vec<&NodeAck> {
    let mut shown: Vec<&NodeAck> = record.kept.iter().collect();
    for ack in &record.slowest {
        if !shown.iter().any(|known| known.node == ack.node) {
            shown.push(ack);
        }
    }
    shown
}

fn root(record: &Record, change: &Change, end: UnixNanoseconds) -> Part {
    let mut root = Part::new(names::CHANGE, change.received, end);
    root.attributes = vec![
        KeyValue::new(names::OBJECT, change.object.to_string()),
        KeyValue::new(names::CHANGE_ID, number(change.id)),
        KeyValue::new(names::REVISION, number(record.revision)),
    ];
    if let Some(service) = &change.service {
        root.attributes.push(KeyValue::new(names::SERVICE, service.name.to_string()));
        root.attributes.push(KeyValue::new(names::SERVICE_NAMESPACE, service.namespace.to_string()));
    }
    if let Some(triggered) = change.triggered {
        if let Ok(at) = Timestamp::from_nanosecond(i128::from(triggered)) {
            root.attributes.push(KeyValue::new(names::TRIGGER_TIME, at.to_string()));
        }
        if change.received.checked_sub(triggered).is_some_and(|age| age <= TRIGGER_HORIZON) {
            root.events.push(Event::new(names::TRIGGERED, time(triggered), Vec::new(), 0));
        }
    }
    root.links = change.origin.map(|origin| Link::with_context(span_context(origin))).into_iter().collect();
    root.status = status(record);
    root
}

fn status(record: &Record) -> Status {
    let missing = record.outstanding() + record.given_up;
    match (missing, record.refusals.is_empty()) {
        (0, true) => Status::Unset,
        (0, false) => Status::error("nodes refused it at first"),
        (missing, _) => Status::error(format!("{missing} nodes have not acknowledged it")),
    }
}

fn distribute(record: &Record, change: &Change, shown: &[&NodeAck], end: UnixNanoseconds) -> Part {
    let mut distribute = Part::new(names::DISTRIBUTE, record.publication.published, end);
    distribute.attributes = vec![
        KeyValue::new(names::ELIGIBLE, i64::from(record.eligible)),
        KeyValue::new(names::ACKNOWLEDGED, i64::from(record.acknowledged)),
        KeyValue::new(names::EXCLUDED, i64::from(record.excluded)),
        KeyValue::new(names::OUTSTANDING, i64::from(record.outstanding() + record.given_up)),
    ];
    let words = ["50% of nodes", "99% of nodes", "all nodes"];
    for (milestone, words) in Milestone::ASCENDING.into_iter().zip(words) {
        if let Some(at) = record.reached(milestone) {
            distribute.events.push(Event::new(words, time(at), Vec::new(), 0));
        }
    }
    for refusal in &record.refusals {
        let attributes = vec![
            KeyValue::new(names::NODE, refusal.node.to_string()),
            KeyValue::new(names::REASON, refusal.reason),
        ];
        distribute.events.push(Event::new(names::REFUSED, time(refusal.at), attributes, 0));
    }
    let mut carriers: Vec<TraceContext> = Vec::new();
    for ack in shown.iter().filter(|ack| ack.carrier != change.trace && ack.delivery.is_some()) {
        if !carriers.contains(&ack.carrier) {
            carriers.push(ack.carrier);
        }
    }
    let link = |carrier: TraceContext| {
        let attributes = vec![KeyValue::new(names::CARRIED_BY, format!("{:032x}", carrier.trace))];
        Link::new(span_context(carrier), attributes, 0)
    };
    distribute.links = carriers.into_iter().map(link).collect();
    distribute
}

#[cfg(test)]
mod tests;
