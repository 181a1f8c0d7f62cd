//! Settings roll out to a fleet of twelve nodes: canary, waves, gates and rollback, with plain kubectl and killed
//! controllers. These tests share the fleet, so they run one after another.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use switchtower_crds::{ProxyProfile, ProxyRollout, ProxyRolloutStatus, ProxyStatus};
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{self, LongConnection, ProbeResult, Transport};
use switchtower_e2e::switchtower::{Fleet, FleetNode, NodeSpec};

use switchtower_e2e::scene::{self, Scene, alone, cluster_ip, node_port};

/// Timeout of a whole rollout on a busy machine. The reconnect backoff of agents grows if their controllers die
/// repeatedly.
const ROLLOUT: Duration = Duration::from_secs(120);
const NODES: usize = 12;
const CANARY: &str = "n05";

/// Twelve nodes in three zones; two have a pod, one has the canary label.
fn fleet() -> &'static Fleet {
    static FLEET: OnceLock<Fleet> = OnceLock::new();
    FLEET.get_or_init(|| {
        let specs: Vec<_> = (1..=NODES)
            .map(|number| {
                let pods: &[&str] = match number {
                    1 => &["a1"],
                    5 => &["e1"],
                    _ => &[],
                };
                NodeSpec::new(&format!("n{number:02}"), ["east", "west", "north"][number % 3], pods)
            })
            .collect();
        let fleet = Fleet::start(&specs).unwrap();
        kubectl(&fleet, &["label", "node", CANARY, "switchtower-test/canary=true"]);
        fleet
    })
}

fn kubectl(fleet: &Fleet, arguments: &[&str]) -> String {
    fleet.control_plane().kubectl(arguments).unwrap()
}

/// The fleet for one test: every node has the built-in settings, as the profile's stable revision.
struct Trip {
    scene: Scene,
    vip: SocketAddr,
    node_port: u16,
    _alone: MutexGuard<'static, ()>,
}

