//! Mode Shadow: real agent, real kernel, real packets, a controller in the test. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::node::{Connection, ask, serve_lines};
use common::scene::Scene;
use common::{Lab, run};
use switchtower_node_agent_testing::controller;
use switchtower_node_agent_testing::fleet::{self, Fleet};
use switchtower_proto::v1::*;

const CLUSTER_IP: &str = "10.96.0.0:80";
/// Port of the backends.
const PORT: u16 = 8081;
/// kube-proxy's health port.
const HEALTH: &str = "127.0.0.1:10256";
/// kube-proxy's metrics port.
const METRICS: &str = "127.0.0.1:10249";
/// Port of the kubelet's probes.
const PROBES: &str = "127.0.0.1:9446";

/// Chains of another proxy: without any nat chain the kernel would stop to translate open connections.
const OTHER_PROXY: &str = "table ip other-proxy {
    chain prerouting { type nat hook prerouting priority dstnat; }
    chain output { type nat hook output priority -100; }
    chain postrouting { type nat hook postrouting priority srcnat; }
}";

fn in_lab<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let lab = Lab::new();
    serve_lines(&lab.pods[0], "pod1", PORT);
    lab.node.run(|| {
        run(&["nft", "-f", "-"], OTHER_PROXY);
        controller::block_on(test());
    });
}

/// One Service with a pod of the node as its endpoint.
fn service() -> Fleet {
    let mut fleet = Fleet::new(0, 0);
    fleet.add_frontend(fleet::frontend(0));
    fleet.add_pool(fleet::pool_key(0), vec![Endpoint { address: vec![10, 244, 0, 1], port: PORT.into() }]);
    fleet.generation = 1;
    fleet
}

fn shadow() -> Settings {
    Settings { mode: ProxyMode::Shadow.into(), ..fleet::settings() }
}

fn table() -> String {
    run(&["nft", "list", "table", "ip", "switchtower"], "")
}

/// The table without its base chains and its stamp, which has the generation.
fn regular_part(table: &str) -> String {
    let mut kept = String::new();
    for block in table.split("\n\n") {
        if !block.contains(" hook ") && !block.contains("map stamp") {
            kept.push_str(block.trim_end_matches(['}', '\n']));
        }
    }
    kept
}

fn hooks() -> usize {
    table().matches(" hook ").count()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_open(address: &str) -> bool {
    TcpStream::connect(address).is_ok()
}

#[test]
fn shadow_translates_nothing_and_active_does_again() {
    in_lab(|| async {
        let mut scene = Scene::of(service()).await;
        let mut connection = Connection::open(CLUSTER_IP);
        let active = table();
        assert_eq!(hooks(), 6);
        for round in 0..2 {
            scene.set(shadow()).await;
            assert!(ask(CLUSTER_IP).is_err(), "round {round}: translated in mode Shadow");
            assert_eq!(hooks(), 0, "{}", table());
            assert_eq!(regular_part(&table()), regular_part(&active));
            connection.exchange("an open connection stays in mode Shadow");
            scene.set(fleet::settings()).await;
            assert_eq!(ask(CLUSTER_IP).unwrap().0, "pod1", "round {round}");
            assert_eq!(hooks(), 6);
            connection.exchange("an open connection stays in mode Active");
        }
    });
}

#[test]
fn drift_repair_keeps_the_mode() {
    in_lab(|| async {
        let mut scene = Scene::of(service()).await;
        scene.set(shadow()).await;
        run(&["nft", "delete", "table", "ip", "switchtower"], "");
        let exists =
            || run(&["nft", "list", "tables"], "").lines().any(|line| line == "table ip switchtower");
        until("the table is restored", exists);
        assert_eq!(hooks(), 0);
        // Hooks that another program adds, under our name and under another one.
        for chain in ["nat_prerouting", "other"] {
            let hook = "{ type nat hook prerouting priority dstnat; }";
            run(&["nft", "-f", "-"], &format!("add chain ip switchtower {chain} {hook}"));
            until("the hook is removed", || hooks() == 0 && !table().contains(&format!("chain {chain} ")));
        }
        assert!(ask(CLUSTER_IP).is_err());
        scene.stream.update(scene.fleet.replace_settings(fleet::settings())).await;
        until("the hooks are registered", || hooks() == 6);
        run(&["nft", "flush", "chain", "ip", "switchtower", "nat_output"], "");
        until("the rules are restored", || ask(CLUSTER_IP).is_ok());
    });
}

#[test]
fn killed_agent_restarts_in_shadow() {
    in_lab(|| async {
        let mut scene = Scene::of(service()).await;
        scene.set(shadow()).await;
        scene.agent.terminate();
        assert_eq!(hooks(), 0, "the tables stay");
        scene.agent = common::process::Agent::start(scene.directory.path());
        scene.stream = scene.controller.accept().await;
        assert_eq!(scene.stream.hello.mode(), ProxyMode::Shadow);
        assert_eq!(hooks(), 0);
        assert!(!is_open(HEALTH) && is_open(PROBES));
    });
}

#[test]
fn ports_and_sysctls_of_kube_proxy_untouched_in_shadow() {
    in_lab(|| async {
        let mut scene = Scene::of(service()).await;
        until("health and metrics listen", || is_open(HEALTH) && is_open(METRICS) && is_open(PROBES));
        let found = run(&["cat", "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"], "");
        let conntrack = ConntrackSettings { udp_timeout_seconds: 17, ..ConntrackSettings::default() };
        let gate = Settings { conntrack: Some(conntrack), drain_gate_port: 9910, ..shadow() };
        scene.set(gate.clone()).await;
        until("health and metrics are closed", || !is_open(HEALTH) && !is_open(METRICS));
        assert!(is_open(PROBES), "the kubelet's probes are answered");
        assert!(!is_open("127.0.0.1:9910"), "the drain gate is closed");
        assert_eq!(run(&["cat", "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"], ""), found);
        scene.set(Settings { mode: ProxyMode::Active.into(), ..gate }).await;
        until("health and metrics listen again", || is_open(HEALTH) && is_open(METRICS));
        until("the drain gate listens", || is_open("127.0.0.1:9910"));
        assert_eq!(run(&["cat", "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"], "").trim(), "17");
    });
}
