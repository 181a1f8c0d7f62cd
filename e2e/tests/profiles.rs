//! Profiles and rollouts with plain kubectl: validation by the API server, invalid combinations, overlaps, deleted
//! profiles. These tests share the fleet, so they run one after another, each from a fleet without profiles.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::collections::BTreeMap;
use std::sync::MutexGuard;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};
use switchtower_crds::{ProxyProfile, ProxyRollout, ProxyRolloutStatus, ProxyStatus};
use switchtower_e2e::lab::programs::repository;
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{LongConnection, Transport};
use switchtower_e2e::switchtower::FleetNode;

use switchtower_e2e::scene::{Scene, alone, answered_by, cluster_ip, fleet};

/// Timeout of a rollout on a busy machine. The reconnect backoff of agents grows if their controllers die repeatedly.
const TIMEOUT: Duration = Duration::from_secs(120);

fn kubectl(arguments: &[&str]) -> Result<String> {
    fleet().control_plane().kubectl(arguments)
}

/// Applies a profile with kubectl.
fn apply(name: &str, spec: &Value) -> Result<String> {
    let profile = json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": name}, "spec": spec,
    });
    let path = fleet().lab().directory().join(format!("profile-{name}.json"));
    std::fs::write(&path, profile.to_string())?;
    kubectl(&["apply", "-f", &path.to_string_lossy()])
}

/// Distinguishable settings, without probes, on all nodes at once; `extra` overrides them.
fn spec(interval: u32, extra: &Value) -> Value {
    let mut spec = json!({
        "settings": {"minimumIntervalMilliseconds": interval},
        "strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []}},
    });
    for (key, value) in extra.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    spec
}

fn rollout(name: &str) -> Result<ProxyRolloutStatus> {
    let object: Option<ProxyRollout> = fleet().kube().get_cluster(name)?;
    object.with_context(|| format!("there is no ProxyRollout {name}"))?.status.context("without status")
}

#[track_caller]
fn reaches(name: &str, state: &str, waiting_on: Option<&str>) -> ProxyRolloutStatus {
    wait::until(&format!("{name} is {state}"), TIMEOUT, || {
        let status = rollout(name)?;
        ensure!(status.state == state && status.waiting_on.as_deref() == waiting_on, "{status:?}");
        Ok(status)
    })
    .with_context(|| fleet().controller_log())
    .unwrap()
}

/// The revision in force on each node, according to the rows.
fn in_force() -> BTreeMap<String, String> {
    let names = ["alpha", "beta", "gamma"].map(|name| {
        let row = fleet().row(name).unwrap();
        (name.to_owned(), row.profile.map(|profile| profile.revision_name).unwrap_or_default())
    });
    names.into()
}

#[track_caller]
fn nodes_have(expected: [&str; 3]) {
    wait::until(&format!("the nodes have {expected:?}"), TIMEOUT, || {
        let found = in_force();
        ensure!(found.values().eq(expected), "{found:?}");
        Ok(())
    })
    .with_context(|| fleet().controller_log())
    .unwrap();
}

fn condition(name: &str, kind: &str) -> Result<(String, String)> {
    let object: Option<ProxyProfile> = fleet().kube().get_cluster(name)?;
    let status = object.context("no such profile")?.status.context("without status")?;
    let found = status.conditions.into_iter().find(|condition| condition.type_ == kind);
    found.map(|condition| (condition.status, condition.reason)).context("no such condition")
}

#[track_caller]
fn profile_is(name: &str, kind: &str, status: &str, reason: &str) {
    let what = format!("{name}: {kind}={status} {reason}");
    wait::until(&what, TIMEOUT, || {
        let found = condition(name, kind)?;
        ensure!(found == (status.to_owned(), reason.to_owned()), "{found:?}");
        Ok(())
    })
    .with_context(|| fleet().controller_log())
    .unwrap();
}

