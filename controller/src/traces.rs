//! One OpenTelemetry trace per change, exported over OTLP (gRPC) where the `OTEL_*` environment asks for it.
//!
//! A trace is built when its change is concluded, from the times of its record. Only then it is known whether
//! it is worth keeping: traces with slow, refusing or lost nodes always are, of the others those that
//! `OTEL_TRACES_SAMPLER` chose by their identifier when the change came in.
//!
//! An agent that exports spans itself tells its part of an update (`switchtower.apply` and what is below) and says so
//! in the acknowledgement; for all others that part is told here, from the timings in the acknowledgement.
//!
//! Beside them go ordinary spans ([`switchtower_telemetry::spans`]), of which the environment's sampler chooses as usual:
//!
//! | span | what |
//! |---|---|
//! | `switchtower.token.review` | a token of an agent or of a caller of the admin API, reviewed by the API server |
//! | `switchtower.admin.request` | a request to the admin API |
//! | `switchtower.watch.list` | a complete list of one kind of object |
//! | `switchtower.rollout.create`, `.decide` | a new revision of a profile, and what a round decided about a rollout |
//! | `switchtower.status.write` | a request about a node's row |
//!
//! What holds: nothing here is on the way of a change. Records wait in a bounded queue for this task, spans in a
//! bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) for the exporter's own thread; where a collector is dead or slow,
//! they are dropped and counted.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanKind, TraceId, TracerProvider as _};
use opentelemetry_sdk::trace::{Config, Sampler, SamplingDecision, SdkTracerProvider};
use switchtower_core::propagation::{Record, TraceContext};
use switchtower_telemetry::TelemetryError;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tokio::sync::mpsc;

mod emit;
mod ids;
mod names;
mod shared;

use emit::Emitter;
use ids::ChosenIds;
use shared::Shared;

/// How long the last spans may take when the controller ends.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Chooses the traces that are kept although nothing is remarkable about them, and names all.
pub struct Head(Config);

impl Head {
    /// A new trace.
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
    /// Sets up the export; `None` if the environment does not ask for it. Nothing is connected yet, and a
    /// collector that cannot be reached is no error. To be called inside the tokio runtime.
    ///
    /// # Errors
    /// The environment asks for something that is not possible.
    pub fn from_environment(replica: &str) -> Result<Option<(Self, Head)>, TelemetryError> {
        let Some(exporter) = switchtower_telemetry::exporter()? else { return Ok(None) };
        let instance = KeyValue::new("service.instance.id", replica.to_owned());
        let resource = switchtower_telemetry::resource("switchtower-controller", vec![instance]);
        let processor = Shared::new(exporter, &resource);
        let ids = ChosenIds::default();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor.clone())
            // What to keep is decided before; the sampler of the environment chooses by identifier alone.
            .with_sampler(Sampler::AlwaysOn)
            .with_id_generator(ids.clone())
            .build();
        let emitter = Emitter::new(provider.tracer("switchtower"), ids);
        let ordinary = SdkTracerProvider::builder().with_span_processor(processor).build();
        Ok(Some((Self { provider, emitter, ordinary }, Head(Config::default()))))
    }

    /// What exports ordinary spans, for the log's subscriber.
    #[must_use]
    pub fn layer(&self) -> BoxedLayer {
        spans::exported(self.ordinary.tracer("switchtower"))
    }

    /// Builds traces until the sender of records is gone, or this is dropped.
    pub async fn run(&self, mut records: mpsc::Receiver<Record>) {
        while let Some(record) = records.recv().await {
            self.emitter.emit(&record);
        }
    }

    /// Exports what is left, as far as the collector takes it in time.
    pub fn shut_down(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN) {
            tracing::warn!(%error, "the last traces were not exported");
        }
    }
}
