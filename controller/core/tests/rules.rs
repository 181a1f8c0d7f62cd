//! The compiled view, walked by the tracer, against a straight-line reading of kube-proxy's rules.
//!
//! The reading below looks at the objects only: which endpoints, masqueraded or not, refused or dropped. It
//! shares no code with the compiler. All combinations of policies, conditions and hints of two endpoints on
//! two nodes are tried, from every kind of source, to every kind of address; and random sets of up to nine
//! endpoints on three nodes, under random settings and ServiceCIDRs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;
use switchtower_core::compile::Compiler;
use switchtower_core::model::*;
use switchtower_core::tracer::{Cause, Fate, Packet, Source, trace};
use switchtower_core::view::View;
use switchtower_core::wire;
use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{Change, Cidr, Endpoint, LayerKind, LocalDetection, Protocol, Settings};

const CLUSTER_IP: [u8; 4] = [10, 96, 0, 10];
const BALANCER: [u8; 4] = [198, 51, 100, 1];
const NODE: [u8; 4] = [192, 0, 2, 1];
/// Addresses of the node that the Node object does not name.
const SECOND: [u8; 4] = [198, 18, 0, 1];
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Condition {
    Ready,
    Unready,
    Serving,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Hint {
    None,
    Zone(&'static str),
    Node(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Place {
    octet: u8,
    node: &'static str,
    condition: Condition,
    hint: Hint,
}

/// The node under test is n1 in zone a.
#[derive(Debug, Clone)]
struct Case {
    places: Vec<Place>,
    internal_local: bool,
    external_local: bool,
    external: bool,
    around: Around,
}

/// Inputs of a packet's fate other than the Service and its endpoints.
#[derive(Debug, Clone, Copy)]
struct Around {
    detection: LocalDetection,
    masquerade_all: bool,
    node_ports: &'static [&'static str],
    service_cidrs: &'static [&'static str],
}

const AROUND: Around = Around {
    detection: LocalDetection::NodeCidr,
    masquerade_all: false,
    node_ports: &[],
    service_cidrs: &["10.96.0.0/16"],
};

const CONDITIONS: [Condition; 4] =
    [Condition::Ready, Condition::Unready, Condition::Serving, Condition::Gone];
const HINTS: [Hint; 5] = [Hint::None, Hint::Zone("a"), Hint::Zone("b"), Hint::Node("n1"), Hint::Node("n2")];

fn places(octet: u8, node: &'static str) -> impl Iterator<Item = Place> {
    CONDITIONS
        .into_iter()
        .flat_map(move |condition| HINTS.into_iter().map(move |hint| Place { octet, node, condition, hint }))
}

fn cases() -> impl Iterator<Item = Case> {
    let mut sets: Vec<Vec<Place>> = vec![vec![]];
    sets.extend(places(1, "n1").map(|place| vec![place]));
    sets.extend(places(2, "n2").map(|place| vec![place]));
    let near: Vec<_> = places(1, "n1").collect();
    sets.extend(near.iter().flat_map(|near| places(2, "n2").map(move |far| vec![*near, far])));
    sets.into_iter().flat_map(|places| {
        (0..8u8).map(move |bits| Case {
            places: places.clone(),
            internal_local: bits & 1 != 0,
            external_local: bits & 2 != 0,
            external: bits & 4 != 0,
            around: AROUND,
        })
    })
}

// ---- the straight-line reading

fn usable(place: &Place, any_ready: bool) -> bool {
    if any_ready { place.condition == Condition::Ready } else { place.condition == Condition::Serving }
}

fn cluster_list(case: &Case) -> Vec<u8> {
    let ready: Vec<_> = case.places.iter().filter(|place| place.condition == Condition::Ready).collect();
    // A node hint comes with a zone hint for older proxies.
    let zone_of = |place: &&Place| match place.hint {
        Hint::None => None,
        Hint::Zone(zone) => Some(zone),
        Hint::Node("n1") => Some("a"),
        Hint::Node(_) => Some("b"),
    };
    let chosen: Vec<&Place> = if ready.is_empty() {
        case.places.iter().filter(|place| place.condition == Condition::Serving).collect()
    } else if ready.iter().all(|place| matches!(place.hint, Hint::Node(_)))
        && ready.iter().any(|place| place.hint == Hint::Node("n1"))
    {
        ready.into_iter().filter(|place| place.hint == Hint::Node("n1")).collect()
    } else if ready.iter().all(|place| place.hint != Hint::None)
        && ready.iter().any(|place| zone_of(place) == Some("a"))
    {
        ready.into_iter().filter(|place| zone_of(place) == Some("a")).collect()
    } else {
        ready
    };
    chosen.into_iter().map(|place| place.octet).collect()
}

fn local_list(case: &Case) -> Vec<u8> {
    let local: Vec<_> = case.places.iter().filter(|place| place.node == "n1").collect();
    let any_ready = local.iter().any(|place| place.condition == Condition::Ready);
    local.into_iter().filter(|place| usable(place, any_ready)).map(|place| place.octet).collect()
}

fn expected(case: &Case, to: &str, from: &str) -> Fate {
    let any = case.places.iter().any(|p| matches!(p.condition, Condition::Ready | Condition::Serving));
    if !any {
        return Fate::Reject(Cause::NoEndpoints);
    }
    let (list, masquerade) = if to == "cluster ip" {
        let Around { detection, masquerade_all, .. } = case.around;
        let masquerade = masquerade_all || detection != LocalDetection::None && from != "pod";
        (if case.internal_local { local_list(case) } else { cluster_list(case) }, masquerade)
    } else if !case.external_local {
        (cluster_list(case), true)
    } else {
        match from {
            "pod" => (cluster_list(case), false),
            "host" => (cluster_list(case), true),
            _ => (local_list(case), false),
        }
    };
    if list.is_empty() {
        return Fate::Drop(if to == "cluster ip" {
            Cause::NoLocalEndpointsInside
        } else {
            Cause::NoLocalEndpointsOutside
        });
    }
    let endpoint = |octet| Endpoint { address: vec![10, 244, 0, octet], port: 8080 };
    let endpoints = list.into_iter().map(endpoint).collect::<BTreeSet<_>>();
    Fate::Forward { endpoints, masquerade, hairpin: None }
}

// ---- the same through the compiler and the tracer

fn service(case: &Case) -> Service {
    let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    Service {
        key: ObjectKey { namespace: "default".into(), name: "web".into() },
        uid: "u".into(),
        created: 1,
        cluster_ips: vec![CLUSTER_IP.into()],
        ports: vec![ServicePortSpec {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: case.external.then_some(30_080),
        }],
        external_ips: vec![],
        load_balancer_ips: if case.external { vec![BALANCER.into()] } else { vec![] },
        source_ranges: vec![],
        external_policy: policy(case.external_local),
        internal_policy: policy(case.internal_local),
        affinity_seconds: None,
        health_check_port: None,
    }
}

/// The endpoints in two slices: it makes no difference in which.
fn slices(case: &Case) -> [EndpointSlice; 2] {
    let (even, odd): (Vec<_>, Vec<_>) = case.places.iter().partition(|place| place.octet % 2 == 0);
    [slice("web-1", &even), slice("web-2", &odd)]
}

fn slice(name: &str, places: &[Place]) -> EndpointSlice {
    let endpoint = |place: &Place| SliceEndpoint {
        address: IpAddr::from([10, 244, 0, place.octet]),
        ready: place.condition == Condition::Ready,
        serving: matches!(place.condition, Condition::Ready | Condition::Serving),
        terminating: matches!(place.condition, Condition::Serving | Condition::Gone),
        node: Some(place.node.into()),
        pod: None,
        zones: match place.hint {
            Hint::None => Box::default(),
            Hint::Zone(zone) => [zone.into()].into(),
            Hint::Node(node) => [if node == "n1" { "a" } else { "b" }.into()].into(),
        },
        nodes: if let Hint::Node(node) = place.hint { [node.into()].into() } else { Box::default() },
    };
    EndpointSlice {
        key: ObjectKey { namespace: "default".into(), name: name.into() },
        service: "web".into(),
        ipv6: false,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: places.iter().map(endpoint).collect(),
    }
}

fn view(case: &Case) -> View {
    view_of(service(case), case, Some("a"))
}

/// The view of n1 in a zone.
fn view_of(service: Service, case: &Case, zone: Option<&str>) -> View {
    let mut compiler = Compiler::new();
    for (name, zone) in [("n1", zone), ("n2", Some("b")), ("n3", Some("b"))] {
        compiler.apply(Input::Node(Node {
            name: name.into(),
            addresses: vec![NODE.into()],
            pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
            zone: zone.map(Into::into),
            eligible: true,
        }));
    }
    compiler.apply(Input::Service(service));
    for slice in slices(case) {
        compiler.apply(Input::Slice(slice));
    }
    let Around { detection, masquerade_all, node_ports, service_cidrs } = case.around;
    compiler.apply(Input::ServiceCidrs(service_cidrs.iter().map(|range| range.parse().unwrap()).collect()));
    let mut view = View::default();
    view.set_host_addresses([NODE.into(), SECOND.into(), IpAddr::from(LOOPBACK)]);
    let settings = Settings {
        local_detection: detection.into(),
        cluster_cidrs: vec![cidr("10.244.0.0/16")],
        masquerade_all,
        node_port_addresses: node_ports.iter().map(|range| cidr(range)).collect(),
        ..Default::default()
    };
    view.apply(LayerKind::Settings, &Change { change: Some(Kind::Settings(settings)) });
    for (layer, changes) in compiler.compile().changes {
        let kind = match &layer {
            LayerId::Cluster => LayerKind::Cluster,
            LayerId::Zone(name) if Some(&**name) == zone => LayerKind::Zone,
            LayerId::Node(node) if &**node == "n1" => LayerKind::Node,
            _ => continue,
        };
        changes.iter().for_each(|change| view.apply(kind, change));
    }
    view
}

fn packet(to: [u8; 4], port: u16, from: &str) -> Packet {
    let source = match from {
        "pod" => Source::LocalPod([10, 244, 0, 99].into()),
        "host" => Source::Host(NODE.into()),
        _ => Source::Other([203, 0, 113, 7].into()),
    };
    Packet { source, destination: to.into(), protocol: Protocol::Tcp, port }
}

/// Sends every kind of packet through a case's view; returns how many.
fn check(case: &Case) -> usize {
    let view = view(case);
    let mut targets = vec![("cluster ip", CLUSTER_IP, 80)];
    if case.external {
        targets.extend([("balancer", BALANCER, 80), ("node port", NODE, 30_080)]);
    }
    for (name, address, port) in &targets {
        for from in ["pod", "host", "client"] {
            let traced = trace(&view, &packet(*address, *port, from));
            assert_eq!(traced.fate, expected(case, name, from), "{name} from {from}: {case:?} {traced:?}");
        }
    }
    3 * targets.len()
}

/// Sends packets from every kind of source to every kind of address, including unserved ones.
fn check_around(case: &Case) {
    let view = view(case);
    let Around { detection, node_ports, service_cidrs, .. } = case.around;
    let local = |nodes_own: bool| match detection {
        LocalDetection::None => false,
        LocalDetection::ClusterCidr => true,
        _ => nodes_own,
    };
    let sources = [
        ([10, 244, 0, 99], if local(true) { "pod" } else { "client" }),
        ([10, 244, 1, 99], if local(false) { "pod" } else { "client" }),
        (NODE, "host"),
        ([203, 0, 113, 7], "client"),
    ];
    let inside = |address: [u8; 4], ranges: &[&str]| {
        let mut ranges = ranges.iter().map(|range| range.parse::<ipnet::IpNet>().unwrap());
        ranges.any(|range| range.contains(&IpAddr::from(address)))
    };
    let serves = |address: [u8; 4]| match node_ports {
        [] => address == NODE,
        ranges => address != LOOPBACK && inside(address, ranges),
    };
    for (source, from) in sources {
        let fate = |to: [u8; 4], port| {
            let source = Source::of(&view, source.into());
            let packet = Packet { source, destination: to.into(), protocol: Protocol::Tcp, port };
            trace(&view, &packet).fate
        };
        assert_eq!(fate(CLUSTER_IP, 80), expected(case, "cluster ip", from), "{source:?} {case:?}");
        if case.external {
            assert_eq!(fate(BALANCER, 80), expected(case, "balancer", from), "{source:?} {case:?}");
        }
        for address in [NODE, SECOND, LOOPBACK] {
            let served = case.external && serves(address);
            let wanted = if served { expected(case, "node port", from) } else { Fate::Pass };
            assert_eq!(fate(address, 30_080), wanted, "{source:?} to {address:?} {case:?}");
        }
        assert_eq!(fate(CLUSTER_IP, 81), Fate::Reject(Cause::UndefinedPort), "{case:?}");
        for free in [[10, 96, 9, 9], [10, 97, 9, 9]] {
            let known = inside(free, service_cidrs);
            let wanted = if known { Fate::Drop(Cause::UnallocatedAddress) } else { Fate::Pass };
            assert_eq!(fate(free, 80), wanted, "{free:?} {case:?}");
        }
    }
}

#[test]
fn every_combination_agrees_with_the_rules() {
    let tried: usize = cases().map(|case| check(&case)).sum();
    assert!(tried > 20_000, "{tried}");
}

fn any_place() -> impl Strategy<Value = (&'static str, Condition, Hint)> {
    // Mostly ready and mostly hinted: one that is not undoes the hints of all.
    let condition = prop_oneof![
        6 => Just(Condition::Ready),
        1 => Just(Condition::Unready),
        2 => Just(Condition::Serving),
        1 => Just(Condition::Gone),
    ];
    let hint = prop_oneof![
        1 => Just(Hint::None),
        4 => prop::sample::select(vec![Hint::Zone("a"), Hint::Zone("b"), Hint::Zone("c")]),
        6 => prop::sample::select(vec![Hint::Node("n1"), Hint::Node("n2"), Hint::Node("n3")]),
    ];
    (prop::sample::select(vec!["n1", "n2", "n3"]), condition, hint)
}

fn any_around() -> impl Strategy<Value = Around> {
    let detections = vec![
        LocalDetection::NodeCidr,
        LocalDetection::ClusterCidr,
        LocalDetection::BridgeInterface,
        LocalDetection::InterfaceNamePrefix,
        LocalDetection::None,
    ];
    let node_ports: Vec<&[&str]> = vec![
        &[],
        &["0.0.0.0/0"],
        &["198.18.0.0/15"],
        &["192.0.2.1/32", "127.0.0.0/8"],
        &["203.0.113.0/24"],
        &["::/0"],
    ];
    let service_cidrs: Vec<&[&str]> =
        vec![&[], &["10.96.0.0/16"], &["10.97.0.0/16"], &["10.96.0.0/16", "10.97.9.0/24", "fd96::/112"]];
    let settings = (prop::sample::select(detections), any::<bool>(), prop::sample::select(node_ports));
    (settings, prop::sample::select(service_cidrs)).prop_map(
        |((detection, masquerade_all, node_ports), service_cidrs)| Around {
            detection,
            masquerade_all,
            node_ports,
            service_cidrs,
        },
    )
}

/// A case of these places, with policies and external addresses by bits.
fn case(places: Vec<(&'static str, Condition, Hint)>, bits: u8, around: Around) -> Case {
    let place = |(octet, (node, condition, hint))| Place { octet, node, condition, hint };
    Case {
        places: (1..).zip(places).map(place).collect(),
        internal_local: bits & 1 != 0,
        external_local: bits & 2 != 0,
        external: bits & 4 != 0,
        around,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn random_endpoints_agree_with_the_rules(
        places in prop::collection::vec(any_place(), 0..10), bits in 0..8u8,
    ) {
        check(&case(places, bits, AROUND));
    }

    #[test]
    fn random_settings_and_service_cidrs_agree_with_the_rules(
        places in prop::collection::vec(any_place(), 0..6), bits in 0..8u8, around in any_around(),
    ) {
        check_around(&case(places, bits, around));
    }
}

#[test]
fn node_without_a_zone_uses_all_endpoints() {
    let place =
        |octet, node, zone| Place { octet, node, condition: Condition::Ready, hint: Hint::Zone(zone) };
    let case = Case {
        places: vec![place(1, "n1", "a"), place(2, "n2", "b")],
        internal_local: false,
        external_local: false,
        external: false,
        around: AROUND,
    };
    for zone in [None, Some("")] {
        let view = view_of(service(&case), &case, zone);
        let Fate::Forward { endpoints, .. } = trace(&view, &packet(CLUSTER_IP, 80, "pod")).fate else {
            panic!("not forwarded")
        };
        assert_eq!(endpoints.len(), 2, "{zone:?}");
    }
}

#[test]
fn unserved_ports_and_addresses_explained() {
    let case =
        Case { places: vec![], internal_local: false, external_local: false, external: true, around: AROUND };
    let view = view(&case);
    assert_eq!(trace(&view, &packet(CLUSTER_IP, 81, "pod")).fate, Fate::Reject(Cause::UndefinedPort));
    assert_eq!(trace(&view, &packet([10, 96, 9, 9], 80, "pod")).fate, Fate::Drop(Cause::UnallocatedAddress));
    assert_eq!(trace(&view, &packet(BALANCER, 81, "client")).fate, Fate::Pass);
    assert_eq!(trace(&view, &packet([127, 0, 0, 1], 30_080, "host")).fate, Fate::Pass);
}

fn cidr(text: &str) -> Cidr {
    wire::cidr(text.parse().unwrap())
}

/// A Service with two balancer addresses and source ranges, and its endpoint on n1.
fn restricted(ranges: &[&str]) -> View {
    let near = Place { octet: 1, node: "n1", condition: Condition::Ready, hint: Hint::None };
    let case = Case {
        places: vec![near],
        internal_local: false,
        external_local: false,
        external: true,
        around: AROUND,
    };
    let mut compiled = service(&case);
    compiled.source_ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
    compiled.load_balancer_ips.push([198, 51, 100, 2].into());
    view_of(compiled, &case, Some("a"))
}

#[test]
fn source_ranges_admit_listed_clients_and_the_balancer() {
    let forwarded = |view: &View, to: [u8; 4], port, source: [u8; 4]| {
        let source = Source::of(view, source.into());
        let packet = Packet { source, destination: to.into(), protocol: Protocol::Tcp, port };
        match trace(view, &packet).fate {
            Fate::Forward { .. } => true,
            Fate::Drop(Cause::SourceRange) => false,
            other => panic!("{other:?}"),
        }
    };
    let view = restricted(&["203.0.113.0/24"]);
    assert!(forwarded(&view, BALANCER, 80, [203, 0, 113, 7]));
    for source in [[203, 0, 114, 7], NODE, BALANCER, [10, 244, 0, 99]] {
        assert!(!forwarded(&view, BALANCER, 80, source), "{source:?}");
    }
    // A node port and the ClusterIP are not restricted.
    assert!(forwarded(&view, NODE, 30_080, [203, 0, 114, 7]));
    assert!(forwarded(&view, CLUSTER_IP, 80, [203, 0, 114, 7]));
    // With the node's address allowed, any address of the Service's balancer is a good source.
    let view = restricted(&["192.0.2.0/24"]);
    for source in [NODE, BALANCER, [198, 51, 100, 2]] {
        assert!(forwarded(&view, BALANCER, 80, source), "{source:?}");
    }
    assert!(!forwarded(&view, BALANCER, 80, [198, 51, 100, 3]));
    // Ranges of the other family do not restrict this one.
    assert!(forwarded(&restricted(&["2001:db8::/32"]), BALANCER, 80, [203, 0, 113, 7]));
}

#[test]
fn endpoint_reaching_itself_masqueraded() {
    let place = |octet, node| Place { octet, node, condition: Condition::Ready, hint: Hint::None };
    let places = vec![place(1, "n1"), place(2, "n2")];
    let case = Case { places, internal_local: false, external_local: false, external: false, around: AROUND };
    let view = view(&case);
    let hairpin = |octet| {
        let source = Source::of(&view, IpAddr::from([10, 244, 0, octet]));
        match trace(&view, &Packet { source, ..packet(CLUSTER_IP, 80, "pod") }).fate {
            Fate::Forward { masquerade: false, hairpin, .. } => hairpin.map(|own| own.address[3]),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((hairpin(1), hairpin(9)), (Some(1), None));
    // The other node's endpoint is not local here, so it is not in the kernel's set.
    assert_eq!(hairpin(2), None);
}

#[test]
fn node_ports_are_served_where_the_settings_say() {
    let near = Place { octet: 1, node: "n1", condition: Condition::Ready, hint: Hint::None };
    let case = Case {
        places: vec![near],
        internal_local: false,
        external_local: false,
        external: true,
        around: AROUND,
    };
    let mut view = view(&case);
    let second = [192, 0, 2, 200];
    view.set_host_addresses([NODE.into(), second.into(), IpAddr::from([127, 0, 0, 1])]);
    let served = |view: &View, address| trace(view, &packet(address, 30_080, "client")).fate != Fate::Pass;
    assert!(served(&view, NODE) && !served(&view, second));
    let settings = |ranges: &[&str]| Settings {
        local_detection: LocalDetection::NodeCidr.into(),
        node_port_addresses: ranges.iter().map(|range| cidr(range)).collect(),
        ..Default::default()
    };
    for (ranges, wanted) in [(&["0.0.0.0/0"][..], [true, true]), (&["192.0.2.200/32"], [false, true])] {
        let change = Change { change: Some(Kind::Settings(settings(ranges))) };
        view.apply(LayerKind::Settings, &change);
        assert_eq!([served(&view, NODE), served(&view, second)], wanted, "{ranges:?}");
        assert!(!served(&view, [127, 0, 0, 1]));
    }
}
