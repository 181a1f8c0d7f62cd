//! Performs actions until nothing is left, by kubectl.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::daemon_set;
use super::kubectl::Kubectl;
use super::lease::Held;
use super::observe::{ORIGINAL, RECORD, Seen, key};
use super::steps::{self, ACTIVE_PROFILE, Action, LABEL, NodeView, SHADOW_PROFILE};
use crate::cluster::Cluster;
use crate::error::CliError;

/// Interval between two observations.
const INTERVAL: Duration = Duration::from_secs(1);

/// A profile of the migration.
#[derive(Clone, Copy)]
struct Profile {
    name: &'static str,
    mode: &'static str,
    labels: &'static [&'static str],
    priority: i32,
}

const ACTIVE: Profile = Profile {
    name: ACTIVE_PROFILE,
    mode: "Active",
    labels: &[steps::BOTH, steps::SWITCHTOWER],
    priority: 1_000_000,
};
/// Precedes: after `finish` the other profile selects all nodes.
const SHADOW: Profile =
    Profile { name: SHADOW_PROFILE, mode: "Shadow", labels: &[steps::KUBE_PROXY], priority: 1_000_001 };

impl Profile {
    fn object(self, cause: &str, all_nodes: bool) -> Value {
        let mut spec = json!({
            "priority": self.priority, "settings": {"mode": self.mode},
            "strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"windowSeconds": 5}},
            "changeCause": format!("{cause} ({})", Timestamp::now()),
        });
        if !all_nodes {
            let expression = json!({"key": LABEL, "operator": "In", "values": self.labels});
            spec["nodeSelector"] = json!({"matchExpressions": [expression]});
        }
        json!({"apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile",
            "metadata": {"name": self.name}, "spec": spec})
    }
}

/// Direction of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    ToSwitchtower,
    ToKubeProxy,
}

/// Result of the loop.
pub(super) enum Outcome {
    /// Nothing is left, except for unreachable nodes.
    Finished(Vec<String>),
    /// An operator must act, or nothing changed in time.
    Stopped(String),
}

/// A migration command that may change the cluster.
pub(super) struct Migration<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) kubectl: &'a Kubectl,
    pub(super) timeout: Duration,
    pub(super) batch: usize,
    /// Nodes to move; empty: all.
    pub(super) only: &'a [String],
}

