//! A real OpenTelemetry Collector that writes what it gets to a file.

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

/// One span, as it was received.
#[derive(Debug, Clone)]
pub struct Span {
    /// The trace, hexadecimal.
    pub trace: String,
    /// The span, hexadecimal.
    pub id: String,
    /// Its parent, empty for a root.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// When it began, in nanoseconds since 1970.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// Attributes, those of the resource among them.
    pub attributes: Vec<(String, Value)>,
    /// Names and times of events.
    pub events: Vec<(String, u64)>,
    /// Traces of links.
    pub links: Vec<String>,
}

impl Span {
    /// An attribute as text; empty if it is not there.
    pub fn attribute(&self, name: &str) -> String {
        let value = self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        let text = value.and_then(|value| value.as_object()?.values().next());
        text.map_or_else(String::new, |text| text.as_str().map_or_else(|| text.to_string(), str::to_owned))
    }
}

/// A running collector; it ends when this is dropped.
#[derive(Debug)]
pub struct Collector {
    process: Process,
    address: SocketAddr,
    file: PathBuf,
}

impl Collector {
    /// Starts it on a port of an address, with its files in a directory, and waits until it listens.
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

    /// Where it takes OTLP over gRPC.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans so far.
    ///
    /// # Errors
    /// It has ended, or writes something else than OTLP as JSON.
    pub fn spans(&self) -> Result<Vec<Span>> {
        self.process.check_running()?;
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        // The last line may not be whole yet.
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

/// Times are numbers in strings: JSON's own are not large enough.
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
