//! `kubectl switchtower` on the real API server, controller, agents and kernels: each command, and its diagnosis of
//! common failures.
//!
//! Its statements about packets are verified with packets. These tests disturb the shared fleet, so they run one
//! after another.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]
#![allow(clippy::print_stdout, reason = "the plugin's output explains a failed test")]

#[cfg(test)]
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{ProbeResult, Transport};
use switchtower_e2e::switchtower::NAMESPACE;
use switchtower_e2e::switchtower::plugin::{self, Answer};

use switchtower_e2e::scene::{SOON, Scene, alone, answered_by, cluster_ip, eventually, fleet};

/// Runs the plugin; prints its output if the test fails.
fn ask(arguments: &[&str]) -> Answer {
    let answer = plugin::run(fleet(), arguments).unwrap();
    println!(
        "$ kubectl switchtower {}\n{}{}(exit code {})",
        arguments.join(" "),
        answer.text,
        answer.errors,
        answer.code
    );
    answer
}

fn json_of(arguments: &[&str]) -> Value {
    let mut arguments = arguments.to_vec();
    arguments.extend(["-o", "json"]);
    ask(&arguments).json().unwrap()
}

/// A Service on a1, b1 and c1, in force on all nodes, and its ClusterIP.
fn scene(name: &str, extra: &Value) -> (Scene, SocketAddr) {
    let scene = Scene::new(name);
    let service = scene.service("web", extra);
    scene.endpoints("web", &["a1", "b1", "c1"]);
    let to = cluster_ip(&service, false);
    let answer = ask(&["wait", &format!("{name}/web"), "--timeout", "20s"]);
    assert_eq!(answer.code, 0);
    (scene, to)
}

#[test]
fn healthy_fleet_has_no_findings() {
    let _alone = alone();
    let (scene, _) = scene("in-order", &json!({}));
    scene.fleet.settled(SOON).unwrap();
    wait::until("drift of earlier tests is no longer reported", Duration::from_secs(45), || {
        let answer = ask(&["status"]);
        ensure!(answer.code == 0, "{}", answer.text);
        Ok(())
    })
    .unwrap();
    let status = json_of(&["status"]);
    assert_eq!((&status["controller"]["connected"], &status["states"]["Synced"]), (&json!(3), &json!(3)));
    assert_eq!(status["problems"], json!([]));
    for node in ["alpha", "beta", "gamma"] {
        let answer = ask(&["diff", node]);
        assert_eq!(answer.code, 0, "{}", answer.text);
        assert!(answer.text.contains("ok the kernel matches the desired state"), "{}", answer.text);
    }
    let check = ask(&["check", "--post"]);
    assert_eq!(check.code, 0, "{}", check.text);
    let yaml = ask(&["status", "-o", "yaml"]);
    assert!(yaml.text.contains("problems: []"), "{}", yaml.text);
}

