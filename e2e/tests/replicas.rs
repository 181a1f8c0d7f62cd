//! Two controllers: one is active, the standby takes over its Lease when it is killed, stopped or terminated.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt as _;
use serde_json::json;
use switchtower_crds::ProxyStatus;
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::Transport;
use switchtower_e2e::scene::{Scene, alone, answered_by, cluster_ip};
use switchtower_e2e::switchtower::{Fleet, NAMESPACE};

const TAKEN_OVER: Duration = Duration::from_secs(30);
const AGREED: Duration = Duration::from_secs(60);

/// Waits until the Lease names this controller.
fn active(fleet: &Fleet, replica: &str) {
    wait::until("the Lease changes hands", TAKEN_OVER, || {
        let lease: Option<Lease> = fleet.kube().get(NAMESPACE, "switchtower-controller")?;
        let holder = lease.and_then(|lease| lease.spec?.holder_identity).context("no holder")?;
        ensure!(holder.starts_with(&format!("{replica}_")), "held by {holder:?}");
        Ok(())
    })
    .unwrap();
}

/// Delivers the ConfigMap of the active controller to the agents, as kubelets do.
fn spread_bootstrap(fleet: &Fleet, port: u16) {
    let data = wait::until("the ConfigMap names the active controller", TAKEN_OVER, || {
        let map: Option<ConfigMap> = fleet.kube().get(NAMESPACE, "switchtower-bootstrap")?;
        let data = map.and_then(|map| map.data).context("no ConfigMap")?;
        let named = data.get("controllers").cloned().unwrap_or_default();
        ensure!(named.trim().ends_with(&format!(":{port}")), "it names {named:?}");
        Ok(data)
    })
    .unwrap();
    for node in fleet.nodes() {
        for (name, text) in &data {
            std::fs::write(fleet.bootstrap_directory(node).join(name), text).unwrap();
        }
    }
}

/// Versions of all objects that two controllers could write in turns.
fn versions(fleet: &Fleet) -> Vec<Option<String>> {
    let map: Option<ConfigMap> = fleet.kube().get(NAMESPACE, "switchtower-bootstrap").unwrap();
    let rows = fleet.nodes().iter().map(|node| {
        let row: Option<ProxyStatus> = fleet.kube().get_cluster(&node.net.name).unwrap();
        row.and_then(|row| row.resource_version())
    });
    rows.chain([map.and_then(|map| map.resource_version())]).collect()
}

/// Waits until this controller's log says that it stands by.
fn stands_by(controller: &str, log: impl Fn() -> String) {
    wait::until(&format!("the {controller} controller waits"), TAKEN_OVER, || {
        let log = log();
        ensure!(log.contains("another controller is active"), "{log}");
        Ok(())
    })
    .unwrap();
}

/// Waits until neither controller writes.
fn quiet(fleet: &Fleet) {
    fleet.settled(AGREED).unwrap();
    wait::until("rows and ConfigMap stay as they are for five seconds", AGREED, || {
        let before = versions(fleet);
        std::thread::sleep(Duration::from_secs(5));
        ensure!(versions(fleet) == before);
        Ok(())
    })
    .unwrap();
}

#[test]
fn standby_takes_over_after_kill_stop_and_termination() {
    let _alone = alone();
    let scene = Scene::new("replicas");
    let fleet = scene.fleet;
    let service = scene.service("web", &json!({}));
    let to = cluster_ip(&service, false);
    scene.endpoints("web", &["a1"]);
    answered_by("at first", scene.pod("c2"), Transport::Tcp, to, &["a1"]);
    active(fleet, "controller-0");
    fleet.start_standby().unwrap();
    stands_by("second", || fleet.standby_log());
    quiet(fleet);
    let takes_over = |how: &str, replica: &str, port: u16, pods: &[&str], act: &dyn Fn()| {
        let began = Instant::now();
        act();
        scene.endpoints("web", pods);
        active(fleet, replica);
        let held = began.elapsed();
        spread_bootstrap(fleet, port);
        // An agent notices a stopped controller after 20 s of silence and an unanswered ping of 10 s.
        fleet.settled(AGREED).unwrap();
        answered_by(how, scene.pod("c2"), Transport::Tcp, to, pods);
        println!("{how}: Lease after {held:.1?}, endpoint in the kernel after {:.1?}", began.elapsed());
        quiet(fleet);
    };
    takes_over("SIGKILL", "controller-1", 9453, &["b1"], &|| fleet.signal_controller(libc::SIGKILL));
    fleet.start_controller().unwrap();
    stands_by("first", || fleet.controller_log());
    takes_over("SIGTERM", "controller-0", 9443, &["c1"], &|| fleet.signal_standby(libc::SIGTERM));
    fleet.start_standby().unwrap();
    stands_by("second", || fleet.standby_log());
    takes_over("SIGSTOP", "controller-1", 9453, &["a1", "b1"], &|| fleet.signal_controller(libc::SIGSTOP));
    fleet.signal_controller(libc::SIGCONT);
    wait::until("the controller that was stopped ends", TAKEN_OVER, || {
        ensure!(fleet.check_controller().is_err());
        Ok(())
    })
    .unwrap();
    active(fleet, "controller-1");
    quiet(fleet);
}
