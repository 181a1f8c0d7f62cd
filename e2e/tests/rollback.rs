//! Settings in force after rollouts that fail, are aborted, or whose profile is deleted: messages, rows and packets
//! agree. These tests share the fleet, so they run one after another, each from a fleet without profiles.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::net::SocketAddr;
use std::sync::MutexGuard;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use switchtower_crds::{ProxyProfile, ProxyRollout, ProxyRolloutStatus, ProxyStatus};
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{self, Transport};

use switchtower_e2e::scene::{Scene, alone, cluster_ip, fleet};

/// Timeout of a rollout on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);
/// A pod of each node.
const PODS: [(&str, &str); 3] = [("alpha", "a2"), ("beta", "b1"), ("gamma", "c1")];

fn kubectl(arguments: &[&str]) -> Result<String> {
    fleet().control_plane().kubectl(arguments)
}

/// A fleet without profiles, and a Service whose backend reports the client's address.
struct Stage {
    scene: Scene,
    to: SocketAddr,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    fn new(name: &str) -> Self {
        let alone = alone();
        let scene = Scene::new(name);
        scene.fleet.settled(TIMEOUT).unwrap();
        let service = scene.service("web", &json!({"type": "NodePort"}));
        scene.endpoints("web", &["a1"]);
        Self { to: cluster_ip(&service, false), scene, _alone: alone }
    }

    /// Applies a profile's settings to all nodes at once, without probes; `extra` overrides the spec.
    fn apply(&self, name: &str, settings: &Value, extra: &Value) {
        let mut spec = json!({
            "settings": settings,
            "strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []}},
        });
        for (key, value) in extra.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        let profile = json!({
            "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": name},
            "spec": spec,
        });
        let path = self.scene.fleet.lab().directory().join("profile.json");
        std::fs::write(&path, profile.to_string()).unwrap();
        kubectl(&["apply", "-f", &path.to_string_lossy()]).unwrap();
    }

    /// A strategy with a manually approved canary.
    fn manual() -> Value {
        json!({
            "steps": [{"nodes": 1, "approval": "Manual"}, {"nodes": "100%"}], "gates": {"probes": []},
        })
    }

    /// A strategy whose canary fails if node ports are not served on the node's own addresses.
    fn probing(&self) -> Value {
        let web = json!({"namespace": self.scene.namespace, "name": "web", "port": "tcp"});
        json!({
            "steps": [{"nodes": 1}, {"nodes": "100%"}],
            "gates": {"windowSeconds": 1, "probes": [
                {"name": "np", "type": "NodePort", "service": web, "timeoutMilliseconds": 3000},
            ]},
        })
    }

    fn reaches(&self, rollout: &str, state: &str) -> ProxyRolloutStatus {
        wait::until(&format!("{rollout} is {state}"), TIMEOUT, || {
            let object: Option<ProxyRollout> = fleet().kube().get_cluster(rollout)?;
            let status = object.with_context(|| format!("no ProxyRollout {rollout}"))?.status;
            let status = status.context("without status")?;
            ensure!(status.state == state, "{status:?}");
            Ok(status)
        })
        .with_context(|| self.scene.fleet.controller_log())
        .unwrap()
    }

    /// Checks that each node has this revision in force and no other assigned, and that packets of its pods are
    /// masqueraded accordingly.
    fn nodes_have(&self, expected: [(&str, bool); 3]) {
        let what = format!("the nodes have {expected:?}");
        wait::until(&what, TIMEOUT, || {
            for ((node, pod), (revision, masquerades)) in PODS.into_iter().zip(expected) {
                let row: ProxyStatus = fleet().kube().get_cluster(node)?.context("no row")?;
                let assigned = row.spec.profile.map(|known| format!("{}@{}", known.name, known.revision));
                let in_force = row.status.and_then(|status| status.profile);
                let in_force = in_force.map(|known| known.revision_name).unwrap_or_default();
                ensure!(in_force == revision, "{node} has {in_force}");
                ensure!(assigned.unwrap_or("builtin@0".into()) == revision, "{node} is assigned otherwise");
                let source = probe::send(self.scene.pod(pod), Transport::Tcp, self.to)?.source();
                let source = source.with_context(|| format!("no answer to {pod}"))?;
                let masqueraded = source != self.scene.pod_address(pod, false);
                ensure!(masqueraded == masquerades, "{node}: the backend sees {source}");
            }
            Ok(())
        })
        .with_context(|| self.scene.fleet.controller_log())
        .unwrap();
    }

    /// Waits until a deleted profile is removed.
    fn gone(&self, profile: &str) {
        wait::until(&format!("{profile} is deleted"), TIMEOUT, || {
            let left: Option<ProxyProfile> = fleet().kube().get_cluster(profile)?;
            ensure!(left.is_none(), "{:?}", left.and_then(|left| left.status));
            Ok(())
        })
        .with_context(|| self.scene.fleet.controller_log())
        .unwrap();
    }
}

/// The revision that a rollout names as its nodes' previous one.
fn told(status: &ProxyRolloutStatus) -> String {
    let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled").unwrap();
    let (_, told) = stalled.message.split_once("all nodes were returned to ").unwrap();
    told.to_owned()
}

