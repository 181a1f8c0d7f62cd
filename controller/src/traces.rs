//! One OpenTelemetry trace per change, exported over OTLP (gRPC) if the `OTEL_*` environment enables it.
//!
//! A trace is built from the times of its record when the change is concluded. Traces with slow, refusing or lost
//! nodes are always kept; of the others, those that `OTEL_TRACES_SAMPLER` selected by trace ID when the change was
//! received.
//!
//! An agent that exports spans itself emits its part of an update (`switchtower.apply` and its children) and sets a
//! flag in the acknowledgement. For all others the controller emits that part, from the timings in the
//! acknowledgement.
//!
//! In addition there are ordinary spans ([`switchtower_telemetry::spans`]), which the environment's sampler selects
//! as usual:
//!
//! | span | what |
//! |---|---|
//! | `switchtower.token.review` | a token of an agent or of a caller of the admin API, reviewed by the API server |
//! | `switchtower.admin.request` | a request to the admin API |
//! | `switchtower.watch.list` | a complete list of one kind of object |
//! | `switchtower.rollout.create`, `.decide` | a new revision of a profile, and what a round decided about a rollout |
//! | `switchtower.status.write` | a request about a node's row |
//!
//! Invariants: nothing here delays a change. Records wait in a bounded queue for this task, spans in a bounded queue
//! (`OTEL_BSP_MAX_QUEUE_SIZE`) for the exporter's own thread. If the collector is down or slow, they are dropped and
//! counted.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanKind, TraceId, TracerProvider as _};
use opentelemetry_sdk::trace::{Config, Sampler, SamplingDecision, SdkTracerProvider};
use switchtower_core::propagation::TraceContext;
use switchtower_telemetry::TelemetryError;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tokio::sync::mpsc;

mod emit;
mod ids;
mod names;
mod shared;

use crate::propagation::Traced;

use emit::Emitter;
use ids::ChosenIds;
use shared::Shared;

/// Timeout for the export of the last spans at shutdown.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Creates trace contexts and selects the traces to keep regardless of their outcome.
pub struct Head(Config);

impl Head {
    /// Creates a trace context.
    #[must_use]
    pub fn trace(&self) -> TraceContext {
        let trace = crate::propagation::new_trace();
        let id = TraceId::from_bytes(trace.trace.to_be_bytes());
        let decision = self.0.sampler.should_sample(None, id, names::CHANGE, &SpanKind::Internal, &[], &[]);
        TraceContext { sampled: decision.decision == SamplingDecision::RecordAndSample, ..trace }
    }
}

/// The exporter.
pub struct Traces {
    provider: SdkTracerProvider,
    emitter: Emitter,
    ordinary: SdkTracerProvider,
}

impl Traces {
    /// Sets up the export; `None` if the environment does not enable it. Does not connect yet, so an unreachable
    /// collector is no error. Must be called inside the tokio runtime.
    ///
    /// # Errors
    /// The environment is invalid.
    pub fn from_environment(replica: &str) -> Result<Option<(Self, Head)>, TelemetryError> {
        let Some(exporter) = switchtower_telemetry::exporter()? else { return Ok(None) };
        let instance = KeyValue::new("service.instance.id", replica.to_owned());
        let resource = switchtower_telemetry::resource("switchtower-controller", vec![instance]);
        let processor = Shared::new(exporter, &resource);
        let ids = ChosenIds::default();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor.clone())
            // `emit` has decided already; the sampler of the environment only knows the trace ID.
            .with_sampler(Sampler::AlwaysOn)
            .with_id_generator(ids.clone())
            .build();
        let emitter = Emitter::new(provider.tracer("switchtower"), ids);
        let ordinary = SdkTracerProvider::builder().with_span_processor(processor).build();
        Ok(Some((Self { provider, emitter, ordinary }, Head(Config::default()))))
    }

    /// Returns the layer that exports ordinary spans, for the tracing subscriber.
    #[must_use]
    pub fn layer(&self) -> BoxedLayer {
        spans::exported(self.ordinary.tracer("switchtower"))
    }

    /// Builds traces until the sender of records is dropped.
    pub async fn run(&self, mut records: mpsc::Receiver<Traced>) {
        while let Some(traced) = records.recv().await {
            match traced {
                Traced::Record(record) => self.emitter.emit(&record),
                Traced::Drain(trace, record) => self.emitter.drain(trace, &record),
            }
        }
    }

    /// Exports the remaining spans, as far as the collector accepts them in time.
    pub fn shut_down(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN) {
            tracing::warn!(%error, "the last traces were not exported");
        }
    }
}