#[test]
fn explain_agrees_with_packets_and_kernels() {
    let _alone = alone();
    let (scene, to) = scene("explained", &json!({"type": "NodePort"}));
    answered_by("as explained", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    let explained = json_of(&["explain", "svc/explained/web:tcp", "--node", "alpha", "--all"]);
    let findings = explained["groups"][0]["findings"].as_array().unwrap();
    // ClusterIP and NodePort of both families, from pods and the node; the NodePort also from outside.
    assert_eq!(findings.len(), 2 * (2 + 3), "{findings:#?}");
    for finding in findings {
        assert_eq!(finding["outcome"], "forwarded", "{finding:#}");
        assert_eq!(finding["kernel"]["state"], "agrees", "{finding:#}");
        assert_eq!(finding["endpoints"].as_array().unwrap().len(), 3, "{finding:#}");
    }
    let answer = ask(&["explain", "explained/web", "--node", "alpha"]);
    assert_eq!(answer.code, 0);
    assert!(answer.text.contains("kernel  matches"), "{}", answer.text);
    let all = ask(&["explain", "explained/web"]);
    assert_eq!(all.code, 0);
    assert!(all.text.contains("on 3 nodes (alpha, beta, gamma)"), "{}", all.text);
    // Source ranges, affinity and both policies: `explain` compares the kernel in these cases too.
    let extra = json!({
        "loadBalancerSourceRanges": ["203.0.113.0/24", "198.18.0.0/15"], "externalTrafficPolicy": "Local",
        "sessionAffinity": "ClientIP",
    });
    scene.load_balancer("balanced", &extra, &["192.0.2.93"]);
    scene.endpoints("balanced", &["a1", "c1"]);
    assert_eq!(ask(&["wait", "explained/balanced"]).code, 0);
    let explained = json_of(&["explain", "explained/balanced", "--node", "alpha", "--all"]);
    for finding in explained["groups"][0]["findings"].as_array().unwrap() {
        assert_eq!(finding["kernel"]["state"], "agrees", "{finding:#}");
    }
    let rules = ask(&["rules", "alpha", "explained/balanced:tcp"]);
    assert!(rules.text.contains("203.0.113.0/24"), "{}", rules.text);
    // An endpoint that reaches itself.
    let own = scene.pod_address("a1", false).to_string();
    let answer = ask(&["explain", "explained/web:tcp", "--node", "alpha", "--from-ip", &own]);
    assert!(answer.text.contains(&format!("itself  {own}:8080 is the source")), "{}", answer.text);
}

#[test]
fn without_local_endpoints_the_policy_is_named() {
    let _alone = alone();
    let (scene, to) = scene("local", &json!({"internalTrafficPolicy": "Local"}));
    scene.endpoints("web", &["b1"]);
    assert_eq!(ask(&["wait", "local/web"]).code, 0);
    eventually("no endpoint is local", scene.pod("a2"), Transport::Tcp, to, |outcome| {
        *outcome == ProbeResult::Silence
    });
    let answer = ask(&["explain", "local/web:tcp", "--node", "alpha"]);
    assert_eq!(answer.code, 1);
    for part in ["DROPPED", "ST0202", "internalTrafficPolicy is Local", "kernel  matches"] {
        assert!(answer.text.contains(part), "{part}: {}", answer.text);
    }
    assert_eq!(ask(&["explain", "local/web", "--node", "beta"]).code, 0, "b1 is local there");
    let groups = json_of(&["explain", "local/web"]);
    let groups: Vec<_> = groups["groups"].as_array().unwrap().iter().map(|group| &group["names"]).collect();
    assert_eq!(groups, [&json!(["alpha", "gamma"]), &json!(["beta"])]);
    // Without any endpoint, the reason differs.
    scene.endpoints("web", &[]);
    assert_eq!(ask(&["wait", "local/web"]).code, 0);
    eventually("nobody at all", scene.pod("a2"), Transport::Tcp, to, |outcome| {
        *outcome == ProbeResult::Refused
    });
    let answer = ask(&["explain", "local/web:tcp", "--node", "alpha"]);
    assert!(answer.text.contains("REFUSED") && answer.text.contains("ST0201"), "{}", answer.text);
}

#[test]
fn source_outside_the_ranges_is_named() {
    let _alone = alone();
    let scene = Scene::new("ranges");
    let vip = "192.0.2.91";
    let extra = json!({"loadBalancerSourceRanges": ["203.0.113.0/24"]});
    scene.load_balancer("web", &extra, &[vip]);
    scene.endpoints("web", &["a1"]);
    assert_eq!(ask(&["wait", "ranges/web"]).code, 0);
    let to = SocketAddr::new(vip.parse().unwrap(), 80);
    let dropped = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
    eventually("not in the range", scene.pod("c2"), Transport::Tcp, to, dropped);
    let source = scene.pod_address("c2", false).to_string();
    let answer = ask(&["explain", "ranges/web:tcp", "--node", "gamma", "--from-ip", &source]);
    assert_eq!(answer.code, 1);
    for part in
        ["DROPPED  LoadBalancer 192.0.2.91:80/TCP", "ST0204", "203.0.113.0/24", "FORWARDED  ClusterIP"]
    {
        assert!(answer.text.contains(part), "{part}: {}", answer.text);
    }
}

#[test]
fn missing_agent_named_with_missed_changes() {
    let _alone = alone();
    let (scene, _) = scene("agent-down", &json!({}));
    let beta = scene.node("beta");
    scene.fleet.stop_agent(beta, libc::SIGKILL).unwrap();
    scene.endpoints("web", &["c1"]);
    let waited = ask(&["wait", "agent-down/web"]);
    assert_eq!(waited.code, 0, "connected nodes have it: {}", waited.text);
    assert!(
        waited.text.contains("not counted: 1 node whose agent is not connected (beta)"),
        "{}",
        waited.text
    );
    wait::until("status reports it", Duration::from_secs(25), || {
        let answer = ask(&["status"]);
        ensure!(answer.code == 1);
        let first = answer.text.lines().skip_while(|line| !line.starts_with("NODE")).nth(1);
        let first: Vec<&str> = first.unwrap_or_default().split_whitespace().take(2).collect();
        ensure!(first == ["beta", "Stale"], "{}", answer.text);
        ensure!(answer.text.contains("ST0102") && answer.text.contains("1 node (beta)"), "{}", answer.text);
        Ok(())
    })
    .unwrap();
    let explained = ask(&["explain", "agent-down/web", "--node", "beta"]);
    assert!(
        explained.text.contains("kernel  unknown: the agent of beta is not connected"),
        "{}",
        explained.text
    );
    assert!(explained.text.contains("may not apply yet on 1 node: beta"), "{}", explained.text);
    assert_eq!(ask(&["diff", "beta"]).code, 2);
    scene.fleet.run_agent(beta).unwrap();
    scene.fleet.settled(Duration::from_secs(20)).unwrap();
    assert_eq!(ask(&["explain", "agent-down/web", "--node", "beta"]).code, 0);
}

#[test]
fn stopped_agent_is_stale_and_reported_by_wait() {
    let _alone = alone();
    let (scene, _) = scene("agent-stale", &json!({}));
    let gamma = scene.node("gamma");
    let process = libc::pid_t::try_from(scene.fleet.agent_id(gamma).unwrap()).unwrap();
    // SAFETY: a signal to a process of this test.
    unsafe { libc::kill(process, libc::SIGSTOP) };
    scene.endpoints("web", &["a1"]);
    // First, so that the two others apply the change before the shorter timeout starts.
    let enough = ask(&["wait", "agent-stale/web", "--timeout", "20s", "--percent", "60"]);
    let waited = ask(&["wait", "agent-stale/web", "--timeout", "3s"]);
    let status = wait::until("status reports it", Duration::from_secs(25), || {
        let answer = ask(&["status"]);
        ensure!(answer.text.contains("ST0103") && answer.text.contains("(gamma)"), "{}", answer.text);
        Ok(answer)
    });
    let explained = ask(&["explain", "agent-stale/web"]);
    // SAFETY: as above.
    unsafe { libc::kill(process, libc::SIGCONT) };
    assert_eq!((waited.code, enough.code), (1, 0));
    assert!(
        waited.text.contains("2 of 3 connected nodes") && waited.text.contains("ST0305"),
        "{}",
        waited.text
    );
    assert!(waited.text.contains(": gamma"), "{}", waited.text);
    assert_eq!(status.unwrap().code, 1);
    assert!(explained.text.contains("gamma (behind by"), "{}", explained.text);
    scene.fleet.settled(Duration::from_secs(40)).unwrap();
}

#[test]
fn foreign_flush_is_named() {
    let _alone = alone();
    let (scene, _) = scene("flushed", &json!({}));
    let alpha = scene.node("alpha");
    alpha.net.namespace.output("nft", &["flush", "ruleset"]).unwrap();
    wait::until("status reports it", SOON, || {
        let answer = ask(&["status"]);
        ensure!(answer.text.contains("ST0106") && answer.text.contains("(alpha)"), "{}", answer.text);
        Ok(())
    })
    .unwrap();
    // Repaired: packets and kernel are correct again.
    wait::until("repaired", SOON, || {
        let answer = ask(&["diff", "alpha"]);
        ensure!(answer.code == 0, "{}", answer.text);
        Ok(())
    })
    .unwrap();
}

#[test]
fn rules_of_a_node_and_of_an_unresponsive_agent() {
    let _alone = alone();
    let (scene, to) = scene("rules", &json!({}));
    let gamma = scene.node("gamma");
    let process = libc::pid_t::try_from(scene.fleet.agent_id(gamma).unwrap()).unwrap();
    let rules = ask(&["rules", "gamma", "--filter", &to.to_string()]);
    assert_eq!(rules.code, 0);
    assert!(rules.text.contains(&format!("ip frontends {to}/TCP : 0x")), "{}", rules.text);
    assert!(rules.text.contains("ip nat_prerouting"), "{}", rules.text);
    let of_service = ask(&["rules", "gamma", "rules/web:tcp"]);
    let line = format!("ip daddr {} tcp dport 80 dnat to {{ ", to.ip());
    assert!(of_service.code == 0 && of_service.text.contains(&line), "{}", of_service.text);
    assert_eq!(of_service.text.lines().count(), 2 + 2, "one rule in each family: {}", of_service.text);
    // SAFETY: a signal to a process of this test.
    unsafe { libc::kill(process, libc::SIGSTOP) };
    let unanswered = ask(&["diff", "gamma"]);
    // SAFETY: as above.
    unsafe { libc::kill(process, libc::SIGCONT) };
    assert_eq!(unanswered.code, 2);
    assert!(unanswered.errors.contains("did not answer within"), "{}", unanswered.errors);
    scene.fleet.settled(Duration::from_secs(40)).unwrap();
}

#[test]
fn stages_of_the_last_change_shown() {
    let _alone = alone();
    let (scene, _) = scene("traced", &json!({}));
    scene.endpoints("web", &["a1"]);
    assert_eq!(ask(&["wait", "traced/web"]).code, 0);
    let changes = wait::until("the change is traced to its end", SOON, || {
        let changes = json_of(&["trace", "traced/web", "--last"]);
        ensure!(changes[0]["all"].is_u64() && changes[0]["outstanding"] == 0, "{changes:#}");
        Ok(changes)
    })
    .unwrap();
    let change = &changes[0];
    assert_eq!((&change["eligible"], &change["acknowledged"]), (&json!(3), &json!(3)), "{change:#}");
    let stages: Vec<u64> = ["compiling", "published", "half", "all"]
        .iter()
        .map(|stage| change[*stage].as_u64().unwrap())
        .collect();
    assert!(stages.is_sorted(), "{stages:?}");
    let text = ask(&["trace", "traced/web"]).text;
    assert!(text.starts_with("EndpointSlice traced/web-") && text.contains("all hold it"), "{text}");
    let many = json_of(&["trace", "traced/web", "--last", "10"]);
    assert!(many.as_array().unwrap().len() > 1, "{many:#}");
}

#[test]
fn rows_marked_outdated_without_controller() {
    let _alone = alone();
    let (scene, _) = scene("no-controller", &json!({}));
    scene.fleet.stop_controller(libc::SIGTERM).unwrap();
    let status = ask(&["status"]);
    let explained = ask(&["explain", "no-controller/web"]);
    let waited = ask(&["wait", "no-controller/web", "--timeout", "1s"]);
    // The rows are no longer renewed: they still report Ready, but visibly outdated.
    let outdated = wait::until("the rows are outdated", Duration::from_secs(60), || {
        let answer = ask(&["check", "--post"]);
        let named = "3 of 3 nodes (alpha, beta, gamma)";
        ensure!(answer.text.contains("FAILED   ST0116") && answer.text.contains(named), "{}", answer.text);
        Ok(answer)
    });
    let old = ask(&["status"]);
    scene.fleet.start_controller().unwrap();
    assert_eq!((status.code, explained.code, waited.code), (1, 2, 2));
    assert!(status.text.contains("ST0301") && status.text.contains("nodes       3"), "{}", status.text);
    assert!(
        explained.errors.contains("cannot reach the controller") && explained.errors.contains("ST0301"),
        "{}",
        explained.errors
    );
    let outdated = outdated.unwrap();
    assert!(outdated.code == 1 && outdated.text.contains("FAILED   ST0301"), "{}", outdated.text);
    assert!(!outdated.text.contains("all kernels match the desired state"), "{}", outdated.text);
    assert!(old.text.contains("not renewed for"), "{}", old.text);
    scene.fleet.settled(Duration::from_secs(30)).unwrap();
    wait::until("the rows are renewed", Duration::from_secs(30), || {
        let answer = ask(&["check", "--post"]);
        ensure!(answer.code == 0, "{}", answer.text);
        Ok(())
    })
    .unwrap();
}

#[test]
fn before_an_installation() {
    let _alone = alone();
    let answer = ask(&["check", "--pre"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert!(answer.text.contains("no DaemonSet kube-system/kube-proxy"), "{}", answer.text);
    assert!(answer.text.contains("ST0405"), "{}", answer.text);
    let proxy = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "spec": {
            "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
            "template": {
                "metadata": {"labels": {"k8s-app": "kube-proxy"}},
                "spec": {"containers": [{"name": "c", "image": "i"}], "nodeSelector": {"none": "none"}},
            },
        },
    });
    fleet().kube().apply(&proxy).unwrap();
    let answer = ask(&["check", "--pre"]);
    fleet().kube().delete::<k8s_openapi::api::apps::v1::DaemonSet>("kube-system", "kube-proxy").unwrap();
    // Not an error: an installation can start with kube-proxy running.
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert!(answer.text.contains("warning  ST0402"), "{}", answer.text);
}

#[test]
fn before_a_migration_from_kubeadm() {
    let _alone = alone();
    let map = |name: &str, key: &str, text: &str| {
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {key: text},
            "metadata": {"name": name, "namespace": "kube-system"}});
        fleet().kube().apply(&object).unwrap();
    };
    map("kube-proxy", "config.conf", "kind: KubeProxyConfiguration\nclusterCIDR: 10.244.0.0/16\n");
    map("kubeadm-config", "ClusterConfiguration", "networking: {podSubnet: 10.244.0.0/16}\nproxy: {}\n");
    let answer = ask(&["check", "--pre"]);
    let after = ask(&["check", "--post"]);
    let stranger = kubeconfig_of("installer");
    let refused = plugin::run_as(fleet(), &stranger, &["check", "--pre"]).unwrap();
    map("kubeadm-config", "ClusterConfiguration", "proxy: {disabled: true}\n");
    let disabled = ask(&["check", "--pre"]);
    for name in ["kube-proxy", "kubeadm-config"] {
        fleet().kube().delete::<k8s_openapi::api::core::v1::ConfigMap>("kube-system", name).unwrap();
    }
    assert_eq!(answer.code, 0, "{}", answer.text);
    // Leftover configuration, kubeadm, firewalls, localhost.
    for part in ["ST0415", "ST0411", "ST0414", "ST0416", "NodePorts on all addresses"] {
        assert!(answer.text.contains(part), "{part}: {}", answer.text);
    }
    assert!(!disabled.text.contains("ST0411"), "{}", disabled.text);
    // This fleet was installed without kube-proxy.
    assert!(after.text.contains("ST0413"), "{}", after.text);
    assert!(
        refused.text.contains("ST0409") && !refused.text.contains("there is no DaemonSet"),
        "{refused:?}"
    );
}

