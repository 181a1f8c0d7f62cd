//! Where the two differ on purpose, kube-proxy's side included: the table in docs/parity.md.

use std::time::Duration;

use anyhow::ensure;
use kube::api::DeleteParams;
use serde_json::json;
use switchtower_e2e::differential::case::{Families, Protocol, Service};
use switchtower_e2e::differential::{Kind, Origin, Probe, World};
use switchtower_e2e::wait;

use crate::support::{P1, REFUSED, agree_in, cluster_ip, port, ready, unready, world};

const SOON: Duration = Duration::from_secs(10);
/// For what kube-proxy leaves to its next full sync, up to an hour later.
const WHILE: Duration = Duration::from_secs(3);

fn single(protocol: Protocol) -> Service {
    let mut service = cluster_ip(vec![ready(P1)]);
    service.families = Families::Ipv4;
    service.ports = vec![port(protocol, 80, 8080)];
    service
}

/// A flow of a local pod to the Service, answered by p1 in both worlds, after `change`.
fn flow_after(world: &mut World, change: impl FnOnce(&mut World, Service)) -> [String; 2] {
    let service = single(Protocol::UDP);
    let states = agree_in(world, vec![service.clone()], Vec::new());
    let flow = world.open_flow(&states[0].probe(Origin::LocalPod, Kind::ClusterIP)).unwrap();
    let before = world.ask_flow(&flow).unwrap();
    assert_eq!((before.kube_proxy.as_str(), before.switchtower.as_str()), ("p1", "p1"));
    change(world, service);
    let last = wait::until("Switchtower has ended the flow", SOON, || {
        let now = world.ask_flow(&flow)?;
        ensure!(now.switchtower != "p1", "{now:?}");
        Ok(now)
    });
    let last = last.unwrap();
    [last.kube_proxy, last.switchtower]
}

#[test]
fn a_udp_flow_to_a_service_that_is_gone_ends_here_and_stays_with_kube_proxy() {
    let last = flow_after(&mut world(), |world, _| drop(agree_in(world, Vec::new(), Vec::new())));
    assert_eq!(last, ["p1", "no answer"]);
}

#[test]
fn a_udp_flow_to_a_service_without_serving_endpoints_ends_here_and_stays_with_kube_proxy() {
    let last = flow_after(&mut world(), |world, mut service| {
        service.endpoints = vec![unready(P1)];
        world.apply(&service).unwrap();
    });
    assert_eq!(last, ["p1", REFUSED]);
}

fn answers(world: &World, probe: &Probe) -> [String; 2] {
    let answers = world.ask_with_pauses(probe, &[Duration::ZERO]).unwrap();
    [answers.kube_proxy.concat(), answers.switchtower.concat()]
}

#[test]
fn rules_that_others_delete_come_back_here_at_once() {
    let mut world = world();
    let states = agree_in(&mut world, vec![single(Protocol::TCP)], Vec::new());
    let probe = states[0].probe(Origin::LocalPod, Kind::ClusterIP);
    assert_eq!(answers(&world, &probe), ["p1", "p1"]);
    world.delete_tables().unwrap();
    std::thread::sleep(WHILE);
    let after = answers(&world, &probe);
    world.repair_kube_proxy().unwrap();
    assert_ne!(after[0], "p1");
    assert_eq!(after[1], "p1");
    agree_in(&mut world, vec![single(Protocol::TCP)], Vec::new());
}

#[test]
fn a_new_service_cidr_is_known_here_at_once() {
    const RANGE: &str = "10.222.0.0/24";
    let mut world = world();
    agree_in(&mut world, vec![single(Protocol::TCP)], Vec::new());
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": "differences"}, "spec": {"cidrs": [RANGE]},
    });
    world.kube().apply(&object).unwrap();
    wait::until("Switchtower knows the range", SOON, || {
        ensure!(world.rulesets()?.switchtower.contains(RANGE), "not yet");
        Ok(())
    })
    .unwrap();
    std::thread::sleep(WHILE);
    assert!(!world.rulesets().unwrap().kube_proxy.contains(RANGE));
    let api: kube::Api<k8s_openapi::api::networking::v1::ServiceCIDR> = kube::Api::all(world.kube().client());
    world.kube().block_on(api.delete("differences", &DeleteParams::default())).unwrap();
}
