//! Selection of a Service's endpoints.

use switchtower_e2e::parity::{Kind, Origin};

use crate::support::{
    P1, P2, P3, P4, P5, REFUSED, SILENCE, agree, agreed, balancer, cluster_ip, nodes, ready, terminating,
    then, unready, zones,
};

const FROM: Origin = Origin::LocalPod;

#[test]
fn zone_hints_on_all_endpoints_keep_traffic_in_the_zone() {
    let endpoints = vec![zones(ready(P1), &["a"]), zones(ready(P3), &["a"]), zones(ready(P5), &["b"])];
    assert_eq!(agreed(cluster_ip(endpoints)).pods(FROM, Kind::ClusterIP), ["p1", "p3"]);
}

#[test]
fn one_endpoint_without_a_zone_hint_undoes_all_hints() {
    let endpoints = vec![zones(ready(P1), &["a"]), ready(P3), zones(ready(P5), &["b"])];
    assert_eq!(agreed(cluster_ip(endpoints)).pods(FROM, Kind::ClusterIP), ["p1", "p3", "p5"]);
}

#[test]
fn zone_without_hints_uses_all_endpoints() {
    let endpoints = vec![zones(ready(P1), &["b"]), zones(ready(P5), &["c"])];
    assert_eq!(agreed(cluster_ip(endpoints)).pods(FROM, Kind::ClusterIP), ["p1", "p5"]);
}

#[test]
fn one_of_several_hinted_zones_is_enough() {
    let endpoints = vec![zones(ready(P1), &["b", "a"]), zones(ready(P5), &["b"])];
    assert_eq!(agreed(cluster_ip(endpoints)).pods(FROM, Kind::ClusterIP), ["p1"]);
}

#[test]
fn unready_endpoints_ignored_for_traffic_and_zone_hints() {
    let in_zone = [zones(unready(P1), &["a"]), zones(ready(P3), &["a"]), zones(ready(P5), &["b"])];
    let service = cluster_ip(in_zone.to_vec());
    let alone = then(&service, |service| {
        service.endpoints[1] = zones(unready(P3), &["a"]);
        service.endpoints.push(zones(ready(P4), &["b"]));
    });
    let states = agree(vec![service], vec![alone]);
    assert_eq!(states[0].pods(FROM, Kind::ClusterIP), ["p3"]);
    // No ready endpoint in the zone: no filtering at all.
    assert_eq!(states[1].pods(FROM, Kind::ClusterIP), ["p4", "p5"]);
}

#[test]
fn node_hints_come_before_zone_hints_before_all_endpoints() {
    let hinted = |pod, node, zone| nodes(zones(ready(pod), &[zone]), &[node]);
    let service = cluster_ip(vec![hinted(P1, "n1", "a"), hinted(P3, "n2", "a"), hinted(P5, "n3", "b")]);
    let none_here = then(&service, |service| drop(service.endpoints.remove(0)));
    let none_near = then(&service, |service| {
        service.endpoints = vec![hinted(P5, "n3", "b"), hinted(P3, "n2", "c")];
    });
    let states = agree(vec![service], vec![none_here, none_near]);
    assert_eq!(states[0].pods(FROM, Kind::ClusterIP), ["p1"]);
    assert_eq!(states[1].pods(FROM, Kind::ClusterIP), ["p3"]);
    assert_eq!(states[2].pods(FROM, Kind::ClusterIP), ["p3", "p5"]);
}

#[test]
fn unready_endpoint_with_node_hint_leaves_zone_hints() {
    let hinted = |endpoint, node, zone| nodes(zones(endpoint, &[zone]), &[node]);
    let endpoints =
        vec![hinted(unready(P1), "n1", "a"), hinted(ready(P3), "n2", "a"), hinted(ready(P5), "n3", "b")];
    assert_eq!(agreed(cluster_ip(endpoints)).pods(FROM, Kind::ClusterIP), ["p3"]);
}

