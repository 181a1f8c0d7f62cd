//! Alert rules and dashboards only use metrics that the controller and the agents export, and every alert has a
//! runbook. Tests that count events of the shared fleet run one after another.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::ensure;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::programs;
use switchtower_e2e::lab::programs::repository as root;
use switchtower_e2e::lab::wait;

use switchtower_e2e::scene::{SOON, Scene, alone, fleet, node};

mod page;

fn rules() -> String {
    fs::read_to_string(root().join("manifests/components/alerts/rules.yaml")).unwrap()
}

/// Metric names in an expression, without the suffixes of histograms.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
    let ours =
        |word: &&str| ["switchtower_", "kubeproxy_", "process_"].iter().any(|known| word.starts_with(known));
    let base = |word: &str| {
        let suffix = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
        suffix.unwrap_or(word).to_owned()
    };
    words.filter(ours).map(base).collect()
}

/// The expressions of all dashboards.
fn dashboards() -> Vec<(String, Vec<String>)> {
    let folder = root().join("manifests/components/dashboards");
    let files = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let json = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    json.map(|path| {
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
        let expressions = targets.map(|target| target["expr"].as_str().unwrap().to_owned());
        (path.file_name().unwrap().to_string_lossy().into_owned(), expressions.collect())
    })
    .collect()
}

#[test]
fn alerts_and_dashboards_use_existing_metrics() {
    let _alone = alone();
    let scene = Scene::new("measured");
    scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    scene.fleet.settled(SOON).unwrap();
    // A node that lags behind, so that its series exists: a change while its agent is stopped.
    let alpha = node(scene.fleet, "alpha");
    scene.fleet.stop_agent(alpha, libc::SIGKILL).unwrap();
    scene.endpoints("web", &["a1", "b1"]);
    let behind = wait::until("the controller reports that alpha lags behind", SOON, || {
        let seconds = scene.fleet.controller_metric("switchtower_node_behind_seconds", "node=\"alpha\"")?;
        ensure!(seconds > 0.0, "{seconds} seconds");
        scene.fleet.controller_metric("switchtower_nodes", "")
    });
    assert_eq!(behind.unwrap(), 3.0, "all states together are all nodes");
    scene.fleet.run_agent(alpha).unwrap();
    // A profile, so that a rollout exists.
    let profile = json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "measured"},
        "spec": {"strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []}}},
    });
    scene.fleet.kube().apply(&profile).unwrap();
    wait::until("the rollout is complete and reported", Duration::from_secs(40), || {
        let labels = "reason=\"Complete\",rollout=\"measured-1\",state=\"Complete\"";
        let told = scene.fleet.controller_metric("switchtower_rollout_info", labels)?;
        ensure!(told == 1.0, "{told}");
        Ok(())
    })
    .unwrap();
    let updated = "result=\"updated\",rollout=\"measured-1\"";
    assert_eq!(scene.fleet.controller_metric("switchtower_rollout_nodes", updated).unwrap(), 3.0);
    scene.fleet.settled(Duration::from_secs(20)).unwrap();
    assert_eq!(scene.fleet.controller_metric("switchtower_node_behind_seconds", "").unwrap(), 0.0);

    let printed = scene.fleet.metrics().unwrap();
    let exist: BTreeSet<_> = printed
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_whitespace().next().map(str::to_owned))
        .collect();
    // Series that exist only after certain events, and the one observed a moment ago.
    let rare = [
        "switchtower_nacks_total",
        "switchtower_refusals_total",
        "switchtower_drift_total",
        "switchtower_watch_errors_total",
        "switchtower_node_behind_seconds",
    ];
    let mut asked = vec![("rules.yaml".to_owned(), vec![rules()])];
    asked.extend(dashboards());
    assert!(asked.len() >= 3, "{asked:?}");
    for (file, expressions) in asked {
        let names: BTreeSet<_> = expressions.iter().flat_map(|text| metrics_in(text)).collect();
        assert!(names.len() > 5, "{file}: {names:?}");
        for name in names {
            assert!(exist.contains(&name) || rare.contains(&name.as_str()), "{file} uses {name}");
        }
    }
}

