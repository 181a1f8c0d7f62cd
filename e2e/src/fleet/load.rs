//! Services with endpoints on the fleet's Nodes, and changes of single endpoints.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::task::JoinSet;

use super::cluster::{CONCURRENCY, node_name, pod_address};
use crate::lab::objects;

const NAMESPACE: &str = "default";
const ENDPOINTS: usize = 3;

/// One endpoint's change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    /// The time when the write was sent to the API server.
    pub(super) at: Instant,
    /// Time in which the API server took it.
    pub(super) write: Duration,
    /// The slice's resource version afterwards.
    pub(super) version: u64,
}

/// Services `s0`, `s1`, … with one slice each.
pub(super) struct Load {
    slices: Api<EndpointSlice>,
    services: usize,
    changes: AtomicUsize,
}

impl Load {
    /// Creates the Services and their slices.
    pub(super) async fn create(client: &Client, services: usize, nodes: usize) -> Result<Self> {
        let accounts: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
        let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
        let create = |number| create_one(accounts.clone(), slices.clone(), number, nodes);
        let creations = futures::stream::iter((0..services).map(create)).buffer_unordered(CONCURRENCY);
        creations.try_collect::<()>().await?;
        Ok(Self { slices, services, changes: AtomicUsize::new(0) })
    }

    /// Changes so far.
    pub(super) fn changes(&self) -> usize {
        self.changes.load(Ordering::Relaxed)
    }

    /// Replaces the address of one endpoint.
    pub(super) async fn change(&self) -> Result<Change> {
        let number = self.changes.fetch_add(1, Ordering::Relaxed);
        change(self.slices.clone(), number, self.services).await
    }

    /// Changes endpoints at a rate; returns the changes in the order of their versions.
    pub(super) async fn run(&self, per_second: u32, duration: Duration) -> Result<Vec<Change>> {
        self.run_until(per_second, tokio::time::sleep(duration)).await
    }

    /// The same until `end`.
    pub(super) async fn run_until(
        &self,
        per_second: u32,
        end: impl Future<Output = ()>,
    ) -> Result<Vec<Change>> {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
        let mut end = std::pin::pin!(end);
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = &mut end => break,
            }
            let number = self.changes.fetch_add(1, Ordering::Relaxed);
            running.spawn(change(self.slices.clone(), number, self.services));
        }
        let mut changes = Vec::new();
        while let Some(change) = running.join_next().await {
            changes.push(change??);
        }
        changes.sort_by_key(|change| change.version);
        Ok(changes)
    }

    /// Changes endpoints as fast as the API server takes it; returns the last version.
    pub(super) async fn change_many(&self, count: usize) -> Result<u64> {
        let changes = futures::stream::iter((0..count).map(|_| self.change())).buffer_unordered(16);
        let changes: Vec<_> = changes.try_collect().await?;
        changes.iter().map(|change| change.version).max().context("no change was written")
    }
}

/// A Service with many endpoints, in slices of 1,000.
pub(super) async fn create_large(client: &Client, endpoints: usize, nodes: usize) -> Result<()> {
    const SLICE: usize = 1_000;
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
    let spec = json!({"ports": [{"port": 80, "targetPort": 8080}]});
    let service = objects::service(NAMESPACE, "large", &spec);
    services.create(&PostParams::default(), &serde_json::from_value(service)?).await?;
    for first in (0..endpoints).step_by(SLICE) {
        let endpoints: Vec<_> = (first..endpoints.min(first + SLICE))
            .map(|pod| {
                let address = format!("100.{}.{}.{}", 64 + pod / 62_500, pod / 250 % 250, pod % 250 + 1);
                json!({"addresses": [address], "nodeName": node_name(pod % nodes), "conditions": {"ready": true}})
            })
            .collect();
        let slice = slice("large", &format!("large-{}", first / SLICE), &endpoints);
        slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    }
    Ok(())
}

/// Applies a merge patch to all Services of a load.
pub(super) async fn patch_services(
    client: &Client,
    services: usize,
    patch: &serde_json::Value,
) -> Result<()> {
    let api: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let patch = Patch::Merge(patch);
    let patched =
        (0..services).map(|number| {
            let (api, patch) = (api.clone(), &patch);
            async move {
                api.patch_metadata(&format!("s{number}"), &PatchParams::default(), patch).await.map(drop)
            }
        });
    let patched = futures::stream::iter(patched).buffer_unordered(CONCURRENCY);
    Ok(patched.try_collect::<()>().await?)
}

async fn change(slices: Api<EndpointSlice>, number: usize, services: usize) -> Result<Change> {
    let name = slice_name(number * 97 % services);
    // An address that the slice never had.
    let address = format!("10.{}.{}.{}", 100 + number / 62_500 % 20, number / 250 % 250, number % 250 + 1);
    let operations = json!([{"op": "replace", "path": "/endpoints/0/addresses/0", "value": address}]);
    let patch: Patch<()> = Patch::Json(serde_json::from_value(operations)?);
    let at = Instant::now();
    let changed = slices.patch_metadata(&name, &PatchParams::default(), &patch).await?;
    let write = at.elapsed();
    let version = changed.metadata.resource_version.context("an object without resourceVersion")?;
    Ok(Change { at, write, version: version.parse().context("a resourceVersion that is no number")? })
}

fn slice_name(number: usize) -> String {
    format!("s{number}-1")
}

async fn create_one(
    services: Api<Service>,
    slices: Api<EndpointSlice>,
    number: usize,
    nodes: usize,
) -> Result<()> {
    let name = format!("s{number}");
    let endpoints: Vec<_> = (number * ENDPOINTS..(number + 1) * ENDPOINTS)
        .map(|pod| {
            let (node, address) = (node_name(pod % nodes), pod_address(pod % nodes, pod / nodes));
            json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}})
        })
        .collect();
    let spec = json!({"clusterIP": objects::cluster_ip(number), "ports": [{"port": 80, "targetPort": 8080}]});
    let service = objects::service(NAMESPACE, &name, &spec);
    let slice = slice(&name, &slice_name(number), &endpoints);
    services.create(&PostParams::default(), &serde_json::from_value(service)?).await?;
    slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    Ok(())
}

fn slice(service: &str, name: &str, endpoints: &[serde_json::Value]) -> serde_json::Value {
    objects::slice(NAMESPACE, name, service, false, &[("", "TCP", 8080)], endpoints)
}
