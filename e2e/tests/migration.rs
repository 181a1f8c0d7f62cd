//! Mode Shadow next to the real kube-proxy, and `kubectl switchtower migrate` to Switchtower and back, with long-lived
//! connections and a continuous prober.
//!
//! API server, DaemonSet and Job controllers, kube-proxy, controller, agents and kernels are real. [`Kubelet`] replaces
//! the scheduler and the kubelets: it binds Pods of kube-proxy, runs kube-proxy in the network namespace of the node, and
//! runs the Jobs that remove its rules.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]
#![allow(clippy::print_stdout, reason = "the figures of a migration are its result")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use switchtower_crds::ProxyProfile;
use switchtower_e2e::lab::kube_proxy::KubeProxy;
use switchtower_e2e::lab::{objects, programs, wait};
use switchtower_e2e::probe::{self, LongConnection, Transport};
use switchtower_e2e::scene::{Scene, answered_by, cluster_ip, nodes};
use switchtower_e2e::switchtower::plugin::{self, Answer};
use switchtower_e2e::switchtower::{Fleet, NAMESPACE};

const TIMEOUT: Duration = Duration::from_secs(90);
/// Long-lived connections through the Service.
const CONNECTIONS: usize = 60;

/// Replacement for the scheduler and the kubelets.
struct Kubelet {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Kubelet {
    fn start(fleet: &'static Fleet) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ending = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut running = BTreeMap::new();
            while !ending.load(Ordering::Relaxed) {
                // Conflicts with the real controllers are retried.
                if let Err(error) = sync(fleet, &mut running) {
                    println!("kubelet: {error:#}");
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pods(fleet: &Fleet) -> Api<Pod> {
    Api::namespaced(fleet.kube().client(), "kube-system")
}

/// One round of all kubelets.
fn sync(fleet: &'static Fleet, running: &mut BTreeMap<String, KubeProxy>) -> Result<()> {
    let api = pods(fleet);
    for pod in fleet.kube().block_on(api.list(&ListParams::default()))?.items {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let is_job = labels.get("app").is_some_and(|app| app == "kube-proxy-cleanup");
        if !is_job && labels.get("k8s-app").is_none_or(|app| app != "kube-proxy") {
            continue;
        }
        let Some(node) = node_of(&pod) else { continue };
        let node = fleet.nodes().iter().find(|known| known.net.name == node).context("an unknown node")?;
        if pod.metadata.deletion_timestamp.is_some() {
            if let Some(proxy) = running.remove(&node.net.name) {
                proxy.process().signal(libc::SIGTERM);
                proxy.process().wait(Duration::from_secs(10))?;
            }
            fleet.kube().block_on(api.delete(&name, &DeleteParams::default().grace_period(0)))?;
        } else if is_job {
            if pod.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Succeeded") {
                let program = programs::control_plane("kube-proxy")?;
                node.net.namespace.output(&program.to_string_lossy(), &["--cleanup"])?;
                let status = Patch::Merge(json!({"status": {"phase": "Succeeded"}}));
                fleet.kube().block_on(api.patch_status(&name, &PatchParams::default(), &status))?;
            }
        } else if !running.contains_key(&node.net.name) {
            if pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_none()) {
                let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
                    "target": {"apiVersion": "v1", "kind": "Node", "name": node.net.name}});
                let parameters = PostParams::default();
                let bound = api.create_subresource::<Value, Value>("binding", &name, &parameters, &binding);
                fleet.kube().block_on(bound)?;
            }
            let proxy = KubeProxy::start(fleet.control_plane(), fleet.lab(), &node.net, &json!({}))?;
            running.insert(node.net.name.clone(), proxy);
            let status = Patch::Merge(json!({"status": objects::running_on_host(&node.net)}));
            fleet.kube().block_on(api.patch_status(&name, &PatchParams::default(), &status))?;
        }
    }
    Ok(())
}

/// The node of a Pod, also before it is bound.
fn node_of(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let affinity = || {
        let terms = spec.affinity.as_ref()?.node_affinity.as_ref()?;
        let terms = &terms.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
        terms.first()?.match_fields.as_ref()?.first()?.values.as_ref()?.first().cloned()
    };
    spec.node_name.clone().or_else(affinity)
}

/// Connects to the Service continuously from pods of all nodes, and counts failures.
struct Prober {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(usize, usize)>>,
}

impl Prober {
    fn start(scene: &Scene, from: &[&str], to: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = from.iter().map(|pod| {
            let (namespace, stop) = (scene.pod(pod), stop.clone());
            std::thread::spawn(move || {
                let (mut sent, mut lost) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let outcome =
                        probe::send_with_timeout(namespace, Transport::Tcp, to, Duration::from_millis(500));
                    sent += 1;
                    lost += usize::from(outcome.is_ok_and(|outcome| outcome.backend().is_none()));
                    std::thread::sleep(Duration::from_millis(5));
                }
                (sent, lost)
            })
        });
        Self { threads: threads.collect(), stop }
    }

