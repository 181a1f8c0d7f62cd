//! Reasons for a missing agent in its node's row: the kubelet's report on its Pod (written by the test to the real
//! API server), the agent's own report, and obstacles to its connection. The other nodes keep working.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::fs;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::switchtower::{AGENT_ACCOUNT, Fleet, FleetNode, NAMESPACE};

use switchtower_e2e::scene::{alone, fleet, node};

/// Timeout: a lost stream is reported after ten seconds, and agents' reports are polled every five.
const SHOWN: Duration = Duration::from_secs(45);
const BOOTSTRAP: &str = "switchtower-bootstrap";

/// Writes the status of a node's agent Pod, as its kubelet would.
fn pod_status(node: &FleetNode, state: &Value, last_state: &Value, restarts: u32) {
    let name = &node.net.name;
    let mut pod = objects::pod(NAMESPACE, &format!("{AGENT_ACCOUNT}-{name}"), name, AGENT_ACCOUNT);
    pod["status"] = json!({
        "phase": "Running",
        "hostIP": node.net.address(false).to_string(),
        "podIP": node.net.address(false).to_string(),
        "podIPs": [{"ip": node.net.address(false).to_string()}],
        "containerStatuses": [{
            "name": "main", "image": "none", "imageID": "", "ready": false, "restartCount": restarts,
            "state": state, "lastState": last_state,
        }],
    });
    fleet().kube().apply(&pod).unwrap();
}

fn running(node: &FleetNode) {
    pod_status(node, &json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}), &json!({}), 0);
}

/// Waits until a node's row is not ready for this reason with this message; the other nodes stay ready.
fn shows(node: &FleetNode, reason: &str, words: &[&str]) {
    let name = &node.net.name;
    wait::until(&format!("{reason} on the row of {name}"), SHOWN, || {
        let row = fleet().row(name)?;
        let ready =
            row.conditions.iter().find(|known| known.type_ == "Ready").context("no Ready condition")?;
        ensure!(ready.status == "False" && ready.reason == reason, "{} {}", ready.reason, ready.message);
        for word in words {
            ensure!(ready.message.contains(word), "{:?} lacks {word:?}", ready.message);
        }
        Ok(())
    })
    .unwrap();
    let others = fleet().nodes().iter().filter(|other| other.net.name != *name);
    others.for_each(|other| wait::until("the others", SHOWN, || fleet().agrees(other)).unwrap());
}

fn in_order() {
    fleet().settled(SHOWN).unwrap();
}

#[test]
fn failed_pod_reported_with_kubelets_reason() {
    let _alone = alone();
    let alpha = node(fleet(), "alpha");
    fleet().stop_agent(alpha, libc::SIGKILL).unwrap();
    let waiting = |reason: &str, message: &str| json!({"waiting": {"reason": reason, "message": message}});
    pod_status(alpha, &waiting("ErrImagePull", "agent:9: not found"), &json!({}), 0);
    shows(alpha, "ErrImagePull", &["agent:9: not found"]);
    let last = json!({"terminated": {"exitCode": 1, "reason": "Error", "startedAt": null, "finishedAt": null,
        "message": "switchtower-node-agent: open nf_tables netlink"}});
    pod_status(alpha, &waiting("CrashLoopBackOff", "back-off 5m0s"), &last, 7);
    shows(alpha, "CrashLoopBackOff", &["restarted 7 times", "exit code 1", "open nf_tables netlink"]);
    running(alpha);
    shows(alpha, "AgentNotAnswering", &["10256"]);
    fleet().run_agent(alpha).unwrap();
    in_order();
}

#[test]
fn lost_kubelet_is_reason_only_with_lost_agent() {
    let _alone = alone();
    let fleet = fleet();
    let beta = node(fleet, "beta");
    let ready = |status: &str, message: &str| {
        let mut object = objects::node(&beta.net, &beta.zone);
        object["status"]["conditions"] = json!([{"type": "Ready", "status": status,
            "reason": "NodeStatusUnknown", "message": message}]);
        fleet.kube().apply(&object).unwrap();
    };
    ready("Unknown", "Kubelet stopped posting node status.");
    std::thread::sleep(Duration::from_millis(500));
    wait::until("only the agent counts", SHOWN, || fleet.agrees(beta)).unwrap();
    fleet.stop_agent(beta, libc::SIGKILL).unwrap();
    shows(beta, "NodeStatusUnknown", &["Kubelet stopped posting node status."]);
    ready("True", "");
    fleet.run_agent(beta).unwrap();
    in_order();
}

