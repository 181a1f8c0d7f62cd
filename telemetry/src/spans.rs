//! Regular spans: background work of a program, recorded with `tracing` and exported like the spans of changes.
//!
//! Invariants: without an exporter no span is created, and creating one never blocks. Spans do not appear in the log, and
//! log lines are not events of spans.

use std::fmt::Display;

use opentelemetry_sdk::trace::SdkTracer;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::{Filter, SubscriberExt as _};
use tracing_subscriber::{Layer, Registry};

/// Prefix of the targets of our crates.
const OURS: &str = "switchtower_";

/// A layer over the registry of spans.
pub type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Makes a span of the crate in which it stands, of level info, which [`failed`] can mark.
///
/// ```
/// let span = switchtower_telemetry::span!("switchtower.file.write", switchtower.items = 3);
/// let written: Result<(), std::io::Error> = span.in_scope(|| Ok(()));
/// if let Err(error) = &written {
///     switchtower_telemetry::spans::failed(&span, error);
/// }
/// ```
#[macro_export]
macro_rules! span {
    ($name:expr $(, $($fields:tt)*)?) => {
        $crate::tracing::info_span!(
            $name,
            otel.status_description = $crate::tracing::field::Empty,
            $($($fields)*)?
        )
    };
}

/// Marks a span of [`span!`](crate::span) as failed.
pub fn failed(span: &Span, error: &dyn Display) {
    if !span.is_disabled() {
        // A description is what makes the status an error.
        span.record("otel.status_description", error.to_string().as_str());
    }
}

/// Returns a subscriber that logs, and exports spans if there is a layer for that.
pub fn subscriber(log: BoxedLayer, spans: Option<BoxedLayer>) -> impl Subscriber + Send + Sync {
    // One list, all of it with filters: `None` as a layer would count as one that enables everything.
    tracing_subscriber::registry().with([log].into_iter().chain(spans).collect::<Vec<_>>())
}

/// The layer that exports them with a tracer.
#[must_use]
pub fn exported(tracer: SdkTracer) -> BoxedLayer {
    let layer = OpenTelemetryLayer::new(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        // Nothing reads OpenTelemetry's current span; spans of changes name their parents.
        .with_context_activation(false);
    layer.with_filter(filter_fn(is_ordinary).with_max_level_hint(LevelFilter::INFO)).boxed()
}

/// Returns the filter of the log: `wanted` without regular spans.
pub fn in_log<F: Filter<Registry>>(wanted: F) -> impl Filter<Registry> {
    fn is_logged(metadata: &Metadata<'_>) -> bool {
        metadata.is_event() || !metadata.target().starts_with(OURS)
    }
    // With a hint: without one every level would count as wanted.
    wanted.and(filter_fn(is_logged).with_max_level_hint(LevelFilter::TRACE))
}

fn is_ordinary(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && *metadata.level() <= Level::INFO && metadata.target().starts_with(OURS)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex, PoisonError};

    use opentelemetry::trace::{SpanId, Status, TracerProvider as _};
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
    use tracing_subscriber::{EnvFilter, fmt};

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    #[derive(Debug, Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Serializes the tests: tracing caches whether a span is wanted per process, not per subscriber. A span that
    /// only the exporting subscriber of another test wants counts as enabled here as well.
    static ONE_SUBSCRIBER: Mutex<()> = Mutex::new(());

    /// Returns the spans that `work` exports and the lines that it logs.
    fn told(export: bool, work: impl FnOnce()) -> (Vec<SpanData>, String) {
        let _alone = ONE_SUBSCRIBER.lock().unwrap_or_else(PoisonError::into_inner);
        let (kept, lines) = (Kept::default(), Lines::default());
        let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
        let layer = export.then(|| exported(provider.tracer("test")));
        let sink = lines.clone();
        let log = fmt::layer().without_time().with_ansi(false).with_writer(move || sink.clone());
        let log = log.with_filter(in_log(EnvFilter::new("info"))).boxed();
        tracing::subscriber::with_default(subscriber(log, layer), work);
        let spans = kept.0.lock().unwrap().clone();
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        (spans, text)
    }

    fn work() {
        let outer = crate::span!("outer", switchtower.number = 7);
        outer.in_scope(|| {
            crate::span!("inner").in_scope(|| tracing::info!("a line"));
            tracing::debug_span!("a detail").in_scope(|| ());
            tracing::info_span!(target: "h2::client", "of a library").in_scope(|| ());
        });
        failed(&outer, &"no luck");
    }

    #[test]
    fn our_spans_are_exported_with_their_parents_and_failures() {
        let (spans, _) = told(true, work);
        let names: Vec<_> = spans.iter().map(|span| span.name.as_ref()).collect();
        assert_eq!(names, ["inner", "outer"]);
        let [inner, outer] = &spans[..] else { panic!("{spans:?}") };
        assert_eq!(
            (inner.parent_span_id, outer.parent_span_id),
            (outer.span_context.span_id(), SpanId::INVALID)
        );
        assert_eq!(outer.status, Status::error("no luck"));
        assert_eq!(inner.status, Status::Unset);
        let attributes: Vec<_> = outer.attributes.iter().map(|known| known.key.as_str()).collect();
        assert_eq!(attributes, ["switchtower.number"]);
        assert!(spans.iter().all(|span| span.events.is_empty()), "lines of the log are no events");
    }

    #[test]
    fn log_independent_of_trace_export() {
        let (spans, without) = told(false, work);
        assert!(spans.is_empty());
        let (_, with) = told(true, work);
        assert_eq!(
            (with.as_str(), without.as_str()),
            (" INFO switchtower_telemetry::spans::tests: a line\n", &*with)
        );
    }

    #[test]
    fn without_export_no_span_is_made() {
        told(false, || assert!(crate::span!("outer").is_disabled()));
    }
}
