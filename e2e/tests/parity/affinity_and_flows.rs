//! Session affinity, and UDP flows that exist while the cluster changes.
//!
//! Flows are compared with kube-proxy at every change of a case by their previous backend: they stay, move or end.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use switchtower_e2e::parity::case::{Families, Protocol, Service, Step};
use switchtower_e2e::parity::{Kind, Origin};

use crate::support::{
    P1, P2, P3, P5, REFUSED, SILENCE, agree, agree_in, balancer, cluster_ip, port, ready, terminating, then,
    unready, world,
};

fn sticky(endpoints: Vec<switchtower_e2e::parity::case::Endpoint>) -> Service {
    Service { affinity_seconds: Some(60), ..balancer(endpoints) }
}

#[test]
fn affinity_on_every_kind_of_address_with_both_policies() {
    let service = sticky(vec![ready(P1), ready(P2), ready(P3), ready(P5)]);
    let local = then(&service, |service| {
        service.external_local = true;
        service.internal_local = true;
    });
    // The comparison of a sticky Service asserts that one client sees one pod.
    let states = agree(vec![service], vec![local]);
    let pods = states[1].pods(Origin::Client, Kind::NodePort);
    assert!(pods.iter().all(|pod| ["p1", "p2"].contains(&pod.as_str())), "{pods:?}");
}

#[test]
fn affinity_is_switched_on_and_off() {
    let service = balancer(vec![ready(P1), ready(P3), ready(P5)]);
    let on = then(&service, |service| service.affinity_seconds = Some(60));
    let states = agree(vec![service.clone()], vec![on, Step::Apply(service)]);
    for state in [&states[0], &states[2]] {
        assert_eq!(state.pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p3", "p5"]);
    }
}

#[test]
fn affinity_refreshed_by_connections_and_expires() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let mut world = world();
    let mut service = cluster_ip(vec![ready(P1), ready(P3), ready(P5)]);
    service.ports = vec![port(Protocol::TCP, 80, 8080)];
    service.families = Families::Ipv4;
    service.affinity_seconds = Some(TIMEOUT.as_secs() as u32);
    let states = agree_in(&mut world, vec![service], Vec::new());
    let probe = states[0].probe(Origin::LocalPod, Kind::ClusterIP);
    // For twice the timeout, with connections well before it ends; a busy machine gets another attempt.
    let steadily = || {
        let (mut theirs, mut ours) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..10 {
            let before = Instant::now();
            let answers = world.ask_with_pauses(&probe, &[TIMEOUT / 5]).unwrap();
            theirs.extend(answers.kube_proxy);
            ours.extend(answers.switchtower);
            if before.elapsed() > TIMEOUT / 2 {
                return None;
            }
        }
        Some([theirs, ours])
    };
    let pods = (0..10).find_map(|_| steadily()).expect("ten connections in time");
    assert!(pods.iter().all(|pods| pods.len() == 1), "kube-proxy and Switchtower: {pods:?}");
    // Then one of the three is chosen again after each timeout: the same one twenty times has a probability of 10^-9.
    let (mut theirs, mut ours) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..20 {
        let answers = world.ask_with_pauses(&probe, &[TIMEOUT + Duration::from_millis(500)]).unwrap();
        theirs.extend(answers.kube_proxy);
        ours.extend(answers.switchtower);
        if theirs.len() > 1 && ours.len() > 1 {
            return;
        }
    }
    panic!("kube-proxy: {theirs:?}, Switchtower: {ours:?}");
}

#[test]
fn client_of_a_removed_pod_moves_and_sticks() {
    let service = sticky(vec![ready(P1)]);
    let moved = then(&service, |service| service.endpoints = vec![ready(P3), ready(P5)]);
    let back = then(&service, |service| service.endpoints = vec![ready(P1)]);
    let states = agree(vec![service], vec![moved, back]);
    assert_eq!(states[0].pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
    assert!(!states[1].pods(Origin::LocalPod, Kind::ClusterIP).contains(&"p1".to_owned()));
    assert_eq!(states[2].pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
}

fn udp(endpoints: Vec<switchtower_e2e::parity::case::Endpoint>) -> Service {
    let mut service = balancer(endpoints);
    service.ports = vec![port(Protocol::UDP, 80, 8080)];
    service.ports[0].node_port = Some(30_080);
    service
}

#[test]
fn udp_flow_leaves_removed_and_keeps_serving_endpoint() {
    let service = udp(vec![ready(P1), ready(P3), ready(P5)]);
    let one_less = then(&service, |service| drop(service.endpoints.remove(1)));
    let states = agree(vec![service], vec![one_less]);
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p5"]);
}

#[test]
fn udp_flow_stays_with_terminating_serving_endpoint() {
    let service = udp(vec![ready(P1), ready(P3)]);
    let ending = then(&service, |service| service.endpoints[0] = terminating(P1, true));
    let ended = then(&service, |service| service.endpoints[0] = terminating(P1, false));
    let states = agree(vec![service], vec![ending, ended]);
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::ClusterIP), ["p3"]);
}

#[test]
fn udp_flow_follows_a_changed_target_port() {
    let service = udp(vec![ready(P1)]);
    let moved = then(&service, |service| service.ports[0].target = Some(8081));
    let states = agree(vec![service], vec![moved]);
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
}

#[test]
fn udp_flows_of_a_service_without_serving_endpoints() {
    let service = udp(vec![ready(P1), ready(P3)]);
    let none = then(&service, |service| service.endpoints = vec![unready(P1), unready(P3)]);
    let states = agree(vec![service], vec![none]);
    states[1].all(Origin::LocalPod, Kind::ClusterIP, REFUSED);
}

#[test]
fn udp_flows_of_a_service_whose_policies_change() {
    let service = udp(vec![ready(P1), ready(P3)]);
    let local = then(&service, |service| {
        service.external_local = true;
        service.internal_local = true;
    });
    let states = agree(vec![service], vec![local]);
    assert_eq!(states[1].pods(Origin::Client, Kind::NodePort), ["p1"]);
}

#[test]
fn udp_flows_when_a_new_service_takes_over_an_external_address() {
    let mut service = udp(vec![ready(P1)]);
    service.external_local = false;
    let mut successor = cluster_ip(vec![ready(P3)]);
    successor.name = "successor".to_owned();
    successor.ports = vec![port(Protocol::UDP, 80, 8080)];
    successor.external_ips = service.external_ips.clone();
    let gone = then(&service, |service| service.external_ips.clear());
    let states = agree(vec![service], vec![gone, Step::Apply(successor)]);
    assert_eq!(states[2].pods(Origin::LocalPod, Kind::ExternalIP), ["p3"]);
}

#[test]
fn udp_client_before_first_ready_endpoint_is_served() {
    let service = udp(vec![unready(P1)]);
    let now = then(&service, |service| service.endpoints = vec![ready(P1)]);
    let states = agree(vec![service], vec![now]);
    states[0].all(Origin::LocalPod, Kind::ClusterIP, REFUSED);
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
}

#[test]
fn deleted_service_releases_its_addresses() {
    let service = balancer(vec![ready(P1)]);
    let name = service.name.clone();
    let mut other = cluster_ip(vec![ready(P3)]);
    other.name = "other".to_owned();
    let states = agree(vec![service, other], vec![Step::Delete(name)]);
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::ClusterIP), ["p3"]);
    states[1].all(Origin::LocalPod, Kind::UnusedAddress, SILENCE);
}
