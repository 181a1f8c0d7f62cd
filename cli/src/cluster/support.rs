//! Reads of objects and logs for a support bundle, and watches for the dashboard.

use futures::Stream;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ListParams, LogParams};
use kube::core::{ClusterResourceScope, NamespaceResourceScope};
use kube::runtime::{WatchStreamExt as _, watcher};

use super::{Cluster, Pod, explained};
use crate::error::CliError;

/// A container, and the instance whose log to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogOf<'a> {
    pub(crate) pod: &'a str,
    pub(crate) container: &'a str,
    /// The instance before the last restart.
    pub(crate) previous: bool,
    /// Maximum number of latest lines.
    pub(crate) lines: i64,
}

impl Cluster {
    /// Lists the objects of a kind in the namespace of the installation.
    pub(crate) async fn system_objects<K>(&self) -> Result<Vec<K>, CliError>
    where
        K: kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.system_namespace);
        let objects = api.list(&ListParams::default()).await;
        let what = format!("list {}s in {}", K::kind(&()), self.system_namespace);
        Ok(objects.map_err(|error| explained(&what, &error))?.items)
    }

    /// Lists the Events of Switchtower's objects in all namespaces, at most 1,000.
    pub(crate) async fn events(&self) -> Result<Vec<Event>, CliError> {
        let api: Api<Event> = Api::all(self.client.clone());
        let of = ListParams::default().fields("reportingComponent=switchtower-controller").limit(1_000);
        let events = api.list(&of).await;
        Ok(events.map_err(|error| explained("list Events", &error))?.items)
    }

    /// Watches all objects of a custom resource, with backoff after errors.
    pub(crate) fn watch<K>(&self) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + use<K>
    where
        K: kube::Resource<DynamicType = (), Scope = ClusterResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned
            + Send
            + 'static,
    {
        let api: Api<K> = Api::all(self.client.clone());
        watcher(api, watcher::Config::default()).default_backoff()
    }

    /// Reads a log of a pod of the installation.
    pub(crate) async fn log(&self, of: LogOf<'_>) -> Result<String, CliError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.system_namespace);
        let parameters = LogParams {
            container: Some(of.container.to_owned()),
            previous: of.previous,
            tail_lines: Some(of.lines),
            timestamps: true,
            ..LogParams::default()
        };
        let log = api.logs(of.pod, &parameters).await;
        log.map_err(|error| explained(&format!("read the log of {}/{}", of.pod, of.container), &error))
    }
}
