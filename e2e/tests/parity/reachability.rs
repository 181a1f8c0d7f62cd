//! Reachability of Services, compared with kube-proxy.

use switchtower_e2e::parity::case::{Families, Protocol, ServiceType, Step};
use switchtower_e2e::parity::{Kind, ORIGINS, Origin};

use crate::support::{P1, P3, P5, REFUSED, SILENCE, agree, agreed, balancer, cluster_ip, port, ready, then};

#[test]
fn cluster_ip_serves_tcp_and_udp_and_refuses_other_protocols() {
    let mut service = cluster_ip(vec![ready(P1), ready(P3)]);
    service.ports = vec![port(Protocol::TCP, 80, 8080), port(Protocol::UDP, 81, 8081)];
    let state = agreed(service);
    assert_eq!(state.pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p3"]);
    state.all(Origin::LocalPod, Kind::OtherProtocol, REFUSED);
}

#[test]
fn port_of_another_service_refused() {
    let mut other = cluster_ip(vec![ready(P3)]);
    other.name = "other".to_owned();
    other.ports = vec![port(Protocol::TCP, 90, 8080)];
    let states = agree(vec![cluster_ip(vec![ready(P1)]), other], Vec::new());
    states[0].all(Origin::LocalPod, Kind::UnusedPort, REFUSED);
}

#[test]
fn free_address_of_the_service_range_is_silent() {
    let state = agreed(cluster_ip(vec![ready(P1)]));
    state.all(Origin::LocalPod, Kind::UnusedAddress, SILENCE);
    state.all(Origin::Host, Kind::UnusedAddress, SILENCE);
}

#[test]
fn without_endpoints_every_origin_is_refused() {
    let state = agreed(balancer(Vec::new()));
    for origin in ORIGINS {
        for kind in [Kind::ClusterIP, Kind::ExternalIP, Kind::LoadBalancer, Kind::NodePort] {
            state.all(origin, kind, REFUSED);
        }
    }
}

#[test]
fn removed_endpoints_leave_reject_rules() {
    let service = balancer(vec![ready(P1), ready(P3)]);
    let gone = then(&service, |service| service.endpoints.clear());
    let states = agree(vec![service], vec![gone]);
    assert_eq!(states[0].pods(Origin::Client, Kind::LoadBalancer), ["p1", "p3"]);
    states[1].all(Origin::LocalPod, Kind::ClusterIP, REFUSED);
    states[1].all(Origin::Client, Kind::LoadBalancer, REFUSED);
}

#[test]
fn ports_come_and_go_and_share_a_number_between_protocols() {
    let mut service = cluster_ip(vec![ready(P1)]);
    service.ports = vec![port(Protocol::TCP, 80, 8080)];
    let more = then(&service, |service| {
        service.ports.extend([port(Protocol::UDP, 80, 8081), port(Protocol::TCP, 81, 8081)]);
    });
    let less = then(&service, |service| service.ports = vec![port(Protocol::UDP, 80, 8080)]);
    let states = agree(vec![service], vec![more, less]);
    for state in &states {
        assert_eq!(state.pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
    }
    states[2].all(Origin::LocalPod, Kind::OtherProtocol, REFUSED);
}

#[test]
fn proxy_name_and_headless_labels_remove_and_restore() {
    let service = balancer(vec![ready(P1), ready(P3)]);
    let labelled = |key: &str, value: &str| {
        then(&service, |service| service.labels = vec![(key.to_owned(), value.to_owned())])
    };
    let steps = vec![
        labelled("service.kubernetes.io/service-proxy-name", "other"),
        Step::Apply(service.clone()),
        labelled("service.kubernetes.io/headless", ""),
        Step::Apply(service.clone()),
    ];
    let states = agree(vec![service], steps);
    for up in [0, 2, 4] {
        assert_eq!(states[up].pods(Origin::Client, Kind::NodePort), ["p1", "p3"]);
    }
    // The first step removes the Service, the second its endpoints.
    states[1].all(Origin::LocalPod, Kind::ClusterIP, SILENCE);
    states[3].all(Origin::LocalPod, Kind::ClusterIP, REFUSED);
    for down in [1, 3] {
        states[down].all(Origin::Client, Kind::NodePort, REFUSED);
    }
}

#[test]
fn types_change_in_place() {
    let service = cluster_ip(vec![ready(P1), ready(P3)]);
    let mut full = balancer(vec![ready(P1), ready(P3)]);
    full.external_ips.clear();
    let node_port = then(&full, |service| {
        service.service_type = ServiceType::NodePort;
        service.load_balancer_ips.clear();
    });
    let local = then(&full, |service| service.external_local = true);
    let steps = vec![node_port, Step::Apply(full), local, Step::Apply(service.clone())];
    let states = agree(vec![service], steps);
    assert_eq!(states[1].pods(Origin::Client, Kind::NodePort), ["p1", "p3"]);
    assert_eq!(states[2].pods(Origin::Client, Kind::LoadBalancer), ["p1", "p3"]);
    assert_eq!(states[3].pods(Origin::Client, Kind::LoadBalancer), ["p1"]);
    assert_eq!(states[4].pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p3"]);
}

#[test]
fn pod_reaches_itself_and_sees_the_node() {
    let state = agreed(balancer(vec![ready(P1)]));
    assert_eq!(state.pods(Origin::EndpointPod, Kind::ClusterIP), ["p1"]);
    state.keeps_source(Origin::EndpointPod, Kind::ClusterIP, false);
    state.keeps_source(Origin::EndpointPod, Kind::NodePort, false);
}

#[test]
fn cluster_ip_keeps_the_address_of_a_pod_across_nodes() {
    let state = agreed(cluster_ip(vec![ready(P3), ready(P5)]));
    state.keeps_source(Origin::LocalPod, Kind::ClusterIP, true);
    state.keeps_source(Origin::Client, Kind::ClusterIP, false);
}

#[test]
fn single_stack_has_one_family_and_dual_stack_both() {
    let single = |families| {
        let mut service = balancer(vec![ready(P1), ready(P5)]);
        service.families = families;
        service
    };
    for families in [Families::Ipv4, Families::Ipv6, Families::Dual] {
        let state = agreed(single(families));
        assert_eq!(state.pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p5"], "{families:?}");
        let node_port = state.pods(Origin::Client, Kind::NodePort);
        let refused = node_port.contains(&REFUSED.to_owned());
        assert_eq!(refused, families != Families::Dual, "{families:?}: {node_port:?}");
    }
}

#[test]
fn sctp_is_served_as_tcp_and_udp_are() {
    let mut service = balancer(vec![ready(P1), ready(P3)]);
    service.ports = vec![port(Protocol::SCTP, 80, 8080)];
    service.ports[0].node_port = Some(30_080);
    let local = then(&service, |service| service.external_local = true);
    let none = then(&service, |service| service.endpoints.clear());
    let states = agree(vec![service], vec![local, none]);
    for origin in [Origin::LocalPod, Origin::Client, Origin::Host] {
        assert_eq!(states[0].pods(origin, Kind::ClusterIP), ["p1", "p3"], "{origin:?}");
    }
    assert_eq!(states[0].pods(Origin::Client, Kind::NodePort), ["p1", "p3"]);
    assert_eq!(states[1].pods(Origin::Client, Kind::LoadBalancer), ["p1"]);
    states[1].keeps_source(Origin::Client, Kind::LoadBalancer, true);
    states[2].all(Origin::LocalPod, Kind::ClusterIP, REFUSED);
}