#[test]
fn failed_and_aborted_changes_return_to_latest_good_one() {
    let stage = Stage::new("again");
    let good = json!({"masqueradeAll": true});
    stage.apply("again", &good, &json!({}));
    stage.reaches("again-1", "Complete");
    stage.nodes_have([("again@1", true); 3]);
    let bad = json!({"masqueradeAll": true, "nodePortAddresses": ["203.0.113.0/24"]});
    stage.apply("again", &bad, &json!({"strategy": stage.probing()}));
    let status = stage.reaches("again-2", "Failed");
    assert_eq!((told(&status).as_str(), status.failed), ("again@1", 1));
    stage.nodes_have([("again@1", true); 3]);
    // Another good revision, and then two that the user aborts.
    stage.apply("again", &good, &json!({"changeCause": "good again"}));
    stage.reaches("again-3", "Complete");
    for number in [4, 5] {
        let strategy = json!({"strategy": Stage::manual(), "changeCause": format!("aborted {number}")});
        stage.apply("again", &json!({"masqueradeAll": false}), &strategy);
        let rollout = format!("again-{number}");
        stage.reaches(&rollout, "Paused");
        kubectl(&["patch", "pxr", &rollout, "--type=merge", "-p", r#"{"spec":{"abort":true}}"#]).unwrap();
        assert_eq!(told(&stage.reaches(&rollout, "Aborted")), "again@3");
        stage.nodes_have([("again@3", true); 3]);
    }
    kubectl(&["delete", "pxp", "again", "--wait=false"]).unwrap();
    stage.gone("again");
    stage.nodes_have([("builtin@0", false); 3]);
}

#[test]
fn overlapping_profile_returns_to_its_own_good_revision() {
    let stage = Stage::new("edge");
    kubectl(&["label", "--overwrite", "node", "gamma", "test/edge=true"]).unwrap();
    stage.apply("below", &json!({}), &json!({"priority": -5}));
    stage.reaches("below-1", "Complete");
    let over = |strategy: Option<Value>, cause: &str| {
        let mut over = json!({
            "priority": 5, "changeCause": cause, "nodeSelector": {"matchLabels": {"test/edge": "true"}},
        });
        if let Some(strategy) = strategy {
            over["strategy"] = strategy;
        }
        over
    };
    let good = json!({"masqueradeAll": true});
    stage.apply("edge", &good, &over(None, "first"));
    stage.reaches("edge-1", "Complete");
    let expected = [("below@1", false), ("below@1", false), ("edge@1", true)];
    stage.nodes_have(expected);
    let bad = json!({"masqueradeAll": false, "nodePortAddresses": ["203.0.113.0/24"]});
    stage.apply("edge", &bad, &over(Some(stage.probing()), "bad"));
    assert_eq!(told(&stage.reaches("edge-2", "Failed")), "edge@1");
    stage.nodes_have(expected);
    stage.apply("edge", &json!({}), &over(Some(Stage::manual()), "aborted"));
    stage.reaches("edge-3", "Paused");
    kubectl(&["patch", "pxr", "edge-3", "--type=merge", "-p", r#"{"spec":{"abort":true}}"#]).unwrap();
    assert_eq!(told(&stage.reaches("edge-3", "Aborted")), "edge@1");
    stage.nodes_have(expected);
    kubectl(&["delete", "pxp", "edge", "--wait=false"]).unwrap();
    stage.gone("edge");
    stage.nodes_have([("below@1", false); 3]);
    kubectl(&["delete", "pxp", "below", "--wait=false"]).unwrap();
    stage.gone("below");
    stage.nodes_have([("builtin@0", false); 3]);
    kubectl(&["label", "node", "gamma", "test/edge-"]).unwrap();
}

#[test]
fn profiles_deleted_together_leave_the_builtin_settings() {
    let stage = Stage::new("together");
    kubectl(&["label", "--overwrite", "node", "gamma", "test/edge=true"]).unwrap();
    let masquerade = json!({"masqueradeAll": true});
    stage.apply("wide", &masquerade, &json!({}));
    stage.reaches("wide-1", "Complete");
    let edge = json!({"priority": 5, "nodeSelector": {"matchLabels": {"test/edge": "true"}}});
    stage.apply("narrow", &masquerade, &edge);
    stage.reaches("narrow-1", "Complete");
    stage.nodes_have([("wide@1", true), ("wide@1", true), ("narrow@1", true)]);
    // Foreground deletion removes the rollouts first; one of them is in progress.
    let strategy = json!({"strategy": Stage::manual(), "changeCause": "on the way"});
    stage.apply("wide", &masquerade, &strategy);
    stage.reaches("wide-2", "Paused");
    kubectl(&["delete", "pxp", "wide", "narrow", "--wait=false", "--cascade=foreground"]).unwrap();
    stage.gone("wide");
    stage.gone("narrow");
    stage.nodes_have([("builtin@0", false); 3]);
    kubectl(&["label", "node", "gamma", "test/edge-"]).unwrap();
}
