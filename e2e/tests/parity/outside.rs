//! External addresses: policies, sources, ranges, node ports.

use switchtower_e2e::parity::{Kind, Origin};

use crate::support::{
    P1, P2, P3, P5, REFUSED, SILENCE, agree, agree_in, agreed, balancer, ready, terminating, then, world,
};

const OUTSIDE: [Kind; 3] = [Kind::ExternalIP, Kind::LoadBalancer, Kind::NodePort];

#[test]
fn external_policy_cluster_uses_all_endpoints_and_masquerades() {
    let state = agreed(balancer(vec![ready(P1), ready(P3), ready(P5)]));
    for kind in OUTSIDE {
        for origin in [Origin::Client, Origin::LocalPod, Origin::RemotePod] {
            assert_eq!(state.pods(origin, kind), ["p1", "p3", "p5"], "{origin:?} {kind:?}");
            state.keeps_source(origin, kind, false);
        }
        assert_eq!(state.pods(Origin::Host, kind), ["p1", "p3", "p5"], "{kind:?}");
    }
}

/// A Service with external policy Local, two endpoints on the node and two elsewhere.
fn local() -> switchtower_e2e::parity::case::Service {
    let mut service = balancer(vec![ready(P1), ready(P2), ready(P3), ready(P5)]);
    service.external_local = true;
    service
}

#[test]
fn external_policy_local_from_outside_keeps_the_client() {
    let state = agreed(local());
    for kind in OUTSIDE {
        assert_eq!(state.pods(Origin::Client, kind), ["p1", "p2"], "{kind:?}");
        state.keeps_source(Origin::Client, kind, true);
    }
}

#[test]
fn external_policy_local_from_a_local_pod_keeps_the_pod() {
    let state = agreed(local());
    for kind in OUTSIDE {
        assert_eq!(state.pods(Origin::LocalPod, kind), ["p1", "p2", "p3", "p5"], "{kind:?}");
        state.keeps_source(Origin::LocalPod, kind, true);
    }
}

#[test]
fn external_policy_local_from_the_host_uses_all_endpoints() {
    let state = agreed(local());
    for kind in OUTSIDE {
        assert_eq!(state.pods(Origin::Host, kind), ["p1", "p2", "p3", "p5"], "{kind:?}");
    }
}

#[test]
fn external_policy_local_without_endpoint_drops_outside() {
    let mut service = balancer(vec![ready(P3), ready(P5)]);
    service.external_local = true;
    let state = agreed(service);
    for kind in OUTSIDE {
        state.all(Origin::Client, kind, SILENCE);
        // For this node, a pod of another node is outside.
        state.all(Origin::RemotePod, kind, SILENCE);
        assert_eq!(state.pods(Origin::LocalPod, kind), ["p3", "p5"], "{kind:?}");
    }
}

#[test]
fn external_policy_local_leaves_the_cluster_ip_alone() {
    let state = agreed(local());
    for origin in [Origin::LocalPod, Origin::Host, Origin::Client] {
        assert_eq!(state.pods(origin, Kind::ClusterIP), ["p1", "p2", "p3", "p5"], "{origin:?}");
    }
    state.keeps_source(Origin::Client, Kind::ClusterIP, false);
}

#[test]
fn internal_policy_local_leaves_external_addresses_alone() {
    let mut service = balancer(vec![ready(P1), ready(P3)]);
    service.internal_local = true;
    let state = agreed(service);
    for origin in [Origin::LocalPod, Origin::Host, Origin::Client] {
        assert_eq!(state.pods(origin, Kind::ClusterIP), ["p1"], "{origin:?}");
        for kind in OUTSIDE {
            assert_eq!(state.pods(origin, kind), ["p1", "p3"], "{origin:?} {kind:?}");
        }
    }
    state.keeps_source(Origin::LocalPod, Kind::ClusterIP, true);
}