    /// Returns the numbers of sent and lost connections.
    fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        let each = self.threads.into_iter().map(|thread| thread.join().unwrap());
        each.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

/// `migrate` with the laboratory's kubectl in its PATH.
fn command(fleet: &Fleet, arguments: &[&str]) -> Command {
    let kubectl = programs::control_plane("kubectl").unwrap();
    let arguments = [&["migrate"], arguments].concat();
    let mut command = plugin::command(fleet, &fleet.control_plane().kubeconfig(), &arguments).unwrap();
    command.env("PATH", kubectl.parent().unwrap());
    command
}

fn migrate(fleet: &Fleet, arguments: &[&str]) -> Answer {
    let answer = Answer::of(&mut command(fleet, arguments)).unwrap();
    println!("$ kubectl switchtower migrate {}\n{}{}", arguments.join(" "), answer.text, answer.errors);
    answer
}

fn label(fleet: &Fleet, node: &str) -> Result<Option<String>> {
    let node: Node = fleet.kube().get_cluster(node)?.context("no Node")?;
    Ok(node.metadata.labels.unwrap_or_default().remove("switchtower.dev/proxy"))
}

/// Starts to move a node, refuses another operator at the same time, and ends the command after its first step.
fn interrupt(fleet: &Fleet, node: &str) {
    let mut first = command(fleet, &["start", node]).stdout(std::process::Stdio::null()).spawn().unwrap();
    wait::until("the first step", TIMEOUT, || {
        ensure!(label(fleet, node)?.as_deref() == Some("both"), "no label");
        Ok(())
    })
    .unwrap();
    let second = migrate(fleet, &["back"]);
    assert!(second.code == 2 && second.errors.contains("another migrate command"), "{second:?}");
    first.kill().unwrap();
    first.wait().unwrap();
}

/// Runs a command as soon as the Lease of an interrupted one is free.
fn after_interruption(fleet: &Fleet, arguments: &[&str]) -> Answer {
    wait::until("the Lease is free", TIMEOUT, || {
        let answer = migrate(fleet, arguments);
        ensure!(!answer.errors.contains("another migrate command"), "{}", answer.errors);
        Ok(answer)
    })
    .unwrap()
}

fn kube_proxy_daemon_set() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": "kube-proxy", "namespace": "kube-system", "labels": {"k8s-app": "kube-proxy"}},
        "spec": {
            "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
            "template": {"metadata": {"labels": {"k8s-app": "kube-proxy"}}, "spec": {
                "hostNetwork": true, "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "kube-proxy", "image": "registry.k8s.io/kube-proxy:v1.36.3",
                    "command": ["/usr/local/bin/kube-proxy", "--config=/var/lib/kube-proxy/config.conf"]}],
            }},
        },
    })
}

/// Specification of the DaemonSet without defaults that depend on nothing that `migrate` changes.
fn daemon_set(fleet: &Fleet) -> Option<(Value, Value)> {
    let object: DaemonSet = fleet.kube().get("kube-system", "kube-proxy").unwrap()?;
    let spec = serde_json::to_value(object.spec.unwrap()).unwrap();
    Some((spec["updateStrategy"].clone(), spec["template"].clone()))
}

#[track_caller]
fn states(fleet: &Fleet, expected: &str) {
    wait::until(&format!("every row is {expected}"), TIMEOUT, || {
        for node in fleet.nodes() {
            let row = fleet.row(&node.net.name)?;
            ensure!(row.state == expected, "{}: {} {:?}", node.net.name, row.state, row.conditions);
        }
        Ok(())
    })
    .with_context(|| fleet.controller_log())
    .unwrap();
}

fn tables(fleet: &Fleet, node: &str) -> String {
    let node = fleet.nodes().iter().find(|known| known.net.name == node).unwrap();
    node.net.namespace.output("nft", &["list", "tables"]).unwrap()
}

/// A fleet with kube-proxy on every node, and Switchtower installed in mode Shadow.
fn shadow_fleet() -> (&'static Fleet, Kubelet) {
    let fleet: &'static Fleet = Box::leak(Box::new(Fleet::build(&nodes()).unwrap()));
    let config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
                  detectLocalMode: NodeCIDR\nconntrack: {maxPerCore: 0, min: 0}\n";
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"config.conf": config},
        "metadata": {"name": "kube-proxy", "namespace": "kube-system"}});
    fleet.kube().apply(&map).unwrap();
    fleet.kube().apply(&kube_proxy_daemon_set()).unwrap();
    let kubelet = Kubelet::start(fleet);
    wait::until("kube-proxy serves every node", TIMEOUT, || {
        for node in fleet.nodes() {
            ensure!(tables(fleet, &node.net.name).contains("table ip kube-proxy"), "{}", node.net.name);
        }
        Ok(())
    })
    .unwrap();
    fleet.install().unwrap();
    fleet.set_controller_environment(&[("SWITCHTOWER_BUILTIN_MODE", "shadow")]);
    fleet.set_agent_environment(&[("SWITCHTOWER_INITIAL_MODE", "shadow")]);
    fleet.start_controller().unwrap();
    fleet.nodes().iter().for_each(|node| fleet.start_agent(node).unwrap());
    (fleet, kubelet)
}

