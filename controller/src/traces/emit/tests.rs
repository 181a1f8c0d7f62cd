//! Records and the spans that an exporter gets of them.

use std::collections::BTreeMap;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanExporter};
use switchtower_core::drain::{Names, Removal};
use switchtower_core::model::ObjectKey;
use switchtower_core::propagation::{Limits, Publication, Tracker};

use super::*;

const SECOND: u64 = 1_000_000_000;
const START: u64 = 1_800_000_000 * SECOND;
const MILLI: u64 = 1_000_000;

/// Keeps what is exported.
#[derive(Debug, Clone, Default)]
struct Kept(std::sync::Arc<std::sync::Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

fn emitted(records: &[Record]) -> Vec<SpanData> {
    exported(|emitter| records.iter().for_each(|record| emitter.emit(record)))
}

fn exported(emit: impl FnOnce(&Emitter)) -> Vec<SpanData> {
    let (kept, ids) = (Kept::default(), ChosenIds::default());
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(kept.clone())
        .with_sampler(Sampler::AlwaysOn)
        .with_id_generator(ids.clone())
        .build();
    let emitter = Emitter::new(provider.tracer("test"), ids);
    emit(&emitter);
    std::mem::take(&mut *kept.0.lock().unwrap())
}

fn change(id: u64, received: u64, sampled: bool) -> Change {
    Change {
        id,
        object: format!("EndpointSlice default/web-{id}").into(),
        service: None,
        received,
        triggered: Some(received - SECOND),
        trace: TraceContext { trace: u128::from(id) << 64 | 7, span: id + 100, sampled },
        origin: Some(TraceContext { trace: 5, span: 6, sampled: true }),
    }
}

/// Changes at 0, 1, ... milliseconds, each compiled by itself; one node acknowledges all at 10 milliseconds.
fn coalesced(sampled: &[bool]) -> Vec<Record> {
    let mut tracker = Tracker::new(Limits::default());
    let slot = tracker.join("n1".into(), 0);
    for (id, sampled) in (1..).zip(sampled) {
        let received = START + id * MILLI;
        let publication = Publication {
            changes: vec![change(id, received, *sampled)],
            total: 1,
            compiling: received + MILLI / 10,
            published: received + MILLI / 5,
        };
        tracker.publish(id, publication, &[slot]);
    }
    let delivery = Delivery {
        started: START + 6 * MILLI,
        sent: START + 7 * MILLI,
        acknowledged: START + 10 * MILLI,
        plan: 100,
        commit: 400,
        operations: 3,
        ..Delivery::default()
    };
    let last = u64::try_from(sampled.len()).unwrap();
    tracker.reached(slot, last, delivery.acknowledged, Some(delivery)).concluded
}

fn by_name(spans: &[SpanData]) -> BTreeMap<String, &SpanData> {
    spans.iter().map(|span| (span.name.to_string(), span)).collect()
}

#[test]
fn change_is_one_trace_with_ordered_spans() {
    let spans = emitted(&coalesced(&[true]));
    let names = by_name(&spans);
    assert_eq!(names.len(), spans.len(), "{names:?}");
    let root = names[names::CHANGE];
    let chosen = change(1, START, true).trace;
    assert_eq!(root.span_context.trace_id(), TraceId::from_bytes(chosen.trace.to_be_bytes()));
    assert_eq!(root.span_context.span_id(), SpanId::from_bytes(chosen.span.to_be_bytes()));
    assert_eq!(root.parent_span_id, SpanId::INVALID);
    assert_eq!((root.links.links.len(), root.events.events.len()), (1, 1));
    for (child, parent) in [
        (names::INGEST, names::CHANGE),
        (names::COMPILE, names::CHANGE),
        (names::DISTRIBUTE, names::CHANGE),
        (names::SEND, names::DISTRIBUTE),
        (names::APPLY, names::SEND),
        (names::PLAN, names::APPLY),
        (names::COMMIT, names::APPLY),
    ] {
        let (child, parent) = (names[child], names[parent]);
        assert_eq!(child.parent_span_id, parent.span_context.span_id(), "{}", child.name);
        assert!(parent.start_time <= child.start_time && child.end_time <= parent.end_time, "{child:?}");
        assert_eq!(child.span_context.trace_id(), root.span_context.trace_id());
    }
    let order = [names::INGEST, names::COMPILE, names::SEND, names::APPLY, names::COMMIT];
    assert!(order.windows(2).all(|pair| names[pair[0]].start_time <= names[pair[1]].start_time));
    // 3 ms between sending and acknowledgement, 0.5 ms of them the agent's: in their middle.
    assert_eq!(names[names::APPLY].start_time, time(START + 7 * MILLI + 1_250_000));
    assert_eq!(names[names::COMMIT].end_time, time(START + 7 * MILLI + 1_750_000));
    assert_eq!(names[names::DISTRIBUTE].events.events.len(), 3, "50 %, 99 % and all");
}

#[test]
fn changes_carried_by_another_link_to_it() {
    let spans = emitted(&coalesced(&[false, true, true]));
    let trace = |id: u64| TraceId::from_bytes(change(id, START, true).trace.trace.to_be_bytes());
    let sends: Vec<_> = spans.iter().filter(|span| span.name == names::SEND).collect();
    assert_eq!(sends.len(), 1);
    assert_eq!(sends[0].span_context.trace_id(), trace(2), "the oldest that is sampled");
    assert!(!spans.iter().any(|span| span.span_context.trace_id() == trace(1)), "nothing remarkable in it");
    let carried =
        spans.iter().find(|span| span.name == names::DISTRIBUTE && span.span_context.trace_id() == trace(3));
    let links = &carried.unwrap().links.links;
    assert_eq!(links.len(), 1);
    assert_eq!(links[0].span_context.trace_id(), trace(2));
    assert_eq!(links[0].attributes[0].key.as_str(), names::CARRIED_BY);
}

#[test]
fn troubled_change_is_always_kept() {
    let mut tracker = Tracker::new(Limits::default());
    let slot = tracker.join("n1".into(), 0);
    let publication =
        Publication { changes: vec![change(1, START, false)], total: 1, compiling: START, published: START };
    tracker.publish(1, publication, &[slot]);
    tracker.refused(slot, 1, START + MILLI, "KernelRefused");
    let spans = emitted(&tracker.overdue(START + 60 * SECOND).concluded);
    let names = by_name(&spans);
    assert!(
        matches!(&names[names::CHANGE].status, Status::Error { description } if description.starts_with('1'))
    );
    let refused = &names[names::DISTRIBUTE].events.events[0];
    assert_eq!((refused.name.as_ref(), refused.timestamp), (names::REFUSED, time(START + MILLI)));
    assert!(!names.contains_key(names::SEND));
}

#[test]
fn drain_query_is_in_the_trace_of_the_removal() {
    let mut tracker = Tracker::new(Limits::default());
    let slot = tracker.join("n1".into(), 0);
    let service = |name: &str| ObjectKey { namespace: "default".into(), name: name.into() };
    let of_service =
        |id, name, sampled| Change { service: Some(service(name)), ..change(id, START, sampled) };
    // A deleted EndpointSlice does not name its Service.
    let changes = vec![of_service(1, "api", true), of_service(2, "web", true), change(3, START, true)];
    tracker.publish(7, Publication { changes, total: 3, compiling: START, published: START }, &[slot]);
    let unsampled = vec![of_service(4, "web", false)];
    tracker.publish(
        8,
        Publication { changes: unsampled, total: 1, compiling: START, published: START },
        &[slot],
    );
    tracker.reached(slot, 8, START + MILLI, None);
    let trace = |revision, name| tracker.trace_of(&Removal { revision, service: Some(service(name).into()) });
    let removal = trace(7, "web").unwrap();
    assert_eq!(removal, change(2, START, true).trace);
    assert_eq!(trace(7, "deleted"), Some(change(3, START, true).trace));
    assert_eq!((trace(8, "web"), trace(9, "web")), (None, None), "not exported");

    let record = DrainRecord {
        node: "n1".into(),
        pod: PodIdentity::Address("10.244.1.7".parse().unwrap()),
        verdict: "Drained",
        started: START,
        ended: START + SECOND,
        waited_for: Names { names: vec!["n2".into()], total: 1 },
        missing: Names::default(),
    };
    let spans = exported(|emitter| {
        tracker.records().for_each(|record| emitter.emit(record));
        emitter.drain(removal, &record);
    });
    let drain = spans.iter().find(|span| span.name == names::DRAIN).unwrap();
    let root = spans.iter().find(|span| span.span_context.span_id() == drain.parent_span_id).unwrap();
    assert_eq!((root.name.as_ref(), &root.status), (names::CHANGE, &Status::Unset));
    assert_eq!(root.span_context.trace_id(), drain.span_context.trace_id());
    assert_eq!((drain.start_time, drain.end_time), (time(START), time(START + SECOND)));
    let attribute =
        |key: &str| drain.attributes.iter().find(|pair| pair.key.as_str() == key).unwrap().value.to_string();
    assert_eq!(
        (attribute(names::ENDPOINT), attribute(names::VERDICT)),
        ("10.244.1.7".into(), "Drained".into())
    );
    assert_eq!((attribute(names::NODE), attribute(names::WAITED_FOR)), ("n1".into(), "n2".into()));
    let failed = exported(|emitter| emitter.drain(removal, &DrainRecord { verdict: "TimedOut", ..record }));
    assert!(matches!(failed[0].status, Status::Error { .. }));
}
