//! The delete budget: EndpointSlices of a namespace are deleted by mistake. Real API server, three agents, packets.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;
use serde_json::json;
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{self, ProbeResult, Transport};
use switchtower_e2e::scene::{Scene, cluster_ip, eventually, fleet};
use switchtower_e2e::switchtower::plugin;

const SHOWN: Duration = Duration::from_secs(60);
/// Number of Services. Each has a TCP and a UDP port in two families: four pools and four frontends.
const SERVICES: usize = 60;
const BACKENDS: [&str; 3] = ["a1", "b1", "c1"];
/// Pods without an endpoint, on alpha and gamma.
const CLIENTS: [&str; 2] = ["a2", "c2"];

fn services(scene: &Scene) -> Vec<SocketAddr> {
    let numbers = 0..SERVICES;
    numbers
        .map(|number| {
            let name = format!("s{number}");
            let service = scene.service(&name, &json!({}));
            scene.endpoints(&name, &BACKENDS);
            cluster_ip(&service, number % 2 == 1)
        })
        .collect()
}

/// Every Service answers from the pod, over TCP and UDP.
fn all_answer(what: &str, scene: &Scene, pod: &str, services: &[SocketAddr]) {
    for to in services {
        for transport in [Transport::Tcp, Transport::Udp] {
            let outcome = probe::send(scene.pod(pod), transport, *to).unwrap();
            let backend = outcome.backend().is_some_and(|name| BACKENDS.contains(&name));
            assert!(backend, "{what}: {transport:?} from {pod} to {to}: {outcome}");
        }
    }
}

/// Waits until the row of every named node shows this number of held removals.
fn held(nodes: &[&str], wanted: i64) {
    for node in nodes {
        wait::until(&format!("{wanted} held removals on the row of {node}"), SHOWN, || {
            let row = fleet().row(node)?;
            let held = row.deviations.map_or(0, |deviations| deviations.held);
            ensure!(held == wanted, "{held}");
            let mut conditions = row.conditions.iter();
            let programmed = conditions.find(|one| one.type_ == "Programmed").context("no Programmed")?;
            if wanted == 0 {
                ensure!((&*row.state, &*programmed.status) == ("Synced", "True"), "{}", row.state);
                return Ok(());
            }
            ensure!((&*row.state, &*programmed.reason) == ("Deviating", "DeletionsHeld"), "{programmed:?}");
            ensure!(programmed.message.contains(&format!("holds {wanted} removals")), "{programmed:?}");
            ensure!(row.generation.applied == row.generation.desired, "the generation is acknowledged");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn mass_deletion_held_until_released() {
    let scene = Scene::new("budget");
    let services = services(&scene);
    scene.fleet.settled(SHOWN).unwrap();
    // Items in the file of a restarted agent count as present, so the test need not wait for the window to pass.
    for node in scene.fleet.nodes() {
        scene.fleet.stop_agent(node, libc::SIGTERM).unwrap();
        scene.fleet.run_agent(node).unwrap();
    }
    scene.fleet.settled(SHOWN).unwrap();
    CLIENTS.iter().for_each(|pod| all_answer("at first", &scene, pod, &services));

    // Below the budget: in force at once.
    scene.endpoints("s0", &[]);
    let refused = |outcome: &ProbeResult| *outcome == ProbeResult::Refused;
    eventually("scaled to zero", scene.pod("a2"), Transport::Tcp, services[0], refused);
    held(&["alpha", "beta", "gamma"], 0);
    scene.endpoints("s0", &BACKENDS);
    scene.fleet.settled(SHOWN).unwrap();

    let control_plane = scene.fleet.control_plane();
    control_plane.kubectl(&["delete", "endpointslices", "-n", "budget", "--all"]).unwrap();
    wait::until("the controller has compiled the deletion", SHOWN, || {
        let row = fleet().row("alpha")?;
        ensure!(row.counts.is_some_and(|counts| counts.endpoints < 10), "{:?}", row.counts);
        Ok(())
    })
    .unwrap();
    let row = scene.fleet.row("alpha").unwrap();
    let number = row.deviations.unwrap().held;
    // Deletions that arrived one by one before the budget was used up are in force.
    assert!((1..=4 * SERVICES as i64).contains(&number), "{number}");
    let alive: Vec<SocketAddr> = services
        .iter()
        .copied()
        .filter(|to| probe::send(scene.pod("a2"), Transport::Tcp, *to).unwrap().backend().is_some())
        .collect();
    assert!(alive.len() >= 20, "{} of {SERVICES} Services are reachable", alive.len());
    all_answer("held", &scene, "a2", &alive[alive.len() - 3..]);
    event_on("alpha");

    // A killed agent keeps what it holds.
    let alpha = scene.node("alpha");
    scene.fleet.stop_agent(alpha, libc::SIGKILL).unwrap();
    scene.fleet.run_agent(alpha).unwrap();
    wait::until("alpha is back with its holds", SHOWN, || {
        let row = fleet().row("alpha")?;
        ensure!(row.state == "Deviating" && row.deviations.is_some_and(|all| all.held > 0), "{}", row.state);
        Ok(())
    })
    .unwrap();
    all_answer("restarted", &scene, "a2", &alive[alive.len() - 3..]);
    released(&scene, &alive);
}

/// Releases alpha with kubectl, then all nodes with the plugin.
fn released(scene: &Scene, alive: &[SocketAddr]) {
    let last = alive[alive.len() - 1];
    let refused = |outcome: &ProbeResult| *outcome == ProbeResult::Refused;
    let before = scene.fleet.row("alpha").unwrap().generation.applied + 1;
    let patch = json!({"spec": {"releaseHeldBefore": before}}).to_string();
    let control_plane = scene.fleet.control_plane();
    control_plane.kubectl(&["patch", "pxs", "alpha", "--type=merge", "-p", &patch]).unwrap();
    held(&["alpha"], 0);
    eventually("released", scene.pod("a2"), Transport::Tcp, last, refused);
    eventually("released", scene.pod("a2"), Transport::Udp, last, refused);
    let gamma = scene.fleet.row("gamma").unwrap();
    assert!(gamma.deviations.unwrap().held > 0, "gamma is not released");
    all_answer("gamma still holds", scene, "c2", &[last]);

    let answer = plugin::run(scene.fleet, &["release-held", "--all"]).unwrap();
    assert_eq!(answer.code, 0, "{answer:?}");
    assert!(answer.text.contains("gamma: ") && !answer.text.contains("alpha: "), "{answer:?}");
    held(&["alpha", "beta", "gamma"], 0);
    eventually("released", scene.pod("c2"), Transport::Tcp, last, refused);
    scene.fleet.settled(SHOWN).unwrap();
}

fn event_on(node: &str) {
    let api: Api<Event> = Api::all(fleet().kube().client());
    wait::until("an Event about the held removals", SHOWN, || {
        let events = fleet().kube().block_on(api.list(&ListParams::default()))?;
        let of_node = |event: &&Event| {
            event.reason.as_deref() == Some("DeletionsHeld")
                && event.regarding.as_ref().is_some_and(|object| object.name.as_deref() == Some(node))
        };
        let event = events.iter().find(of_node).context("none")?;
        let note = event.note.as_deref().unwrap_or_default();
        ensure!(note.contains(&format!("release-held {node}")), "{note}");
        Ok(())
    })
    .unwrap();
}
