//! Prometheus' own parser of OpenMetrics.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::lab::programs;

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