impl Trip {
    fn new(name: &str) -> Self {
        let alone = alone();
        // A failed test may have left the fleet without a controller.
        if fleet().check_controller().is_err() {
            fleet().start_controller().unwrap();
        }
        let scene = Scene::of(fleet(), name);
        let service = scene.service("web", &json!({"type": "NodePort"}));
        scene.endpoints("web", &["a1", "e1"]);
        let (vip, node_port) = (cluster_ip(&service, false), node_port(&service, Transport::Tcp));
        let trip = Self { scene, vip, node_port, _alone: alone };
        let at_once = json!({
            "steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": [], "windowSeconds": 0},
        });
        let target = trip.apply(&format!("before {name}"), &json!({}), &at_once);
        trip.follow(&target, |status| status.state == "Complete", |_, _| ());
        // A node whose agent was missing follows once it reconnects.
        trip.has(&target, &all());
        trip.scene.fleet.settled(ROLLOUT).unwrap();
        trip
    }

    /// The labelled canary, then half, then all; `canary` overrides the first step.
    fn strategy(&self, canary: &Value) -> Value {
        let web = json!({"namespace": self.scene.namespace, "name": "web", "port": "tcp"});
        let mut first = json!({
            "name": "canary", "nodes": 1, "soakSeconds": 1,
            "nodeSelector": {"matchLabels": {"switchtower-test/canary": "true"}},
        });
        for (key, value) in canary.as_object().into_iter().flatten() {
            first[key] = value.clone();
        }
        json!({
            "steps": [first, {"name": "half", "nodes": "50%"}, {"name": "all", "nodes": "100%"}],
            "maxUnavailable": "50%",
            "gates": {
                "windowSeconds": 1,
                "probes": [
                    {"name": "vip", "service": web, "compareSource": true, "timeoutMilliseconds": 3000},
                    {"name": "node-port", "service": web, "type": "NodePort", "timeoutMilliseconds": 3000},
                ],
            },
        })
    }

    /// Applies the profile with kubectl; returns the name of its revision.
    fn apply(&self, cause: &str, settings: &Value, strategy: &Value) -> String {
        let profile = json!({
            "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "default"},
            "spec": {"changeCause": cause, "settings": settings, "strategy": strategy},
        });
        let path = self.scene.fleet.lab().directory().join("profile.json");
        std::fs::write(&path, profile.to_string()).unwrap();
        kubectl(self.scene.fleet, &["apply", "-f", &path.to_string_lossy()]);
        let current = wait::until("the controller takes the profile in", ROLLOUT, || {
            let profile = self.profile()?;
            let status = profile.status.unwrap_or_default();
            ensure!(status.observed_generation == profile.metadata.generation, "{status:?}");
            Ok(status.target_name)
        });
        current.unwrap()
    }

    fn profile(&self) -> Result<ProxyProfile> {
        let profile: Option<ProxyProfile> = self.scene.fleet.kube().get_cluster("default")?;
        profile.context("there is no ProxyProfile default")
    }

    /// Name of the latest rollout.
    fn rollout(&self) -> String {
        self.profile().unwrap().status.unwrap().rollout.unwrap()
    }

    /// Patches the latest rollout with kubectl.
    fn patch(&self, change: &Value) {
        let patch = json!({"spec": change}).to_string();
        kubectl(self.scene.fleet, &["patch", "pxr", &self.rollout(), "--type=merge", "-p", &patch]);
    }

    /// Watches the rollout of `target` until `wanted`, and calls `each` with every observed state.
    fn follow(
        &self,
        target: &str,
        wanted: impl Fn(&ProxyRolloutStatus) -> bool,
        mut each: impl FnMut(&ProxyRolloutStatus, &BTreeSet<String>),
    ) -> ProxyRolloutStatus {
        let deadline = Instant::now() + ROLLOUT;
        loop {
            // Nodes first, so that the status is at least as recent as the nodes.
            let touched = self.touched(target);
            let rollout: Option<ProxyRollout> = self
                .profile()
                .ok()
                .and_then(|profile| profile.status?.rollout)
                .and_then(|name| self.scene.fleet.kube().get_cluster(&name).unwrap());
            let status = rollout.and_then(|rollout| rollout.status).unwrap_or_default();
            if status.target == target {
                each(&status, &touched);
                if wanted(&status) {
                    return status;
                }
            }
            let evidence = || serde_json::to_string_pretty(&status).unwrap_or_default();
            assert!(Instant::now() < deadline, "{target} not in time; touched {touched:?}: {}", evidence());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until exactly these nodes have the revision assigned.
    fn has(&self, target: &str, nodes: &BTreeSet<String>) {
        wait::until(&format!("{target} is assigned to {nodes:?}"), ROLLOUT, || {
            let touched = self.touched(target);
            ensure!(touched == *nodes, "{touched:?}");
            Ok(())
        })
        .unwrap();
    }

    /// The nodes to which the revision is assigned.
    fn touched(&self, target: &str) -> BTreeSet<String> {
        let rows: kube::Api<ProxyStatus> = kube::Api::all(self.scene.fleet.kube().client());
        let rows = self.scene.fleet.kube().block_on(rows.list(&kube::api::ListParams::default())).unwrap();
        let of = |row: &ProxyStatus| {
            let profile = row.spec.profile.as_ref()?;
            Some(format!("{}@{}", profile.name, profile.revision))
        };
        let touched = rows.into_iter().filter(|row| of(row).as_deref() == Some(target));
        touched.filter_map(|row| row.metadata.name).collect()
    }

    fn nodes(&self) -> &'static [FleetNode] {
        self.scene.fleet.nodes()
    }

    fn node(&self, name: &str) -> &'static FleetNode {
        scene::node(self.scene.fleet, name)
    }

    /// The nodes whose kernel masquerades every connection to a ClusterIP.
    fn masquerading(&self) -> BTreeSet<String> {
        let masquerades = |node: &&FleetNode| {
            let chain = ["list", "chain", "ip", "switchtower", "mark_cluster_ip"];
            !node.net.namespace.output("nft", &chain).unwrap().contains("@local_pods")
        };
        self.nodes().iter().filter(masquerades).map(|node| node.net.name.clone()).collect()
    }
}

fn all() -> BTreeSet<String> {
    (1..=NODES).map(|number| format!("n{number:02}")).collect()
}

fn canary() -> BTreeSet<String> {
    BTreeSet::from([CANARY.to_owned()])
}