/// Starts alpha's agent with another content of its bootstrap folder and waits for the reason in its row.
fn with_bootstrap(fleet: &Fleet, files: &[(&str, &str)], reason: &str, words: &[&str]) {
    let gamma = node(fleet, "gamma");
    running(gamma);
    fleet.stop_agent(gamma, libc::SIGTERM).unwrap();
    let directory = fleet.bootstrap_directory(gamma);
    fs::remove_dir_all(&directory).unwrap();
    fs::create_dir_all(&directory).unwrap();
    for (name, text) in files {
        fs::write(directory.join(name), text).unwrap();
    }
    fleet.run_agent(gamma).unwrap();
    shows(gamma, reason, words);
    // The kernel keeps its state, and correct files suffice for recovery.
    fleet.write_bootstrap(gamma).unwrap();
    in_order();
}

#[test]
fn agent_reports_missing_bootstrap_files() {
    let _alone = alone();
    with_bootstrap(fleet(), &[], "BootstrapMissing", &["ca.crt"]);
}

#[test]
fn empty_and_garbled_bootstrap_files_reported() {
    let _alone = alone();
    with_bootstrap(fleet(), &[("ca.crt", ""), ("controllers", "")], "BootstrapInvalid", &["certificate"]);
    let garbage = "\u{1}\u{2} garbage\n";
    with_bootstrap(
        fleet(),
        &[("ca.crt", garbage), ("controllers", garbage)],
        "BootstrapInvalid",
        &["ca.crt"],
    );
}

#[test]
fn agent_with_foreign_ca_reports_untrusted_controller() {
    let _alone = alone();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let foreign = params.self_signed(&key).unwrap().pem();
    let address = fleet().controller_address().to_string();
    let files = [("ca.crt", foreign.as_str()), ("controllers", address.as_str())];
    with_bootstrap(fleet(), &files, "ControllerUntrusted", &[address.as_str()]);
}

#[test]
fn damaged_bootstrap_config_map_is_rewritten() {
    let _alone = alone();
    let kube = fleet().kube();
    let api: Api<ConfigMap> = Api::namespaced(kube.client(), NAMESPACE);
    let good: ConfigMap = kube.get(NAMESPACE, BOOTSTRAP).unwrap().unwrap();
    let comes_back = |what: &str| {
        wait::until(what, Duration::from_secs(20), || {
            let map: Option<ConfigMap> = kube.get(NAMESPACE, BOOTSTRAP)?;
            ensure!(map.context("it does not exist")?.data == good.data, "its content differs");
            Ok(())
        })
        .unwrap();
    };
    kube.delete::<ConfigMap>(NAMESPACE, BOOTSTRAP).unwrap();
    comes_back("a deleted ConfigMap");
    for bad in [json!({"data": null}), json!({"data": {"ca.crt": "garbage", "controllers": "\u{1}"}})] {
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&bad));
        kube.block_on(api.patch(BOOTSTRAP, &parameters, &patch)).unwrap();
        comes_back("a changed ConfigMap");
    }
    in_order();
}

#[test]
fn taken_controller_port_reported_and_retried() {
    let _alone = alone();
    let fleet = fleet();
    fleet.stop_controller(libc::SIGKILL).unwrap();
    let taken = wait::until("the port is free", SHOWN, || Ok(TcpListener::bind(fleet.controller_address())?));
    let taken = taken.unwrap();
    fleet.start_controller().unwrap();
    for node in fleet.nodes() {
        let what = format!("the reason on the row of {}", node.net.name);
        wait::until(&what, SHOWN, || {
            fleet.check_controller()?;
            let row = fleet.row(&node.net.name)?;
            let told = row.conditions.iter().any(|known| known.reason == "ControllerNotListening");
            ensure!(told, "{}: {:?}", row.state, row.conditions);
            Ok(())
        })
        .unwrap();
    }
    drop(taken);
    in_order();
}