/// A kubeconfig of a ServiceAccount in the namespace of the product.
fn kubeconfig_of(account: &str) -> PathBuf {
    let object = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": NAMESPACE},
    });
    fleet().kube().apply(&object).unwrap();
    let token = fleet().token(account, None, &[], 3_600).unwrap();
    let admin = std::fs::read(fleet().control_plane().kubeconfig()).unwrap();
    let mut config: Value = serde_json::from_slice(&admin).unwrap();
    config["users"] = json!([{"name": "admin", "user": {"token": token}}]);
    let path = fleet().lab().directory().join(format!("{account}.kubeconfig"));
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

#[test]
fn access_decided_by_rbac() {
    let _alone = alone();
    let (_scene, _) = scene("rights", &json!({}));
    let stranger = kubeconfig_of("stranger");
    let as_stranger = |arguments: &[&str]| plugin::run_as(fleet(), &stranger, arguments).unwrap();
    let refused = as_stranger(&["status"]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.errors.contains("ST0404") && refused.errors.contains("cannot list ProxyStatus"),
        "{refused:?}"
    );

    let bind = |name: &str, kind: &str, role: &str| {
        let mut object = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": "stranger", "namespace": NAMESPACE}],
        });
        object["kind"] = format!("{kind}Binding").into();
        if kind == "Role" {
            object["metadata"]["namespace"] = NAMESPACE.into();
        }
        fleet().kube().apply(&object).unwrap();
    };
    bind("stranger-rows", "ClusterRole", "switchtower-viewer");
    bind("stranger-views", "Role", "switchtower-viewer");
    bind("stranger-reads", "ClusterRole", "view");
    wait::until("the rights are in force", SOON, || {
        let answer = as_stranger(&["explain", "rights/web", "--node", "alpha"]);
        ensure!(answer.code == 0, "{answer:?}");
        Ok(())
    })
    .unwrap();
    let refused = as_stranger(&["diff", "alpha"]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.errors.contains("switchtower-operator") && refused.errors.contains("ST0404"),
        "{refused:?}"
    );
}

