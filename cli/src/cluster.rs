//! Client for the API server, with the permissions of the user.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::jiff::fmt::rfc2822;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource as _};
use serde_json::Value;
use switchtower_admin_api::{self as admin, codes};
use switchtower_crds::{ProxyProfile, ProxyRollout, ProxyStatus};

mod migration;
pub(crate) mod support;

use crate::args::Global;
use crate::error::{CliError, chain};

/// Minimum lifetime of a token that the API server accepts, in seconds.
const TOKEN_SECONDS: i64 = 600;
/// ConfigMap in which the controller publishes its CA.
const BOOTSTRAP: &str = "switchtower-bootstrap";
/// Label that names the Service of an EndpointSlice.
pub(crate) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Connection to the API server.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    namespace: String,
    system_namespace: String,
}

impl Cluster {
    /// Loads the kubeconfig, without sending a request.
    pub(crate) async fn new(global: &Global) -> Result<Self, CliError> {
        let options = KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
        let kubeconfig = match &global.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let unusable = |error: &dyn std::error::Error| {
            CliError::new(format!("cannot use the kubeconfig: {}; check that kubectl works", chain(error)))
        };
        let kubeconfig = kubeconfig.map_err(|error| unusable(&error))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
        let config = config.map_err(|error| unusable(&error))?;
        let namespace = global.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| unusable(&error))?;
        Ok(Self { client, namespace, system_namespace: global.system_namespace.clone() })
    }

    /// Returns the namespace of Services and pods.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the namespace of the installation.
    pub(crate) fn system_namespace(&self) -> &str {
        &self.system_namespace
    }

    /// Returns the time of the API server, to compare with times in rows. Falls back to the local clock.
    pub(crate) async fn now(&self) -> Timestamp {
        let server = async {
            let request = http::Request::get("/version").body(kube::client::Body::empty()).ok()?;
            let response = self.client.send(request).await.ok()?;
            let date = response.headers().get(http::header::DATE)?.to_str().ok()?;
            Some(rfc2822::parse(date).ok()?.timestamp())
        };
        server.await.unwrap_or_else(Timestamp::now)
    }

    /// Returns the custom resources that the API server serves.
    pub(crate) async fn kinds(&self) -> Result<Kinds, CliError> {
        match self.client.list_api_group_resources(ProxyStatus::api_version(&()).as_ref()).await {
            Ok(list) => Ok(Kinds::new(&list)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Kinds::default()),
            Err(error) => Err(explained("list the kinds of switchtower.dev", &error)),
        }
    }

    /// Lists all ProxyStatus objects.
    pub(crate) async fn rows(&self) -> Result<Vec<ProxyStatus>, CliError> {
        let api: Api<ProxyStatus> = Api::all(self.client.clone());
        let rows = api.list(&ListParams::default()).await;
        Ok(rows.map_err(|error| explained("list ProxyStatus", &error))?.items)
    }

    /// Applies a merge patch to the spec of a ProxyStatus.
    pub(crate) async fn patch_row(&self, name: &str, spec: &Value) -> Result<ProxyStatus, CliError> {
        let api: Api<ProxyStatus> = Api::all(self.client.clone());
        let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
        let patched = api.patch(name, &PatchParams::default(), &patch).await;
        patched.map_err(|error| explained(&format!("change ProxyStatus {name}"), &error))
    }

    pub(crate) async fn profiles(&self) -> Result<Vec<ProxyProfile>, CliError> {
        let api: Api<ProxyProfile> = Api::all(self.client.clone());
        let profiles = api.list(&ListParams::default()).await;
        Ok(profiles.map_err(|error| explained("list ProxyProfiles", &error))?.items)
    }

    pub(crate) async fn rollouts(&self) -> Result<Vec<ProxyRollout>, CliError> {
        let api: Api<ProxyRollout> = Api::all(self.client.clone());
        let rollouts = api.list(&ListParams::default()).await;
        Ok(rollouts.map_err(|error| explained("list ProxyRollouts", &error))?.items)
    }

    pub(crate) async fn rollout(&self, name: &str) -> Result<Option<ProxyRollout>, CliError> {
        let api: Api<ProxyRollout> = Api::all(self.client.clone());
        api.get_opt(name).await.map_err(|error| explained(&format!("read ProxyRollout {name}"), &error))
    }

    /// Applies a merge patch to the spec of a rollout.
    pub(crate) async fn patch_rollout(&self, name: &str, spec: &Value) -> Result<ProxyRollout, CliError> {
        let api: Api<ProxyRollout> = Api::all(self.client.clone());
        let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
        let patched = api.patch(name, &PatchParams::default(), &patch).await;
        patched.map_err(|error| explained(&format!("change ProxyRollout {name}"), &error))
    }

    pub(crate) async fn service(&self, namespace: &str, name: &str) -> Result<Option<Service>, CliError> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("read Service {namespace}/{name}");
        api.get_opt(name).await.map_err(|error| explained(&what, &error))
    }

    pub(crate) async fn slices(&self, namespace: &str, name: &str) -> Result<Vec<EndpointSlice>, CliError> {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), namespace);
        let of = ListParams::default().labels(&format!("{SERVICE_NAME_LABEL}={name}"));
        let slices = api.list(&of).await;
        let what = format!("list EndpointSlices of {namespace}/{name}");
        Ok(slices.map_err(|error| explained(&what, &error))?.items)
    }

    /// Lists the EndpointSlices of all namespaces, in pages.
    pub(crate) async fn all_slices(&self) -> Result<Vec<EndpointSlice>, CliError> {
        let api: Api<EndpointSlice> = Api::all(self.client.clone());
        let mut page = ListParams::default().limit(500);
        let mut slices = Vec::new();
        loop {
            let list = api.list(&page).await.map_err(|error| explained("list EndpointSlices", &error))?;
            slices.extend(list.items);
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(slices),
            }
        }
    }

    /// Returns the latest resourceVersions of Services and EndpointSlices in the cluster.
    pub(crate) async fn newest(&self) -> Result<(u64, u64), CliError> {
        let one = ListParams::default().limit(1);
        let services = Api::<Service>::all(self.client.clone()).list(&one).await;
        let services = services.map_err(|error| explained("list Services", &error))?;
        let slices = Api::<EndpointSlice>::all(self.client.clone()).list(&one).await;
        let slices = slices.map_err(|error| explained("list EndpointSlices", &error))?;
        Ok((version(services.metadata.resource_version), version(slices.metadata.resource_version)))
    }

    pub(crate) async fn pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>, CliError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("read Pod {namespace}/{name}");
        api.get_opt(name).await.map_err(|error| explained(&what, &error))
    }

    pub(crate) async fn nodes(&self) -> Result<Vec<Node>, CliError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let nodes = api.list(&ListParams::default()).await;
        Ok(nodes.map_err(|error| explained("list Nodes", &error))?.items)
    }

    /// Lists all DaemonSets.
    pub(crate) async fn daemon_sets(&self) -> Result<Vec<DaemonSet>, CliError> {
        let api: Api<DaemonSet> = Api::all(self.client.clone());
        let sets = api.list(&ListParams::default()).await;
        Ok(sets.map_err(|error| explained("list DaemonSets", &error))?.items)
    }

    /// Lists pods of a namespace by label.
    pub(crate) async fn pods_labelled(&self, namespace: &str, label: &str) -> Result<Vec<Pod>, CliError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pods = api.list(&ListParams::default().labels(label)).await;
        Ok(pods.map_err(|error| explained(&format!("list Pods in {namespace}"), &error))?.items)
    }

    /// Returns a ConfigMap if it exists.
    pub(crate) async fn find(&self, namespace: &str, name: &str) -> Result<Option<ConfigMap>, CliError> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let what = format!("read ConfigMap {namespace}/{name}");
        api.get_opt(name).await.map_err(|error| explained(&what, &error))
    }

    /// Returns Calico's settings for all nodes, or `None` without Calico.
    pub(crate) async fn felix_configuration(&self) -> Result<Option<DynamicObject>, CliError> {
        let kind = GroupVersionKind::gvk("crd.projectcalico.org", "v1", "FelixConfiguration");
        let api: Api<DynamicObject> = Api::all_with(
            self.client.clone(),
            &ApiResource::from_gvk_with_plural(&kind, "felixconfigurations"),
        );
        match api.get("default").await {
            Ok(found) => Ok(Some(found)),
            // For a kind that is not installed the API server responds with plain text, not with a Status.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(explained("read FelixConfiguration default", &error)),
        }
    }

    /// Returns true if a namespaced object exists.
    pub(crate) async fn exists<K>(&self, namespace: &str, name: &str) -> Result<bool, CliError>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let kind = K::kind(&K::DynamicType::default()).to_string();
        let found = api.get_metadata_opt(name).await;
        let what = format!("read {kind} {namespace}/{name}");
        Ok(found.map_err(|error| explained(&what, &error))?.is_some())
    }

    /// Returns major and minor version of the API server.
    pub(crate) async fn version(&self) -> Result<(u32, u32), CliError> {
        let version = self.client.apiserver_version().await;
        let version = version.map_err(|error| explained("read the API server's version", &error))?;
        let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
        Ok((number(&version.major), number(&version.minor)))
    }

    /// Returns the names of the controller pods, ready ones first. Each answers for all nodes.
    pub(crate) async fn controller_pods(&self) -> Result<Vec<String>, CliError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.system_namespace);
        let of = ListParams::default().labels("app.kubernetes.io/name=switchtower-controller");
        let mut pods =
            api.list(&of).await.map_err(|error| explained("list the controller's pods", &error))?.items;
        pods.sort_by_key(|pod| !is_ready(pod));
        let Some(first) = pods.first() else {
            let message = format!(
                "no controller pod in namespace {}; if Switchtower is installed in another namespace, set \
                 --system-namespace",
                self.system_namespace
            );
            return Err(CliError::coded(codes::CONTROLLER_UNREACHABLE, message));
        };
        let name = |pod: &Pod| pod.metadata.name.clone().unwrap_or_default();
        if let Some(why) = why_not_running(first) {
            let message =
                format!("controller pod {}/{} is not running: {why}", self.system_namespace, name(first));
            return Err(CliError::coded(codes::CONTROLLER_UNREACHABLE, message));
        }
        Ok(pods.iter().filter(|pod| why_not_running(pod).is_none()).map(name).collect())
    }

    /// Returns the CA of the controller's certificate.
    pub(crate) async fn controller_ca(&self) -> Result<String, CliError> {
        self.bootstrap().await?.and_then(|mut data| data.remove("ca.crt")).ok_or_else(|| {
            let message = format!(
                "ConfigMap {BOOTSTRAP} not found in namespace {}; the controller writes it when it starts",
                self.system_namespace
            );
            CliError::coded(codes::CONTROLLER_UNREACHABLE, message)
        })
    }

    async fn bootstrap(&self) -> Result<Option<BTreeMap<String, String>>, CliError> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.system_namespace);
        let map = api.get_opt(BOOTSTRAP).await;
        let map = map.map_err(|error| explained(&format!("read ConfigMap {BOOTSTRAP}"), &error))?;
        Ok(map.and_then(|map| map.data))
    }

    /// Creates a token for the controller's admin API.
    pub(crate) async fn token(&self, account: &str) -> Result<String, CliError> {
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.system_namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![admin::AUDIENCE.to_owned()],
                expiration_seconds: Some(TOKEN_SECONDS),
                bound_object_ref: None,
            },
            ..TokenRequest::default()
        };
        let answer = api.create_token_request(account, &PostParams::default(), &request).await;
        let what = format!("create a token of ServiceAccount {}/{account}", self.system_namespace);
        let answer = answer.map_err(|error| explained(&what, &error))?;
        let token = answer.status.map(|status| status.token);
        token.ok_or_else(|| CliError::new("the response to the TokenRequest contains no token"))
    }
}

