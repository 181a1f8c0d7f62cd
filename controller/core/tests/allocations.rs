//! Upper bounds on memory allocations: deterministic, unlike times, so that a regression of the hot paths fails a test
//! on any machine.

#![allow(clippy::panic, clippy::unwrap_used, clippy::print_stdout, reason = "a test that prints its figures")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::IpAddr;

use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Cursor, Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::*;
use switchtower_core::propagation::{Change, Limits, Publication, TraceContext, Tracker};
use switchtower_proto::v1::{Protocol, Source};

/// The system's allocator, with counters for each thread.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

fn note(bytes: usize) {
    COUNT.set(COUNT.get() + 1);
    BYTES.set(BYTES.get() + bytes);
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's contract is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size.saturating_sub(layout.size()));
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of a call on this thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Allocations {
    count: usize,
    bytes: usize,
}

fn allocations<T>(call: impl FnOnce() -> T) -> (Allocations, T) {
    let (count, bytes) = (COUNT.get(), BYTES.get());
    let result = call();
    (Allocations { count: COUNT.get() - count, bytes: BYTES.get() - bytes }, result)
}

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

/// A compiled cluster of 100 nodes.
struct Cluster {
    compiler: Compiler,
    layers: Layers,
}

impl Cluster {
    fn new(services: u32) -> Self {
        let mut compiler = Compiler::new();
        for number in 0..100 {
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
    Subscription { node: format!("n{number}").into(), zone: None, settings: ("builtin".into(), 0) }
}

#[test]
fn compile_of_a_change_allocates_the_same_at_any_size() {
    let measure = |services| {
        let mut cluster = Cluster::new(services);
        // Buffers reach their size.
        (1..=64).for_each(|round| cluster.change(services / 2, round));
        // Sometimes a map or a log grows: the minimum is the cost of the change.
        (65..=80).map(|round| allocations(|| cluster.change(services / 2, round)).0.count).min().unwrap()
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
            assert!(cost.count <= 16, "{cost:?} for node {number} at {services} services");
            assert!(cost.bytes <= 2_048, "{cost:?}: the bytes of an update are shared");
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
            assert!(cost.count <= 16, "{cost:?} in a fleet of {nodes}");
        }
    }
}