#[test]
fn usage_errors_name_the_remedy() {
    let _alone = alone();
    let (_scene, _) = scene("wrong", &json!({}));
    let cases: &[(&[&str], &str)] = &[
        (&["explain", "no/such/service"], "expected [svc/][NAMESPACE/]NAME[:PORT]"),
        (&["explain", "nothing"], "use -n to select another namespace"),
        (&["explain", "wrong/web:https"], "it has tcp (80), udp (80)"),
        (&["explain", "wrong/web", "--node", "omega"], "Node omega does not exist"),
        (&["explain", "wrong/web", "--from", "pod/a/b/c"], "expected pod/[NAMESPACE/]NAME"),
        (&["explain", "wrong/web", "--from", "nobody"], "Pod default/nobody not found"),
        (&["explain", "ST0999"], "list all with kubectl switchtower codes"),
        (&["diff", "omega"], "Node omega does not exist"),
        (&["diff"], "<NODE>"),
        (&["rules", "omega"], "Node omega does not exist"),
        (&["rules", "alpha", "no/such/service"], "expected [svc/][NAMESPACE/]NAME[:PORT]"),
        (&["rules", "alpha", "wrong/other"], "Service wrong/other has no frontend"),
        (&["rules", "alpha", "wrong/web", "--filter", "x"], "cannot be used with"),
        (&["rules", "alpha", "--limit", "0"], "1..=100000"),
        (&["wait", "wrong/other"], "to wait for a deletion, omit the name"),
        (&["wait", "--timeout", "soon"], "such as 500ms, 30s, 2m or 1h"),
        (&["wait", "--for", "luck"], "possible values: change"),
        (&["trace", "wrong/other"], "has no record of a change"),
        (&["rollout", "pause", "nothing"], "list all with kubectl switchtower rollout status"),
        (&["check"], "--pre"),
        (&["status", "--context", "nowhere"], "check that kubectl works"),
    ];
    for (arguments, wanted) in cases {
        let answer = ask(arguments);
        assert_eq!(answer.code, 2, "{arguments:?}");
        assert!(answer.errors.contains(wanted), "{arguments:?}: {}", answer.errors);
        assert!(answer.text.is_empty(), "{arguments:?}: {}", answer.text);
    }
    let nowhere = plugin::run_as(fleet(), Path::new("/nowhere"), &["status"]).unwrap();
    assert_eq!(nowhere.code, 2);
    assert!(nowhere.errors.contains("kubeconfig from '\"/nowhere\"'"), "{}", nowhere.errors);
    assert!(nowhere.errors.contains("check that kubectl works"), "{}", nowhere.errors);
}

