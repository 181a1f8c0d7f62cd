//! The cost of an endpoint change does not depend on the size of the cluster.

#![allow(clippy::panic, clippy::unwrap_used, clippy::print_stdout, reason = "a test that prints its figures")]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::*;
use switchtower_proto::v1::{Protocol, Source};

fn object(number: u32, suffix: &str) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: format!("s{number}{suffix}").into() }
}

fn address(first: u8, number: u32) -> IpAddr {
    let [_, b, c, d] = number.to_be_bytes();
    IpAddr::from([first, b, c, d])
}

fn service(number: u32) -> Service {
    Service {
        key: object(number, ""),
        uid: format!("u{number}").into(),
        created: i64::from(number),
        cluster_ips: vec![address(10, number)],
        ports: vec![ServicePortSpec { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        external_ips: vec![],
        load_balancer_ips: vec![],
        source_ranges: vec![],
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        affinity_seconds: None,
        health_check_port: None,
    }
}

/// Three endpoints; the last one's address depends on `round`.
fn slice(number: u32, round: u32) -> EndpointSlice {
    let endpoint = |address| SliceEndpoint {
        address,
        ready: true,
        serving: true,
        terminating: false,
        node: Some(format!("n{}", number % 100).into()),
        zones: Box::default(),
        nodes: Box::default(),
    };
    let addresses = [address(11, number), address(12, number), address(13, number * 2 + round % 2)];
    EndpointSlice {
        key: object(number, "-1"),
        service: object(number, "").name,
        ipv6: false,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: addresses.into_iter().map(endpoint).collect(),
    }
}

/// The shortest of many runs: other load on the machine only adds time.
fn one_change(services: u32) -> Duration {
    let mut compiler = cluster(100, services);
    compiler.compile();
    let runs = (1..=300).map(|round| {
        let start = Instant::now();
        compiler.apply(Input::Slice(slice(services / 2, round)));
        let compiled = compiler.compile();
        let taken = start.elapsed();
        let changes: usize = compiled.changes.values().map(Vec::len).sum();
        // The pool's patch, and the hairpin entry that goes and the one that comes.
        assert_eq!(changes, 3, "{compiled:?}");
        taken
    });
    runs.min().unwrap()
}

fn cluster(nodes: u32, services: u32) -> Compiler {
    let mut compiler = Compiler::new();
    for number in 0..nodes {
        compiler.apply(Input::Node(Node {
            name: format!("n{number}").into(),
            addresses: vec![address(192, number)],
            pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
            zone: None,
            eligible: true,
        }));
    }
    for number in 0..services {
        compiler.apply(Input::Service(service(number)));
        compiler.apply(Input::Slice(slice(number, 0)));
    }
    compiler
}

/// Layers touched, log entries added and bytes sent by one endpoint change.
fn one_change_in_a_fleet(nodes: u32) -> (usize, usize, usize) {
    let mut compiler = cluster(nodes, 200);
    let mut layers = Layers::new(LogLimits::default());
    let apply = |compiler: &mut Compiler, layers: &mut Layers| {
        let compiled = compiler.compile();
        layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default())
    };
    apply(&mut compiler, &mut layers);
    let node = Subscription { node: "n5".into(), zone: None, settings: ("builtin".into(), 0) };
    let (before, entries) = (layers.head(&node), layers.log_entries());
    compiler.apply(Input::Slice(slice(100, 1)));
    let applied = apply(&mut compiler, &mut layers);
    let Planned::Update(plan) = layers.plan(&node, Some(&before)) else { panic!("nothing is to be sent") };
    let bytes = plan.parts.iter().map(|part| part.payload.len()).sum();
    (applied.touched.len(), layers.log_entries() - entries, bytes)
}

#[test]
fn endpoint_change_touches_constant_layers_in_any_fleet() {
    let small = one_change_in_a_fleet(100);
    assert_eq!((small.0, small.1), (2, 2), "CLUSTER and the endpoint's node");
    for nodes in [1_000, 5_000] {
        assert_eq!(one_change_in_a_fleet(nodes), small, "{nodes} nodes");
    }
}

#[test]
fn endpoint_change_cost_independent_of_services() {
    let few = one_change(1_000);
    for services in [10_000, 50_000] {
        let many = one_change(services);
        println!("one endpoint change: {few:?} at 1,000 services, {many:?} at {services}");
        assert!(many < few * 5, "{few:?} at 1,000 services, {many:?} at {services}");
    }
}
