//! Spans of the agent, exported over OTLP if the `OTEL_*` environment configures it.
//!
//! Exporters of a change's spans:
//!
//! | span | exported by |
//! |---|---|
//! | `switchtower.change`, `.ingest`, `.compile`, `.distribute`, `.send` | the controller |
//! | `switchtower.apply` with `.receive`, `.plan`, `.nft.commit` of each attempt | the agent, if it exports; else the controller, from the timings in the acknowledgement |
//! | `switchtower.conntrack.clean`, after the acknowledgement | the agent |
//! | `switchtower.repair`, a separate trace | the agent |
//! | `switchtower.connect`, `switchtower.snapshot.write`, `switchtower.question`, separate traces | the agent, as ordinary spans ([`switchtower_telemetry::spans`]) |
//!
//! An update is traced under the first of its changes whose trace is sampled; its `apply` is a child of that change's
//! root. A snapshot carries old changes: its `apply` is a separate trace.
//!
//! Invariants: ending a span queues it in a bounded queue or drops it, and never blocks. Without export an update costs
//! one comparison.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use switchtower_proto::v1::Update;
use switchtower_telemetry::TelemetryError;
use switchtower_telemetry::names::{APPLY, COMMIT, GENERATION, MODE, NODE, OPERATIONS, PLAN, REASON};
use switchtower_telemetry::spans::{self, BoxedLayer};

use crate::kernel::dataplane::{CommitError, Committed, Repaired};

/// Timeout of the last export during shutdown.
const SHUTDOWN: Duration = Duration::from_secs(2);

const RECEIVE: &str = "switchtower.receive";
const CONNTRACK: &str = "switchtower.conntrack.clean";
const REPAIR: &str = "switchtower.repair";

const DELETED: &str = "switchtower.flows.deleted";
const CAUSE: &str = "switchtower.drift.cause";
const DIFFERENCES: &str = "switchtower.drift.differences";

/// The export, or none.
pub(crate) struct Traces {
    export: Option<(SdkTracerProvider, SdkTracer)>,
    node: String,
}

impl Traces {
    /// No export.
    #[must_use]
    pub(crate) fn none() -> Self {
        Traces { export: None, node: String::new() }
    }

    /// Configures the export from the environment. Call it inside the tokio runtime that drives the export.
    ///
    /// # Errors
    /// The environment is invalid.
    pub(crate) fn from_environment(node: &str) -> Result<Self, TelemetryError> {
        let Some(exporter) = switchtower_telemetry::exporter()? else { return Ok(Self::none()) };
        let own = vec![KeyValue::new("service.instance.id", node.to_owned())];
        let builder = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(switchtower_telemetry::resource("switchtower-node-agent", own));
        Ok(Self::of(builder.build(), node))
    }

    fn of(provider: SdkTracerProvider, node: &str) -> Self {
        let tracer = provider.tracer("switchtower");
        Traces { export: Some((provider, tracer)), node: node.to_owned() }
    }

    /// Returns whether spans are exported.
    #[must_use]
    pub(crate) fn are_exported(&self) -> bool {
        self.export.is_some()
    }

    /// Returns the layer that exports ordinary spans, for the subscriber of the log.
    #[must_use]
    pub(crate) fn layer(&self) -> Option<BoxedLayer> {
        self.export.as_ref().map(|(_, tracer)| spans::exported(tracer.clone()))
    }

    /// Starts the span of an update; `None` if it is not traced.
    pub(crate) fn begin(&self, update: &Update) -> Option<Applying> {
        let (_, tracer) = self.export.as_ref()?;
        let of_change = update.from.is_some();
        let parent = if of_change { sampled_change(update)? } else { Context::new() };
        let began = SystemTime::now();
        let attributes = vec![
            KeyValue::new(NODE, self.node.clone()),
            KeyValue::new(GENERATION, i64::try_from(update.to).unwrap_or(i64::MAX)),
        ];
        let builder = SpanBuilder::from_name(APPLY)
            .with_kind(SpanKind::Consumer)
            .with_start_time(began)
            .with_attributes(attributes);
        let context = parent.with_span(tracer.build_with_context(builder, &parent));
        // A span that the sampler drops is exported by the controller.
        context.span().is_recording().then(|| Applying { tracer: tracer.clone(), context, began, of_change })
    }

    /// Exports a repair of drift, or its failure.
    pub(crate) fn repaired(
        &self,
        cause: &'static str,
        started: SystemTime,
        result: &Result<Repaired, CommitError>,
    ) {
        let Some((_, tracer)) = &self.export else { return };
        let mut attributes = vec![KeyValue::new(NODE, self.node.clone()), KeyValue::new(CAUSE, cause)];
        let failed = match result {
            // Nothing differed: no repair.
            Ok(Repaired { differences: 0, .. }) => return,
            Ok(Repaired { differences, .. }) => {
                attributes.push(KeyValue::new(DIFFERENCES, i64::from(*differences)));
                None
            }
            Err(error) => Some(error),
        };
        Part::new(REPAIR, started, SystemTime::now())
            .with(attributes)
            .failed(failed)
            .record(tracer, &Context::new());
    }