#[test]
fn good_change_reaches_all_without_delaying_endpoints() {
    let trip = Trip::new("good");
    let mut connection = LongConnection::open(trip.scene.pod("e1"), trip.vip).unwrap();
    // Each expected state lasts long enough to be observed on a busy machine.
    let mut strategy = trip.strategy(&json!({"soakSeconds": 3}));
    strategy["steps"][1]["soakSeconds"] = json!(3);
    let target = trip.apply("good", &json!({"masqueradeAll": true}), &strategy);
    let mut walk: Vec<(i32, BTreeSet<String>)> = Vec::new();
    let mut endpoints_changed = false;
    let status = trip.follow(
        &target,
        |status| status.state == "Complete",
        |status, touched| {
            let step = status.progress.current_step;
            if walk.last().is_none_or(|(_, last)| last != touched) {
                walk.push((step, touched.clone()));
            }
            // During the canary's soak time the Service loses an endpoint: every node follows at once.
            if !endpoints_changed && touched == &canary() {
                endpoints_changed = true;
                trip.scene.endpoints("web", &["a1"]);
                scene::answered_by(
                    "during the rollout",
                    trip.scene.pod("a1"),
                    Transport::Tcp,
                    trip.vip,
                    &["a1"],
                );
            }
        },
    );
    assert!(endpoints_changed, "{walk:?}");
    let mut before = BTreeSet::new();
    for (step, touched) in &walk {
        assert!(touched.is_superset(&before), "no node is taken back: {walk:?}");
        let most = [0, 1, NODES / 2, NODES].get(*step as usize).copied().unwrap_or(NODES);
        assert!(touched.len() <= most, "step {step} touches {most} nodes at most: {walk:?}");
        assert!(touched.is_empty() || touched.contains(CANARY), "the canary is first: {walk:?}");
        before.clone_from(touched);
    }
    assert!(walk.iter().any(|(_, touched)| touched == &canary()), "{walk:?}");
    assert!(walk.iter().any(|(_, touched)| touched.len() == NODES / 2), "{walk:?}");
    assert_eq!((before, trip.masquerading()), (all(), all()));
    assert_eq!((status.progress.updated.as_str(), status.failed), ("12/12", 0));
    let took = status.acknowledgements.unwrap();
    println!("acknowledgements: {took:?}");
    assert_eq!(took.nodes, 12);
    assert!(took.median_milliseconds <= took.slowest_milliseconds && took.slowest_milliseconds < 60_000);
    kubectl(trip.scene.fleet, &["wait", "--for=condition=Ready", "pxs", "--all", "--timeout=20s"]);
    let columns = kubectl(trip.scene.fleet, &["get", "pxr", &trip.rollout()]);
    assert!(columns.contains("Complete") && columns.contains("12/12"), "{columns}");
    connection.exchange().unwrap();
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn breaking_change_stops_at_canary_and_rolls_back() {
    let trip = Trip::new("bad");
    let metric = |name: &str, labels: &str| trip.scene.fleet.controller_metric(name, labels).unwrap();
    let counts = || {
        let failures = metric("switchtower_rollout_failures_total", "reason=\"ProbeFailed\"");
        (failures, metric("switchtower_rollout_rollbacks_total", "cause=\"failure\""))
    };
    let before = counts();
    let node = trip.node(CANARY);
    let to = SocketAddr::new(node.net.address(false), trip.node_port);
    let watcher = Watcher::start(node, to);
    let mut connection = LongConnection::open(&node.net.client, to).unwrap();
    let bad = json!({"nodePortAddresses": ["203.0.113.0/24"]});
    let target = trip.apply("bad", &bad, &trip.strategy(&json!({})));
    let mut touched_ever = BTreeSet::new();
    let status = trip.follow(
        &target,
        |status| status.state == "Failed",
        |_, touched| touched_ever.extend(touched.iter().cloned()),
    );
    assert_eq!(touched_ever, canary(), "exactly the canary");
    assert_eq!(trip.touched(&target), BTreeSet::new(), "which has its previous settings again");
    let gap = watcher.stop();
    println!("from the last good answer of the canary's NodePort to the next one: {gap:?}");
    assert!(!gap.is_zero(), "the change did break the NodePort");
    assert!(gap < Duration::from_secs(5), "it did not answer for {gap:?}");
    connection.exchange().unwrap();
    assert_eq!(status.failed, 1);
    let failure = &status.failures[0];
    assert_eq!((failure.node.as_str(), failure.errno), (CANARY, libc::ECONNREFUSED), "{failure:?}");
    assert!(failure.message.contains("node-port"), "{failure:?}");
    let trace = failure.trace_id.clone().unwrap_or_default();
    assert!(trace.len() == 32 && u128::from_str_radix(&trace, 16).is_ok_and(|id| id != 0), "{failure:?}");
    // Node, reason, errno and trace are in every place that a user may check.
    let evidence = [CANARY, "ProbeFailed", "errno 111", &trace];
    let message = &status.conditions.iter().find(|condition| condition.type_ == "Stalled").unwrap().message;
    assert!(evidence.iter().all(|word| message.contains(word)), "{message}");
    let is_reported = |event: &Value| {
        let about = event["involvedObject"]["name"] == trip.rollout().as_str();
        let text = event["message"].as_str().unwrap_or_default();
        about && event["reason"] == "RolloutFailed" && evidence.iter().all(|word| text.contains(word))
    };
    wait::until("an Event contains the evidence", ROLLOUT, || {
        let events = kubectl(trip.scene.fleet, &["get", "events", "-A", "-o", "json"]);
        let events: Value = serde_json::from_str(&events)?;
        ensure!(events["items"].as_array().into_iter().flatten().any(is_reported), "{events}");
        Ok(())
    })
    .unwrap();
    assert_eq!(counts(), (before.0 + 1.0, before.1 + 1.0));
    let labels = format!("rollout=\"{}\",state=\"Failed\"", trip.rollout());
    wait::until("the metrics report the state", ROLLOUT, || {
        let info = metric("switchtower_rollout_info", &format!("reason=\"NodeFailed\",{labels}"));
        ensure!(info == 1.0, "{info}");
        Ok(())
    })
    .unwrap();
    // The same revision is never retried automatically, not even by another controller.
    trip.scene.fleet.stop_controller(libc::SIGKILL).unwrap();
    trip.scene.fleet.start_controller().unwrap();
    trip.scene.fleet.settled(ROLLOUT).unwrap();
    assert_eq!(trip.touched(&target), BTreeSet::new());
    scene::eventually("again", &node.net.client, Transport::Tcp, to, |outcome| {
        matches!(outcome, ProbeResult::Reply { .. })
    });
}

#[test]
fn canary_rolls_back_without_controller() {
    let trip = Trip::new("alone");
    let fleet = trip.scene.fleet;
    let node = trip.node(CANARY);
    let to = SocketAddr::new(node.net.address(false), trip.node_port);
    let watcher = Watcher::start(node, to);
    let bad = json!({"nodePortAddresses": ["203.0.113.0/24"]});
    let target = trip.apply("alone", &bad, &trip.strategy(&json!({})));
    // Killed once the canary has switched, and before its third attempt has failed.
    watcher.answering(false);
    fleet.stop_controller(libc::SIGKILL).unwrap();
    watcher.answering(true);
    let gap = watcher.stop();
    assert!(gap < Duration::from_secs(5), "it did not answer for {gap:?}");
    // The next controller learns the result from the agent.
    fleet.start_controller().unwrap();
    let status = trip.follow(
        &target,
        |status| status.state == "Failed",
        |_, touched| {
            assert!(touched.is_subset(&canary()), "{touched:?}");
        },
    );
    let failure = &status.failures[0];
    assert_eq!((failure.node.as_str(), failure.errno), (CANARY, libc::ECONNREFUSED), "{failure:?}");
    fleet.settled(ROLLOUT).unwrap();
}

#[test]
fn pause_approve_and_abort_by_kubectl() {
    let trip = Trip::new("by-hand");
    let strategy = trip.strategy(&json!({"approval": "Manual"}));
    let target = trip.apply("by hand", &json!({"masqueradeAll": true}), &strategy);
    trip.follow(
        &target,
        |status| status.waiting_on.as_deref() == Some("Approval"),
        |_, touched| {
            assert!(touched.is_subset(&canary()), "{touched:?}");
        },
    );
    trip.patch(&json!({"paused": true}));
    trip.follow(&target, |status| status.waiting_on.as_deref() == Some("Resume"), |_, _| ());
    trip.patch(&json!({"approvedStep": 1}));
    // Approved and paused: a controller with other work in the queue changes no node.
    trip.scene.endpoints("web", &["a1"]);
    trip.scene.fleet.settled(ROLLOUT).unwrap();
    assert_eq!((trip.touched(&target), trip.masquerading()), (canary(), canary()));
    trip.patch(&json!({"paused": false}));
    trip.follow(&target, |_| trip.touched(&target).len() > 1, |_, _| ());
    trip.patch(&json!({"abort": true}));
    let status = trip.follow(&target, |status| status.state == "Aborted", |_, _| ());
    assert_eq!((trip.touched(&target), status.failed), (BTreeSet::new(), 0));
    trip.scene.fleet.settled(ROLLOUT).unwrap();
    assert_eq!(trip.masquerading(), BTreeSet::new());
}

#[test]
fn too_many_missing_agents_freeze_rollout() {
    let trip = Trip::new("frozen");
    let fleet = trip.scene.fleet;
    let target =
        trip.apply("frozen", &json!({"masqueradeAll": true}), &trip.strategy(&json!({"approval": "Manual"})));
    trip.follow(&target, |status| status.waiting_on.as_deref() == Some("Approval"), |_, _| ());
    // Four of the eleven unchanged nodes: more than a fifth.
    let gone = ["n02", "n03", "n07", "n09"].map(|name| trip.node(name));
    for node in gone {
        fleet.stop_agent(node, libc::SIGKILL).unwrap();
    }
    let status = trip.follow(&target, |status| status.state == "Frozen", |_, _| ());
    let stalled = status.conditions.iter().find(|condition| condition.type_ == "Stalled").unwrap();
    assert_eq!((stalled.status.as_str(), stalled.reason.as_str()), ("True", "Frozen"));
    assert!(stalled.message.contains("of 11 nodes that it has not touched"), "{}", stalled.message);
    // An approval does not move it either.
    trip.patch(&json!({"approvedStep": 1}));
    trip.scene.endpoints("web", &["a1"]);
    scene::answered_by("while it is frozen", trip.scene.pod("a1"), Transport::Tcp, trip.vip, &["a1"]);
    assert_eq!(trip.touched(&target), canary());
    for node in gone {
        fleet.run_agent(node).unwrap();
    }
    trip.follow(&target, |status| status.state == "Complete", |_, _| ());
    fleet.settled(ROLLOUT).unwrap();
    assert_eq!(trip.masquerading(), all());
}

#[test]
fn controller_killed_at_every_step_loses_nothing() {
    let trip = Trip::new("killed");
    let fleet = trip.scene.fleet;
    let target = trip.apply("killed", &json!({"masqueradeAll": true}), &trip.strategy(&json!({})));
    let mut seen: BTreeSet<(i32, String)> = BTreeSet::new();
    let mut before = BTreeSet::new();
    trip.follow(
        &target,
        |status| status.state == "Complete",
        |status, touched| {
            assert!(touched.is_superset(&before), "no node is taken back: {before:?}, then {touched:?}");
            before.clone_from(touched);
            let standing = (status.progress.current_step, status.state.clone());
            if status.state != "Complete" && seen.insert(standing) {
                fleet.stop_controller(libc::SIGKILL).unwrap();
                let after = trip.touched(&target);
                assert!(after.is_superset(&before), "no node is taken back: {before:?}, then {after:?}");
                fleet.start_controller().unwrap();
            }
        },
    );
    let steps: BTreeSet<i32> = seen.iter().map(|(step, _)| *step).filter(|step| *step > 0).collect();
    assert_eq!(steps, BTreeSet::from([1, 2, 3]), "it was killed in every step: {seen:?}");
    fleet.settled(ROLLOUT).unwrap();
    assert_eq!((trip.touched(&target), trip.masquerading()), (all(), all()));
}

/// Connects to an address repeatedly from a node's client, and records the longest period without an answer.
struct Watcher {
    stop: Arc<AtomicBool>,
    answering: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Duration>,
}

impl Watcher {
    fn start(node: &'static FleetNode, to: SocketAddr) -> Self {
        let (stop, answering) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        let (stopped, state) = (stop.clone(), answering.clone());
        let answers = move || {
            let outcome =
                probe::send_with_timeout(&node.net.client, Transport::Tcp, to, Duration::from_millis(300));
            matches!(outcome, Ok(ProbeResult::Reply { .. }))
        };
        wait::until("the NodePort answers at first", ROLLOUT, || {
            ensure!(answers(), "no answer from {to}");
            Ok(())
        })
        .unwrap();
        let thread = std::thread::spawn(move || {
            let (mut last, mut longest, mut missed) = (Instant::now(), Duration::ZERO, false);
            while !stopped.load(Ordering::Relaxed) {
                if answers() {
                    if std::mem::take(&mut missed) {
                        longest = longest.max(last.elapsed());
                    }
                    last = Instant::now();
                } else {
                    missed = true;
                }
                state.store(!missed, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
            if missed { longest.max(last.elapsed()) } else { longest }
        });
        Self { stop, answering, thread }
    }

    /// Waits until the address answers, or until it does not.
    fn answering(&self, wanted: bool) {
        wait::until("the NodePort changes", ROLLOUT, || {
            ensure!(self.answering.load(Ordering::Relaxed) == wanted, "answering is not yet {wanted}");
            Ok(())
        })
        .unwrap();
    }

    /// Maximum time from an answer to the next one; zero if every connection was answered.
    fn stop(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
