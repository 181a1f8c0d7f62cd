//! Latency of a small Service while a maximal one flaps.
//!
//! `cargo run --release -p switchtower-core --example flapping_service -- [SECONDS]`; default: 30 for each shape.
//! One thread plays the controller's engine: it compiles all pending changes, applies it to the layers and plans the update
//! of one node. One endpoint of the maximal Service changes as soon as the engine has compiled the previous change, and
//! a small Service changes 50 times per second. The latency of a change is from its arrival to the planned update.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a program that prints its figures")]

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use switchtower_core::compile::{Compiler, Limits};
use switchtower_core::layer::{HealthCheckPlacement, Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::*;
use switchtower_proto::v1::{Protocol, Source};

/// Interval between two changes of the small Service.
const INTERVAL: Duration = Duration::from_millis(20);
/// Endpoints of one EndpointSlice, as the API server's controller fills it.
const SLICE: u32 = 100;

fn address(first: u8, number: u32) -> IpAddr {
    let [_, b, c, d] = number.to_be_bytes();
    IpAddr::from([first, b, c, d])
}

fn key(name: &str) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: name.into() }
}

fn service(name: &str, ports: u32) -> Service {
    let port = |number: u32| ServicePortSpec {
        name: format!("p{number}").into(),
        protocol: Protocol::Tcp,
        port: 1_000 + number as u16,
        node_port: None,
    };
    Service {
        key: key(name),
        uid: name.into(),
        cluster_ips: vec![address(10, name.len() as u32)],
        ports: (0..ports).map(port).collect(),
        ..Service::default()
    }
}

/// Slice `index` of a Service; the first endpoint depends on `round`.
fn slice(name: &str, index: u32, endpoints: u32, ports: u32, round: u32) -> EndpointSlice {
    let endpoint = |number: u32| SliceEndpoint {
        address: address(11 + if number == 0 { (round % 2) as u8 } else { 0 }, index * SLICE + number),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(format!("n{}", number % 100).into()),
        pod: None,
        zones: Box::default(),
        nodes: Box::default(),
    };
    let port = |number: u32| SlicePort {
        name: format!("p{number}").into(),
        protocol: Protocol::Tcp,
        port: 1_000 + number as u16,
    };
    EndpointSlice {
        key: key(&format!("{name}-{index}")),
        service: key(name).name,
        ipv6: false,
        ports: (0..ports).map(port).collect(),
        endpoints: (0..endpoints).map(endpoint).collect(),
    }
}

enum Change {
    Small(Instant, EndpointSlice),
    Large(EndpointSlice),
}

/// Shape of the maximal Service.
#[derive(Clone, Copy)]
struct Shape {
    ports: u32,
    endpoints: u32,
}

struct Engine {
    compiler: Compiler,
    layers: Layers,
    node: Subscription,
}

impl Engine {
    fn new(shape: Option<Shape>) -> Self {
        let mut compiler = Compiler::new();
        for number in 0..100 {
            compiler.apply(Input::Node(Node {
                name: format!("n{number}").into(),
                addresses: vec![address(192, number)],
                pod_cidrs: vec!["10.244.0.0/24".parse().expect("a CIDR")],
                zone: None,
                eligible: true,
            }));
        }
        compiler.apply(Input::Service(service("small", 1)));
        compiler.apply(Input::Slice(slice("small", 0, 3, 1, 0)));
        if let Some(Shape { ports, endpoints }) = shape {
            compiler.apply(Input::Service(service("large", ports)));
            for index in 0..endpoints.div_ceil(SLICE) {
                let of_slice = SLICE.min(endpoints - index * SLICE);
                compiler.apply(Input::Slice(slice("large", index, of_slice, ports, 0)));
            }
        }
        let health_checks = HealthCheckPlacement::Shared;
        let node =
            Subscription { node: "n1".into(), zone: None, settings: ("builtin".into(), 0), health_checks };
        let mut engine = Self { compiler, layers: Layers::new(LogLimits::default()), node };
        engine.publish();
        engine
    }

    fn publish(&mut self) {
        let compiled = self.compiler.compile();
        self.layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default());
    }

    fn step(&mut self) {
        let before = self.layers.head(&self.node);
        self.publish();
        let planned = self.layers.plan(&self.node, Some(&before));
        assert!(!matches!(planned, Planned::Compress(_)), "the log covers one change");
    }
}

/// Latencies of the small Service's changes, and the number of changes of the maximal one.
fn measure(shape: Option<Shape>, duration: Duration) -> (Vec<Duration>, u32) {
    let mut engine = Engine::new(shape);
    let (sender, receiver) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let small = std::thread::spawn({
        let (sender, stop) = (sender.clone(), stop.clone());
        move || {
            for round in 1.. {
                std::thread::sleep(INTERVAL);
                let change = Change::Small(Instant::now(), slice("small", 0, 3, 1, round));
                if stop.load(Ordering::Relaxed) || sender.send(change).is_err() {
                    return;
                }
            }
        }
    });
    let end = Instant::now() + duration;
    let (mut latencies, mut flaps) = (Vec::new(), 0);
    while Instant::now() < end {
        if let Some(Shape { ports, endpoints }) = shape {
            flaps += 1;
            let change = Change::Large(slice("large", 0, SLICE.min(endpoints), ports, flaps));
            sender.send(change).expect("the receiver exists");
        }
        let first = receiver.recv().expect("the sender exists");
        let mut arrived = Vec::new();
        for change in std::iter::once(first).chain(receiver.try_iter()) {
            match change {
                Change::Small(at, slice) => {
                    arrived.push(at);
                    engine.compiler.apply(Input::Slice(slice));
                }
                Change::Large(slice) => _ = engine.compiler.apply(Input::Slice(slice)),
            }
        }
        engine.step();
        latencies.extend(arrived.iter().map(Instant::elapsed));
    }
    stop.store(true, Ordering::Relaxed);
    drop(receiver);
    small.join().expect("the thread ended");
    latencies.sort_unstable();
    (latencies, flaps)
}

fn main() {
    let seconds = std::env::args().nth(1).map_or(30, |text| text.parse().expect("a number"));
    let bound = Limits::default().service;
    let (endpoints, frontends) = (bound.endpoints as u32, bound.frontends as u32);
    let shapes = [
        ("no other Service", None),
        ("one port, all endpoints", Some(Shape { ports: 1, endpoints })),
        ("all ports", Some(Shape { ports: frontends, endpoints: endpoints / frontends })),
    ];
    println!(
        "{:<26}  {:>9}  {:>9}  {:>9}  {:>9}",
        "maximal Service", "flaps/s", "p50 ms", "p99 ms", "max ms"
    );
    for (name, shape) in shapes {
        let (latencies, flaps) = measure(shape, Duration::from_secs(seconds));
        let at = |share: f64| {
            let index = ((latencies.len() as f64 * share) as usize).min(latencies.len().saturating_sub(1));
            latencies.get(index).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1_000.0)
        };
        let rate = f64::from(flaps) / seconds as f64;
        println!("{name:<26}  {rate:>9.1}  {:>9.2}  {:>9.2}  {:>9.2}", at(0.5), at(0.99), at(1.0));
    }
}
