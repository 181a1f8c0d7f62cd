//! Settings change while the agent runs: real agent, real kernel, real packets, a controller in the test. A
//! connection through a Service stays open while every setting changes. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::Lab;
use common::node::{Connection, Watcher, ask, serve_lines};
use common::process::Agent;
use common::scene::Scene;
use switchtower_node_agent_testing::controller::{self, DEADLINE};
use switchtower_node_agent_testing::fleet::{self, Fleet, probe};
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::*;

const CLUSTER_IP: &str = "10.96.0.0:80";
const NODE_PORT: &str = "192.0.2.1:30080";
/// The same NodePort on another address of the node.
const OTHER_NODE_PORT: &str = "10.244.0.254:30080";
/// Port of the backends.
const PORT: u16 = 8081;

/// Runs a test in the node of a laboratory whose first two pods are backends.
fn in_lab<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let lab = Lab::new();
    serve_lines(&lab.pods[0], "pod1", PORT);
    serve_lines(&lab.pods[1], "pod2", PORT);
    lab.node.run(|| controller::block_on(test()));
}

fn shell(line: &str) -> String {
    common::run(&["sh", "-c", line], "")
}

/// One Service whose endpoints are two pods of the node, with a ClusterIP and a NodePort.
fn service() -> Fleet {
    let mut fleet = Fleet::new(0, 0);
    let mut node_port = fleet::frontend(0);
    node_port.kind = FrontendKind::NodePort as i32;
    let key = node_port.key.take().unwrap();
    node_port.key = Some(FrontendKey { address: Vec::new(), port: 30_080, ..key });
    fleet.add_frontend(fleet::frontend(0));
    fleet.add_frontend(node_port);
    let pods = [1, 2].map(|last| Endpoint { address: vec![10, 244, 0, last], port: PORT.into() });
    fleet.add_pool(fleet::pool_key(0), pods.to_vec());
    fleet.generation = 1;
    fleet
}

fn cidr(address: [u8; 4], prefix_length: u32) -> Cidr {
    Cidr { address: address.to_vec(), prefix_length }
}

impl Scene {
    async fn start() -> Self {
        Self::of(service()).await
    }

    /// Sends settings that are on trial with these probes, and the built-in ones behind them.
    async fn send_on_trial(&mut self, settings: Settings, probes: Vec<Probe>, window_milliseconds: u32) {
        self.revision += 1;
        let fallback = Some(Box::new(fleet::settings()));
        let trial = Some(Box::new(Trial { probes, window_milliseconds, fallback }));
        let settings = Settings { profile: "default".into(), revision: self.revision, trial, ..settings };
        self.stream.update(self.fleet.replace_settings(settings)).await;
    }

    /// Receives messages until a Report with this phase of the trial; returns the status and the Acks before it.
    async fn until(&mut self, phase: TrialPhase) -> (TrialStatus, Vec<Ack>) {
        let mut acks = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            match self.stream.next().await {
                Some(FromAgent::Report(Report { trial: Some(status), .. })) if status.phase() == phase => {
                    return (status, acks);
                }
                Some(FromAgent::Ack(ack)) => acks.push(ack),
                Some(FromAgent::Report(_)) => {}
                other => panic!("while waiting for {phase:?} this came: {other:?}"),
            }
        }
        panic!("{phase:?} did not come in time");
    }
}

/// The sources that pods see of this host's connections to the Service.
fn sources() -> BTreeSet<IpAddr> {
    (0..16).map(|_| ask(CLUSTER_IP).unwrap().1).collect()
}