/// kube-proxy's rules on the node mean the same as those in mode Shadow.
fn compared(fleet: &Fleet, name: &str) {
    let node = fleet.nodes().iter().find(|known| known.net.name == name).unwrap();
    let files = ["ip", "ip6"].map(|family| {
        let rules = node.net.namespace.output("nft", &["--json", "list", "table", family, "kube-proxy"]);
        let path = fleet.lab().directory().join(format!("{family}.json"));
        std::fs::write(&path, rules.unwrap()).unwrap();
        path.to_string_lossy().into_owned()
    });
    let arguments = ["compare", name, "--rules", &files[0], "--rules", &files[1]];
    let mut command = plugin::command(fleet, &fleet.control_plane().kubeconfig(), &arguments).unwrap();
    let answer = Answer::of(&mut command).unwrap();
    assert!(answer.code == 0 && answer.text.contains("equally"), "{}{}", answer.text, answer.errors);
}

/// Waits until the objects and labels of the migration are gone.
fn nothing_is_left(fleet: &Fleet) {
    let record: Option<ConfigMap> = fleet.kube().get(NAMESPACE, "switchtower-migration").unwrap();
    assert!(record.is_none());
    wait::until("profiles and labels are gone", TIMEOUT, || {
        for name in ["kube-proxy-migration", "kube-proxy-return"] {
            ensure!(fleet.kube().get_cluster::<ProxyProfile>(name)?.is_none(), "{name} exists");
        }
        for node in fleet.nodes() {
            ensure!(label(fleet, &node.net.name)?.is_none(), "{}", node.net.name);
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn nodes_migrate_and_return_without_broken_connections() {
    let (fleet, _kubelet) = shadow_fleet();
    fleet.settled(TIMEOUT).unwrap();
    states(fleet, "Shadow");
    let original = daemon_set(fleet).unwrap();
    let scene = Scene::of(fleet, "migration");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1", "b1", "c1"]);
    let to = cluster_ip(&service, false);
    answered_by("kube-proxy serves", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);

    for node in fleet.nodes() {
        compared(fleet, &node.net.name);
    }
    let plan = migrate(fleet, &["plan"]);
    assert_eq!(plan.code, 0, "{}", plan.text);
    let from = ["a2", "b1", "c2"];
    let mut connections: Vec<LongConnection> = (0..CONNECTIONS)
        .map(|number| LongConnection::open(scene.pod(from[number % from.len()]), to).unwrap())
        .collect();
    let mut alive = |what: &str| {
        let broken = connections.iter_mut().filter_map(|one| one.exchange().err()).count();
        assert_eq!(broken, 0, "{what}: {broken} of {CONNECTIONS} connections are broken");
    };
    let prober = Prober::start(&scene, &from, to);

    // One node first, with another operator at the same time, and an interruption.
    interrupt(fleet, "alpha");
    alive("the command was interrupted");
    let start = after_interruption(fleet, &["start", "alpha"]);
    assert_eq!(start.code, 0, "{}", start.text);
    for line in ["label node --overwrite alpha switchtower.dev/proxy=switchtower", "create -f -"] {
        assert!(start.text.contains(line), "{}", start.text);
    }
    alive("alpha moved");
    assert_eq!(fleet.row("alpha").unwrap().state, "Synced");
    assert_eq!(fleet.row("beta").unwrap().state, "Shadow");
    assert!(!tables(fleet, "alpha").contains("kube-proxy") && tables(fleet, "beta").contains("kube-proxy"));
    let early = migrate(fleet, &["finish"]);
    assert!(early.code == 1 && early.text.contains("not moved: beta, gamma"), "{}", early.text);

    let start = migrate(fleet, &["start", "--batch", "2"]);
    assert_eq!(start.code, 0, "{}", start.text);
    alive("all nodes moved");
    states(fleet, "Synced");
    let finish = migrate(fleet, &["finish"]);
    assert_eq!(finish.code, 0, "{}", finish.text);
    assert!(daemon_set(fleet).is_none(), "kube-proxy is deleted");
    alive("finished");
    println!("to Switchtower: {:?} (sent, lost)", prober.end());

    let prober = Prober::start(&scene, &from, to);
    let back = migrate(fleet, &["back"]);
    assert_eq!(back.code, 0, "{}", back.text);
    states(fleet, "Shadow");
    alive("all nodes returned");
    let (sent, lost) = prober.end();
    println!("to kube-proxy: sent {sent}, lost {lost}");
    assert_eq!(daemon_set(fleet).unwrap(), original, "restored exactly");
    nothing_is_left(fleet);
    states(fleet, "Shadow");
    answered_by("kube-proxy serves again", scene.pod("a2"), Transport::Tcp, to, &["a1", "b1", "c1"]);
}
