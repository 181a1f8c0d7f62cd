//! Checks that the installation matches the manifests: applying them again changes nothing, the components apply, a
//! monitoring system finds every pod through the metrics Services, and one replica of the controller replaces another.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::control_plane::Kubectl;
use super::high_availability;
use super::install::{NAMESPACE, write_overlay};
use super::layout::{Layout, Tools};
use super::shell::{Results, say};
use crate::lab::http::http_get;

/// Runs the checks; prints a line for each and the total.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    say("the installation");
    let installed = Installed { kubectl: Kubectl::new(layout, tools), layout, tools };
    let mut results = Results::default();
    results.add("manifests applied again change nothing", || installed.apply_again())?;
    results.add("components for alerts and dashboards", || installed.components())?;
    results.add("metrics Services lead to every pod", || installed.metrics())?;
    results.add("a replica replaces another", || high_availability::check(layout, tools))?;
    results.end("installed")
}

struct Installed<'a> {
    kubectl: Kubectl,
    layout: &'a Layout,
    tools: &'a Tools,
}

impl Installed<'_> {
    /// Applying the manifests again changes neither their objects nor those that the controller wrote.
    fn apply_again(&self) -> Result<()> {
        let version = |kubectl: &Kubectl| {
            kubectl.run(&format!(
                "get --namespace {NAMESPACE} configmap/switchtower-bootstrap secret/switchtower-ca \
                 --output jsonpath={{.items[*].metadata.resourceVersion}}"
            ))
        };
        let budget = |kubectl: &Kubectl| {
            kubectl.run(&format!(
                "get --namespace {NAMESPACE} poddisruptionbudget/switchtower-controller \
                 --output jsonpath={{.metadata.generation}}"
            ))
        };
        let (before, budget_before) = (version(&self.kubectl)?, budget(&self.kubectl)?);
        let overlay = write_overlay(self.layout, self.tools, "overlay", &[])?;
        let applied = self.kubectl.run(&format!("apply -k {overlay}"))?;
        // kubectl calls every PodDisruptionBudget configured, because the patch strategy of its selector is "replace".
        let unchanged = |line: &&str| line.ends_with(" unchanged") || line.starts_with("poddisruptionbudget");
        let changed: Vec<&str> = applied.lines().filter(|line| !unchanged(line)).collect();
        ensure!(changed.is_empty(), "{changed:?}");
        ensure!(budget(&self.kubectl)? == budget_before, "the PodDisruptionBudget changed");
        ensure!(!before.is_empty() && version(&self.kubectl)? == before, "the controller's objects changed");
        Ok(())
    }

    /// The API server accepts the components in a dry run.
    fn components(&self) -> Result<()> {
        let overlay = write_overlay(self.layout, self.tools, "components", &["alerts", "dashboards"])?;
        let applied = self.kubectl.run(&format!("apply -k {overlay} --dry-run=server"))?;
        for map in ["configmap/switchtower-alert-rules", "configmap/switchtower-dashboards"] {
            ensure!(applied.contains(&format!("{map} created")), "{applied:?} lacks {map}");
        }
        Ok(())
    }

    fn metrics(&self) -> Result<()> {
        let nodes = usize::from(self.layout.nodes);
        for (service, pods) in [("switchtower-controller", 2), ("switchtower-node-agent", nodes)] {
            let addresses = metrics_addresses(&self.kubectl, service)?;
            ensure!(addresses.len() == pods, "{service}: {addresses:?}, expected {pods}");
            for address in addresses {
                let metrics = http_get(address, "/metrics")?;
                ensure!(metrics.contains("switchtower_"), "{address} does not serve Switchtower's metrics");
            }
        }
        Ok(())
    }
}

/// Addresses at which the ready Pods of a component serve metrics.
pub(super) fn metrics_addresses(kubectl: &Kubectl, component: &str) -> Result<Vec<SocketAddr>> {
    let slices = kubectl.json(&format!(
        "get endpointslices --namespace {NAMESPACE} --selector kubernetes.io/service-name={component}-metrics"
    ))?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for slice in list(&slices["items"]) {
        let port = slice["ports"][0]["port"].as_u64().and_then(|port| u16::try_from(port).ok());
        let endpoints = list(&slice["endpoints"]);
        for endpoint in endpoints.iter().filter(|endpoint| endpoint["conditions"]["ready"] == true) {
            let address = endpoint["addresses"][0].as_str().and_then(|text| text.parse::<IpAddr>().ok());
            found.extend(address.zip(port).map(SocketAddr::from));
        }
    }
    Ok(found)
}
