//! Metrics as a monitoring system gets them, and what its own parser says of them.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::programs;
use crate::switchtower::{Fleet, FleetNode};

/// The address of an agent's metrics, in its node's namespace.
const AGENT: ([u8; 4], u16) = ([127, 0, 0, 1], 10249);

impl Fleet {
    /// The sum of a metric of the controller over the series that have `labels` (as written, `reason="expired"`).
    ///
    /// # Errors
    /// The controller does not answer.
    pub fn controller_metric(&self, name: &str, labels: &str) -> Result<f64> {
        Ok(sum_metric(&http_get(self.metrics_address(), "/metrics")?, name, labels))
    }

    /// All metrics of the controller and of all agents, as they print them.
    ///
    /// # Errors
    /// One of them does not answer.
    pub fn metrics(&self) -> Result<String> {
        let mut text = http_get(self.metrics_address(), "/metrics")?;
        for node in self.nodes() {
            text.push_str(&node.net.namespace.run(|| http_get(AGENT.into(), "/metrics"))??);
        }
        Ok(text)
    }

    /// The sum of a metric of a node's agent.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn agent_metric(&self, node: &FleetNode, name: &str, labels: &str) -> Result<f64> {
        let text = node.net.namespace.run(|| http_get(AGENT.into(), "/metrics"))??;
        Ok(sum_metric(&text, name, labels))
    }

    /// The controller's metrics as OpenMetrics, asked for as Prometheus does.
    ///
    /// # Errors
    /// The controller does not answer, or with another type of text.
    pub fn open_metrics(&self) -> Result<String> {
        let accept = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3";
        let answer = get(self.metrics_address(), "/metrics", &format!("Accept: {accept}\r\n"))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
        let wanted = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        ensure!(head.lines().any(|line| line.eq_ignore_ascii_case(wanted)), "the answer is another: {head}");
        Ok(body.to_owned())
    }
}

/// Has Prometheus' own parser of OpenMetrics read a text, in a directory for its files.
///
/// # Errors
/// It does not take it; the message is the parser's.
pub fn parse_open_metrics(text: &str, directory: &Path) -> Result<()> {
    let (file, blocks) = (directory.join("metrics.txt"), directory.join("metrics-blocks"));
    fs::write(&file, with_times(text)).with_context(|| format!("writing {}", file.display()))?;
    let mut command = Command::new(programs::tool("promtool")?);
    command.args(["tsdb", "create-blocks-from", "openmetrics"]).arg(&file).arg(&blocks);
    let output = command.output().context("starting promtool")?;
    if !output.status.success() {
        bail!("promtool: {}\n{text}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// With a time in every sample: promtool makes blocks of a database of them, a scraper brings its own.
fn with_times(text: &str) -> String {
    let line = |line: &str| match line.split_once(" # {") {
        _ if line.starts_with('#') => format!("{line}\n"),
        Some((sample, exemplar)) => format!("{sample} 1700000000.0 # {{{exemplar}\n"),
        None => format!("{line} 1700000000.0\n"),
    };
    text.lines().map(line).collect()
}

/// The whole answer to a GET: status line, headers, body.
///
/// # Errors
/// Nobody answers.
pub fn http_get(address: SocketAddr, path: &str) -> Result<String> {
    get(address, path, "")
}

fn get(address: SocketAddr, path: &str, headers: &str) -> Result<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2))
        .with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n{headers}\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn sum_metric(text: &str, name: &str, labels: &str) -> f64 {
    let series = text.lines().filter_map(|line| line.rsplit_once(' '));
    let matching = series.filter(|(series, _)| {
        series
            .strip_prefix(name)
            .is_some_and(|rest| (rest.is_empty() || rest.starts_with('{')) && rest.contains(labels))
    });
    matching.filter_map(|(_, value)| value.parse::<f64>().ok()).sum()
}
