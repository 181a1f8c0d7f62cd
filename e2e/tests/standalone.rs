//! `switchtower-controller standalone`: controller and agent of one node in one process, in the node's namespace, against
//! the real API server and kernel.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};
use switchtower_e2e::lab::kube_proxy::forward_api_server;
use switchtower_e2e::lab::process::Process;
use switchtower_e2e::lab::{programs, wait};
use switchtower_e2e::probe::Transport;
use switchtower_e2e::scene::{SOON, Scene, answered_by, cluster_ip, node};
use switchtower_e2e::switchtower::{Fleet, NAMESPACE, NodeSpec};

/// Timeout of a start: it includes a wait for the Lease of a previous process.
const STARTED: Duration = Duration::from_secs(60);
const NODE: &str = "edge";

/// A kubeconfig of the administrator that works in the nodes' namespaces.
fn kubeconfig(fleet: &Fleet) -> PathBuf {
    let server = forward_api_server(fleet.control_plane(), fleet.lab()).unwrap();
    let mut text: Value =
        serde_json::from_slice(&fs::read(fleet.control_plane().kubeconfig()).unwrap()).unwrap();
    text["clusters"][0]["cluster"] =
        json!({"server": format!("https://{server}"), "insecure-skip-tls-verify": true});
    let path = fleet.lab().directory().join("standalone.kubeconfig");
    fs::write(&path, text.to_string()).unwrap();
    path
}

fn start(fleet: &Fleet, kubeconfig: &std::path::Path) -> Process {
    let mut command = Command::new(programs::workspace("switchtower-controller").unwrap());
    command.args(["standalone", "--node-name", NODE, "--namespace", NAMESPACE]);
    command.arg("--kubeconfig").arg(kubeconfig);
    command.arg("--state-dir").arg(fleet.lab().directory().join("standalone-state"));
    node(fleet, NODE).net.namespace.wrap(&mut command);
    Process::start("standalone", command, &fleet.lab().directory().join("standalone.log")).unwrap()
}

fn wait_until_ready(fleet: &Fleet, process: &Process) {
    wait::until("a Ready row", STARTED, || {
        process.check_running()?;
        let row = fleet.row(NODE)?;
        let ready = row.conditions.iter().any(|known| known.type_ == "Ready" && known.status == "True");
        ensure!(ready, "{:?}; its log: {}", row.conditions, process.log_text());
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn one_process_serves_its_node() {
    let specs = [NodeSpec::new(NODE, "east", &["a1", "a2"]), NodeSpec::new("other", "east", &[])];
    let fleet: &'static Fleet = Box::leak(Box::new(Fleet::build(&specs).unwrap()));
    fleet.install().unwrap();
    let kubeconfig = kubeconfig(fleet);
    let process = start(fleet, &kubeconfig);

    let scene = Scene::of(fleet, "standalone");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1", "a2"]);
    wait_until_ready(fleet, &process);
    let host = &node(fleet, NODE).net.namespace;
    for ipv6 in [false, true] {
        let address = cluster_ip(&service, ipv6);
        answered_by("both pods", host, Transport::Tcp, address, &["a1", "a2"]);
    }

    // It serves its own node only, and does not write the ConfigMap of other agents.
    assert!(fleet.row("other").is_err(), "a row of another node");
    let bootstrap: Option<ConfigMap> = fleet.kube().get(NAMESPACE, "switchtower-bootstrap").unwrap();
    assert!(bootstrap.is_none());
    let secrets = fleet.lab().directory().join("standalone-state/standalone");
    for file in ["ca.key", "token"] {
        let mode = fs::metadata(secrets.join(file)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{file}");
    }

    // A clean stop releases the Lease; the kernel keeps forwarding; the next start adopts tables and CA.
    process.signal(libc::SIGTERM);
    let status = process.wait(Duration::from_secs(15)).unwrap();
    assert!(status.success(), "{status}: {}", process.log_text());
    answered_by("both pods", host, Transport::Tcp, cluster_ip(&service, false), &["a1", "a2"]);
    let process = start(fleet, &kubeconfig);
    scene.endpoints("web", &["a2"]);
    answered_by("the remaining pod", host, Transport::Tcp, cluster_ip(&service, false), &["a2"]);
    wait_until_ready(fleet, &process);
    process.signal(libc::SIGTERM);
    assert!(process.wait(Duration::from_secs(15)).unwrap().success());
}

#[test]
fn wrong_node_name_is_reported_with_its_remedy() {
    let fleet = Fleet::build(&[NodeSpec::new(NODE, "east", &[])]).unwrap();
    fleet.install().unwrap();
    fleet.control_plane().kubectl(&["delete", "node", NODE]).unwrap();
    let process = start(&fleet, &kubeconfig(&fleet));
    wait::until("the log names the flag", SOON, || {
        process.check_running()?;
        ensure!(process.log_text().contains("check --node-name"), "{}", process.log_text());
        Ok(())
    })
    .unwrap();
    process.signal(libc::SIGTERM);
    assert!(process.wait(Duration::from_secs(15)).unwrap().success());
}
