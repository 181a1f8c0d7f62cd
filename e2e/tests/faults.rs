//! Faults in a fleet: killed agents and controllers, foreign changes of the ruleset, Nodes that come and go. These
//! tests disturb the shared fleet, so they run one after another.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::Node;
use serde_json::json;
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::observe::kernel;
use switchtower_e2e::probe::{self, LongConnection, ProbeResult, Transport};
use switchtower_e2e::switchtower::{AGENT_ACCOUNT, AUDIENCE, FleetNode};

use switchtower_e2e::scene::{SOON, Scene, alone, answered_by, cluster_ip, eventually, fleet};

/// Timeout for rows and kernels to agree. An agent reconnects after its backoff, a lost stream is reported after ten
/// seconds, and a repaired foreign change for thirty.
const AGREED: Duration = Duration::from_secs(60);

/// A Service on a1, b1 and c1, and its ClusterIP.
fn scene(name: &str) -> (Scene, SocketAddr) {
    let scene = Scene::new(name);
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1", "b1", "c1"]);
    let to = cluster_ip(&service, false);
    answered_by("at first", scene.pod("c2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    scene.fleet.settled(AGREED).unwrap();
    (scene, to)
}

/// All elements of both tables, as sets: the order of slots depends on history.
fn content(node: &FleetNode) -> BTreeMap<String, std::collections::BTreeSet<String>> {
    let mut content = BTreeMap::new();
    for family in ["ip", "ip6"] {
        for map in ["frontends", "inside", "outside", "backends", "slots"] {
            let elements = kernel::map_elements(&node.net.namespace, family, map).unwrap();
            content.insert(format!("{family} {map}"), elements);
        }
        for set in ["refused", "vips", "cluster_ips"] {
            let elements = kernel::set_elements(&node.net.namespace, family, set).unwrap();
            content.insert(format!("{family} {set}"), elements);
        }
    }
    content
}

#[test]
fn rows_and_kernels_agree_within_two_seconds_of_a_change() {
    let _alone = alone();
    let (scene, to) = scene("agree");
    // A busy machine may delay single changes; repeated delays would be the product's fault.
    let mut took: Vec<Duration> =
        [&["a1"][..], &["a1", "c2"][..], &["b1"][..], &["a2"][..], &["b1", "c1"][..]]
            .into_iter()
            .map(|pods| {
                scene.endpoints("web", pods);
                answered_by("changed", scene.pod("c2"), Transport::Tcp, to, pods);
                scene.fleet.settled(AGREED).unwrap()
            })
            .collect();
    took.sort_unstable();
    assert!(took[took.len() / 2] <= Duration::from_secs(2), "{took:?}");
}

#[test]
fn killed_agent_adopts_kernel_state_without_writing() {
    let _alone = alone();
    let (scene, to) = scene("kill-agent");
    let alpha = scene.node("alpha");
    let mut connection = LongConnection::open(scene.pod("a2"), to).unwrap();
    scene.fleet.stop_agent(alpha, libc::SIGKILL).unwrap();
    answered_by("without agent", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    let before = kernel::transactions(&alpha.net.namespace).unwrap();
    let content_before = content(alpha);
    scene.fleet.run_agent(alpha).unwrap();
    wait::until("the agent is connected again", AGREED, || {
        ensure!(scene.fleet.agent_metric(alpha, "switchtower_controller_connected", "")? == 1.0);
        scene.fleet.agrees(alpha)
    })
    .unwrap();
    let after = kernel::transactions(&alpha.net.namespace).unwrap();
    assert_eq!(after, before, "the agent wrote to the kernel; its log:\n{}", scene.fleet.agent_log(alpha));
    assert_eq!(content(alpha), content_before);
    connection.exchange().unwrap();
    // From now on, changes of endpoints arrive as usual.
    scene.endpoints("web", &["a1", "b1"]);
    answered_by("changed", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1"]);
    scene.fleet.settled(AGREED).unwrap();
}

#[test]
fn changes_while_the_agent_is_away_arrive_when_it_is_back() {
    let _alone = alone();
    let (scene, to) = scene("away");
    let alpha = scene.node("alpha");
    scene.fleet.stop_agent(alpha, libc::SIGTERM).unwrap();
    scene.endpoints("web", &["c1"]);
    answered_by("elsewhere", scene.pod("c2"), Transport::Tcp, to, &["c1"]);
    answered_by("nothing changes here", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    scene.fleet.run_agent(alpha).unwrap();
    answered_by("back", scene.pod("a2"), Transport::Tcp, to, &["c1"]);
    scene.fleet.settled(AGREED).unwrap();
}

#[test]
fn absent_agent_shown_in_its_row() {
    let _alone = alone();
    let (scene, _) = scene("absent");
    let beta = scene.node("beta");
    scene.fleet.stop_agent(beta, libc::SIGKILL).unwrap();
    wait::until("beta's row reports its missing agent", AGREED, || {
        let row = scene.fleet.row("beta")?;
        let ready = row.conditions.iter().find(|condition| condition.type_ == "Ready");
        let ready = ready.map(|condition| (condition.status.clone(), condition.reason.clone()));
        let connected = row.conditions.iter().find(|condition| condition.type_ == "Connected");
        let connected = connected.map(|condition| condition.status.as_str());
        ensure!(connected == Some("False"), "connected {connected:?}, ready {ready:?}, {}", row.state);
        ensure!(ready.is_some_and(|(status, _)| status != "True"), "still ready");
        Ok(())
    })
    .unwrap();
    scene.fleet.run_agent(beta).unwrap();
    scene.fleet.settled(AGREED).unwrap();
}

#[test]
fn flushed_ruleset_is_repaired() {
    let _alone = alone();
    let (scene, to) = scene("flush");
    let gamma = scene.node("gamma");
    let before = content(gamma);
    gamma.net.namespace.output("nft", &["flush", "ruleset"]).unwrap();
    answered_by("repaired", scene.pod("c2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    wait::until("the kernel holds the same as before", SOON, || {
        scene.fleet.agrees(gamma)?;
        let after: BTreeMap<_, _> =
            content(gamma).into_iter().filter(|(set, _)| !set.ends_with("slots")).collect();
        let frontends = after.get("ip frontends").map(std::collections::BTreeSet::len);
        ensure!(frontends == before.get("ip frontends").map(std::collections::BTreeSet::len));
        Ok(())
    })
    .unwrap();
    wait::until("the agent counts the repair", SOON, || {
        let repaired = scene.fleet.agent_metric(gamma, "switchtower_drift_total", "")?;
        ensure!(repaired >= 1.0, "{repaired}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn foreign_kube_proxy_rules_reported_in_row() {
    let _alone = alone();
    let (scene, to) = scene("exclusive");
    let beta = scene.node("beta");
    let state = |wanted: &str, exclusive: &str| {
        wait::until("the row reports kube-proxy", AGREED, || {
            let row = scene.fleet.row("beta")?;
            let condition = row.conditions.iter().find(|condition| condition.type_ == "Exclusive");
            let status = condition.map(|condition| condition.status.as_str());
            ensure!((row.state.as_str(), status) == (wanted, Some(exclusive)), "{}: {status:?}", row.state);
            Ok(())
        })
        .unwrap();
    };
    state("Synced", "True");
    for (add, remove) in [
        ("add table ip6 kube-proxy", "delete table ip6 kube-proxy"),
        ("add table ip nat; add chain ip nat KUBE-SERVICES", "delete table ip nat"),
    ] {
        beta.net.namespace.output("nft", &[add]).unwrap();
        state("NotExclusive", "False");
        answered_by("meanwhile", scene.pod("b1"), Transport::Tcp, to, &["a1", "b1", "c1"]);
        beta.net.namespace.output("nft", &[remove]).unwrap();
        state("Synced", "True");
    }
}

#[test]
fn foreign_element_removed_and_missing_one_restored() {
    let _alone = alone();
    let (scene, to) = scene("foreign-hand");
    let gamma = scene.node("gamma");
    let address = to.ip().to_string();
    let element = format!("delete element ip switchtower vips {{ {address} }}");
    let (before, namespace) = (content(gamma), &gamma.net.namespace);
    let removed =
        ["delete", "element", "ip", "switchtower", "frontends", "{", &address, ".", "tcp", ".", "80", "}"];
    namespace.output("nft", &removed).unwrap();
    drop(namespace.output("nft", &[&element]));
    let added = ["add", "element", "ip", "switchtower", "vips", "{", "192.0.2.77", "}"];
    namespace.output("nft", &added).unwrap();
    wait::until("the kernel holds the same as before", SOON, || {
        let after = content(gamma);
        ensure!(after == before, "it differs");
        Ok(())
    })
    .unwrap();
    answered_by("repaired", scene.pod("c2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
}

#[test]
fn traffic_continues_without_controller() {
    let _alone = alone();
    let (scene, to) = scene("kill-controller");
    let generation = scene.fleet.row("alpha").unwrap().generation.applied;
    let transactions = kernel::transactions(&scene.node("alpha").net.namespace).unwrap();
    let mut connection = LongConnection::open(scene.pod("a2"), to).unwrap();
    scene.fleet.stop_controller(libc::SIGKILL).unwrap();
    answered_by("no controller", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    scene.fleet.start_controller().unwrap();
    wait::until("every agent is connected again", AGREED, || {
        for node in scene.fleet.nodes() {
            ensure!(scene.fleet.agent_metric(node, "switchtower_controller_connected", "")? == 1.0);
        }
        Ok(())
    })
    .unwrap();
    scene.fleet.settled(AGREED).unwrap();
    connection.exchange().unwrap();
    assert_eq!(kernel::transactions(&scene.node("alpha").net.namespace).unwrap(), transactions);
    assert!(scene.fleet.row("alpha").unwrap().generation.applied >= generation, "a generation went back");
    scene.endpoints("web", &["b1"]);
    answered_by("changed", scene.pod("a2"), Transport::Tcp, to, &["b1"]);
    scene.fleet.settled(AGREED).unwrap();
    assert!(scene.fleet.row("alpha").unwrap().generation.applied > generation);
}

#[test]
fn stopped_api_server_affects_no_packet_or_stream() {
    let _alone = alone();
    let (scene, to) = scene("api-server");
    let api_server = scene.fleet.control_plane().api_server();
    api_server.signal(libc::SIGSTOP);
    answered_by("no API server", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    for node in scene.fleet.nodes() {
        let connected = scene.fleet.agent_metric(node, "switchtower_controller_connected", "");
        assert_eq!(connected.unwrap_or_default(), 1.0, "{} left its controller", node.net.name);
    }
    api_server.signal(libc::SIGCONT);
    scene.endpoints("web", &["c1"]);
    answered_by("goes on", scene.pod("a2"), Transport::Tcp, to, &["c1"]);
    scene.fleet.settled(AGREED).unwrap();
}

/// Its token cannot be reviewed, and kubelets cannot renew an expired one.
#[test]
fn agent_connects_by_certificate_without_the_api_server() {
    let _alone = alone();
    let (scene, to) = scene("certificate");
    let fleet = scene.fleet;
    let alpha = scene.node("alpha");
    let before = kernel::transactions(&alpha.net.namespace).unwrap();
    let token =
        fleet.token(AGENT_ACCOUNT, Some(&fleet.agent_pod("alpha").unwrap()), &[AUDIENCE], 3_600).unwrap();
    let api_server = fleet.control_plane().api_server();
    api_server.signal(libc::SIGSTOP);
    // The controller has reviewed the previous token a moment ago.
    std::fs::write(fleet.token_file(alpha), token).unwrap();
    fleet.stop_agent(alpha, libc::SIGKILL).unwrap();
    fleet.run_agent(alpha).unwrap();
    let connected = wait::until("alpha connects by its certificate", AGREED, || {
        let connected = fleet.agent_metric(alpha, "switchtower_controller_connected", "")?;
        ensure!(connected == 1.0, "it is not connected");
        Ok(())
    });
    api_server.signal(libc::SIGCONT);
    connected.unwrap();
    let log = fleet.controller_log();
    assert!(log.lines().any(|line| line.contains("node's certificate") && line.contains("alpha")), "{log}");
    fleet.settled(AGREED).unwrap();
    assert_eq!(kernel::transactions(&alpha.net.namespace).unwrap(), before, "no kernel is written");
    scene.endpoints("web", &["c1"]);
    answered_by("afterwards", scene.pod("a2"), Transport::Tcp, to, &["c1"]);
}

#[test]
fn kubectl_shows_and_waits_for_every_node() {
    let _alone = alone();
    let (scene, _) = scene("kubectl");
    let control_plane = scene.fleet.control_plane();
    let wait = ["wait", "--for=condition=Ready", "pxs", "--all", "--timeout=40s"];
    assert_eq!(control_plane.kubectl(&wait).unwrap().lines().count(), 3);
    let table = control_plane.kubectl(&["get", "switchtower"]).unwrap();
    let mut lines = table.lines();
    let columns: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    let wanted = ["NAME", "READY", "STATE", "DESIRED", "APPLIED", "PROFILE", "SINCE", "REPORTED", "REASON"];
    assert_eq!(columns, wanted);
    assert_eq!(lines.filter(|line| line.contains("True")).count(), 3, "{table}");
    let selected = |selector| control_plane.kubectl(&["get", "pxs", "-o", "name", selector]).unwrap();
    assert_eq!(selected("--field-selector=status.state=Synced").lines().count(), 3);
    assert_eq!(selected("--field-selector=status.state=Stale"), "");
}

#[test]
fn recreated_node_served() {
    let _alone = alone();
    let (scene, to) = scene("node-again");
    let beta = scene.node("beta");
    let uid = |name: &str| scene.fleet.kube().get_cluster::<Node>(name).unwrap().unwrap().metadata.uid;
    let before = uid("beta");
    scene.fleet.kube().delete_cluster::<Node>("beta").unwrap();
    answered_by("the others", scene.pod("c2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    scene.fleet.register(beta).unwrap();
    assert_ne!(uid("beta"), before);
    // The old Pod of the agent is bound to the old Node; its DaemonSet would create a new one.
    scene.fleet.stop_agent(beta, libc::SIGTERM).unwrap();
    scene.fleet.start_agent(beta).unwrap();
    wait::until("beta is served", AGREED, || scene.fleet.agrees(beta)).unwrap();
    answered_by("served again", scene.pod("b1"), Transport::Tcp, to, &["a1", "b1", "c1"]);
    scene.endpoints("web", &["c1"]);
    answered_by("changed", scene.pod("b1"), Transport::Tcp, to, &["c1"]);
    scene.fleet.settled(AGREED).unwrap();
}

#[test]
fn new_connections_survive_endpoint_changes() {
    let _alone = alone();
    let (scene, to) = scene("churn");
    let from = scene.pod("c2");
    let stop = AtomicBool::new(false);
    let outcomes = std::thread::scope(|scope| {
        let hammer = scope.spawn(|| {
            let mut outcomes = BTreeMap::<String, usize>::new();
            while !stop.load(Ordering::Relaxed) {
                for (name, count) in probe::spread(from, Transport::Tcp, to, 50).unwrap() {
                    *outcomes.entry(name).or_default() += count;
                }
            }
            outcomes
        });
        for round in 0..25 {
            // b1 stays; the pods themselves never stop serving.
            let pods: &[&str] = if round % 2 == 0 { &["b1", "c1"] } else { &["a1", "b1"] };
            scene.endpoints("web", pods);
            std::thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
        hammer.join().unwrap()
    });
    let failed: Vec<_> =
        outcomes.iter().filter(|(name, _)| !["a1", "b1", "c1"].contains(&name.as_str())).collect();
    assert!(failed.is_empty(), "{failed:?} of {outcomes:?}");
    assert!(outcomes.values().sum::<usize>() > 200, "{outcomes:?}");
    scene.fleet.settled(AGREED).unwrap();
}

#[test]
fn services_swapping_an_address_both_work() {
    let _alone = alone();
    let scene = Scene::new("swap");
    let with = |ip: &str| json!({"externalIPs": [ip]});
    let (one, two) = ("192.0.2.31", "192.0.2.32");
    scene.service("left", &with(one));
    scene.service("right", &with(two));
    scene.endpoints("left", &["a1"]);
    scene.endpoints("right", &["c1"]);
    let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 80);
    let from = scene.pod("b1");
    answered_by("left at first", from, Transport::Tcp, at(one), &["a1"]);
    answered_by("right at first", from, Transport::Tcp, at(two), &["c1"]);
    scene.service("left", &with(two));
    scene.service("right", &with(one));
    answered_by("swapped", from, Transport::Tcp, at(two), &["a1"]);
    answered_by("swapped", from, Transport::Tcp, at(one), &["c1"]);
    fleet().settled(AGREED).unwrap();
}

#[test]
fn untranslated_packets_never_leave_without_endpoints() {
    let _alone = alone();
    let (scene, to) = scene("empty");
    scene.endpoints("web", &[]);
    let from = scene.pod("c2");
    eventually("empty", from, Transport::Tcp, to, |outcome| *outcome == ProbeResult::Refused);
    let ports = [("tcp", "TCP", 8080)];
    let slice = objects::slice("empty", "web-4", "web", false, &ports, &[]);
    scene.fleet.kube().apply(&slice).unwrap();
    eventually("still", from, Transport::Udp, to, |outcome| *outcome == ProbeResult::Refused);
    scene.endpoints("web", &["a1"]);
    eventually("back", from, Transport::Tcp, to, |outcome| outcome.backend() == Some("a1"));
}
