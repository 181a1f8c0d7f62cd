//! The drain gate in the whole product: a rolling replacement of endpoints under continuous new connections from every
//! node, while one agent is slow. Without the gate connections are lost, with it none. The laboratory has no kubelets;
//! the tests send the hooks' requests as they do, from the node to the pod's address.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};
use switchtower_e2e::drain_gate::{self, open_gate};
use switchtower_e2e::lab::namespace::Namespace;
use switchtower_e2e::lab::{objects, wait};
use switchtower_e2e::probe::{self, Transport};
use switchtower_e2e::scene::{Scene, alone, answered_by, cluster_ip, fleet, node_port};

/// The pods that are replaced, one after another, and those that remain.
const REPLACED: [&str; 3] = ["a1", "a2", "b1"];
const REMAINING: [&str; 2] = ["c1", "c2"];
/// Delay of the slow agent.
const SLOWED: Duration = Duration::from_secs(2);

/// Sends the request of a hook as the kubelet of the pod's node does; returns the body of the response.
fn hook(pod: &str, query: &str) -> anyhow::Result<Value> {
    let (net, node) = fleet().pod(pod)?;
    drain_gate::hook(node, net.address(false), &format!("/drained{query}"))
}

/// A pod's process ends: new connections are refused, established ones continue. Dropping it starts the process again.
struct Ended(&'static Namespace);

impl Ended {
    fn new(pod: &'static Namespace) -> Self {
        for arguments in [
            vec!["add", "table", "inet", "ended"],
            vec!["add", "chain", "inet", "ended", "input", "{ type filter hook input priority 0; }"],
            vec![
                "add",
                "rule",
                "inet",
                "ended",
                "input",
                "tcp",
                "dport",
                "8080",
                "tcp",
                "flags",
                "&",
                "(syn|ack)",
                "==",
                "syn",
                "reject",
                "with",
                "tcp",
                "reset",
            ],
        ] {
            pod.output("nft", &arguments).unwrap();
        }
        Self(pod)
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.output("nft", &["delete", "table", "inet", "ended"]).unwrap();
    }
}

/// Stops an agent for two seconds at a time.
struct Slow {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slow {
    fn agent(node: &str) -> Self {
        let node = fleet().nodes().iter().find(|one| one.net.name == node).unwrap();
        let process = fleet().agent_id(node).unwrap().to_string();
        let ended = Arc::new(AtomicBool::new(false));
        let ending = ended.clone();
        let signal = move |name: &str| {
            let status = std::process::Command::new("kill").args([name, &process]).status().unwrap();
            assert!(status.success());
        };
        let thread = std::thread::spawn(move || {
            while !ending.load(Ordering::Relaxed) {
                signal("-STOP");
                std::thread::sleep(SLOWED);
                signal("-CONT");
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        Self { ended, thread: Some(thread) }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Opens new connections from every node to every address until it is stopped.
struct Load {
    ended: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    losses: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(targets: &[SocketAddr]) -> Self {
        let mut load = Self {
            ended: Arc::default(),
            count: Arc::default(),
            losses: Arc::default(),
            threads: Vec::new(),
        };
        for node in fleet().nodes() {
            let (ended, count, losses) = (load.ended.clone(), load.count.clone(), load.losses.clone());
            let targets = targets.to_vec();
            load.threads.push(std::thread::spawn(move || {
                for target in targets.iter().cycle() {
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    let outcome = probe::send(&node.net.namespace, Transport::Tcp, *target).unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                    if outcome.backend().is_none() {
                        losses.lock().unwrap().push(format!("{} to {target}: {outcome}", node.net.name));
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }));
        }
        load
    }

    /// Returns the number of connections and the losses.
    fn stop(self) -> (usize, Vec<String>) {
        self.ended.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        (self.count.load(Ordering::Relaxed), std::mem::take(&mut self.losses.lock().unwrap()))
    }
}

struct Run {
    scene: Scene,
    targets: Vec<SocketAddr>,
}

impl Run {
    /// Each run needs a load balancer's address of its own.
    fn new(name: &str, load_balancer: &str) -> Self {
        let scene = Scene::new(name);
        let service = scene.load_balancer("web", &json!({}), &[load_balancer]);
        scene.endpoints("web", &[&REPLACED[..], &REMAINING[..]].concat());
        let node = &scene.node("alpha").net;
        let port = node_port(&service, Transport::Tcp);
        let load_balancer = SocketAddr::new(load_balancer.parse().unwrap(), 80);
        let node_port = SocketAddr::new(node.address(false), port);
        let targets = vec![cluster_ip(&service, false), node_port, load_balancer];
        let run = Self { scene, targets };
        run.serves(&[&REPLACED[..], &REMAINING[..]].concat());
        run
    }

    fn serves(&self, pods: &[&str]) {
        for node in fleet().nodes() {
            answered_by("all pods serve", &node.net.namespace, Transport::Tcp, self.targets[0], pods);
        }
    }

    /// Marks pods as terminating, in all slices.
    fn terminate(&self, pods: &BTreeSet<&str>) {
        let all = [&REPLACED[..], &REMAINING[..]].concat();
        self.scene.endpoints_with("web", &all, |name, endpoint| {
            if pods.contains(name) { objects::terminating(endpoint, true) } else { endpoint }
        });
    }

    /// Replaces one pod after another under load. `hook` runs between the change of the endpoints and the end of the
    /// pod's process. Returns connections and losses.
    fn roll(&self, mut hook: impl FnMut(&str)) -> (usize, Vec<String>) {
        let slow = Slow::agent("gamma");
        let load = Load::start(&self.targets);
        let mut gone = BTreeSet::new();
        let mut ended = Vec::new();
        for pod in REPLACED {
            std::thread::sleep(Duration::from_millis(500));
            gone.insert(pod);
            self.terminate(&gone);
            hook(pod);
            ended.push(Ended::new(self.scene.pod(pod)));
            std::thread::sleep(Duration::from_secs(1));
        }
        std::thread::sleep(SLOWED);
        let outcome = load.stop();
        drop((slow, ended));
        outcome
    }
}

#[test]
fn rolling_replacement_loses_no_connection_with_the_gate() {
    let _alone = alone();
    open_gate(fleet()).unwrap();
    let run = Run::new("drain-roll", "203.0.113.18");
    let (without, lost) = run.roll(|_| ());
    assert!(!lost.is_empty(), "no connection of {without} was lost without the gate; the agent was not slow");
    run.terminate(&BTreeSet::new());
    run.serves(&[&REPLACED[..], &REMAINING[..]].concat());

    let mut waits = Vec::new();
    let (with, losses) = run.roll(|pod| {
        let body = hook(pod, "").unwrap();
        assert_eq!(body["verdict"], "Drained", "{body}");
        assert_eq!(body["nodesMissingTotal"], 0, "{body}");
        waits.push(Duration::from_millis(body["milliseconds"].as_u64().unwrap()));
    });
    println!(
        "without the gate: {} of {without} connections lost; with it: {} of {with}; waits {waits:?}",
        lost.len(),
        losses.len()
    );
    assert!(losses.is_empty(), "{:?} ...", &losses[..losses.len().min(5)]);
    waits.sort_unstable();
    assert!(waits[waits.len() / 2] <= SLOWED + Duration::from_secs(1), "{waits:?}");
    // The other tests ask about the same pods, in any order.
    run.scene.endpoints("web", &[]);
}

/// The hooks ask the replica of their node; the slow agent acknowledges to the other one.
#[test]
fn gate_waits_for_the_agents_of_both_replicas() {
    let _alone = alone();
    open_gate(fleet()).unwrap();
    fleet().start_second().unwrap();
    let deliver = || {
        fleet().listed(2)?;
        fleet().nodes().iter().try_for_each(|node| fleet().write_bootstrap(node))
    };
    deliver().unwrap();
    let run = Run::new("drain-replicas", "203.0.113.19");
    let [alpha, gamma] = ["alpha", "gamma"].map(|name| run.scene.node(name));
    wait::until("the agents of alpha and gamma use different replicas", Duration::from_secs(120), || {
        fleet().settled(Duration::from_secs(60))?;
        if fleet().replica_of(alpha)? == fleet().replica_of(gamma)? {
            fleet().stop_agent(gamma, libc::SIGKILL)?;
            fleet().run_agent(gamma)?;
            anyhow::bail!("both use the same");
        }
        Ok(())
    })
    .unwrap();
    let (count, losses) = run.roll(|pod| {
        let body = hook(pod, "").unwrap();
        assert_eq!((&body["verdict"], &body["nodesMissingTotal"]), (&json!("Drained"), &json!(0)), "{body}");
    });
    println!("{} of {count} connections lost", losses.len());
    assert!(losses.is_empty(), "{:?} ...", &losses[..losses.len().min(5)]);

    // The replica that a hook asked ends; the agent asks the other one.
    run.terminate(&BTreeSet::new());
    run.serves(&[&REPLACED[..], &REMAINING[..]].concat());
    let asked = fleet().replica_number(alpha).unwrap();
    let waiting = std::thread::spawn(|| hook("a1", "?timeout=120s").unwrap());
    std::thread::sleep(Duration::from_millis(500));
    fleet().signal_replica(asked, libc::SIGKILL);
    run.scene.endpoints("web", &["c1"]);
    let body = waiting.join().unwrap();
    assert_eq!(body["verdict"], "Drained", "{body}");
    if asked == 0 {
        fleet().restart_replica(0).unwrap();
        deliver().unwrap();
        fleet().signal_replica(1, libc::SIGTERM);
    }
    fleet().settled(Duration::from_secs(60)).unwrap();
    run.scene.endpoints("web", &[]);
}

#[test]
fn every_verdict_is_reached() {
    let _alone = alone();
    open_gate(fleet()).unwrap();
    let scene = Scene::new("drain-verdicts");
    let verdict = |pod: &str, query: &str| hook(pod, query).unwrap()["verdict"].as_str().unwrap().to_owned();
    let service = scene.service("web", &json!({}));
    let vip = cluster_ip(&service, false);
    scene.endpoints("web", &["a1", "b1"]);
    answered_by("both serve", &scene.node("gamma").net.namespace, Transport::Tcp, vip, &["a1", "b1"]);
    assert_eq!(verdict("a1", "?timeout=300ms"), "TimedOut", "ready");
    scene.endpoints_with("web", &["a1", "b1"], |_, endpoint| objects::terminating(endpoint, true));
    wait::until("only terminating endpoints are left", Duration::from_secs(20), || {
        let verdict = verdict("a1", "?timeout=300ms");
        ensure!(verdict == "LastEndpoint", "{verdict}");
        Ok(())
    })
    .unwrap();
    // A replacement ends the wait.
    let waiting = std::thread::spawn(|| hook("a1", "?timeout=60s").unwrap());
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    scene.endpoints("web", &["c1"]);
    assert_eq!(waiting.join().unwrap()["verdict"], "Drained");
    assert!(began.elapsed() < Duration::from_secs(20));

    // A controller that is lost while pods wait.
    scene.endpoints("web", &["a1", "c1"]);
    answered_by("it is back", &scene.node("beta").net.namespace, Transport::Tcp, vip, &["a1", "c1"]);
    fleet().stop_controller(9).unwrap();
    assert_eq!(verdict("a1", "?timeout=1s"), "NoController");
    let waiting = std::thread::spawn(|| hook("a1", "?timeout=120s").unwrap());
    scene.endpoints("web", &["c1"]);
    fleet().start_controller().unwrap();
    let body = waiting.join().unwrap();
    assert_eq!(body["verdict"], "Drained", "{body}");
    fleet().settled(Duration::from_secs(60)).unwrap();
}

/// Waits for an Event about a Pod; returns its note.
fn event(namespace: &str, pod: &str, reason: &str) -> String {
    let api: Api<Event> = Api::namespaced(fleet().kube().client(), namespace);
    wait::until(&format!("Event {reason} on Pod {pod}"), Duration::from_secs(20), || {
        let events = fleet().kube().block_on(api.list(&ListParams::default()))?.items;
        let wanted = |event: &&Event| {
            let object = &event.involved_object;
            event.reason.as_deref() == Some(reason)
                && (object.kind.as_deref(), object.name.as_deref()) == (Some("Pod"), Some(pod))
                && object.uid.is_some()
        };
        let found = events.iter().find(wanted).and_then(|event| event.message.clone());
        found.with_context(|| format!("not among {} Events", events.len()))
    })
    .unwrap()
}

/// Creates a running Pod on a node with a status.
fn running_pod(namespace: &str, name: &str, node: &str, status: Value) {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "default", "namespace": namespace}});
    fleet().kube().apply(&account).unwrap();
    let mut pod = objects::pod(namespace, name, node, "default");
    pod["status"] = status;
    fleet().kube().apply(&pod).unwrap();
}

/// Applies the EndpointSlice of a host-network pod on alpha; `replaced`: it terminates, and c1 is ready.
fn host_endpoint(scene: &Scene, service: &str, pod: &str, port: u16, replaced: bool) {
    let node = &scene.node("alpha").net;
    let host = json!({
        "addresses": [node.address(false).to_string()], "nodeName": node.name,
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "targetRef": {"kind": "Pod", "namespace": scene.namespace, "name": pod},
    });
    let mut endpoints = vec![host];
    if replaced {
        let (pod, node) = fleet().pod("c1").unwrap();
        endpoints =
            vec![objects::terminating(endpoints.remove(0), true), objects::endpoint(pod, &node.net, false)];
    }
    let name = format!("{service}-4");
    let slice = objects::slice(&scene.namespace, &name, service, false, &[("tcp", "TCP", port)], &endpoints);
    fleet().kube().apply(&slice).unwrap();
}

#[test]
fn host_network_pod_waits_by_its_name() {
    const NAMESPACE: &str = "drain-host";
    let _alone = alone();
    open_gate(fleet()).unwrap();
    let scene = Scene::new(NAMESPACE);
    for (service, pod, port) in [("web", "web-host", 8080), ("api", "api-host", 9090)] {
        scene.service(service, &json!({}));
        host_endpoint(&scene, service, pod, port, false);
    }
    fleet().settled(Duration::from_secs(20)).unwrap();
    let verdict = |node: &str, pod: &str, timeout: &str| {
        let node = scene.node(node);
        let path = format!("/drained/{NAMESPACE}/{pod}?timeout={timeout}");
        drain_gate::hook(node, node.net.address(false), &path).unwrap()["verdict"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(verdict("alpha", "web-host", "300ms"), "TimedOut", "ready");
    // In its first minute, the controller cannot know that a pod was no endpoint.
    let is_none = |verdict: String| ["NotAnEndpoint", "Drained"].contains(&&*verdict);
    assert!(is_none(verdict("alpha", "unknown", "20s")));
    assert!(is_none(verdict("beta", "web-host", "20s")), "a pod of another node");
    host_endpoint(&scene, "web", "web-host", 8080, true);
    assert_eq!(verdict("alpha", "web-host", "20s"), "Drained", "the other pod has the same address");
    assert_eq!(verdict("alpha", "api-host", "300ms"), "TimedOut", "ready");

    // The Event needs the Pod.
    let status = objects::running_on_host(&scene.node("alpha").net);
    running_pod(NAMESPACE, "api-host", "alpha", status);
    assert_eq!(verdict("alpha", "api-host", "400ms"), "TimedOut");
    let note = event(NAMESPACE, "api-host", "DrainGateTimedOut");
    assert!(note.contains("still a ready endpoint"), "{note}");
    for service in ["web", "api"] {
        scene.endpoints(service, &[]);
    }
}

#[test]
fn pod_gets_an_event_when_the_gate_gives_up() {
    const NAMESPACE: &str = "drain-event";
    let _alone = alone();
    open_gate(fleet()).unwrap();
    let scene = Scene::new(NAMESPACE);
    scene.service("web", &json!({}));
    let (net, node) = fleet().pod("a1").unwrap();
    running_pod(NAMESPACE, "web-0", &node.net.name, objects::running(net, &node.net));
    scene.endpoints_with("web", &["a1"], |_, endpoint| objects::terminating(endpoint, true));
    fleet().settled(Duration::from_secs(20)).unwrap();
    assert_eq!(hook("a1", "?timeout=300ms").unwrap()["verdict"], "LastEndpoint");
    let note = event(NAMESPACE, "web-0", "DrainGateLastEndpoint");
    assert!(note.contains("only terminating endpoints"), "{note}");
    scene.endpoints("web", &[]);
}
