//! Upper bounds on memory allocations: deterministic, unlike times, so that a regression of the hot paths fails a test
//! on any machine.

#![allow(clippy::panic, clippy::unwrap_used, clippy::print_stdout, reason = "a test that prints its figures")]

mod common;

use allocation_counter::{AllocationInfo, measure};
use common::slice;
use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Cursor, HealthCheckPlacement, Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::*;
use switchtower_core::propagation::{Change, Limits, Publication, TraceContext, Tracker};
use switchtower_proto::v1::Source;

/// Allocations of a call on this thread.
fn allocations<T>(call: impl FnOnce() -> T) -> (AllocationInfo, T) {
    let mut result = None;
    let cost = measure(|| result = Some(call()));
    (cost, result.unwrap())
}

/// A compiled cluster of 100 nodes.
struct Cluster {
    compiler: Compiler,
    layers: Layers,
}

impl Cluster {
    fn new(services: u32) -> Self {
        let compiler = common::cluster(100, services);
        let mut cluster = Self { compiler, layers: Layers::new(LogLimits::default()) };
        cluster.publish();
        cluster
    }

    fn publish(&mut self) {
        let compiled = self.compiler.compile();
        self.layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default());
    }

    fn change(&mut self, number: u32, round: u32) {
        self.compiler.apply(Input::Slice(slice(number, round)));
        self.publish();
    }

    fn plan(&self, node: &Subscription, from: &Cursor) -> Planned {
        self.layers.plan(node, Some(from))
    }
}

fn node(number: u32) -> Subscription {
    Subscription {
        node: format!("n{number}").into(),
        zone: None,
        settings: ("builtin".into(), 0),
        health_checks: HealthCheckPlacement::Shared,
    }
}

#[test]
fn compile_of_a_change_allocates_the_same_at_any_size() {
    let measure = |services| {
        let mut cluster = Cluster::new(services);
        // Buffers reach their size.
        (1..=64).for_each(|round| cluster.change(services / 2, round));
        // Sometimes a map or a log grows: the minimum is the cost of the change.
        (65..=80)
            .map(|round| allocations(|| cluster.change(services / 2, round)).0.count_total)
            .min()
            .unwrap()
    };
    let (few, many) = (measure(1_000), measure(4_000));
    println!("compile and apply: {few} allocations at 1,000 services, {many} at 4,000");
    assert!(many <= few + few / 4, "{few} allocations at 1,000 services, {many} at 4,000");
    assert!(few <= 150, "{few} allocations");
}

#[test]
fn plan_of_an_update_allocates_little_at_any_size() {
    for services in [1_000, 4_000] {
        let mut cluster = Cluster::new(services);
        let before: Vec<Cursor> = (0..100).map(|number| cluster.layers.head(&node(number))).collect();
        (1..=50).for_each(|round| cluster.change(round * 7, round));
        // Joins the changes for all nodes.
        cluster.plan(&node(0), &before[0]);
        for number in 1..100 {
            let node = node(number);
            let (cost, planned) = allocations(|| cluster.plan(&node, &before[number as usize]));
            let Planned::Update(plan) = planned else { panic!("nothing to send") };
            let sent: usize = plan.parts.iter().map(|part| part.payload.len()).sum();
            assert!(sent > 1_000, "{sent} bytes sent");
            assert!(cost.count_total <= 16, "{cost:?} for node {number} at {services} services");
            assert!(cost.bytes_total <= 2_048, "{cost:?}: the bytes of an update are shared");
        }
    }
}

#[test]
fn acknowledgement_allocates_little_in_any_fleet() {
    for nodes in [100, 5_000] {
        let mut tracker = Tracker::new(Limits::default());
        let slots: Vec<_> = (0..nodes).map(|number| tracker.join(format!("n{number}").into(), 0)).collect();
        let change = Change {
            id: 1,
            object: "Service default/s1".into(),
            service: None,
            received: 1,
            triggered: None,
            trace: TraceContext { trace: 1, span: 1, sampled: false },
            origin: None,
        };
        let publication = Publication { changes: vec![change], total: 1, ..Publication::default() };
        tracker.publish(1, publication, &slots);
        for slot in &slots {
            let cost = allocations(|| tracker.reached(*slot, 1, 5, None)).0;
            assert!(cost.count_total <= 16, "{cost:?} in a fleet of {nodes}");
        }
    }
}