#[test]
fn alerts_fire_under_their_conditions() {
    let output = Command::new(programs::tool("promtool").unwrap())
        .args(["test", "rules", "rules_test.yaml"])
        .current_dir(root().join("manifests/components/alerts"))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
}

#[test]
fn every_alert_has_a_runbook_and_every_runbook_an_alert() {
    let named = |line: &str| line.trim().strip_prefix("- alert: ").map(str::to_owned);
    let alerts: BTreeSet<_> = rules().lines().filter_map(named).collect();
    let runbooks: BTreeSet<_> = fs::read_dir(root().join("docs/runbooks"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    assert!(alerts.len() > 5);
    assert_eq!(alerts, runbooks);
    for alert in &alerts {
        assert!(
            rules().contains(&format!("runbook_url: https://switchtower.dev/docs/runbooks/{alert}.md")),
            "{alert} does not name its runbook"
        );
        let tests = fs::read_to_string(root().join("manifests/components/alerts/rules_test.yaml")).unwrap();
        assert!(tests.contains(&format!("alertname: {alert}")), "{alert} has no test");
    }
}

#[test]
fn programming_latency_measured_as_by_kube_proxy() {
    let _alone = alone();
    let scene = Scene::new("triggered");
    scene.service("web", &json!({}));
    scene.endpoints("web", &["c1"]);
    scene.fleet.settled(SOON).unwrap();
    let beta = node(fleet(), "beta");
    let metric = |name: &str| scene.fleet.agent_metric(beta, name, "ip_family=\"IPv4\"").unwrap();
    let measured = "kubeproxy_network_programming_duration_seconds";
    let (count, sum) = (metric(&format!("{measured}_count")), metric(&format!("{measured}_sum")));
    let arrived = metric("kubeproxy_sync_proxy_rules_endpoint_changes_total");

    // A change that was triggered twenty seconds ago.
    let began = SystemTime::now() - Duration::from_secs(20);
    let (pod, at) = scene.fleet.pod("c2").unwrap();
    let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
    let endpoint = objects::endpoint(pod, &at.net, false);
    let mut slice = objects::slice("triggered", "web-4", "web", false, &ports, &[endpoint]);
    slice["metadata"]["annotations"] = json!({
        "endpoints.kubernetes.io/last-change-trigger-time": Timestamp::try_from(began).unwrap().to_string(),
    });
    scene.fleet.kube().apply(&slice).unwrap();
    wait::until("the agent has measured it", SOON, || {
        ensure!(metric(&format!("{measured}_count")) > count);
        Ok(())
    })
    .unwrap();
    let took = metric(&format!("{measured}_sum")) - sum;
    assert!((20.0..40.0).contains(&took), "{took} seconds");
    assert!(metric("kubeproxy_sync_proxy_rules_endpoint_changes_total") > arrived);
    scene.fleet.settled(SOON).unwrap();
    assert_eq!(metric("kubeproxy_sync_proxy_rules_endpoint_changes_pending"), 0.0);
}

#[test]
fn ports_without_local_endpoint_counted_as_by_kube_proxy() {
    let _alone = alone();
    let scene = Scene::new("nobody-local");
    scene.service("web", &json!({"internalTrafficPolicy": "Local"}));
    scene.endpoints("web", &["a1"]);
    let count = |name: &str| {
        let metric = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
        let labels = "ip_family=\"IPv6\",traffic_policy=\"internal\"";
        scene.fleet.agent_metric(node(scene.fleet, name), metric, labels)
    };
    // The agent counts them when it writes its file, at most every 30 s.
    wait::until("gamma counts its two ports", Duration::from_secs(45), || {
        let counted = count("gamma")?;
        ensure!(counted == 2.0, "{counted} ports");
        Ok(())
    })
    .unwrap();
    assert_eq!(count("alpha").unwrap(), 0.0, "a1 is local there");
}