/// Labels of kube-proxy's Pods: of static manifests, and of kubeadm's DaemonSet.
pub(crate) const KUBE_PROXY_LABELS: [&str; 2] = ["component=kube-proxy", "k8s-app=kube-proxy"];

/// Returns whether a Node has the label of Windows.
pub(crate) fn is_windows(node: &Node) -> bool {
    let labels = node.metadata.labels.as_ref();
    labels.is_some_and(|labels| labels.get("kubernetes.io/os").is_some_and(|os| os == "windows"))
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Returns the reason why a pod is not running, as reported by the kubelet or the scheduler.
fn why_not_running(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let sentence = |reason: Option<&String>, message: Option<&String>| {
        let parts: Vec<&str> = [reason, message].into_iter().flatten().map(String::as_str).collect();
        parts.join(": ")
    };
    let containers = status.container_statuses.iter().flatten();
    let states = containers.filter_map(|container| container.state.as_ref());
    for state in states {
        if let Some(waiting) = &state.waiting {
            return Some(sentence(waiting.reason.as_ref(), waiting.message.as_ref()));
        }
        if let Some(end) = &state.terminated {
            let why = sentence(end.reason.as_ref(), end.message.as_ref());
            return Some(format!("container exited with code {}: {why}", end.exit_code));
        }
    }
    let conditions = status.conditions.iter().flatten();
    let unscheduled =
        conditions.into_iter().find(|known| known.type_ == "PodScheduled" && known.status == "False");
    match (unscheduled, status.phase.as_deref()) {
        (Some(condition), _) => Some(sentence(condition.reason.as_ref(), condition.message.as_ref())),
        (None, None | Some("Running")) => None,
        (None, Some(phase)) => Some(format!("the pod is {phase}")),
    }
}

/// Custom resources of Switchtower by plural name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds {
    pub(crate) served: Vec<String>,
    pub(crate) terminating: Vec<String>,
}