#[test]
fn external_policy_local_ignores_hints_unlike_cluster() {
    let mut service =
        balancer(vec![zones(ready(P1), &["b"]), zones(ready(P3), &["a"]), zones(ready(P5), &["b"])]);
    service.external_local = true;
    let state = agreed(service);
    assert_eq!(state.pods(Origin::Client, Kind::LoadBalancer), ["p1"]);
    assert_eq!(state.pods(FROM, Kind::LoadBalancer), ["p3"]);
    assert_eq!(state.pods(FROM, Kind::ClusterIP), ["p3"]);
}

#[test]
fn internal_policy_local_ignores_hints_and_node_ports_do_not() {
    let mut service =
        balancer(vec![zones(ready(P1), &["b"]), zones(ready(P3), &["a"]), zones(ready(P5), &["b"])]);
    service.internal_local = true;
    let state = agreed(service);
    assert_eq!(state.pods(FROM, Kind::ClusterIP), ["p1"]);
    assert_eq!(state.pods(Origin::Client, Kind::NodePort), ["p3"]);
}

#[test]
fn internal_policy_local_without_any_endpoint_is_refused() {
    let mut service = cluster_ip(Vec::new());
    service.internal_local = true;
    agreed(service).all(FROM, Kind::ClusterIP, REFUSED);
}

#[test]
fn internal_policy_local_without_local_endpoints_is_dropped() {
    let mut service = cluster_ip(vec![ready(P3), ready(P5)]);
    service.internal_local = true;
    agreed(service).all(FROM, Kind::ClusterIP, SILENCE);
}

#[test]
fn internal_policy_local_uses_local_endpoints_only() {
    let mut service = cluster_ip(vec![ready(P1), ready(P2), ready(P3)]);
    service.internal_local = true;
    assert_eq!(agreed(service).pods(FROM, Kind::ClusterIP), ["p1", "p2"]);
}

#[test]
fn terminating_endpoints_serve_until_one_is_ready() {
    let service = cluster_ip(vec![terminating(P1, true), terminating(P3, true)]);
    let one_ready = then(&service, |service| service.endpoints.push(ready(P5)));
    let states = agree(vec![service], vec![one_ready]);
    assert_eq!(states[0].pods(FROM, Kind::ClusterIP), ["p1", "p3"]);
    assert_eq!(states[1].pods(FROM, Kind::ClusterIP), ["p5"]);
}

#[test]
fn local_policy_falls_back_to_local_terminating_endpoints() {
    let mut service = balancer(vec![ready(P1), terminating(P2, true), ready(P3), terminating(P4, true)]);
    service.external_local = true;
    service.internal_local = true;
    let fallback = then(&service, |service| drop(service.endpoints.remove(0)));
    let states = agree(vec![service], vec![fallback]);
    for (state, pod) in states.iter().zip(["p1", "p2"]) {
        assert_eq!(state.pods(FROM, Kind::ClusterIP), [pod]);
        assert_eq!(state.pods(Origin::Client, Kind::NodePort), [pod]);
    }
}

#[test]
fn terminating_endpoints_not_serving_never_used() {
    let service = balancer(vec![terminating(P1, false), ready(P3)]);
    let last = then(&service, |service| drop(service.endpoints.pop()));
    let states = agree(vec![service], vec![last]);
    assert_eq!(states[0].pods(FROM, Kind::ClusterIP), ["p3"]);
    states[1].all(FROM, Kind::ClusterIP, REFUSED);
    states[1].all(Origin::Client, Kind::LoadBalancer, REFUSED);
}

#[test]
fn both_policies_local_and_all_endpoints_terminating_elsewhere() {
    let mut service = balancer(vec![terminating(P3, true), terminating(P5, true)]);
    service.external_local = true;
    service.internal_local = true;
    let state = agreed(service);
    state.all(FROM, Kind::ClusterIP, SILENCE);
    state.all(Origin::Client, Kind::LoadBalancer, SILENCE);
    assert_eq!(state.pods(FROM, Kind::LoadBalancer), ["p3", "p5"]);
}