impl Migration<'_> {
    /// Records kube-proxy's DaemonSet and keeps it off labelled nodes.
    pub(super) async fn prepare(&self, seen: &Seen) -> Result<(), CliError> {
        let Some(object) = &seen.daemon_set else { return Ok(()) };
        if seen.original.is_none() {
            let data = json!({ORIGINAL: daemon_set::original(object).to_string()});
            let record = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": data,
                "metadata": {"name": RECORD, "namespace": self.cluster.system_namespace()}});
            // Fails if another command created it.
            self.kubectl.run_with(&["create"], &record).await?;
        }
        if !daemon_set::avoids(object) {
            self.patch_daemon_set(object, &daemon_set::avoid_patch(object)).await?;
        }
        Ok(())
    }

    async fn patch_daemon_set(&self, object: &Value, patch: &Value) -> Result<(), CliError> {
        let (namespace, name) = key(object);
        let patch = patch.to_string();
        self.kubectl.run(&["-n", &namespace, "patch", "daemonset", &name, "--type=json", "-p", &patch]).await
    }

    /// Recreates the DaemonSet that `finish` deleted.
    pub(super) async fn recreate(&self, seen: &Seen) -> Result<(), CliError> {
        match (&seen.daemon_set, &seen.original) {
            (Some(_), _) => self.prepare(seen).await,
            (None, Some(original)) => {
                self.kubectl.run_with(&["create"], &daemon_set::recreated(original)).await
            }
            (None, None) => Err(CliError::new(format!(
                "neither kube-proxy's DaemonSet nor ConfigMap {RECORD} exists: install kube-proxy, then run the command again"
            ))),
        }
    }

    /// Performs actions until nothing is left or nothing changes for the timeout.
    pub(super) async fn run(&self, direction: Direction, lease: &mut Held) -> Result<Outcome, CliError> {
        let (mut tried, mut waiting) = (false, None::<(String, Instant)>);
        loop {
            lease.renew().await?;
            let seen = Seen::look(self.cluster).await?;
            let nodes: Vec<NodeView> =
                seen.nodes.iter().filter(|node| self.concerns(node)).cloned().collect();
            let action = match direction {
                Direction::ToSwitchtower => {
                    steps::forward(&nodes, &seen.rollout(ACTIVE.name), self.batch, tried)
                }
                Direction::ToKubeProxy => steps::back(&nodes, &seen.rollout(SHADOW.name), self.batch, tried),
            };
            match action {
                Action::Finished(away) => return Ok(Outcome::Finished(away)),
                Action::Stuck(reason) => return Ok(Outcome::Stopped(reason)),
                Action::Wait(reason) => {
                    let since = match &waiting {
                        Some((known, since)) if *known == reason => *since,
                        _ => {
                            self.kubectl.progress(&format!("# waiting for {reason}"));
                            Instant::now()
                        }
                    };
                    if since.elapsed() > self.timeout {
                        return Ok(Outcome::Stopped(format!("timeout while waiting for {reason}")));
                    }
                    waiting = Some((reason, since));
                    tokio::time::sleep(INTERVAL).await;
                }
                other => {
                    waiting = None;
                    tried = matches!(other, Action::Activate(_) | Action::Deactivate(_)) || tried;
                    self.perform(&other, &seen).await?;
                }
            }
        }
    }

    /// Nodes that are on the way count even if the command names others.
    fn concerns(&self, node: &NodeView) -> bool {
        self.only.is_empty() || self.only.contains(&node.name) || node.place != steps::Place::Untouched
    }

    async fn perform(&self, action: &Action, seen: &Seen) -> Result<(), CliError> {
        match action {
            Action::Activate(nodes) => {
                self.label(nodes, steps::BOTH).await?;
                self.roll_out(ACTIVE, &format!("migrate {}", nodes.join(", "))).await
            }
            Action::Detach(node) => self.label(std::slice::from_ref(node), steps::SWITCHTOWER).await,
            Action::CleanUp(node) => {
                let object = seen.daemon_set.as_ref().or(seen.original.as_ref());
                let object =
                    object.ok_or_else(|| CliError::new("kube-proxy's DaemonSet and its record are gone"))?;
                self.kubectl.run_with(&["create"], &daemon_set::cleanup_job(object, node)).await
            }
            Action::Attach(nodes) => {
                let object = seen.daemon_set.as_ref().or(seen.original.as_ref());
                let namespace = object.map(|object| key(object).0).unwrap_or_default();
                for node in nodes {
                    // The next migration needs a new one.
                    let job = daemon_set::job_name(node);
                    self.kubectl
                        .run(&["-n", &namespace, "delete", "job", &job, "--ignore-not-found"])
                        .await?;
                }
                self.label(nodes, steps::BOTH).await
            }
            Action::Deactivate(nodes) => {
                self.label(nodes, steps::KUBE_PROXY).await?;
                self.roll_out(SHADOW, &format!("return {}", nodes.join(", "))).await
            }
            Action::Wait(_) | Action::Stuck(_) | Action::Finished(_) => Ok(()),
        }
    }

    async fn label(&self, nodes: &[String], value: &str) -> Result<(), CliError> {
        let change = format!("{LABEL}={value}");
        let mut arguments = vec!["label", "node", "--overwrite"];
        arguments.extend(nodes.iter().map(String::as_str));
        arguments.push(&change);
        self.kubectl.run(&arguments).await
    }

    async fn roll_out(&self, profile: Profile, cause: &str) -> Result<(), CliError> {
        let cause: String = cause.chars().take(200).collect();
        self.kubectl.run_with(&["apply"], &profile.object(&cause, false)).await
    }

    /// Extends mode Active to all nodes, also to later ones, and deletes kube-proxy's DaemonSet.
    pub(super) async fn finish(&self, lease: &mut Held) -> Result<Outcome, CliError> {
        self.kubectl.run_with(&["apply"], &ACTIVE.object("finish the migration", true)).await?;
        let started = Instant::now();
        let seen = loop {
            lease.renew().await?;
            let seen = Seen::look(self.cluster).await?;
            match seen.rollout(ACTIVE.name) {
                steps::Rollout::Over => break seen,
                steps::Rollout::Failed(message) => {
                    return Ok(Outcome::Stopped(format!("the rollout to all nodes failed: {message}")));
                }
                steps::Rollout::Running if started.elapsed() > self.timeout => {
                    return Ok(Outcome::Stopped(
                        "timeout while waiting for the rollout to all nodes".to_owned(),
                    ));
                }
                steps::Rollout::Running => tokio::time::sleep(INTERVAL).await,
            }
        };
        if let Some(object) = &seen.daemon_set {
            let (namespace, name) = key(object);
            self.kubectl.run(&["-n", &namespace, "delete", "daemonset", &name]).await?;
        }
        Ok(Outcome::Finished(Vec::new()))
    }

    /// Restores kube-proxy's DaemonSet after all nodes returned, and removes what the migration created. `shadow`: the
    /// built-in settings have mode Shadow; otherwise the profile that keeps the nodes in it must stay.
    pub(super) async fn restore(&self, shadow: bool) -> Result<(), CliError> {
        let seen = Seen::look(self.cluster).await?;
        if let (Some(original), Some(object)) = (&seen.original, &seen.daemon_set) {
            self.patch_daemon_set(object, &daemon_set::restore_patch(original, object)).await?;
        }
        if seen.profile(ACTIVE.name).is_some() {
            self.kubectl.run(&["delete", "proxyprofile", ACTIVE.name]).await?;
        }
        if shadow {
            if seen.profile(SHADOW.name).is_some() {
                self.kubectl.run(&["delete", "proxyprofile", SHADOW.name]).await?;
            }
            let label = format!("{LABEL}-");
            self.kubectl.run(&["label", "node", "-l", LABEL, &label]).await?;
        }
        let namespace = self.cluster.system_namespace();
        self.kubectl.run(&["-n", namespace, "delete", "configmap", RECORD, "--ignore-not-found"]).await
    }
}
