//! A real OpenTelemetry Collector that writes received spans to a file.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::lab::process::Process;
use crate::lab::programs;
use crate::lab::wait;

/// A span as received.
#[derive(Debug, Clone)]
pub struct Span {
    /// Trace id, hexadecimal.
    pub trace: String,
    /// Span id, hexadecimal.
    pub id: String,
    /// Parent span id, empty for a root.
    pub parent: String,
    pub name: String,
    /// Start in nanoseconds since 1970.
    pub start: u64,
    /// End in nanoseconds since 1970.
    pub end: u64,
    /// Attributes, including those of the resource.
    pub attributes: Vec<(String, Value)>,
    /// Names and times of events.
    pub events: Vec<(String, u64)>,
    /// Trace ids of links.
    pub links: Vec<String>,
}

impl Span {
    /// An attribute as text; empty if absent.
    pub fn attribute(&self, name: &str) -> String {
        let value = self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        let text = value.and_then(|value| value.as_object()?.values().next());
        text.map_or_else(String::new, |text| text.as_str().map_or_else(|| text.to_string(), str::to_owned))
    }
}

/// A running collector, which ends on drop.
#[derive(Debug)]
pub struct Collector {
    process: Process,
    address: SocketAddr,
    file: PathBuf,
}

impl Collector {
    /// Starts a collector on a port of an address, with its files in a directory, and waits until it listens.
    ///
    /// # Errors
    /// It is not built, or does not listen in time.
    pub fn start(address: IpAddr, directory: &Path) -> Result<Self> {
        let address = TcpListener::bind((address, 0))?.local_addr()?;
        let file = directory.join(format!("spans-{}.json", address.port()));
        let config = serde_json::json!({
            "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": address.to_string()}}}},
            "exporters": {"file": {"path": file, "flush_interval": "100ms"}},
            "service": {"pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}}},
        });
        // JSON is YAML.
        let path = directory.join("collector.yaml");
        fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
        let mut command = Command::new(programs::tool("otelcol")?);
        command.arg(format!("--config=file:{}", path.display()));
        let process = Process::start("otelcol", command, &directory.join("collector.log"))?;
        let collector = Self { process, address, file };
        wait::until("the OpenTelemetry Collector listens", Duration::from_secs(20), || {
            collector.process.check_running()?;
            TcpStream::connect_timeout(&collector.address, Duration::from_millis(200)).context("connecting")
        })?;
        Ok(collector)
    }

    /// Endpoint for OTLP over gRPC.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans so far.
    ///
    /// # Errors
    /// The collector has exited, or its file is not OTLP as JSON.
    pub fn spans(&self) -> Result<Vec<Span>> {
        self.process.check_running()?;
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        // The last line may be incomplete.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut spans = Vec::new();
        for line in whole.lines() {
            let document: Value = serde_json::from_str(line).context("reading OTLP")?;
            for resource in list(&document["resourceSpans"]) {
                let shared = attributes(&resource["resource"]);
                for scope in list(&resource["scopeSpans"]) {
                    spans.extend(list(&scope["spans"]).iter().map(|span| read(span, &shared)));
                }
            }
        }
        Ok(spans)
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Parses a time: they are strings, since JSON numbers are not precise enough.
fn time(value: &Value) -> u64 {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_default()
}

fn attributes(holder: &Value) -> Vec<(String, Value)> {
    let pair = |attribute: &Value| (text(&attribute["key"]), attribute["value"].clone());
    list(&holder["attributes"]).iter().map(pair).collect()
}

fn read(span: &Value, shared: &[(String, Value)]) -> Span {
    let mut attributes = attributes(span);
    attributes.extend_from_slice(shared);
    Span {
        trace: text(&span["traceId"]),
        id: text(&span["spanId"]),
        parent: text(&span["parentSpanId"]),
        name: text(&span["name"]),
        start: time(&span["startTimeUnixNano"]),
        end: time(&span["endTimeUnixNano"]),
        attributes,
        events: list(&span["events"])
            .iter()
            .map(|event| (text(&event["name"]), time(&event["timeUnixNano"])))
            .collect(),
        links: list(&span["links"]).iter().map(|link| text(&link["traceId"])).collect(),
    }
}
