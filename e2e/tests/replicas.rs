//! Two replicas of the controller serve agents at once. Each is killed, stopped and terminated in turn, and their CA is
//! rotated.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use switchtower_crds::ProxyStatus;
use switchtower_e2e::lab::wait;
use switchtower_e2e::observe::kernel;
use switchtower_e2e::probe::Transport;
use switchtower_e2e::scene::{Scene, alone, answered_by, cluster_ip};
use switchtower_e2e::switchtower::{Fleet, NAMESPACE};

const LEASE: &str = "switchtower-controller";
const TAKEN_OVER: Duration = Duration::from_secs(30);
/// An agent notices a stopped replica after 20 s of silence and an unanswered ping of 10 s.
const MOVED: Duration = Duration::from_secs(60);
const AGREED: Duration = Duration::from_secs(120);

fn replica(number: usize) -> String {
    format!("controller-{number}")
}

/// The replica that each node's row names, in the order of the nodes.
fn served_by(fleet: &Fleet) -> Vec<String> {
    fleet.nodes().iter().map(|node| fleet.replica_of(node).unwrap_or_default()).collect()
}

/// The number of each node's last kernel transaction, and its digest.
fn kernels(fleet: &Fleet) -> Vec<(u32, u128)> {
    let read =
        |namespace| (kernel::transactions(namespace).unwrap(), kernel::stamp(namespace).unwrap().digest);
    fleet.nodes().iter().map(|node| read(&node.net.namespace)).collect()
}

fn leader(fleet: &Fleet) -> anyhow::Result<String> {
    let lease: Option<Lease> = fleet.kube().get(NAMESPACE, LEASE)?;
    let holder = lease.and_then(|lease| lease.spec?.holder_identity).context("no leader")?;
    Ok(holder.split('_').next().unwrap_or_default().to_owned())
}

/// Waits until one replica serves all agents and the rows agree with the kernels.
fn all_served_by(fleet: &Fleet, number: usize, how: &str) {
    wait::until(&format!("{how}: {} serves all agents", replica(number)), MOVED, || {
        let served = served_by(fleet);
        ensure!(served.iter().all(|name| *name == replica(number)), "{served:?}");
        fleet.nodes().iter().try_for_each(|node| fleet.agrees(node))
    })
    .unwrap();
}

#[test]
fn replicas_serve_agents_at_once_and_replace_each_other() {
    let _alone = alone();
    let scene = Scene::new("replicas");
    let fleet = scene.fleet;
    let service = scene.service("web", &json!({}));
    let to = cluster_ip(&service, false);
    scene.endpoints("web", &["a1"]);
    answered_by("at first", scene.pod("c2"), Transport::Tcp, to, &["a1"]);
    fleet.settled(AGREED).unwrap();
    let first = kernels(fleet);
    fleet.start_second().unwrap();
    fleet.listed(2).unwrap();
    fleet.spread().unwrap();
    let digests = |kernels: &[(u32, u128)]| kernels.iter().map(|(_, digest)| *digest).collect::<Vec<_>>();
    assert_eq!(digests(&kernels(fleet)), digests(&first), "both replicas compile the same");
    scene.endpoints("web", &["b1"]);
    fleet.settled(AGREED).unwrap();
    answered_by("by both", scene.pod("c2"), Transport::Tcp, to, &["b1"]);

    let rounds = [
        (0, libc::SIGKILL, "SIGKILL", ["c1"]),
        (1, libc::SIGTERM, "SIGTERM", ["a1"]),
        (0, libc::SIGSTOP, "SIGSTOP", ["b1"]),
    ];
    for (number, signal, name, pods) in rounds {
        fleet.spread().unwrap();
        let how = format!("{name} of {}", replica(number));
        let (before, began) = (kernels(fleet), Instant::now());
        fleet.signal_replica(number, signal);
        all_served_by(fleet, 1 - number, &how);
        let moved = began.elapsed();
        assert_eq!(kernels(fleet), before, "{how}: no kernel was written");
        wait::until("the other replica is the leader", TAKEN_OVER, || {
            let leader = leader(fleet)?;
            ensure!(leader == replica(1 - number), "{leader} is");
            Ok(())
        })
        .unwrap();
        scene.endpoints("web", &pods);
        fleet.settled(AGREED).unwrap();
        answered_by(&how, scene.pod("c2"), Transport::Tcp, to, &pods);
        println!("{how}: all agents moved after {moved:.1?}");
        if signal == libc::SIGSTOP {
            // Its former streams and its former leadership do no harm.
            fleet.signal_replica(number, libc::SIGCONT);
        } else {
            fleet.restart_replica(number).unwrap();
        }
        fleet.listed(2).unwrap();
        fleet.settled(AGREED).unwrap();
    }

    lease_deleted_by_hand(fleet);
    row_edited_by_hand(fleet);
    fleet.signal_replica(1, libc::SIGTERM);
    all_served_by(fleet, 0, "the second ends");
    fleet.listed(1).unwrap();
}

