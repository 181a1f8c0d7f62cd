//! Observation of the cluster: the inputs of the next action.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use serde_json::Value;
use switchtower_admin_api::{ConditionType, NodeState, RolloutState};
use switchtower_crds::{ProxyProfile, ProxyRollout, ProxyStatus};

use super::daemon_set;
use super::steps::{Cleanup, LABEL, NodeView, Place, Presence, Rollout};
use crate::cluster::{Cluster, is_ready, is_windows};
use crate::error::CliError;

/// ConfigMap with the DaemonSet as it was before the migration.
pub(super) const RECORD: &str = "switchtower-migration";
/// Key of the DaemonSet in the record, as JSON.
pub(super) const ORIGINAL: &str = "daemonset.json";
/// Label of the Jobs that remove kube-proxy's rules.
pub(super) const JOBS: &str = "app=kube-proxy-cleanup";

/// The cluster at one moment.
pub(super) struct Seen {
    /// Linux nodes, by name.
    pub(super) nodes: Vec<NodeView>,
    /// kube-proxy's DaemonSet, if it exists.
    pub(super) daemon_set: Option<Value>,
    /// The DaemonSet as it was before the migration.
    pub(super) original: Option<Value>,
    profiles: Vec<(ProxyProfile, Option<ProxyRollout>)>,
}

/// Namespace and name of an object.
pub(super) fn key(object: &Value) -> (String, String) {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

impl Seen {
    /// Reads the objects.
    ///
    /// # Errors
    /// An object cannot be read, or the record is damaged.
    pub(super) async fn look(cluster: &Cluster) -> Result<Self, CliError> {
        let record = cluster.find(cluster.system_namespace(), RECORD).await?;
        let original = record.as_ref().map(read_record).transpose()?;
        let daemon_set = match &original {
            Some(original) => {
                let (namespace, name) = key(original);
                cluster.daemon_set(&namespace, &name).await?
            }
            None => the_kube_proxy(cluster.daemon_sets().await?),
        };
        let daemon_set = daemon_set.map(|object| to_value(&object)).transpose()?;
        let (pods, jobs) = match daemon_set.as_ref().or(original.as_ref()).map(selector) {
            Some((namespace, labels)) => (
                cluster.pods_labelled(&namespace, &labels).await?,
                cluster.jobs_labelled(&namespace, JOBS).await?,
            ),
            None => (Vec::new(), Vec::new()),
        };
        let mut profiles = Vec::new();
        for name in [super::steps::ACTIVE_PROFILE, super::steps::SHADOW_PROFILE] {
            if let Some(profile) = cluster.profile(name).await? {
                let latest = profile.status.as_ref().and_then(|status| status.rollout.clone());
                let rollout = match latest {
                    Some(rollout) => cluster.rollout(&rollout).await?,
                    None => None,
                };
                profiles.push((profile, rollout));
            }
        }
        let mut nodes = views(&cluster.nodes().await?, &cluster.rows().await?, &pods, &jobs);
        if daemon_set.is_none() {
            // `finish` deletes the Jobs with the DaemonSet.
            let moved = nodes.iter_mut().filter(|node| node.place == Place::Switchtower);
            moved.for_each(|node| node.cleanup = Cleanup::Complete);
        }
        Ok(Self { nodes, daemon_set, original, profiles })
    }

    pub(super) fn profile(&self, name: &str) -> Option<&ProxyProfile> {
        self.profiles.iter().map(|(profile, _)| profile).find(|profile| name_of(profile) == name)
    }

    /// Returns the state of the latest rollout of a profile.
    pub(super) fn rollout(&self, name: &str) -> Rollout {
        let Some((profile, rollout)) = self.profiles.iter().find(|(profile, _)| name_of(profile) == name)
        else {
            return Rollout::Over;
        };
        let observed = profile.status.as_ref().and_then(|status| status.observed_generation);
        if observed < profile.metadata.generation {
            return Rollout::Running;
        }
        let Some(status) = rollout.as_ref().and_then(|rollout| rollout.status.as_ref()) else {
            return Rollout::Running;
        };
        match RolloutState::from_name(&status.state) {
            Some(RolloutState::Complete) => Rollout::Over,
            Some(RolloutState::Failed | RolloutState::Aborted | RolloutState::Superseded) => {
                let message = status.conditions.iter().find(|condition| condition.type_ == "Stalled");
                let message = message.map(|condition| condition.message.clone());
                Rollout::Failed(message.unwrap_or_else(|| status.state.clone()))
            }
            _ => Rollout::Running,
        }
    }
}

fn name_of(profile: &ProxyProfile) -> &str {
    profile.metadata.name.as_deref().unwrap_or_default()
}

fn to_value(object: &DaemonSet) -> Result<Value, CliError> {
    let value = serde_json::to_value(object)
        .map_err(|error| CliError::new(format!("cannot serialise the DaemonSet of kube-proxy: {error}")))?;
    Ok(value)
}

fn read_record(map: &ConfigMap) -> Result<Value, CliError> {
    let text = map.data.as_ref().and_then(|data| data.get(ORIGINAL)).map(String::as_str).unwrap_or_default();
    serde_json::from_str(text).map_err(|error| {
        CliError::new(format!(
            "ConfigMap {RECORD} has no valid key {ORIGINAL} ({error}): restore it, or delete the ConfigMap to record the \
             present DaemonSet"
        ))
    })
}

/// Returns kube-proxy's DaemonSet if there is exactly one.
fn the_kube_proxy(all: Vec<DaemonSet>) -> Option<DaemonSet> {
    let mut found = all.into_iter().filter(crate::commands::check::is_kube_proxy);
    found.next().filter(|_| found.next().is_none())
}

/// Returns namespace and label selector of a DaemonSet's Pods.
fn selector(object: &Value) -> (String, String) {
    let labels = object.pointer("/spec/selector/matchLabels").and_then(Value::as_object);
    let labels = labels.into_iter().flatten();
    let labels: Vec<String> =
        labels.filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?))).collect();
    (key(object).0, labels.join(","))
}

