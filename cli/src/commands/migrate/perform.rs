//! Performs actions until nothing is left, by kubectl.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use switchtower_crds::ProxyProfile;

use super::daemon_set;
use super::kubectl::Kubectl;
use super::lease::Held;
use super::observe::{JOBS, ORIGINAL, RECORD, Seen, key};
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

impl Outcome {
    pub(super) fn is_finished(&self) -> bool {
        matches!(self, Self::Finished(_))
    }
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

    /// Restores kube-proxy's DaemonSet exactly as it was, before any node returns: a later change of its template would restart
    /// kube-proxy on nodes that only it serves. On nodes that moved, its rules have no effect yet.
    pub(super) async fn restore_daemon_set(&self, lease: &mut Held) -> Result<Outcome, CliError> {
        // It would remove the rules of the returning kube-proxy.
        let cleaned = self.until("the removal of kube-proxy's rules", lease, |seen| {
            Ok(seen.nodes.iter().all(|node| node.cleanup != steps::Cleanup::Running))
        });
        let seen = match cleaned.await? {
            Ok(seen) => seen,
            Err(reason) => return Ok(Outcome::Stopped(reason)),
        };
        match (&seen.daemon_set, &seen.original) {
            (Some(object), Some(original)) if !daemon_set::is_restored(original, object) => {
                self.patch_daemon_set(object, &daemon_set::restore_patch(original, object)).await?;
            }
            (Some(_), _) => {}
            (None, Some(original)) => self.kubectl.run_with(&["create"], original).await?,
            (None, None) => {
                return Err(CliError::new(format!(
                    "neither kube-proxy's DaemonSet nor ConfigMap {RECORD} exists: install kube-proxy, then run the command again"
                )));
            }
        }
        Ok(Outcome::Finished(Vec::new()))
    }

    /// Observes the cluster until `holds`. Returns the observation, or as an inner error the reason why it does not hold.
    async fn until(
        &self,
        what: &str,
        lease: &mut Held,
        holds: impl Fn(&Seen) -> Result<bool, String>,
    ) -> Result<Result<Seen, String>, CliError> {
        let started = Instant::now();
        loop {
            lease.renew().await?;
            let seen = Seen::look(self.cluster).await?;
            match holds(&seen) {
                Ok(true) => return Ok(Ok(seen)),
                Err(reason) => return Ok(Err(reason)),
                Ok(false) if started.elapsed() > self.timeout => {
                    return Ok(Err(format!("timeout while waiting for {what}")));
                }
                Ok(false) => tokio::time::sleep(INTERVAL).await,
            }
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
        let rolled_out =
            self.until("the rollout to all nodes", lease, |seen| match seen.rollout(ACTIVE.name) {
                steps::Rollout::Over => Ok(true),
                steps::Rollout::Running => Ok(false),
                steps::Rollout::Failed(message) => Err(format!("the rollout to all nodes failed: {message}")),
            });
        let seen = match rolled_out.await? {
            Ok(seen) => seen,
            Err(reason) => return Ok(Outcome::Stopped(reason)),
        };
        if let Some(object) = &seen.daemon_set {
            let (namespace, name) = key(object);
            self.kubectl.run(&["-n", &namespace, "delete", "daemonset", &name]).await?;
            self.kubectl.run(&["-n", &namespace, "delete", "job", "-l", JOBS, "--ignore-not-found"]).await?;
        }
        Ok(Outcome::Finished(Vec::new()))
    }

    /// Removes what the migration created, after all nodes returned. `shadow`: the built-in settings have mode Shadow;
    /// otherwise the profile that keeps the nodes in it must stay.
    pub(super) async fn clear(&self, shadow: bool, lease: &mut Held) -> Result<Outcome, CliError> {
        let profiles: &[Profile] = if shadow { &[ACTIVE, SHADOW] } else { &[ACTIVE] };
        for profile in profiles {
            if let Some(reason) = self.delete(*profile, lease).await? {
                return Ok(Outcome::Stopped(reason));
            }
        }
        if shadow {
            let label = format!("{LABEL}-");
            self.kubectl.run(&["label", "node", "-l", LABEL, &label]).await?;
        }
        let namespace = self.cluster.system_namespace();
        self.kubectl.run(&["-n", namespace, "delete", "configmap", RECORD, "--ignore-not-found"]).await?;
        Ok(Outcome::Finished(Vec::new()))
    }

    /// Deletes a profile and waits until its nodes have other settings. Returns the reason if they do not get them.
    async fn delete(&self, profile: Profile, lease: &mut Held) -> Result<Option<String>, CliError> {
        let name = profile.name;
        let seen = Seen::look(self.cluster).await?;
        let Some(known) = seen.profile(name) else { return Ok(None) };
        if known.metadata.deletion_timestamp.is_some() {
            // A change of the profile retries what failed in an earlier attempt.
            let change =
                json!({"spec": {"changeCause": format!("delete ({})", Timestamp::now())}}).to_string();
            self.kubectl.run(&["patch", "proxyprofile", name, "--type=merge", "-p", &change]).await?;
        } else {
            self.kubectl.run(&["delete", "proxyprofile", name, "--wait=false"]).await?;
        }
        let what = format!("ProxyProfile {name} to hand over its nodes");
        let gone = self.until(&what, lease, |seen| match seen.profile(name) {
            None => Ok(true),
            Some(profile) => match stalled(profile) {
                Some(message) => Err(format!("ProxyProfile {name} cannot be deleted: {message}")),
                None => Ok(false),
            },
        });
        Ok(gone.await?.err())
    }
}

/// Returns the message of a profile whose latest change failed.
fn stalled(profile: &ProxyProfile) -> Option<String> {
    let conditions = &profile.status.as_ref()?.conditions;
    let stalled = conditions.iter().find(|condition| condition.type_ == "Stalled")?;
    let is_current = stalled.observed_generation >= profile.metadata.generation;
    (stalled.status == "True" && is_current).then(|| stalled.message.clone())
}
