//! The cost of an endpoint change does not depend on the size of the cluster.

#![allow(clippy::panic, clippy::unwrap_used, clippy::print_stdout, reason = "a test that prints its figures")]

mod common;

use std::time::{Duration, Instant};

use common::{address, cluster, service, slice};
use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Applied, HealthCheckPlacement, Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::*;
use switchtower_proto::v1::Source;

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

/// Compiles what is pending, and applies it to the layers.
fn publish(compiler: &mut Compiler, layers: &mut Layers) -> Applied {
    let compiled = compiler.compile();
    layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default())
}

/// Layers touched, log entries added and bytes sent by one endpoint change.
fn one_change_in_a_fleet(nodes: u32) -> (usize, usize, usize) {
    let mut compiler = cluster(nodes, 200);
    let mut layers = Layers::new(LogLimits::default());
    publish(&mut compiler, &mut layers);
    let health_checks = HealthCheckPlacement::Shared;
    let node = Subscription { node: "n5".into(), zone: None, settings: ("builtin".into(), 0), health_checks };
    let (before, entries) = (layers.head(&node), layers.log_entries());
    compiler.apply(Input::Slice(slice(100, 1)));
    let applied = publish(&mut compiler, &mut layers);
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

/// Layers touched by one more LoadBalancer with a health check node port and endpoints on two nodes, log entries added,
/// and the shortest time of compiling and applying it.
fn one_health_check_in_a_fleet(nodes: u32) -> (usize, usize, Duration) {
    let mut compiler = cluster(nodes, 200);
    let mut layers = Layers::new(LogLimits::default());
    publish(&mut compiler, &mut layers);
    let mut cost = (0, 0, Duration::MAX);
    for number in 300..340 {
        let balancer = Service {
            load_balancer_ips: vec![address(198, number)],
            external_policy: TrafficPolicy::Local,
            health_check_port: Some(30_000 + number as u16),
            ..service(number)
        };
        let mut endpoints = slice(number, 0);
        endpoints.endpoints[0].node = Some("n1".into());
        let entries = layers.log_entries();
        let start = Instant::now();
        compiler.apply(Input::Service(balancer));
        compiler.apply(Input::Slice(endpoints));
        let applied = publish(&mut compiler, &mut layers);
        let taken = start.elapsed();
        cost = (applied.touched.len(), layers.log_entries() - entries, cost.2.min(taken));
    }
    cost
}

#[test]
fn health_check_port_touches_only_nodes_with_endpoints() {
    let (layers, entries, small) = one_health_check_in_a_fleet(100);
    assert_eq!((layers, entries), (4, 4), "CLUSTER, HEALTH_CHECKS and the nodes of the endpoints");
    for nodes in [1_000, 5_000] {
        let (layers, entries, taken) = one_health_check_in_a_fleet(nodes);
        println!("one health check node port: {small:?} at 100 nodes, {taken:?} at {nodes}");
        assert_eq!((layers, entries), (4, 4), "{nodes} nodes");
        assert!(taken < Duration::from_millis(2), "{taken:?} at {nodes} nodes");
    }
}
