//! The built-in settings, which apply to every node without a ProxyProfile.
//!
//! At the installation they are adopted from kube-proxy's configuration, so that the first commit on a node treats
//! connections as kube-proxy did. The decision is stored in the ConfigMap `switchtower-builtin-settings` and never
//! repeated: no restart, and no later edit or deletion of kube-proxy's ConfigMap, changes a whole fleet outside of a
//! rollout. Use a ProxyProfile to change settings.

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use switchtower_admin_api::ConditionType;
use switchtower_crds::ProxyStatus;
use switchtower_crds::builtin::{CONFIG_MAP, Record, RecordError};
use switchtower_crds::kube_proxy;
use switchtower_proto::v1::Settings;

mod decide;

use decide::{Found, PodsSeen};

use crate::cli::BuiltinMode;
use crate::errors::is_missing_kind;
use crate::fleet::builtin_settings;
use crate::lease::Fence;
use crate::rollout::laid_over;

/// Objects asked for at once.
const PAGE: u32 = 500;

/// Why there are no built-in settings yet.
#[derive(Debug, thiserror::Error)]
pub enum BuiltinError {
    /// The API server refused, or did not answer.
    #[error("{what}")]
    Api {
        /// Operation and required permission.
        what: String,
        /// The API server's answer.
        #[source]
        source: Box<kube::Error>,
    },
    /// The stored record is invalid.
    #[error(
        "the ConfigMap {namespace}/{CONFIG_MAP} is unusable; repair it, or delete it to derive the settings again"
    )]
    Record {
        /// Its namespace.
        namespace: String,
        /// Error in the record.
        #[source]
        source: RecordError,
    },
}

fn refused(what: impl Into<String>) -> impl FnOnce(kube::Error) -> BuiltinError {
    let what = what.into();
    move |source| BuiltinError::Api { what, source: Box::new(source) }
}

/// Returns the stored decision, or decides now, with the given mode. Of several controllers that start together, one decides and the
/// others read.
///
/// # Errors
/// The API server refuses or does not answer, or the record is damaged.
pub async fn load(client: &Client, namespace: &str, mode: BuiltinMode) -> Result<Record, BuiltinError> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let reading = || {
        refused(format!(
            "reading the ConfigMap {namespace}/{CONFIG_MAP}; the controller must be allowed to get it"
        ))
    };
    let read = |map: &ConfigMap| {
        Record::read(map).map_err(|source| BuiltinError::Record { namespace: namespace.to_owned(), source })
    };
    if let Some(map) = api.get_opt(CONFIG_MAP).await.map_err(reading())? {
        return read(&map);
    }
    let record = decide::decide(look(client).await?, mode);
    match api.create(&PostParams::default(), &record.config_map()).await {
        Ok(_) => {
            tracing::info!(origin = record.origin.as_str(), explanation = record.explanation, %namespace,
                "built-in settings decided; the ConfigMap {CONFIG_MAP} keeps them");
            Ok(record)
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            read(&api.get(CONFIG_MAP).await.map_err(reading())?)
        }
        Err(error) => Err(refused(format!(
            "creating the ConfigMap {namespace}/{CONFIG_MAP}; the namespace must exist and the controller be allowed to \
             create ConfigMaps in it"
        ))(error)),
    }
}

/// Restores the record after a deletion, once this replica is the leader. `client` refuses writes otherwise. Never
/// returns.
pub async fn keep(client: Client, namespace: String, record: Record, fence: Fence) {
    fence.opened().await;
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
    let seen = watcher::watch_object(api.clone(), CONFIG_MAP).default_backoff();
    futures::pin_mut!(seen);
    while let Some(event) = seen.next().await {
        match event {
            Ok(Some(_)) => {}
            Ok(None) => match api.create(&PostParams::default(), &record.config_map()).await {
                Ok(_) => {
                    tracing::warn!(%namespace, "the ConfigMap {CONFIG_MAP} was deleted and is restored; use a ProxyProfile to change settings");
                }
                Err(error) => {
                    tracing::warn!(%error, %namespace, "the ConfigMap {CONFIG_MAP} was deleted and cannot be restored");
                }
            },
            Err(error) => {
                tracing::debug!(%error, "watching the ConfigMap {CONFIG_MAP} failed; retrying");
            }
        }
    }
}

/// The settings as agents get them.
#[must_use]
pub fn settings(record: &Record) -> Settings {
    laid_over(&builtin_settings(), &record.settings)
}

/// Collects the facts at the installation.
async fn look(client: &Client) -> Result<Found, BuiltinError> {
    if served_before(client).await? {
        return Ok(Found { served_before: true, ..Found::default() });
    }
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), kube_proxy::NAMESPACE);
    let map = api.get_opt(kube_proxy::CONFIG_MAP).await.map_err(refused(format!(
        "reading the ConfigMap {}/{}; the ClusterRole switchtower-controller allows it",
        kube_proxy::NAMESPACE,
        kube_proxy::CONFIG_MAP
    )))?;
    let kube_proxy = map.map(|map| decide::read(&map));
    if matches!(kube_proxy, Some(Ok(_))) {
        return Ok(Found { kube_proxy, ..Found::default() });
    }
    Ok(Found { kube_proxy, pods: look_at_pods(client).await?, served_before: false })
}

/// Some node was served by a version that kept no record (nor reported local detection): its settings must not change
/// now. Rows of a later version mean that a user deleted the record to derive the settings again.
async fn served_before(client: &Client) -> Result<bool, BuiltinError> {
    let api: Api<ProxyStatus> = Api::all(client.clone());
    let listed = each_page(&api, ListParams::default(), |page| {
        page.iter().filter_map(|row| row.status.as_ref()).any(|status| {
            let reported = status
                .conditions
                .iter()
                .any(|condition| condition.type_ == ConditionType::LocalDetection.as_str());
            status.connection.is_some() && !reported
        })
    });
    match listed.await {
        Err(error) if is_missing_kind(&error) => Ok(false),
        other => other.map_err(refused("listing ProxyStatus")),
    }
}

async fn look_at_pods(client: &Client) -> Result<PodsSeen, BuiltinError> {
    let mut seen = PodsSeen::default();
    let nodes: Api<Node> = Api::all(client.clone());
    let add_nodes = |page: &[Node]| {
        page.iter().for_each(|node| seen.add_node(node));
        false
    };
    each_page(&nodes, ListParams::default(), add_nodes).await.map_err(refused("listing Nodes"))?;
    let slices: Api<EndpointSlice> = Api::all(client.clone());
    let add_slices = |page: &[EndpointSlice]| {
        page.iter().for_each(|slice| seen.add_slice(slice));
        seen.is_decided()
    };
    each_page(&slices, ListParams::default(), add_slices).await.map_err(refused("listing EndpointSlices"))?;
    Ok(seen)
}

/// Lists page by page until `enough` returns true or the list ends. Returns the last result of `enough`.
async fn each_page<K>(
    api: &Api<K>,
    params: ListParams,
    mut enough: impl FnMut(&[K]) -> bool,
) -> Result<bool, kube::Error>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned,
{
    let mut params = params.limit(PAGE);
    loop {
        let page = api.list(&params).await?;
        if enough(&page.items) {
            return Ok(true);
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(false),
        }
    }
}