/// The Leases are created again, and no agent moves.
fn lease_deleted_by_hand(fleet: &Fleet) {
    fleet.spread().unwrap();
    let (served, before) = (served_by(fleet), kernels(fleet));
    fleet.kube().delete::<Lease>(NAMESPACE, LEASE).unwrap();
    for number in 0..2 {
        fleet.kube().delete::<Lease>(NAMESPACE, &format!("{LEASE}-{}", replica(number))).unwrap();
    }
    wait::until("the Lease is created again", TAKEN_OVER, || leader(fleet)).unwrap();
    fleet.listed(2).unwrap();
    fleet.settled(AGREED).unwrap();
    assert_eq!((served_by(fleet), kernels(fleet)), (served, before));
}

/// The replica that serves the node reports its state again, whatever the row claims.
fn row_edited_by_hand(fleet: &Fleet) {
    for (claimant, session) in [("unknown", 0_i64), ("unknown", i64::MAX), ("controller-0", 1 << 40)] {
        let node = &fleet.nodes()[0].net.name;
        let before = kernels(fleet);
        let api: kube::Api<ProxyStatus> = kube::Api::all(fleet.kube().client());
        let status =
            json!({"status": {"state": "Edited", "connection": {"replica": claimant, "session": session}}});
        let (params, patch) = (PatchParams::default(), Patch::Merge(&status));
        let edited = fleet.kube().block_on(api.patch_status(node, &params, &patch)).unwrap();
        wait::until(&format!("the row claimed by {claimant}, {session} is repaired"), MOVED, || {
            let row: ProxyStatus = fleet.kube().get_cluster(node)?.context("no row")?;
            ensure!(row.resource_version() != edited.resource_version(), "it is not written");
            fleet.nodes().iter().try_for_each(|node| fleet.agrees(node))
        })
        .unwrap();
        assert_eq!(kernels(fleet), before, "no kernel was written");
    }
}

/// Certificates in the bootstrap ConfigMap, as a kubelet delivers them to all nodes.
fn delivered_certificates(fleet: &Fleet) -> anyhow::Result<Vec<String>> {
    fleet.nodes().iter().try_for_each(|node| fleet.write_bootstrap(node))?;
    let map: Option<ConfigMap> = fleet.kube().get(NAMESPACE, "switchtower-bootstrap")?;
    let bundle = map.and_then(|map| map.data?.remove("ca.crt")).context("no CA")?;
    let end = "-----END CERTIFICATE-----";
    Ok(bundle
        .split_inclusive(end)
        .map(str::trim)
        .filter(|text| text.ends_with(end))
        .map(str::to_owned)
        .collect())
}

/// Waits until agents trust exactly this number of CAs, and returns them, the signer first.
fn trusted(fleet: &Fleet, count: usize, what: &str) -> Vec<String> {
    wait::until(what, MOVED, || {
        let certificates = delivered_certificates(fleet)?;
        ensure!(certificates.len() == count, "agents trust {} CAs", certificates.len());
        Ok(certificates)
    })
    .unwrap()
}