impl Kinds {
    /// Plural names of all custom resources.
    pub(crate) const ALL: [&str; 3] = ["proxystatuses", "proxyprofiles", "proxyrollouts"];

    /// Reads the discovery document. A CRD that is being deleted is listed without the verb `create`.
    fn new(list: &APIResourceList) -> Self {
        let mut kinds = Self::default();
        for resource in list.resources.iter().filter(|resource| Self::ALL.contains(&&*resource.name)) {
            let creatable = resource.verbs.iter().any(|verb| verb == "create");
            if creatable { &mut kinds.served } else { &mut kinds.terminating }.push(resource.name.clone());
        }
        kinds
    }

    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let known = |name: &&str| self.served.iter().chain(&self.terminating).any(|known| known == name);
        Self::ALL.into_iter().filter(|name| !known(name)).collect()
    }
}

/// Parses a resourceVersion as a number (KEP-5504); 0 if it is not a number.
pub(crate) fn version(text: Option<String>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

pub(crate) fn explained(what: &str, error: &kube::Error) -> CliError {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            CliError::coded(codes::NO_RIGHT, format!("cannot {what}: {}", status.message))
        }
        kube::Error::Api(status) if status.code == 404 && what.contains("Proxy") => {
            let message = format!("cannot {what}: the API server does not know this kind of object");
            CliError::coded(codes::NOT_INSTALLED, message)
        }
        kube::Error::Api(status) => CliError::new(format!("cannot {what}: {}", status.message)),
        other => CliError::new(format!(
            "cannot {what}: {}; check that kubectl reaches the API server",
            chain(other)
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kinds_are_read_from_discovery() {
        let list: APIResourceList = serde_json::from_value(json!({
            "groupVersion": "switchtower.dev/v1alpha1",
            "resources": [
                {"name": "proxystatuses", "kind": "ProxyStatus", "namespaced": false, "singularName": "",
                 "verbs": ["get", "list", "create", "patch"]},
                {"name": "proxystatuses/status", "kind": "ProxyStatus", "namespaced": false, "singularName": "",
                 "verbs": ["get", "patch"]},
                {"name": "proxyprofiles", "kind": "ProxyProfile", "namespaced": false, "singularName": "",
                 "verbs": ["get", "list", "delete"]},
            ],
        }))
        .unwrap();
        let kinds = Kinds::new(&list);
        assert_eq!(
            (&*kinds.served, &*kinds.terminating),
            (&["proxystatuses".to_owned()][..], &["proxyprofiles".to_owned()][..])
        );
        assert_eq!(kinds.missing(), ["proxyrollouts"]);
        assert_eq!(Kinds::default().missing(), Kinds::ALL);
    }

    #[test]
    fn reason_of_a_stopped_controller_is_found() {
        let pod = |status: Value| -> Pod { serde_json::from_value(json!({"status": status})).unwrap() };
        let container = |state: Value| json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]);
        let waits = container(json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}));
        let ended =
            container(json!({"terminated": {"exitCode": 1, "reason": "Error", "message": "no kubeconfig"}}));
        let runs = container(json!({"running": {"startedAt": null}}));
        let why = |status| why_not_running(&pod(status));
        let waits = why(json!({"phase": "Pending", "containerStatuses": waits}));
        assert_eq!(waits.as_deref(), Some("ImagePullBackOff: no such image"));
        let ended = why(json!({"phase": "Running", "containerStatuses": ended}));
        assert_eq!(ended.as_deref(), Some("container exited with code 1: Error: no kubeconfig"));
        let nowhere = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available"}]);
        let nowhere = why(json!({"phase": "Pending", "conditions": nowhere}));
        assert_eq!(nowhere.as_deref(), Some("Unschedulable: 0/3 nodes are available"));
        assert_eq!(why(json!({"phase": "Running", "containerStatuses": runs})), None);
        assert_eq!(why(json!({"phase": "Failed"})).as_deref(), Some("the pod is Failed"));
    }
}