/// Sets a label of a node; `value` "-" removes it.
fn label(node: &str, key: &str, value: &str) {
    let change = if value == "-" { format!("{key}-") } else { format!("{key}={value}") };
    kubectl(&["label", "--overwrite", "node", node, &change]).unwrap();
}

/// A fleet whose nodes all have a revision of a profile `base` with the lowest priority.
fn start(name: &str) -> (MutexGuard<'static, ()>, Scene) {
    let alone = alone();
    let scene = Scene::new(name);
    scene.fleet.settled(TIMEOUT).unwrap();
    apply("base", &spec(0, &json!({"priority": -1000, "changeCause": name}))).unwrap();
    delete_leftovers();
    wait::until("the base profile is everywhere", TIMEOUT, || {
        // One read: condition and generation must belong to the same moment.
        let base: ProxyProfile = fleet().kube().get_cluster("base")?.context("no profile base")?;
        let generation = base.metadata.generation;
        let status = base.status.unwrap_or_default();
        ensure!(status.observed_generation == generation, "generation {:?}", status.observed_generation);
        let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
        ensure!(ready.is_some_and(|ready| ready.status == "True"), "{ready:?}");
        let stable = status.stable_name;
        let names = in_force();
        ensure!(names.values().all(|name| *name == stable), "{names:?}, stable is {stable}");
        Ok(())
    })
    .with_context(|| fleet().controller_log())
    .unwrap();
    (alone, scene)
}

/// Deletes the profiles of a test that failed, so that the next tests do not fail with it.
fn delete_leftovers() {
    let names = kubectl(&["get", "pxp", "--output", "name"]).unwrap();
    for name in names.lines().filter(|name| !name.ends_with("/base")) {
        kubectl(&["delete", name, "--wait=false"]).unwrap();
    }
}

/// Deletes a profile and waits until `base` takes over its nodes.
fn leave(name: &str) {
    kubectl(&["delete", "pxp", name, "--wait=false"]).unwrap();
    let cause = format!("after {name} {:08x}", rand::random::<u32>());
    apply("base", &spec(0, &json!({"priority": -1000, "changeCause": cause}))).unwrap();
    wait::until(&format!("{name} is deleted"), TIMEOUT, || {
        let left: Option<ProxyProfile> = fleet().kube().get_cluster(name)?;
        ensure!(left.is_none(), "{:?}", left.and_then(|left| left.status));
        Ok(())
    })
    .with_context(|| fleet().controller_log())
    .unwrap();
}

#[test]
fn invalid_profiles_are_rejected_on_apply() {
    let _alone = alone();
    let steps = |steps: Value| json!({"strategy": {"steps": steps}});
    let short = steps(json!([{"nodes": "5%"}, {"nodes": "50%"}]));
    let cases = [
        ("a CIDR that is none", json!({"settings": {"nodePortAddresses": ["10.0.0/8"]}}), "must be a CIDR"),
        ("a share over 100 %", steps(json!([{"nodes": "101%"}, {"nodes": "100%"}])), "should match"),
        ("no node at all", steps(json!([{"nodes": 0}, {"nodes": "100%"}])), "greater than or equal to 1"),
        ("steps that end early", short, "the last step must have"),
        (
            "a last step for some",
            steps(json!([{"nodes": "100%", "nodeSelector": {"matchLabels": {"a": "b"}}}])),
            "the last step must have",
        ),
        (
            "a mode without its networks",
            json!({"settings": {"localDetection": {"mode": "ClusterCIDR"}}}),
            "clusterCIDRs is required",
        ),
        (
            "an operator that is none",
            json!({"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Has"}]}}),
            "Unsupported value",
        ),
    ];
    for (what, spec, message) in cases {
        let error = format!("{:#}", apply("wrong", &spec).expect_err(what));
        assert!(error.contains(message), "{what}: {error}");
    }
    let error = format!("{:#}", apply("builtin", &json!({})).expect_err("a reserved name"));
    assert!(error.contains("the name builtin is reserved"), "{error}");
}

