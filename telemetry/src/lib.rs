//! OTLP export of spans over gRPC, for the controller and the agents: asked for by the standard `OTEL_*` environment,
//! off without it. Spans of changes are built from recorded times where they are known; [`spans`] are the others.
//!
//! Invariants: spans wait in a bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) for a thread of the exporter's own. Ending a
//! span never blocks; where a collector is dead or slow, spans are dropped and counted.

use std::env;

use opentelemetry::KeyValue;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};

pub mod names;
pub mod spans;

/// For [`span!`].
#[doc(hidden)]
pub use tracing;

/// Error in the export settings of the environment.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The endpoint, its certificate or another setting is not valid.
    #[error("setting up OTLP export; check the OTEL_EXPORTER_OTLP_* variables")]
    Exporter(#[from] ExporterBuildError),
    /// Another protocol than the one that is built in.
    #[error("{variable}={value} is not supported: export is with grpc")]
    Protocol {
        /// The environment variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
}

/// Returns the exporter that the environment configures. It connects later, so that an unreachable collector is not an
/// error. Call it inside a tokio runtime, which the exporter uses from then on.
///
/// # Errors
/// The environment configures something impossible.
pub fn exporter() -> Result<Option<SpanExporter>, TelemetryError> {
    if !is_asked_for(|name| env::var(name).ok().filter(|value| !value.is_empty()))? {
        return Ok(None);
    }
    Ok(Some(SpanExporter::builder().with_tonic().build()?))
}

/// Returns the identity of the exporter: from the environment (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`), else the
/// binary's name, this version, and the attributes in `own`.
#[must_use]
pub fn resource(service: &'static str, own: Vec<KeyValue>) -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let ours = [KeyValue::new("service.name", service), version].into_iter().chain(own);
    // Later values replace earlier ones.
    let builder = Resource::builder_empty()
        .with_attributes(ours)
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_detector(Box::new(EnvResourceDetector::new()));
    match env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => builder.with_service_name(name).build(),
        _ => builder.build(),
    }
}

/// Returns true if the standard environment enables traces over OTLP.
fn is_asked_for(variable: impl Fn(&str) -> Option<String>) -> Result<bool, TelemetryError> {
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
        Some((variable, value)) if value != "grpc" => Err(TelemetryError::Protocol { variable, value }),
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