/// Session of each node's connection.
fn sessions(fleet: &Fleet) -> Vec<i64> {
    let of = |node: &str| fleet.row(node).unwrap().connection.unwrap().session;
    fleet.nodes().iter().map(|node| of(&node.net.name)).collect()
}

/// Both replicas use the new CA without a lost connection; agents that connect afterwards trust it.
#[test]
fn ca_is_rotated_and_restored_without_a_lost_session() {
    let _alone = alone();
    let scene = Scene::new("rotation");
    let fleet = scene.fleet;
    let service = scene.service("web", &json!({}));
    let to = cluster_ip(&service, false);
    scene.endpoints("web", &["a1"]);
    fleet.set_controller_environment(&[("SWITCHTOWER_CA_ROTATION_SECONDS", "8")]);
    fleet.start_second().unwrap();
    fleet.listed(2).unwrap();
    fleet.signal_replica(0, libc::SIGTERM);
    fleet.restart_replica(0).unwrap();
    fleet.listed(2).unwrap();
    fleet.settled(AGREED).unwrap();
    fleet.spread().unwrap();
    let (served, before, first) = (sessions(fleet), kernels(fleet), trusted(fleet, 1, "one CA at first"));

    let secrets: kube::Api<Secret> = kube::Api::namespaced(fleet.kube().client(), NAMESPACE);
    let request = json!({"metadata": {"annotations": {"switchtower.dev/rotate-ca": "now"}}});
    let (params, request) = (PatchParams::default(), Patch::Merge(&request));
    fleet.kube().block_on(secrets.patch("switchtower-ca", &params, &request)).unwrap();
    let announced = trusted(fleet, 2, "the next CA is announced");
    assert_eq!(announced[0], first[0], "the first one still signs");
    let promoted = wait::until("the next CA signs", MOVED, || {
        let certificates = delivered_certificates(fleet)?;
        ensure!(certificates[0] == announced[1], "the first one signs");
        Ok(certificates)
    })
    .unwrap();
    assert_eq!(promoted[1], first[0], "the previous one stays trusted");
    fleet.settled(AGREED).unwrap();
    assert_eq!(trusted(fleet, 1, "the rotation is complete"), promoted[..1]);
    assert_eq!((sessions(fleet), kernels(fleet)), (served, before), "no session ends, no kernel is written");

    // Each replica presents a certificate of the new CA, also to the other one.
    for number in 0..2 {
        fleet.signal_replica(number, libc::SIGKILL);
        all_served_by(fleet, 1 - number, "after the rotation");
        fleet.restart_replica(number).unwrap();
        fleet.listed(2).unwrap();
    }
    // A replica that starts before waits for the CA that agents trust.
    fleet.signal_replica(1, libc::SIGKILL);
    all_served_by(fleet, 0, "without the Secret");
    fleet.kube().block_on(secrets.delete("switchtower-ca", &kube::api::DeleteParams::default())).unwrap();
    fleet.restart_replica(1).unwrap();
    let restored = wait::until("the leader restores the Secret", TAKEN_OVER, || {
        fleet.kube().get::<Secret>(NAMESPACE, "switchtower-ca")?.context("no Secret")
    });
    let data = restored.unwrap().data.unwrap();
    assert_eq!(String::from_utf8_lossy(&data["ca.crt"].0).trim(), promoted[0], "the same CA");
    fleet.listed(2).unwrap();
    assert_eq!(trusted(fleet, 1, "the same CA"), promoted[..1]);
    scene.endpoints("web", &["b1"]);
    fleet.settled(AGREED).unwrap();
    answered_by("after the rotation", scene.pod("c2"), Transport::Tcp, to, &["b1"]);
    fleet.set_controller_environment(&[]);
    fleet.signal_replica(1, libc::SIGTERM);
    all_served_by(fleet, 0, "the second ends");
}