fn views(nodes: &[Node], rows: &[ProxyStatus], pods: &[Pod], jobs: &[Job]) -> Vec<NodeView> {
    let rows: BTreeMap<&str, &ProxyStatus> =
        rows.iter().filter_map(|row| Some((row.metadata.name.as_deref()?, row))).collect();
    let mut views: Vec<NodeView> = nodes
        .iter()
        .filter(|node| !is_windows(node))
        .filter_map(|node| {
            let name = node.metadata.name.as_deref()?;
            Some(view(name, node, rows.get(name).copied(), pods, jobs))
        })
        .collect();
    views.sort_by(|one, other| one.name.cmp(&other.name));
    views
}

fn view(name: &str, node: &Node, row: Option<&ProxyStatus>, pods: &[Pod], jobs: &[Job]) -> NodeView {
    let label = node.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL));
    let status = row.and_then(|row| row.status.as_ref());
    let exclusive = status.and_then(|status| {
        status.conditions.iter().find(|condition| condition.type_ == ConditionType::Exclusive.as_str())
    });
    let on_node = |pod: &&Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(name);
    let kube_proxy = match pods.iter().find(on_node) {
        None => Presence::Absent,
        Some(pod) if is_ready(pod) && pod.metadata.deletion_timestamp.is_none() => Presence::Ready,
        Some(_) => Presence::NotReady,
    };
    NodeView {
        name: name.to_owned(),
        place: Place::of(label.map(String::as_str)),
        state: status.and_then(|status| NodeState::from_name(&status.state)),
        profile: status
            .and_then(|status| status.profile.as_ref())
            .map(|profile| profile.name.clone())
            .unwrap_or_default(),
        kube_proxy_rules: exclusive.is_some_and(|condition| condition.status == "False"),
        kube_proxy,
        cleanup: cleanup(name, jobs),
    }
}

fn cleanup(node: &str, jobs: &[Job]) -> Cleanup {
    let name = daemon_set::job_name(node);
    let Some(job) = jobs.iter().find(|job| job.metadata.name.as_ref() == Some(&name)) else {
        return Cleanup::Absent;
    };
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut holding =
        conditions.filter(|condition| condition.status == "True").map(|condition| &*condition.type_);
    match holding.find(|kind| matches!(*kind, "Complete" | "Failed")) {
        Some("Complete") => Cleanup::Complete,
        Some(_) => Cleanup::Failed,
        None => Cleanup::Running,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn view_joins_node_row_pod_and_job() {
        let nodes = [
            object::<Node>(json!({"metadata": {"name": "b", "labels": {LABEL: "both"}}})),
            object(json!({"metadata": {"name": "a"}})),
            object(json!({"metadata": {"name": "w", "labels": {"kubernetes.io/os": "windows"}}})),
        ];
        let rows = [object::<ProxyStatus>(json!({
            "metadata": {"name": "b"}, "spec": {},
            "status": {"state": "NotExclusive", "generation": {"desired": 1, "sent": 1, "applied": 1},
                "profile": {"name": "p", "revision": 1, "revisionName": "p@1"},
                "conditions": [{"type": "Exclusive", "status": "False", "reason": "ForeignProxy", "message": "",
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
        }))];
        let pods = [object::<Pod>(json!({
            "spec": {"nodeName": "b", "containers": []},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }))];
        let jobs = [object::<Job>(json!({
            "metadata": {"name": daemon_set::job_name("b")},
            "status": {"conditions": [{"type": "SuccessCriteriaMet", "status": "True"}, {"type": "Complete", "status": "True"}]},
        }))];
        let views = views(&nodes, &rows, &pods, &jobs);
        let wanted = NodeView {
            name: "b".into(),
            place: Place::Both,
            state: Some(NodeState::NotExclusive),
            profile: "p".into(),
            kube_proxy_rules: true,
            kube_proxy: Presence::Ready,
            cleanup: Cleanup::Complete,
        };
        assert_eq!(views.len(), 2);
        assert_eq!(views[1], wanted);
        assert_eq!(
            (views[0].place, views[0].state, views[0].kube_proxy),
            (Place::Untouched, None, Presence::Absent)
        );
    }
}
