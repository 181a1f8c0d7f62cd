//! Settings: kube-proxy's by its configuration file, Switchtower's by a ProxyProfile.

use switchtower_e2e::parity::case::{Service, Step};
use switchtower_e2e::parity::settings::{Detection, Settings};
use switchtower_e2e::parity::{Kind, Origin};

use crate::support::{P1, P3, P5, REFUSED, SILENCE, State, agree_with, balancer, ready, then, world};

const OUTSIDE: [Kind; 3] = [Kind::ExternalIP, Kind::LoadBalancer, Kind::NodePort];

#[track_caller]
fn with(settings: Settings, service: Service, steps: Vec<Step>) -> Vec<State> {
    agree_with(&mut world(), settings, vec![service], steps)
}

fn detecting(detection: Detection) -> Settings {
    Settings { detection, ..Settings::default() }
}

/// A Service with endpoints on other nodes, then with policy Local and an endpoint on the node.
fn elsewhere_then_local() -> (Service, Vec<Step>) {
    let service = balancer(vec![ready(P3), ready(P5)]);
    let local = then(&service, |service| {
        service.external_local = true;
        service.endpoints.push(ready(P1));
    });
    (service, vec![local])
}

#[test]
fn masquerade_all_affects_cluster_ips_only() {
    let settings = Settings { masquerade_all: true, ..Settings::default() };
    let (service, steps) = elsewhere_then_local();
    let states = with(settings, service, steps);
    for origin in [Origin::LocalPod, Origin::EndpointPod, Origin::RemotePod, Origin::Client] {
        states[0].keeps_source(origin, Kind::ClusterIP, false);
    }
    for kind in OUTSIDE {
        states[1].keeps_source(Origin::LocalPod, kind, true);
        states[1].keeps_source(Origin::Client, kind, true);
    }
}

#[test]
fn no_local_detection_disables_masquerading_and_short_cut() {
    let (service, mut steps) = elsewhere_then_local();
    steps.push(then(&service, |service| service.external_local = true));
    let states = with(detecting(Detection::None), service, steps);
    for origin in [Origin::LocalPod, Origin::RemotePod, Origin::Client] {
        states[0].keeps_source(origin, Kind::ClusterIP, true);
    }
    for kind in OUTSIDE {
        assert_eq!(states[1].pods(Origin::LocalPod, kind), ["p1"], "{kind:?}");
        assert_eq!(states[1].pods(Origin::Host, kind), ["p1", "p3", "p5"], "{kind:?}");
        states[2].all(Origin::LocalPod, kind, SILENCE);
        assert_eq!(states[2].pods(Origin::Host, kind), ["p3", "p5"], "{kind:?}");
    }
}

#[test]
fn cluster_cidr_detection_includes_pods_of_other_nodes() {
    let (service, steps) = elsewhere_then_local();
    let states = with(detecting(Detection::ClusterCidr), service, steps);
    for (origin, kept) in [(Origin::LocalPod, true), (Origin::RemotePod, true), (Origin::Client, false)] {
        states[0].keeps_source(origin, Kind::ClusterIP, kept);
    }
    for kind in OUTSIDE {
        assert_eq!(states[1].pods(Origin::RemotePod, kind), ["p1", "p3", "p5"], "{kind:?}");
        assert_eq!(states[1].pods(Origin::Client, kind), ["p1"], "{kind:?}");
    }
}

#[test]
fn interface_detection_includes_only_pod_behind_it() {
    let (service, steps) = elsewhere_then_local();
    let states = with(detecting(Detection::BridgeInterface("pod3".to_owned())), service, steps);
    let kept = [(Origin::LocalPod, true), (Origin::EndpointPod, false), (Origin::RemotePod, false)];
    for (origin, kept) in kept {
        states[0].keeps_source(origin, Kind::ClusterIP, kept);
    }
    for kind in OUTSIDE {
        assert_eq!(states[1].pods(Origin::LocalPod, kind), ["p1", "p3", "p5"], "{kind:?}");
        assert_eq!(states[1].pods(Origin::EndpointPod, kind), ["p1"], "{kind:?}");
    }
}

#[test]
fn interface_prefix_detection_includes_all_pods_of_node() {
    let (service, steps) = elsewhere_then_local();
    let states = with(detecting(Detection::InterfaceNamePrefix("pod".to_owned())), service, steps);
    let kept = [(Origin::LocalPod, true), (Origin::EndpointPod, true), (Origin::RemotePod, false)];
    for (origin, kept) in kept {
        states[0].keeps_source(origin, Kind::ClusterIP, kept);
    }
    assert_eq!(states[1].pods(Origin::EndpointPod, Kind::NodePort), ["p1", "p3", "p5"]);
    assert_eq!(states[1].pods(Origin::RemotePod, Kind::NodePort), ["p1"]);
}

fn node_ports(networks: &[&str]) -> State {
    let node_port_addresses = networks.iter().map(|&network| network.to_owned()).collect();
    let settings = Settings { node_port_addresses, ..Settings::default() };
    with(settings, balancer(vec![ready(P1), ready(P3)]), Vec::new()).remove(0)
}

const ADDRESSES: [Kind; 3] = [Kind::NodePort, Kind::SecondaryNodePort, Kind::GatewayNodePort];

#[test]
fn node_ports_on_all_addresses_are_served_on_each_but_loopback() {
    let state = node_ports(&["0.0.0.0/0", "::/0"]);
    for kind in ADDRESSES {
        for origin in [Origin::LocalPod, Origin::Host, Origin::Client] {
            assert_eq!(state.pods(origin, kind), ["p1", "p3"], "{origin:?} {kind:?}");
        }
    }
    state.all(Origin::Host, Kind::LoopbackNodePort, REFUSED);
}

#[test]
fn node_ports_on_one_network_are_served_on_its_addresses_only() {
    let state = node_ports(&["10.77.0.0/24", "fd00:77::/64"]);
    assert_eq!(state.pods(Origin::Client, Kind::SecondaryNodePort), ["p1", "p3"]);
    for kind in [Kind::NodePort, Kind::GatewayNodePort] {
        state.all(Origin::Client, kind, REFUSED);
    }
}

#[test]
fn node_ports_on_networks_of_one_family_leave_the_other_open() {
    let state = node_ports(&["10.77.0.0/24"]);
    assert_eq!(state.pods(Origin::Client, Kind::SecondaryNodePort), ["p1", "p3"]);
    for kind in [Kind::NodePort, Kind::GatewayNodePort] {
        // Refused over IPv4, answered over IPv6.
        assert_eq!(state.pods(Origin::Client, kind), ["p1", "p3", REFUSED], "{kind:?}");
    }
}

#[test]
fn node_ports_on_a_network_of_loopback_are_not_served_there() {
    let state = node_ports(&["127.0.0.0/8", "10.77.0.1/32", "::1/128", "fd00:77::1/128"]);
    state.all(Origin::Host, Kind::LoopbackNodePort, REFUSED);
    assert_eq!(state.pods(Origin::Client, Kind::SecondaryNodePort), ["p1", "p3"]);
    state.all(Origin::Client, Kind::NodePort, REFUSED);
}