fn sysctl(name: &str) -> String {
    shell(&format!("cat /proc/sys/net/netfilter/{name}")).trim().to_owned()
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn open_connection_survives_every_change_of_settings() {
    in_lab(|| async {
        let mut scene = Scene::start().await;
        let (bridge, own): (IpAddr, IpAddr) = ("10.244.0.254".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let mut connections = [Connection::open(CLUSTER_IP), Connection::open(NODE_PORT)];
        let mut alive = |what: &str| connections.iter_mut().for_each(|one| one.exchange(what));
        let table = || shell("nft list table ip switchtower");
        let detection = |mode: LocalDetection| Settings { local_detection: mode as i32, ..fleet::settings() };
        let started = shell("cat /proc/sys/net/netfilter/nf_conntrack_udp_timeout");

        // A host process is no local pod: it is masqueraded, unless the detection includes it or is off.
        assert_eq!(sources(), [bridge].into());
        alive("at the beginning");
        let host = Settings {
            cluster_cidrs: vec![cidr([192, 0, 2, 0], 24)],
            ..detection(LocalDetection::ClusterCidr)
        };
        scene.set(host.clone()).await;
        assert_eq!(sources(), [own].into(), "the host counts as a local pod");
        alive("cluster CIDR");
        scene.set(Settings { masquerade_all: true, ..host }).await;
        assert_eq!(sources(), [bridge].into(), "masquerade_all");
        alive("masquerade_all");
        for (mode, interface, rule) in [
            (LocalDetection::BridgeInterface, "br0", "iifname \"br0\""),
            (LocalDetection::InterfaceNamePrefix, "b", "iifname \"b*\""),
        ] {
            scene.set(Settings { interface: interface.into(), ..detection(mode) }).await;
            assert!(table().contains(rule), "{mode:?}: {}", table());
            assert_eq!(sources(), [bridge].into());
            alive(interface);
        }
        scene.set(detection(LocalDetection::None)).await;
        assert_eq!(sources(), [own].into(), "no detection: nothing is masqueraded");
        alive("no detection");
        scene.set(Settings { masquerade_mark: 0x8000, ..fleet::settings() }).await;
        assert!(table().contains("0x00008000"), "{}", table());
        assert_eq!(sources(), [bridge].into());
        alive("another mark");

        // NodePorts on another of the node's addresses.
        let elsewhere =
            Settings { node_port_addresses: vec![cidr([10, 244, 0, 0], 24)], ..fleet::settings() };
        scene.set(elsewhere).await;
        assert!(ask(NODE_PORT).is_err(), "not on the primary address");
        assert!(ask(OTHER_NODE_PORT).is_ok());
        alive("the NodePort's address is no longer served, the connection is");

        let conntrack = ConntrackSettings {
            udp_timeout_seconds: 17,
            tcp_be_liberal: true,
            ..ConntrackSettings::default()
        };
        scene.set(Settings { conntrack: Some(conntrack), ..fleet::settings() }).await;
        assert_eq!(
            (sysctl("nf_conntrack_udp_timeout"), sysctl("nf_conntrack_tcp_be_liberal")),
            ("17".into(), "1".into())
        );
        alive("conntrack");
        scene.set(fleet::settings()).await;
        assert_eq!(
            sysctl("nf_conntrack_udp_timeout"),
            started.trim(),
            "a value that is no longer set is restored"
        );

        // From before the first commit: its acknowledgement may arrive late on a busy machine.
        let began = Instant::now();
        scene.set(Settings { minimum_interval_milliseconds: 400, ..fleet::settings() }).await;
        for _ in 0..2 {
            scene.set(Settings { minimum_interval_milliseconds: 400, ..fleet::settings() }).await;
        }
        assert!(began.elapsed() >= Duration::from_millis(700), "two intervals: {:?}", began.elapsed());
        scene.set(fleet::settings()).await;
        alive("minimum interval");

        assert!(!scene.agent.log().contains("the kernel holds the generation"), "it logs warnings only");
        scene.set(Settings { log_level: "info".into(), ..fleet::settings() }).await;
        scene.set(Settings { log_level: "info".into(), ..fleet::settings() }).await;
        assert!(scene.agent.log().contains("the kernel holds the generation"), "{}", scene.agent.log());
        scene.set(fleet::settings()).await;
        let length = scene.agent.log().len();
        scene.set(fleet::settings()).await;
        assert_eq!(
            scene.agent.log()[length..].matches("the kernel holds").count(),
            0,
            "{}",
            scene.agent.log()
        );
        alive("log level");
    });
}

#[test]
fn working_settings_pass_their_trial() {
    in_lab(|| async {
        let mut scene = Scene::start().await;
        let mut connection = Connection::open(CLUSTER_IP);
        let probes = vec![
            probe(ProbeKind::ClusterIp, "80"),
            probe(ProbeKind::NodePort, "http"),
            Probe {
                service: "none".into(),
                name: "no such Service".into(),
                ..probe(ProbeKind::ClusterIp, "")
            },
        ];
        let good = Settings { node_port_addresses: vec![cidr([0, 0, 0, 0], 0)], ..fleet::settings() };
        scene.send_on_trial(good, probes, 1_200).await;
        let (status, acks) = scene.until(TrialPhase::Passed).await;
        let causes: Vec<_> =
            acks.iter().map(|ack| ack.deviations.clone().and_then(|all| all.settings)).collect();
        assert_eq!(causes.len(), 2, "{causes:?}");
        assert_eq!((causes[0].as_ref().unwrap().cause(), &causes[1]), (SettingsCause::Trial, &None));
        assert!(acks.iter().all(|ack| ack.generation == scene.fleet.generation));
        let results: Vec<_> = status
            .results
            .iter()
            .map(|result| (result.address.as_str(), result.ok_before, result.ok_after, result.failed))
            .collect();
        let expected =
            [(CLUSTER_IP, true, true, false), (NODE_PORT, true, true, false), ("", false, false, false)];
        assert_eq!(results, expected);
        assert!(ask(OTHER_NODE_PORT).is_ok(), "in force");
        connection.exchange("after the trial");
    });
}

#[test]
fn settings_breaking_a_node_port_rolled_back_by_the_agent() {
    in_lab(|| async {
        let mut scene = Scene::start().await;
        let mut connection = Connection::open(CLUSTER_IP);
        let watcher = Watcher::start(NODE_PORT);
        let bad = Settings { node_port_addresses: vec![cidr([10, 244, 0, 0], 24)], ..fleet::settings() };
        scene.send_on_trial(bad.clone(), vec![probe(ProbeKind::NodePort, "80")], 60_000).await;
        let (_, acks) = scene.until(TrialPhase::Before).await;
        assert!(acks.is_empty());
        // From here on the stream is neither read nor answered.
        let gap = tokio::task::spawn_blocking(move || watcher.longest_gap(DEADLINE)).await.unwrap();
        assert!(gap < Duration::from_secs(5), "the NodePort did not answer for {gap:?}");
        connection.exchange("after the rollback");

        // A restarted agent keeps the fallback and reports the result to the next controller.
        scene.agent.kill();
        scene.agent = Agent::start(scene.directory.path());
        scene.stream = scene.controller.accept().await;
        let hello = scene.stream.hello.clone();
        let status = hello.trial.unwrap();
        assert_eq!(status.phase(), TrialPhase::RolledBack);
        let result = &status.results[0];
        assert!(result.ok_before && !result.ok_after && result.failed && result.ok_again, "{result:?}");
        assert_eq!((result.errno, result.address.as_str()), (libc::ECONNREFUSED, NODE_PORT));
        let in_force = hello.deviations.unwrap().settings.unwrap();
        assert_eq!((in_force.profile.as_str(), in_force.cause()), ("builtin", SettingsCause::RolledBack));
        assert!(ask(NODE_PORT).is_ok());
    });
}

#[test]
fn changed_source_address_fails_the_trial() {
    in_lab(|| async {
        let mut scene = Scene::start().await;
        let source = Probe { compare_source: true, ..probe(ProbeKind::ClusterIp, "http") };
        let bad = Settings { local_detection: LocalDetection::None as i32, ..fleet::settings() };
        scene.send_on_trial(bad, vec![source], 60_000).await;
        let (status, _) = scene.until(TrialPhase::RolledBack).await;
        let result = &status.results[0];
        assert!(result.ok_before && result.ok_after && result.failed, "{result:?}");
        assert_eq!(
            (result.source_before.as_slice(), result.source_after.as_slice()),
            (&[10, 244, 0, 254][..], &[192, 0, 2, 1][..])
        );
        let ack = loop {
            if let Some(FromAgent::Ack(ack)) = scene.stream.next().await {
                break ack;
            }
        };
        assert_eq!(ack.deviations.unwrap().settings.unwrap().cause(), SettingsCause::RolledBack);
        assert_eq!(sources(), ["10.244.0.254".parse().unwrap()].into());
    });
}

#[test]
fn next_agent_continues_the_trial_of_a_killed_one() {
    in_lab(|| async {
        let mut scene = Scene::start().await;
        let good = Settings { masquerade_all: true, ..fleet::settings() };
        scene.send_on_trial(good, vec![probe(ProbeKind::ClusterIp, "80")], 2_000).await;
        let (status, _) = scene.until(TrialPhase::Watching).await;
        assert!(status.results[0].ok_before);
        scene.agent.kill();
        scene.agent = Agent::start(scene.directory.path());
        scene.stream = scene.controller.accept().await;
        let hello = scene.stream.hello.clone();
        assert_eq!(hello.trial.unwrap().phase(), TrialPhase::Watching);
        scene.stream.welcome(2, &[]).await;
        // The snapshot file may be older than the trial: then the controller sends the missing changes.
        if hello.view.is_none_or(|view| view.generation < scene.fleet.generation) {
            scene.stream.update(scene.fleet.snapshot()).await;
        }
        let (status, _) = scene.until(TrialPhase::Passed).await;
        assert!(status.results[0].ok_before && status.results[0].ok_after);
    });
}