#[test]
fn source_ranges_guard_balancer_addresses_only() {
    let mut service = balancer(vec![ready(P1), ready(P3)]);
    service.source_ranges = vec!["198.18.0.0/16".to_owned(), "fd18::/16".to_owned()];
    let nobody = then(&service, |service| {
        service.source_ranges = vec!["10.99.0.0/16".to_owned(), "fd99::/64".to_owned()];
    });
    let states = agree(vec![service], vec![nobody]);
    assert_eq!(states[0].pods(Origin::Client, Kind::LoadBalancer), ["p1", "p3"]);
    states[1].all(Origin::Client, Kind::LoadBalancer, SILENCE);
    for state in &states {
        assert_eq!(state.pods(Origin::Client, Kind::NodePort), ["p1", "p3"]);
        assert_eq!(state.pods(Origin::Client, Kind::ExternalIP), ["p1", "p3"]);
    }
}

#[test]
fn source_ranges_drop_pods_outside_and_admit_the_node_inside() {
    let mut service = balancer(vec![ready(P1), ready(P3)]);
    service.source_ranges = vec!["198.18.0.0/16".to_owned(), "fd18::/16".to_owned()];
    let state = agreed(service);
    state.all(Origin::LocalPod, Kind::LoadBalancer, SILENCE);
    assert_eq!(state.pods(Origin::Host, Kind::LoadBalancer), ["p1", "p3"]);
}

/// A node that owns the balancer's address uses it as source; if the node's own address is allowed, so is this one.
#[test]
fn source_ranges_admit_the_balancers_own_address_from_the_node() {
    let mut world = world();
    let mut service = balancer(vec![ready(P1), ready(P3)]);
    service.source_ranges = vec!["198.18.0.0/16".to_owned(), "fd18::/16".to_owned()];
    world.on_node("addr add 198.51.100.9/32 dev lo\n").unwrap();
    let states = agree_in(&mut world, vec![service], Vec::new());
    world.on_node("addr del 198.51.100.9/32 dev lo\n").unwrap();
    assert_eq!(states[0].pods(Origin::Host, Kind::LoadBalancer), ["p1", "p3"]);
}

#[test]
fn source_ranges_of_one_family_guard_that_family_only() {
    let mut service = balancer(vec![ready(P1)]);
    service.source_ranges = vec!["10.99.0.0/16".to_owned()];
    let answers = agreed(service).pods(Origin::Client, Kind::LoadBalancer);
    assert_eq!(answers, [SILENCE, "p1"]);
}

#[test]
fn addresses_of_a_balancer_in_mode_proxy_are_not_served() {
    let mut service = balancer(vec![ready(P1)]);
    service.load_balancer_proxy = true;
    let vip = then(&service, |service| service.load_balancer_proxy = false);
    let states = agree(vec![service], vec![vip]);
    assert!(!states[0].pods(Origin::LocalPod, Kind::LoadBalancer).contains(&"p1".to_owned()));
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::LoadBalancer), ["p1"]);
}

#[test]
fn external_address_without_a_node_is_served_in_cluster() {
    let state = agreed(balancer(vec![ready(P3)]));
    for origin in [Origin::LocalPod, Origin::RemotePod, Origin::Host] {
        assert_eq!(state.pods(origin, Kind::ExternalIP), ["p3"], "{origin:?}");
    }
}

#[test]
fn node_ports_are_served_on_the_primary_address_only() {
    let state = agreed(balancer(vec![ready(P1)]));
    assert_eq!(state.pods(Origin::Client, Kind::NodePort), ["p1"]);
    state.all(Origin::Client, Kind::SecondaryNodePort, REFUSED);
    state.all(Origin::Host, Kind::SecondaryNodePort, REFUSED);
}

#[test]
fn node_ports_are_never_served_on_loopback() {
    agreed(balancer(vec![ready(P1)])).all(Origin::Host, Kind::LoopbackNodePort, REFUSED);
}

#[test]
fn terminating_endpoints_serve_on_both_nodes() {
    let both = balancer(vec![terminating(P1, true), terminating(P3, true)]);
    let local = then(&both, |service| {
        service.external_local = true;
        service.internal_local = true;
    });
    let elsewhere = then(&both, |service| {
        service.external_local = true;
        service.endpoints.remove(0);
    });
    let states = agree(vec![both], vec![local, elsewhere]);
    assert_eq!(states[0].pods(Origin::Client, Kind::NodePort), ["p1", "p3"]);
    assert_eq!(states[0].pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p3"]);
    assert_eq!(states[1].pods(Origin::Client, Kind::NodePort), ["p1"]);
    assert_eq!(states[1].pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
    states[2].all(Origin::Client, Kind::NodePort, SILENCE);
}
