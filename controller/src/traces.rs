//! One OpenTelemetry trace per change, exported over OTLP (gRPC) where the `OTEL_*` environment asks for it.
//!
//! A trace is built when its change is concluded, from the times of its record. Only then it is known whether
//! it is worth keeping: traces with slow, refusing or lost nodes always are, of the others those that
//! `OTEL_TRACES_SAMPLER` chose by their identifier when the change came in.
//!
//! What holds: nothing here is on the way of a change. Records wait in a bounded queue for this task, spans in a
//! bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) for the exporter's own thread; where a collector is dead or slow,
//! they are dropped and counted.

use std::env;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanKind, TraceId, TracerProvider as _};
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{Config, Sampler, SamplingDecision, SdkTracerProvider};
use switchtower_core::propagation::{Record, TraceContext};
use tokio::sync::mpsc;

mod emit;
mod ids;
mod names;

use emit::Emitter;
use ids::ChosenIds;

/// How long the last spans may take when the controller ends.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Why traces cannot be exported although they are asked for.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The endpoint, its certificate or another setting is not valid.
    #[error("setting up OTLP export; check the OTEL_EXPORTER_OTLP_* variables")]
    Exporter(#[from] ExporterBuildError),
    /// Another protocol than the one that is built in.
    #[error("{variable}={value} is not supported: the controller exports with grpc")]
    Protocol {
        /// The environment variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
}

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
}

impl Traces {
    /// Sets up the export; `None` if the environment does not ask for it. Nothing is connected yet, and a
    /// collector that cannot be reached is no error.
    ///
    /// # Errors
    /// The environment asks for something that is not possible.
    pub fn from_environment(replica: &str) -> Result<Option<(Self, Head)>, TracesError> {
        if !is_asked_for(|name| env::var(name).ok().filter(|value| !value.is_empty()))? {
            return Ok(None);
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().build()?;
        let ids = ChosenIds::default();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource(replica))
            // What to keep is decided before; the sampler of the environment chooses by identifier alone.
            .with_sampler(Sampler::AlwaysOn)
            .with_id_generator(ids.clone())
            .build();
        let emitter = Emitter::new(provider.tracer("switchtower"), ids);
        Ok(Some((Self { provider, emitter }, Head(Config::default()))))
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

/// Who exports, as the environment names it, else as we do.
fn resource(replica: &str) -> Resource {
    let ours = [
        KeyValue::new("service.name", "switchtower-controller"),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", replica.to_owned()),
    ];
    // What comes later replaces what came before.
    let builder = Resource::builder_empty()
        .with_attributes(ours)
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_detector(Box::new(EnvResourceDetector::new()));
    match env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => builder.with_service_name(name).build(),
        _ => builder.build(),
    }
}

/// Whether the standard environment asks for traces over OTLP.
fn is_asked_for(variable: impl Fn(&str) -> Option<String>) -> Result<bool, TracesError> {
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let endpoints = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    let asked = match variable("OTEL_TRACES_EXPORTER").as_deref() {
        Some(exporters) => exporters.split(',').any(|exporter| exporter.trim() == "otlp"),
        None => endpoints.iter().any(|name| variable(name).is_some()),
    };
    if disabled || !asked {
        return Ok(false);
    }
    let names = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    let protocol = names.into_iter().find_map(|name| Some((name, variable(name)?)));
    match protocol {
        Some((variable, value)) if value != "grpc" => Err(TracesError::Protocol { variable, value }),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(variables: &[(&str, &str)]) -> Option<bool> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        is_asked_for(|name| find(name).map(|(_, value)| (*value).to_owned())).ok()
    }

    #[test]
    fn traces_are_exported_where_the_environment_asks_for_it() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317");
        assert_eq!(asked(&[]), Some(false));
        assert_eq!(asked(&[endpoint]), Some(true));
        assert_eq!(asked(&[("OTEL_TRACES_EXPORTER", "otlp")]), Some(true));
        assert_eq!(asked(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]), Some(false));
        assert_eq!(asked(&[endpoint, ("OTEL_SDK_DISABLED", "TRUE")]), Some(false));
        assert_eq!(asked(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]), Some(true));
        assert_eq!(asked(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]), None);
    }
}