    /// Exports queued spans within a timeout. Must not run on the runtime's thread.
    pub(crate) fn shut_down(&self) {
        let Some((provider, _)) = &self.export else { return };
        if let Err(error) = provider.shutdown_with_timeout(SHUTDOWN) {
            tracing::warn!(%error, "cannot export the last spans");
        }
    }
}

/// Returns the first change of an update with a sampled trace, as a parent.
fn sampled_change(update: &Update) -> Option<Context> {
    let propagator = TraceContextPropagator::new();
    let mut parents = update.changes.iter().map(|change| {
        let carrier = HashMap::from([("traceparent".to_owned(), change.traceparent.clone())]);
        propagator.extract_with_context(&Context::new(), &carrier)
    });
    parents.find(|parent| parent.span().span_context().is_sampled())
}

/// Span of one update, from its first message until the kernel holds it.
pub(crate) struct Applying {
    tracer: SdkTracer,
    context: Context,
    began: SystemTime,
    of_change: bool,
}

impl Applying {
    /// Returns whether the span belongs to the trace of a change, so that the controller need not export it.
    #[must_use]
    pub(crate) fn is_of_change(&self) -> bool {
        self.of_change
    }

    /// Notes that the view has the complete update.
    pub(crate) fn received(&self) {
        self.record(Part::new(RECEIVE, self.began, SystemTime::now()));
    }

    /// Ends the span of a refused update.
    pub(crate) fn refused(self, reason: &'static str) {
        let span = self.context.span();
        span.set_attribute(KeyValue::new(REASON, reason));
        span.set_status(Status::error("the update was refused"));
        span.end();
    }

    /// Notes an attempt to commit the update; `full` if it compared everything.
    pub(crate) fn attempted(&self, full: bool, started: SystemTime, result: &Result<Committed, CommitError>) {
        let now = SystemTime::now();
        match result {
            Ok(committed) => {
                let mode = if full { "full" } else { "delta" };
                self.context.span().set_attribute(KeyValue::new(MODE, mode));
                let planned = (started + committed.plan).min(now);
                self.record(Part::new(PLAN, started, planned));
                let operations = vec![KeyValue::new(OPERATIONS, i64::from(committed.operations))];
                self.record(
                    Part::new(COMMIT, planned, (planned + committed.commit).min(now)).with(operations),
                );
            }
            Err(error) => self.record(Part::new(COMMIT, started, now).failed(Some(error))),
        }
    }

    /// Ends the span: the kernel holds the update.
    pub(crate) fn held(&self) {
        self.context.span().end();
    }

    /// Notes the end of the pass over the conntrack table that the update required.
    pub(crate) fn flows(&self, took: Duration, deleted: usize) {
        let now = SystemTime::now();
        let deleted = vec![KeyValue::new(DELETED, i64::try_from(deleted).unwrap_or(i64::MAX))];
        self.record(Part::new(CONNTRACK, now - took, now).with(deleted));
    }

    fn record(&self, part: Part<'_>) {
        part.record(&self.tracer, &self.context);
    }
}

/// A finished part of the work on an update.
struct Part<'a> {
    name: &'static str,
    start: SystemTime,
    end: SystemTime,
    attributes: Vec<KeyValue>,
    failed: Option<&'a CommitError>,
}

impl<'a> Part<'a> {
    fn new(name: &'static str, start: SystemTime, end: SystemTime) -> Self {
        Self { name, start, end, attributes: Vec::new(), failed: None }
    }

    fn with(self, attributes: Vec<KeyValue>) -> Self {
        Self { attributes, ..self }
    }

    fn failed(self, failed: Option<&'a CommitError>) -> Self {
        Self { failed, ..self }
    }

    /// Records the part as a span below `parent`.
    fn record(self, tracer: &SdkTracer, parent: &Context) {
        use opentelemetry::trace::Span as _;
        let Self { name, start, end, mut attributes, failed } = self;
        attributes.extend(failed.map(|error| KeyValue::new(REASON, i64::from(error.errno()).to_string())));
        let builder = SpanBuilder::from_name(name).with_start_time(start).with_attributes(attributes);
        let mut span = tracer.build_with_context(builder, parent);
        if let Some(error) = failed {
            span.set_status(Status::error(error.to_string()));
        }
        span.end_with_timestamp(end);
    }
}

#[cfg(test)]
mod tests;
