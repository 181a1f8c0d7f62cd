//! The drain gate: real agent, real kernel, real packets, a controller in the test. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::io::{Read as _, Write as _};
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::node::{Connection, serve_lines};
use common::process::Agent;
use common::scene::Scene;
use common::{Lab, Namespace};
use switchtower_node_agent_testing::controller::{self, DEADLINE};
use switchtower_node_agent_testing::fleet::{self, Fleet};
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::controller_message::Message as FromController;
use switchtower_proto::v1::*;

const GATE: u16 = 9910;
const POD: &str = "10.244.0.1:9910";
const POD_IPV6: &str = "[fd44::1]:9910";
/// The node's own addresses.
const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
/// Port of the backends.
const PORT: u16 = 8081;

/// Sends a request from the calling thread's namespace; returns status and body.
fn get(to: &str, path: &str) -> Result<(u16, String), String> {
    let to: SocketAddr = to.parse().unwrap();
    let fail = |error: std::io::Error| format!("{:?}", error.kind());
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).map_err(fail)?;
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: pod\r\n\r\n").map_err(fail)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(fail)?;
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no response")?;
    Ok((status, text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned()))
}

/// The verdict of a hook.
fn verdict(response: Result<(u16, String), String>) -> String {
    let (status, body) = response.unwrap();
    assert_eq!(status, 200, "{body}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    body["verdict"].as_str().unwrap().to_owned()
}

/// A hook as the kubelet sends it: from the host, in the background.
fn hook(to: &'static str, path: &'static str) -> tokio::task::JoinHandle<Result<(u16, String), String>> {
    tokio::task::spawn_blocking(move || get(to, path))
}

impl Scene {
    async fn start() -> Self {
        let mut fleet = Fleet::new(0, 0);
        fleet.add_frontend(fleet::frontend(0));
        let backend = Endpoint { address: vec![10, 244, 0, 2], port: PORT.into() };
        fleet.add_pool(fleet::pool_key(0), vec![backend]);
        let pods = [("10.244.0.0", 24), ("fd44::", 64)];
        let pod_cidrs = pods.map(|(net, prefix_length)| Cidr { address: common::bytes(net), prefix_length });
        let addresses = NODE.map(common::bytes).to_vec();
        fleet.replace_node(NodeRecord { pod_cidrs: pod_cidrs.to_vec(), addresses, ..fleet::node_record() });
        fleet.generation = 1;
        Self::of(fleet).await
    }

    /// Opens the gate with a local detection and waits for the listener.
    async fn open(&mut self, mode: LocalDetection, interface: &str) {
        self.set(Settings { interface: interface.into(), ..gated(mode) }).await;
        let deadline = Instant::now() + DEADLINE;
        while TcpStream::connect(("127.0.0.1", GATE)).is_err() {
            assert!(Instant::now() < deadline, "no listener: {}", self.agent.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn query(&mut self) -> DrainQuery {
        match self.stream.next().await {
            Some(FromAgent::DrainQuery(query)) => query,
            other => panic!("a DrainQuery is due, this came: {other:?}"),
        }
    }

    async fn answer(&self, id: u64, verdict: DrainVerdict) {
        let answer = DrainAnswer { id, verdict: verdict as i32, ..DrainAnswer::default() };
        self.stream.send(FromController::DrainAnswer(answer)).await;
    }

    /// Sends a hook and answers its query; returns the address in the query.
    async fn drain(&mut self, to: &'static str) -> Vec<u8> {
        let hook = hook(to, "/drained");
        let query = self.query().await;
        self.answer(query.id, DrainVerdict::Drained).await;
        assert_eq!(verdict(hook.await.unwrap()), "Drained");
        query.address
    }

    async fn report(&mut self) -> Report {
        match self.stream.next().await {
            Some(FromAgent::Report(report)) => report,
            other => panic!("a Report is due, this came: {other:?}"),
        }
    }
}

fn gated(mode: LocalDetection) -> Settings {
    Settings {
        local_detection: mode as i32,
        cluster_cidrs: vec![
            Cidr { address: vec![10, 244, 0, 0], prefix_length: 16 },
            Cidr { address: common::bytes("fd44::"), prefix_length: 48 },
        ],
        drain_gate_port: GATE.into(),
        ..fleet::settings()
    }
}

/// Runs a test in the node of a laboratory; it gets the namespaces of the pods.
fn in_lab<F: Future<Output = ()>>(test: impl FnOnce(Vec<ManuallyDrop<Namespace>>) -> F + Send) {
    let lab = Lab::new();
    serve_lines(&lab.pods[1], "pod2", PORT);
    // The laboratory removes them.
    let pods = lab.pods.iter().map(|pod| ManuallyDrop::new(Namespace(pod.0.clone()))).collect();
    lab.node.run(|| controller::block_on(test(pods)));
}

fn rule() -> String {
    let chain = common::run(&["nft", "list", "chain", "ip", "switchtower", "nat_output"], "");
    chain.lines().find(|line| line.contains("redirect")).unwrap_or_default().trim().to_owned()
}

#[test]
fn hooks_reach_the_agent_with_every_local_detection() {
    in_lab(async |pods| {
        let mut scene = Scene::start().await;
        let mut connection = Connection::open("10.96.0.0:80");
        assert_eq!(get(POD, "/drained"), Err("ConnectionRefused".into()), "off by default");
        for (mode, interface) in [
            (LocalDetection::ClusterCidr, ""),
            (LocalDetection::BridgeInterface, "br0"),
            (LocalDetection::InterfaceNamePrefix, "br"),
            (LocalDetection::NodeCidr, ""),
        ] {
            scene.open(mode, interface).await;
            assert!(!rule().is_empty(), "{mode:?}");
            assert_eq!(scene.drain(POD).await, [10, 244, 0, 1], "{mode:?}");
            assert_eq!(scene.drain(POD_IPV6).await, common::bytes("fd44::1"), "{mode:?}");
            connection.exchange("a connection stays open");
        }
        for (from, to) in [(1, POD), (0, "127.0.0.1:9910"), (0, POD), (1, "192.0.2.1:9910")] {
            let refused = pods[from].run(|| get(to, "/drained"));
            assert_eq!(refused, Err("ConnectionRefused".into()), "from a pod to {to}");
        }
        assert_eq!(get("127.0.0.1:9910", "/drained").unwrap().0, 400, "not redirected");
        for path in
            ["/drained?timeout=soon", "/other", "/drained/", "/drained/default", "/drained/default/a/b"]
        {
            let (status, explanation) = get(POD, path).unwrap();
            assert_eq!(status, 400, "{path}");
            assert!(explanation.ends_with('\n') && explanation.len() > 20, "{path}: {explanation}");
        }

        scene.set(fleet::settings()).await;
        assert_eq!(rule(), "");
        assert_eq!(get(POD, "/drained"), Err("ConnectionRefused".into()), "off again");
        connection.exchange("after the gate was closed");
    });
}

#[test]
fn host_network_pods_are_identified_by_the_path() {
    in_lab(async |pods| {
        let mut scene = Scene::start().await;
        for (mode, interface) in [(LocalDetection::NodeCidr, ""), (LocalDetection::BridgeInterface, "br0")] {
            scene.open(mode, interface).await;
            for (to, address) in [("192.0.2.1:9910", NODE[0]), ("[2001:db8::1]:9910", NODE[1])] {
                let (status, explanation) = get(to, "/drained").unwrap();
                assert_eq!(status, 400, "the address alone names no pod");
                assert!(explanation.contains("/drained/NAMESPACE/NAME"), "{explanation}");
                let waiting = hook(to, "/drained/kube-system/dns-7.x?timeout=60s");
                let query = scene.query().await;
                let name = PodName { namespace: "kube-system".into(), name: "dns-7.x".into() };
                assert_eq!((query.address, query.host_pod), (common::bytes(address), Some(name)));
                scene.answer(query.id, DrainVerdict::Drained).await;
                let body = waiting.await.unwrap().unwrap().1;
                assert!(body.contains("kube-system/dns-7.x"), "{body}");
                for pod in &pods {
                    let refused = pod.run(|| get(to, "/drained/kube-system/dns-7.x"));
                    assert_eq!(refused, Err("ConnectionRefused".into()), "from a pod");
                }
            }
            // The address of a pod is its identity, whatever the path says.
            let waiting = hook(POD, "/drained/kube-system/dns-7.x");
            let query = scene.query().await;
            assert_eq!((query.address, query.host_pod), (vec![10, 244, 0, 1], None));
            scene.answer(query.id, DrainVerdict::Drained).await;
            assert_eq!(verdict(waiting.await.unwrap()), "Drained");
        }
        // The Node gets another address.
        let moved = NodeRecord { addresses: vec![vec![192, 0, 2, 9]], ..fleet::node_record() };
        scene.stream.update(scene.fleet.replace_node(moved)).await;
        scene.stream.ack().await;
        assert_eq!(get("192.0.2.1:9910", "/drained/a/b"), Err("ConnectionRefused".into()), "not the node's");
    });
}

#[test]
fn pods_of_a_node_wait_together_during_a_flood() {
    const PODS: u8 = 250;
    in_lab(async |_| {
        let mut scene = Scene::start().await;
        scene.open(LocalDetection::NodeCidr, "").await;
        let ended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopping = ended.clone();
        // A local process: connections that are not redirected, malformed requests, and connections without a request.
        let flood = tokio::task::spawn_blocking(move || {
            let mut count = 0_usize;
            let mut idle = Vec::new();
            while !stopping.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = get("127.0.0.1:9910", "/drained");
                let _ = get(POD, "/drained?timeout=soon");
                if idle.len() < 200 {
                    idle.extend(TcpStream::connect(POD));
                }
                count += 2;
            }
            count
        });
        let hooks: Vec<_> = (1..=PODS)
            .map(|pod| {
                tokio::task::spawn_blocking(move || {
                    get(&format!("10.244.0.{pod}:9910"), "/drained?timeout=60s")
                })
            })
            .collect();
        let mut queries = std::collections::BTreeMap::new();
        while queries.len() < usize::from(PODS) {
            let query = scene.query().await;
            assert!(queries.insert(query.address, query.id).is_none(), "one query for each pod");
        }
        let began = Instant::now();
        for id in queries.into_values() {
            scene.answer(id, DrainVerdict::Drained).await;
        }
        for hook in hooks {
            assert_eq!(verdict(hook.await.unwrap()), "Drained");
        }
        let took = began.elapsed();
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        let count = flood.await.unwrap();
        println!("{PODS} hooks answered in {took:?} during {count} requests of another process");
        assert!(count > 20, "no flood: {count}");
        assert!(took < Duration::from_secs(10), "{took:?}");
    });
}

#[test]
fn node_without_local_detection_reports_it() {
    in_lab(async |_| {
        let mut scene = Scene::start().await;
        scene.set(gated(LocalDetection::None)).await;
        assert_eq!(rule(), "");
        let report = scene.report().await;
        assert!(report.drain_gate_failure.contains("localDetection"), "{report:?}");
        scene.set(gated(LocalDetection::NodeCidr)).await;
        assert_eq!(scene.report().await.drain_gate_failure, "");
    });
}

#[test]
fn removed_rule_of_the_gate_is_restored() {
    in_lab(async |_| {
        let mut scene = Scene::start().await;
        scene.open(LocalDetection::NodeCidr, "").await;
        let before = common::run(&["nft", "list", "chain", "ip", "switchtower", "nat_output"], "");
        common::run(&["nft", "flush", "chain", "ip", "switchtower", "nat_output"], "");
        let report = scene.report().await;
        assert_eq!(report.drift_repaired, 1);
        assert_eq!(common::run(&["nft", "list", "chain", "ip", "switchtower", "nat_output"], ""), before);
        assert_eq!(scene.drain(POD).await, [10, 244, 0, 1]);
    });
}

#[test]
fn hook_ends_with_the_agent_and_works_with_the_next_one() {
    in_lab(async |_| {
        let mut scene = Scene::start().await;
        scene.open(LocalDetection::NodeCidr, "").await;
        let waiting = hook(POD, "/drained");
        scene.query().await;
        scene.agent.terminate();
        assert_eq!(verdict(waiting.await.unwrap()), "NoController", "the agent ends its hooks");
        assert_eq!(get(POD, "/drained"), Err("ConnectionRefused".into()), "the pod terminates at once");
        let before = rule();
        scene.agent = Agent::start(scene.directory.path());
        scene.stream = scene.controller.accept().await;
        scene.stream.welcome(2, &[]).await;
        assert_eq!(rule(), before);
        let generation = scene.stream.hello.view.as_ref().map(|view| view.generation);
        assert_eq!(generation, Some(scene.fleet.generation));
        scene.open(LocalDetection::NodeCidr, "").await;
        assert_eq!(scene.drain(POD).await, [10, 244, 0, 1]);
    });
}

#[test]
fn hook_survives_its_controller() {
    in_lab(async |_| {
        let mut scene = Scene::start().await;
        scene.open(LocalDetection::NodeCidr, "").await;
        let waiting = hook(POD, "/drained?timeout=60s");
        let first = scene.query().await;
        let goodbye = GoAway { reason: GoAwayReason::Shutdown as i32, ..GoAway::default() };
        scene.stream.send(FromController::GoAway(goodbye)).await;
        scene.stream = scene.controller.accept().await;
        scene.stream.welcome(2, &[]).await;
        let again = loop {
            match scene.stream.next().await {
                Some(FromAgent::DrainQuery(query)) => break query,
                Some(FromAgent::Ack(_)) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(again.address, first.address);
        assert!(again.timeout_milliseconds < first.timeout_milliseconds);
        scene.answer(again.id, DrainVerdict::LastEndpoint).await;
        assert_eq!(verdict(waiting.await.unwrap()), "LastEndpoint");
        let began = Instant::now();
        let unanswered = hook(POD, "/drained?timeout=200ms");
        scene.query().await;
        assert_eq!(verdict(unanswered.await.unwrap()), "NoController");
        assert!(began.elapsed() < Duration::from_secs(10), "the agent ends every hook");
    });
}
