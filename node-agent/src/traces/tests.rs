//! Updates and the spans that an exporter gets of them.

use std::sync::{Arc, Mutex};

use opentelemetry::trace::SpanId;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use switchtower_proto::v1::ChangeInfo;

use super::*;

/// Keeps what is exported.
#[derive(Debug, Clone, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

fn traces() -> (Traces, Kept) {
    let kept = Kept::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
    (Traces::of(provider, "n1"), kept)
}

fn update(from: Option<u64>, parents: &[&str]) -> Update {
    let change = |parent: &&str| ChangeInfo { traceparent: (*parent).to_owned(), ..ChangeInfo::default() };
    Update { from, to: 8, changes: parents.iter().map(change).collect(), ..Update::default() }
}

const UNSAMPLED: &str = "00-00000000000000000000000000000001-0000000000000001-00";
const SAMPLED: &str = "00-00000000000000000000000000000002-0000000000000009-01";

fn differing(differences: u32) -> crate::kernel::dataplane::Repaired {
    crate::kernel::dataplane::Repaired { differences, ..Default::default() }
}

#[test]
fn update_traced_under_its_first_sampled_change() {
    let (traces, kept) = traces();
    let applying = traces.begin(&update(Some(7), &["", UNSAMPLED, "nonsense", SAMPLED])).unwrap();
    applying.received();
    let refused = CommitError::Refused { operation: "add element".into(), errno: libc::ENOMEM };
    applying.attempted(false, SystemTime::now(), &Err(refused));
    let committed = Committed { operations: 3, ..Committed::default() };
    applying.attempted(true, SystemTime::now(), &Ok(committed));
    applying.held();
    applying.flows(Duration::from_millis(3), 5);
    drop(applying);

    let spans = kept.0.lock().unwrap().clone();
    let apply = spans.iter().find(|span| span.name == APPLY).unwrap();
    assert_eq!(apply.parent_span_id, SpanId::from(9));
    let attribute = |span: &SpanData, key: &str| {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.to_string()).unwrap_or_default()
    };
    assert_eq!((attribute(apply, GENERATION), attribute(apply, MODE)), ("8".into(), "full".into()));
    let children: Vec<_> = spans
        .iter()
        .filter(|span| span.parent_span_id == apply.span_context.span_id())
        .map(|span| (span.name.as_ref(), attribute(span, REASON)))
        .collect();
    let none = String::new;
    let wanted = [
        (RECEIVE, none()),
        (COMMIT, libc::ENOMEM.to_string()),
        (PLAN, none()),
        (COMMIT, none()),
        (CONNTRACK, none()),
    ];
    assert_eq!(children, wanted);
    assert_eq!(spans.len(), 6);
    assert!(spans.iter().all(|span| span.span_context.trace_id() == apply.span_context.trace_id()));
}

#[test]
fn uncollected_spans_not_recorded() {
    let (traces, kept) = traces();
    assert!(traces.begin(&update(Some(7), &[UNSAMPLED])).is_none());
    assert!(traces.begin(&update(Some(7), &[])).is_none());
    assert!(Traces::none().begin(&update(Some(7), &[SAMPLED])).is_none());
    traces.repaired("changed", SystemTime::now(), &Ok(differing(0)));
    assert!(kept.0.lock().unwrap().is_empty());
}

#[test]
fn full_view_traced_on_its_own() {
    let (traces, kept) = traces();
    let of_change = traces.begin(&update(Some(7), &[SAMPLED])).unwrap();
    assert!(of_change.is_of_change(), "the controller does not export it again");
    let whole = traces.begin(&update(None, &[SAMPLED])).unwrap();
    assert!(!whole.is_of_change());
    whole.attempted(true, SystemTime::now(), &Ok(Committed::default()));
    whole.held();
    let spans = kept.0.lock().unwrap();
    let apply = spans.iter().find(|span| span.name == APPLY).unwrap();
    assert_eq!(apply.parent_span_id, SpanId::INVALID);
    assert_eq!(spans.len(), 3, "{spans:?}");
}

#[test]
fn refusals_and_repairs_reported() {
    let (traces, kept) = traces();
    traces.begin(&update(Some(7), &[SAMPLED])).unwrap().refused("DigestMismatch");
    traces.repaired("table_deleted", SystemTime::now(), &Ok(differing(39)));
    let spans = kept.0.lock().unwrap();
    assert_eq!(spans.len(), 2, "{spans:?}");
    assert!(matches!(spans[0].status, Status::Error { .. }));
    assert_eq!((spans[1].name.as_ref(), spans[1].parent_span_id), (REPAIR, SpanId::INVALID));
}
