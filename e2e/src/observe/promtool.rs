//! Prometheus' own parser of OpenMetrics.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::lab::programs;

/// Parses a text with Prometheus' own parser; `directory` receives its files.
///
/// # Errors
/// The parser rejects it; the message is the parser's.
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

/// Adds a timestamp to every sample: promtool writes blocks of a database, for which a scraper would supply the time.
fn with_times(text: &str) -> String {
    let line = |line: &str| match line.split_once(" # {") {
        _ if line.starts_with('#') => format!("{line}\n"),
        Some((sample, exemplar)) => format!("{sample} 1700000000.0 # {{{exemplar}\n"),
        None => format!("{line} 1700000000.0\n"),
    };
    text.lines().map(line).collect()
}
