//! Many Services, changes of one endpoint, and a plain watch on them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::lab::api::Kube;
use crate::lab::objects;

/// Maximum number of concurrent requests.
const CONCURRENCY: usize = 32;
const NAMESPACE: &str = "default";

/// Numbers of endpoints of Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sizes {
    /// Three endpoints each.
    Uniform,
    /// Pareto-distributed from 1 to 400, with an average of about 3.
    Mixed,
}

impl Sizes {
    /// Endpoints of a Service.
    fn of(self, number: usize) -> usize {
        match self {
            Self::Uniform => 3,
            Self::Mixed => {
                // Evenly spread numbers in (0, 1] for any number of Services.
                let share = (number as f64 * 0.618_033_988_749_895).fract().max(1e-9);
                (share.powf(-1.0 / 1.2) as usize).min(MAXIMUM)
            }
        }
    }
}

/// Maximum number of endpoints of a Service.
const MAXIMUM: usize = 400;
/// Endpoints of an EndpointSlice, as the controller of the control plane fills it.
const SLICE: usize = 100;

/// Services `s0` … with their slices.
pub(super) struct Load<'a> {
    kube: &'a Kube,
    services: usize,
    /// Counter that gives every change a new address.
    changes: AtomicUsize,
}

impl<'a> Load<'a> {
    pub(super) fn create(kube: &'a Kube, services: usize, sizes: Sizes) -> Result<Self> {
        let create = |number| create_one(kube, number, sizes.of(number));
        let requests = futures::stream::iter(0..services).map(create);
        kube.block_on(requests.buffer_unordered(CONCURRENCY).try_collect::<Vec<()>>())?;
        Ok(Self { kube, services, changes: AtomicUsize::new(0) })
    }

    /// Replaces one endpoint of one Service; returns the slice's new resourceVersion.
    pub(super) fn change(&self) -> Result<String> {
        let number = self.changes.fetch_add(1, Ordering::Relaxed);
        let name = slice_name(number * 97 % self.services, 0);
        let address = format!("10.250.{}.{}", number / 250 % 250, number % 250 + 1);
        let patch: Patch<Value> = Patch::Json(serde_json::from_value(json!([
            {"op": "replace", "path": "/endpoints/0/addresses/0", "value": address}
        ]))?);
        let api: Api<EndpointSlice> = Api::namespaced(self.kube.client(), NAMESPACE);
        let changed = self.kube.block_on(api.patch(&name, &PatchParams::default(), &patch))?;
        changed.metadata.resource_version.context("the object has no resourceVersion")
    }

    /// Starts a watch that only records events.
    pub(super) fn watch(&self) -> Result<PlainWatch> {
        let api: Api<EndpointSlice> = Api::namespaced(self.kube.client(), NAMESPACE);
        let list = self.kube.block_on(api.list_metadata(&Default::default()))?;
        let version = list.metadata.resource_version.context("the list has no resourceVersion")?;
        let (tell, seen) = channel();
        self.kube.runtime().spawn(async move {
            let parameters = WatchParams::default().timeout(290);
            let Ok(events) = api.watch(&parameters, &version).await else { return };
            let mut events = std::pin::pin!(events);
            while let Some(Ok(event)) = events.next().await {
                let now = Instant::now();
                let (WatchEvent::Added(slice) | WatchEvent::Modified(slice)) = event else { continue };
                let version = slice.metadata.resource_version.unwrap_or_default();
                if tell.send((version, now)).is_err() {
                    return;
                }
            }
        });
        Ok(PlainWatch { seen })
    }
}

/// Events of the plain watch, with the time of arrival.
pub(super) struct PlainWatch {
    seen: Receiver<(String, Instant)>,
}

impl PlainWatch {
    pub(super) fn wait_for(&self, version: &str, timeout: Duration) -> Result<Instant> {
        loop {
            let (seen, when) = self.seen.recv_timeout(timeout)?;
            if seen == version {
                return Ok(when);
            }
        }
    }
}

fn slice_name(service: usize, number: usize) -> String {
    format!("s{service}-{number}")
}

async fn create_one(kube: &Kube, number: usize, endpoints: usize) -> Result<()> {
    let name = format!("s{number}");
    let spec = json!({"clusterIP": objects::cluster_ip(number), "ports": [{"port": 80, "targetPort": 8080}]});
    let service = objects::service(NAMESPACE, &name, &spec);
    create::<Service>(kube, service).await?;
    for first in (0..endpoints).step_by(SLICE) {
        let endpoints: Vec<_> = (first..endpoints.min(first + SLICE))
            .map(|pod| {
                let network = format!("{}.{}", 10 + pod / 150, 100 + pod % 150);
                let address = format!("{network}.{}.{}", number / 250 % 250, number % 250 + 1);
                json!({"addresses": [address], "nodeName": "n9", "conditions": {"ready": true}})
            })
            .collect();
        let slice_name = slice_name(number, first / SLICE);
        let slice = objects::slice(NAMESPACE, &slice_name, &name, false, &[("", "TCP", 8080)], &endpoints);
        create::<EndpointSlice>(kube, slice).await?;
    }
    Ok(())
}

async fn create<K>(kube: &Kube, object: Value) -> Result<()>
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + serde::Serialize,
    K::DynamicType: Default,
{
    let api: Api<K> = Api::namespaced(kube.client(), NAMESPACE);
    api.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    Ok(())
}