#[test]
fn kubectl_explains_every_kind() {
    let _alone = alone();
    // The API server publishes the schema of a new kind shortly after it serves the kind.
    let explains = |arguments: &[&str], words: &[&str]| {
        wait::until(&format!("kubectl explain {arguments:?}"), TIMEOUT, || {
            let text = kubectl(&[&["explain"], arguments].concat())?;
            let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
            for word in words {
                ensure!(flat.contains(word), "it lacks {word:?}: {text}");
            }
            Ok(())
        })
        .unwrap();
    };
    explains(&["pxp", "--recursive"], &["tcpCloseWaitTimeoutSeconds <integer>", "freezePercent <integer>"]);
    explains(&["pxr", "--recursive"], &["approvedStep <integer>", "soakingSince <string>"]);
    explains(&["pxs", "--recursive"], &["previous <Object>", "revisionName <string>"]);
    for (field, words) in [
        (
            "pxp.spec.settings.conntrack.tcpEstablishedTimeoutSeconds",
            ["in seconds, 0 to 2147483", "Default: 86400"],
        ),
        ("pxp.spec.strategy.gates.windowSeconds", ["in seconds, 0 to 3600", "rolls back automatically"]),
        ("pxr.spec.approvedStep", ["counted from 1", "Cannot be decreased"]),
        ("pxr.status.waitingOn", ["CanaryNodes", "HealthyNodes"]),
        ("pxs.spec.profile.previous", ["Revision of another profile", "The node returns to it"]),
        ("pxs.status.state", ["Synced", "Absent"]),
    ] {
        explains(&[field], &words);
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn connection_tracking_changes_live_and_a_connection_stays() {
    let (_alone, scene) = start("tracking");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    let to = cluster_ip(&service, false);
    answered_by("at first", scene.pod("b1"), Transport::Tcp, to, &["a1"]);
    let mut connection = LongConnection::open(scene.pod("b1"), to).unwrap();
    let read = |node: &FleetNode, name: &str| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        node.net.namespace.output("cat", &[&path]).unwrap().trim().to_owned()
    };
    let on_all_nodes = |wanted: &[(&str, &str)]| {
        wait::until(&format!("every node has {wanted:?}"), TIMEOUT, || {
            for node in fleet().nodes() {
                for (name, value) in wanted {
                    let found = read(node, name);
                    ensure!(found == *value, "{}: {name} is {found}", node.net.name);
                }
            }
            Ok(())
        })
        .unwrap();
    };
    let untouched = ["udp_timeout", "udp_timeout_stream"].map(|name| read(scene.node("alpha"), name));
    let with = |conntrack: Value| json!({"settings": {"conntrack": conntrack}});
    let times = with(json!({
        "maxPerCore": 0, "tcpEstablishedTimeoutSeconds": 4321, "tcpCloseWaitTimeoutSeconds": 123,
        "tcpBeLiberal": true, "udpTimeoutSeconds": 17, "udpStreamTimeoutSeconds": 71,
    }));
    apply("tracking", &spec(1, &times)).unwrap();
    reaches("tracking-1", "Complete", None);
    on_all_nodes(&[
        ("tcp_timeout_established", "4321"),
        ("tcp_timeout_close_wait", "123"),
        ("tcp_be_liberal", "1"),
        ("udp_timeout", "17"),
        ("udp_timeout_stream", "71"),
    ]);
    connection.exchange().unwrap();
    // Table sizes are global to the kernel and writable only in the host's network namespace: the node reports the
    // failure and continues. A limit above the wanted one would be accepted, and machines have different limits.
    let limit: u32 = read(scene.node("alpha"), "max").parse().unwrap();
    apply("tracking", &spec(1, &with(json!({"maxPerCore": 1, "min": limit + 1})))).unwrap();
    reaches("tracking-2", "Complete", None);
    for node in fleet().nodes() {
        wait::until(&format!("{} reports the failure", node.net.name), TIMEOUT, || {
            let failures = fleet().agent_metric(node, "switchtower_sysctl_failures", "")?;
            ensure!(failures >= 1.0, "{failures} failures");
            let logged = fleet().agent_log(node).contains("a kernel setting cannot be written");
            ensure!(logged, "nothing in the log");
            Ok(())
        })
        .unwrap();
    }
    // Omitted settings have their defaults or keep the previous values.
    let [udp, stream] = untouched;
    on_all_nodes(&[
        ("tcp_timeout_established", "86400"),
        ("tcp_timeout_close_wait", "3600"),
        ("udp_timeout", &udp),
        ("udp_timeout_stream", &stream),
    ]);
    connection.exchange().unwrap();
    scene.fleet.settled(TIMEOUT).unwrap();
    leave("tracking");
}

/// Path of a file in `examples/`.
fn example(name: &str) -> String {
    repository().join("examples").join(name).to_string_lossy().into_owned()
}

#[test]
fn example_profile_is_accepted() {
    let _alone = alone();
    kubectl(&["apply", "--dry-run=server", "-f", &example("profile.yaml")]).unwrap();
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn rollout_waits_for_canary_and_approvals() {
    let (_alone, scene) = start("approvals");
    let canary = json!({
        "name": "canary", "nodes": 1, "approval": "Manual",
        "nodeSelector": {"matchLabels": {"test/canary": "true"}},
    });
    let strategy = json!({
        "steps": [canary, {"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []},
    });
    apply("canaried", &spec(1, &json!({"strategy": strategy}))).unwrap();
    // The selector matches no node: the rollout waits, and no node is changed.
    let status = reaches("canaried-1", "Paused", Some("CanaryNodes"));
    assert_eq!((status.progress.step.as_str(), status.progress.touched_nodes), ("1/2", 0));
    label("beta", "test/canary", "true");
    let status = reaches("canaried-1", "Paused", Some("Approval"));
    assert_eq!((status.progress.updated.as_str(), status.failed), ("1/3", 0));
    let base = in_force()["alpha"].clone();
    nodes_have([&base, "canaried@1", &base]);
    // Endpoints are never delayed.
    let service = scene.service("web", &json!({}));
    for pod in ["a1", "c1"] {
        scene.endpoints("web", &[pod]);
        answered_by("meanwhile", scene.pod("b1"), Transport::Tcp, cluster_ip(&service, false), &[pod]);
    }
    let patch = |spec: &str| kubectl(&["patch", "pxr", "canaried-1", "--type=merge", "-p", spec]);
    let error = format!("{:#}", patch(r#"{"spec":{"approvedStep":3}}"#).unwrap_err());
    assert!(error.contains("must not exceed the number of steps"), "{error}");
    let error = format!("{:#}", patch(r#"{"spec":{"settings":{"masqueradeAll":true}}}"#).unwrap_err());
    assert!(error.contains("settings are immutable"), "{error}");
    for file in ["approve-step", "abort"] {
        let file = example(&format!("{file}.yaml"));
        let example =
            ["patch", "pxr", "canaried-1", "--type=merge", "--dry-run=server", "--patch-file", &file];
        kubectl(&example).unwrap();
    }
    // The canary loses its label: no node is left to evaluate.
    label("beta", "test/canary", "-");
    reaches("canaried-1", "Paused", Some("CanaryNodes"));
    label("beta", "test/canary", "true");
    reaches("canaried-1", "Paused", Some("Approval"));
    patch(r#"{"spec":{"approvedStep":1}}"#).unwrap();
    reaches("canaried-1", "Complete", None);
    nodes_have(["canaried@1"; 3]);
    let error = format!("{:#}", patch(r#"{"spec":{"approvedStep":0}}"#).unwrap_err());
    assert!(error.contains("cannot be decreased"), "{error}");
    profile_is("canaried", "Ready", "True", "UpToDate");
    let columns = [
        "STATE",
        "STEP",
        "TARGET",
        "UPDATED/ELIGIBLE",
        "FAILED",
        "WAITING-ON",
        "AGE",
        "Complete",
        "2/2",
        "canaried@1",
        "3/3",
    ];
    wait::until("the columns show it", TIMEOUT, || {
        let table = kubectl(&["get", "pxr", "canaried-1"])?;
        ensure!(columns.iter().all(|word| table.contains(word)), "{table}");
        Ok(())
    })
    .unwrap();
    events("canaried-1", &["RolloutInconclusive", "WaitingForApproval", "StepDone", "RolloutComplete"]);
    label("beta", "test/canary", "-");
    leave("canaried");
}

/// Waits until Events with these reasons exist on a rollout.
fn events(rollout: &str, reasons: &[&str]) {
    let api: Api<k8s_openapi::api::core::v1::Event> = Api::all(fleet().kube().client());
    wait::until(&format!("Events about {rollout}"), TIMEOUT, || {
        let events = fleet().kube().block_on(api.list(&ListParams::default()))?;
        let about =
            events.items.into_iter().filter(|event| event.involved_object.name.as_deref() == Some(rollout));
        let found: Vec<_> = about.filter_map(|event| event.reason).collect();
        ensure!(reasons.iter().all(|&reason| found.iter().any(|known| known == reason)), "{found:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn overlapping_profile_reports_the_winner() {
    let (_alone, _scene) = start("overlap");
    let east = json!({"matchLabels": {"topology.kubernetes.io/zone": "east"}});
    apply("east", &spec(1, &json!({"nodeSelector": east, "priority": 5}))).unwrap();
    reaches("east-1", "Complete", None);
    let base = in_force()["gamma"].clone();
    nodes_have(["east@1", "east@1", &base]);
    profile_is("base", "Overlapping", "True", "OtherProfileWins");
    profile_is("east", "Overlapping", "False", "NoOverlap");
    // A relabelled node keeps its settings until its new profile's rollout reaches it.
    label("gamma", "topology.kubernetes.io/zone", "east");
    std::thread::sleep(Duration::from_secs(2));
    nodes_have(["east@1", "east@1", &base]);
    apply("east", &spec(1, &json!({"nodeSelector": east, "priority": 5, "changeCause": "with gamma"})))
        .unwrap();
    reaches("east-2", "Complete", None);
    nodes_have(["east@2"; 3]);
    label("gamma", "topology.kubernetes.io/zone", "west");
    // In use: its nodes keep the revision until the next profile takes over.
    kubectl(&["delete", "pxp", "east", "--wait=false"]).unwrap();
    wait::until("east is gone", TIMEOUT, || {
        let names = in_force();
        ensure!(names.values().all(|name| *name == base || name.starts_with("east@")), "{names:?}");
        let left: Option<ProxyProfile> = fleet().kube().get_cluster("east")?;
        ensure!(left.is_none(), "{:?}", left.and_then(|left| left.status));
        Ok(())
    })
    .with_context(|| fleet().controller_log())
    .unwrap();
    nodes_have([&base; 3]);
}

#[test]
fn edit_supersedes_and_deletion_releases_all_nodes() {
    let (_alone, _scene) = start("supersede");
    let soak = json!({
        "steps": [{"nodes": 1, "soakSeconds": 3600}, {"nodes": "100%"}], "gates": {"probes": []},
    });
    let base = in_force()["alpha"].clone();
    apply("edited", &spec(1, &json!({"strategy": soak}))).unwrap();
    assert_eq!(reaches("edited-1", "Soaking", Some("Soak")).progress.touched_nodes, 1);
    apply("edited", &spec(2, &json!({"strategy": soak}))).unwrap();
    reaches("edited-1", "Superseded", None);
    assert_eq!(reaches("edited-2", "Soaking", Some("Soak")).progress.touched_nodes, 1);
    wait::until("no node has the superseded revision", TIMEOUT, || {
        let names = in_force();
        ensure!(names.values().all(|name| *name == base || name == "edited@2"), "{names:?}");
        Ok(())
    })
    .unwrap();
    // Aborted: the node is rolled back, and the abort is final.
    let patch = |spec: &str| kubectl(&["patch", "pxr", "edited-2", "--type=merge", "-p", spec]);
    patch(r#"{"spec":{"abort":true}}"#).unwrap();
    reaches("edited-2", "Aborted", None);
    // Back to its revision before the profile, not to the built-in settings.
    nodes_have([&base; 3]);
    assert!(patch(r#"{"spec":{"abort":false}}"#).is_err());
    profile_is("edited", "Stalled", "True", "RolloutAborted");
    // Retried by the user; then the profile is deleted during the rollout.
    apply("edited", &spec(2, &json!({"strategy": soak, "changeCause": "again"}))).unwrap();
    reaches("edited-3", "Soaking", Some("Soak"));
    leave("edited");
    wait::until("no node is left behind", TIMEOUT, || {
        let names = in_force();
        ensure!(names.values().all(|name| name.starts_with("base@") && *name != base), "{names:?}");
        let gone: Option<ProxyRollout> = fleet().kube().get_cluster("edited-3")?;
        ensure!(gone.is_none(), "the rollout of the deleted profile still exists");
        Ok(())
    })
    .unwrap();
    // Created again under the same name: a new rollout starts.
    apply("edited", &spec(3, &json!({}))).unwrap();
    profile_is("edited", "Ready", "True", "UpToDate");
    wait::until("the new profile has the nodes", TIMEOUT, || {
        let names = in_force();
        ensure!(names.values().all(|name| name.starts_with("edited@")), "{names:?}");
        Ok(())
    })
    .unwrap();
    leave("edited");
}

#[test]
fn nodes_return_to_their_previous_revisions() {
    let (_alone, scene) = start("own-ways");
    let base = in_force()["alpha"].clone();
    label("gamma", "test/few", "true");
    let few = json!({"nodeSelector": {"matchLabels": {"test/few": "true"}}, "priority": 5});
    apply("few", &spec(1, &few)).unwrap();
    reaches("few-1", "Complete", None);
    nodes_have([&base, &base, "few@1"]);
    // A profile over all of them; all nodes except gamma had another one.
    let by_hand = json!({
        "steps": [{"nodes": "100%", "approval": "Manual"}], "maxUnavailable": "100%", "gates": {"probes": []},
    });
    apply("wide", &spec(2, &json!({"priority": 9, "strategy": by_hand}))).unwrap();
    reaches("wide-1", "Paused", Some("Approval"));
    nodes_have(["wide@1"; 3]);
    let remembered = |node: &str| {
        let row: ProxyStatus = fleet().kube().get_cluster(node).unwrap().unwrap();
        let previous = row.spec.profile.unwrap().previous.unwrap();
        format!("{}@{}", previous.name, previous.revision)
    };
    assert_eq!(["alpha", "beta", "gamma"].map(remembered), [&base, &base, "few@1"]);
    // The next controller knows the previous revisions too.
    scene.fleet.stop_controller(libc::SIGKILL).unwrap();
    scene.fleet.start_controller().unwrap();
    kubectl(&["patch", "pxr", "wide-1", "--type=merge", "-p", r#"{"spec":{"abort":true}}"#]).unwrap();
    reaches("wide-1", "Aborted", None);
    nodes_have([&base, &base, "few@1"]);
    // A deleted revision is neither restored nor waited for.
    apply("wide", &spec(3, &json!({"priority": 9, "strategy": by_hand}))).unwrap();
    reaches("wide-2", "Paused", Some("Approval"));
    nodes_have(["wide@2"; 3]);
    kubectl(&["delete", "pxp", "few", "--timeout=60s"]).unwrap();
    kubectl(&["patch", "pxr", "wide-2", "--type=merge", "-p", r#"{"spec":{"abort":true}}"#]).unwrap();
    reaches("wide-2", "Aborted", None);
    nodes_have([&base, &base, &base]);
    label("gamma", "test/few", "-");
    leave("wide");
}

#[test]
fn profile_without_nodes_waits_and_reports_it() {
    let (_alone, _scene) = start("nobody");
    let base = in_force()["alpha"].clone();
    let nobody = json!({"matchLabels": {"test/nobody": "true"}});
    apply("nobody", &spec(1, &json!({"nodeSelector": nobody, "priority": 5}))).unwrap();
    let status = reaches("nobody-1", "Paused", Some("EligibleNodes"));
    assert_eq!((status.progress.updated.as_str(), status.progress.touched_nodes), ("0/0", 0));
    profile_is("nobody", "Ready", "False", "RollingOut");
    label("gamma", "test/nobody", "true");
    reaches("nobody-1", "Complete", None);
    nodes_have([&base, &base, "nobody@1"]);
    label("gamma", "test/nobody", "-");
    leave("nobody");
}

#[test]
fn rollout_created_by_hand_moves_no_node() {
    let (_alone, _scene) = start("by-hand");
    let rollout = json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyRollout", "metadata": {"name": "mine"},
        "spec": {
            "profile": "base", "revision": 900, "hash": "x", "settings": {},
            "fallback": {"profile": "builtin", "revision": 0}, "strategy": {"steps": [{"nodes": "100%"}]},
        },
    });
    fleet().kube().apply(&rollout).unwrap();
    reaches("mine", "Ignored", None);
    assert!(in_force().values().all(|name| name != "base@900"));
    fleet().kube().delete_cluster::<ProxyRollout>("mine").unwrap();
}

#[test]
fn next_controller_continues_rollout_of_killed_one() {
    let (_alone, scene) = start("killed");
    let strategy = json!({
        "steps": [
            {"nodes": 1, "approval": "Manual"}, {"nodes": 2, "soakSeconds": 2, "approval": "Manual"}, {"nodes": "100%"},
        ],
        "maxUnavailable": 1, "gates": {"probes": []},
    });
    apply("steps", &spec(1, &json!({"strategy": strategy}))).unwrap();
    let restart = || {
        scene.fleet.stop_controller(9).unwrap();
        scene.fleet.start_controller().unwrap();
        scene.fleet.controller_listens(TIMEOUT).unwrap();
    };
    let approve = |step: u32| {
        let patch = json!({"spec": {"approvedStep": step}}).to_string();
        kubectl(&["patch", "pxr", "steps-1", "--type=merge", "-p", &patch]).unwrap();
    };
    let assigned = || {
        let api: Api<ProxyStatus> = Api::all(scene.fleet.kube().client());
        let rows = scene.fleet.kube().block_on(api.list(&ListParams::default())).unwrap();
        let names = rows
            .items
            .into_iter()
            .filter(|row| row.spec.profile.as_ref().is_some_and(|profile| profile.name == "steps"));
        names.filter_map(|row| row.metadata.name).collect::<Vec<_>>()
    };
    reaches("steps-1", "Paused", Some("Approval"));
    let first = assigned();
    restart();
    reaches("steps-1", "Paused", Some("Approval"));
    assert_eq!((assigned(), first.len()), (first.clone(), 1), "a restart changes no node");
    approve(1);
    restart();
    reaches("steps-1", "Paused", Some("Approval"));
    wait::until("two nodes have it", TIMEOUT, || {
        ensure!(assigned().len() == 2 && rollout("steps-1")?.progress.steps_done == 1, "{:?}", assigned());
        Ok(())
    })
    .unwrap();
    assert!(assigned().contains(&first[0]));
    restart();
    approve(2);
    restart();
    reaches("steps-1", "Complete", None);
    nodes_have(["steps@1"; 3]);
    restart();
    scene.fleet.settled(TIMEOUT).unwrap();
    nodes_have(["steps@1"; 3]);
    leave("steps");
}
