//! Metrics of the controller and the agents, as a monitoring system scrapes them.

use anyhow::{Context as _, Result, ensure};

use super::{Fleet, FleetNode};
use crate::lab::http::{get, http_get};

/// Address of an agent's metrics in its node's namespace.
const AGENT: ([u8; 4], u16) = ([127, 0, 0, 1], 10249);

impl Fleet {
    /// Sum of a controller metric over the series that contain `labels` (as exposed, for example `reason="expired"`).
    ///
    /// # Errors
    /// The controller does not answer.
    pub fn controller_metric(&self, name: &str, labels: &str) -> Result<f64> {
        Ok(sum_metric(&http_get(self.metrics_address(), "/metrics")?, name, labels))
    }

    /// All metrics of the controller and of all agents, as exposed.
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

    /// Sum of a metric of a node's agent.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn agent_metric(&self, node: &FleetNode, name: &str, labels: &str) -> Result<f64> {
        let text = node.net.namespace.run(|| http_get(AGENT.into(), "/metrics"))??;
        Ok(sum_metric(&text, name, labels))
    }

    /// The controller's metrics in the OpenMetrics format, requested with Prometheus' Accept header.
    ///
    /// # Errors
    /// The controller does not answer, or answers in another format.
    pub fn open_metrics(&self) -> Result<String> {
        let accept = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3";
        let answer = get(self.metrics_address(), "/metrics", &format!("Accept: {accept}\r\n"))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no body")?;
        let wanted = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        ensure!(
            head.lines().any(|line| line.eq_ignore_ascii_case(wanted)),
            "unexpected content type: {head}"
        );
        Ok(body.to_owned())
    }
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