#[test]
fn codes_and_completion_need_no_cluster() {
    let _alone = alone();
    let code = ask(&["explain", "ST0204"]);
    assert!(code.text.contains("loadBalancerSourceRanges"), "{}", code.text);
    assert!(json_of(&["codes"]).as_array().unwrap().len() > 20);
    assert!(ask(&["completion", "bash"]).text.contains("kubectl-switchtower"));
    let rollouts = ask(&["rollout", "status"]);
    assert_eq!(
        (rollouts.code, rollouts.text.as_str()),
        (0, "No ProxyRollouts found; the controller creates one when a ProxyProfile changes.\n")
    );
}

/// Unpacks a bundle and returns its only folder.
fn unpacked(archive: &Path, into: &Path) -> PathBuf {
    std::fs::create_dir(into).unwrap();
    let mut tar = std::process::Command::new("tar");
    let status =
        tar.args(["--extract", "--gzip", "--file"]).arg(archive).arg("--directory").arg(into).status();
    assert!(status.unwrap().success());
    let mut folders = std::fs::read_dir(into).unwrap().map(|entry| entry.unwrap().path());
    folders.next().unwrap()
}

#[test]
fn bundle_contains_state_without_credentials() {
    let _alone = alone();
    let (scene, to) = scene("bundled", &json!({}));
    let work = tempfile::tempdir().unwrap();
    let deployment = work.path().join("deployment.json");
    let containers =
        json!([{"name": "c", "image": "none", "env": [{"name": "API_TOKEN", "value": "hunter2"}]}]);
    let labels = json!({"app": "bundled"});
    let object = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "bundled", "namespace": NAMESPACE},
        "spec": {"replicas": 0, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}}},
    });
    std::fs::write(&deployment, object.to_string()).unwrap();
    let control_plane = scene.fleet.control_plane();
    control_plane.kubectl(&["apply", "-f", deployment.to_str().unwrap()]).unwrap();
    let file = work.path().join("b.tar.gz");
    let file = file.to_str().unwrap();

    let plain = ask(&["bundle", "--file", file, "--node", "alpha"]);
    // The only missing parts are the agents' logs: no kubelet serves them here.
    let missing: Vec<_> = plain.text.lines().filter(|line| line.starts_with("! ")).collect();
    assert!(
        missing.iter().all(|line| line.starts_with("! not included: logs/switchtower-node-agent-")),
        "{missing:?}"
    );
    assert_eq!(plain.code, 1, "{}", plain.text);
    assert!(plain.errors.contains("\n  controller-metrics.txt\n"), "no progress: {}", plain.errors);
    let folder = unpacked(Path::new(file), &work.path().join("plain"));
    let read = |folder: &Path, name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let rows: Value = serde_json::from_str(&read(&folder, "rows.json")).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 3);
    assert!(read(&folder, "controller-metrics.txt").contains("\nswitchtower_revision "));
    assert!(read(&folder, "status.txt").contains("alpha"));
    assert!(read(&folder, "nodes/alpha/diff.json").contains("\"differencesTotal\": 0"));
    let address = to.ip().to_string();
    assert!(read(&folder, "nodes/alpha/rules.json").contains(&address));
    assert!(read(&folder, "deployments.json").contains("\"value\": \"[removed]\""));

    let again = ask(&["bundle", "--file", file]);
    assert_eq!(again.code, 2, "an existing file is replaced: {}", again.errors);
    std::fs::remove_file(file).unwrap();
    assert_eq!(ask(&["bundle", "--file", file, "--node", "alpha", "--redact-addresses"]).code, 1);
    let folder = unpacked(Path::new(file), &work.path().join("redacted"));
    assert!(read(&folder, "nodes/alpha/rules.json").contains("ipv4-"));
    let all = std::process::Command::new("grep")
        .args(["-rlE", &format!("hunter2|{address}|198\\.18\\.|BEGIN .*PRIVATE KEY|eyJ")])
        .arg(&folder)
        .output();
    assert_eq!(String::from_utf8_lossy(&all.unwrap().stdout), "");
    control_plane.kubectl(&["--namespace", NAMESPACE, "delete", "deployment", "bundled"]).unwrap();

    std::fs::remove_file(file).unwrap();
    let small = ask(&["bundle", "--file", file, "--node", "alpha", "--max-size", "1"]);
    assert!(std::fs::metadata(file).unwrap().len() < 1 << 20, "{}", small.text);
}
