//! Resident memory of compiler and layers while endpoints change.
//!
//! `cargo run --release -p switchtower-core --example memory_curve -- [NODES] [CHANGES-PER-NODE]`; defaults: 500 and 10,000.
//! Each node has ten pods. A change replaces one pod of one node; its Service has two more endpoints elsewhere. Every
//! node takes and acknowledges an update after each round of one change per node.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a program that prints its figures")]

use std::net::IpAddr;
use std::sync::Arc;

use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Cursor, HealthCheckPlacement, Layers, LogLimits, Planned, Subscription};
use switchtower_core::model::*;
use switchtower_proto::v1::{Protocol, Source};

const PODS: u32 = 10;

fn address(first: u8, number: u32) -> IpAddr {
    let [_, b, c, d] = number.to_be_bytes();
    IpAddr::from([first, b, c, d])
}

fn object(number: u32) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: format!("s{number}").into() }
}

fn service(number: u32) -> Service {
    Service {
        key: object(number),
        uid: format!("u{number}").into(),
        created: i64::from(number),
        cluster_ips: vec![address(10, number)],
        ports: vec![ServicePortSpec { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        ..Service::default()
    }
}

/// Service `number` has a pod on three nodes; that of the first one has its address from `round`.
fn slice(number: u32, nodes: u32, round: u32) -> EndpointSlice {
    let pod = |index: u32| SliceEndpoint {
        address: if index == 0 {
            address(20 + (round % 97) as u8, number)
        } else {
            address(10 + index as u8, number)
        },
        ready: true,
        serving: true,
        terminating: false,
        node: Some(format!("n{}", (number + index * 7) % nodes).into()),
        pod: None,
        zones: Box::default(),
        nodes: Box::default(),
    };
    EndpointSlice {
        key: object(number),
        service: object(number).name,
        ipv6: false,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (0..3).map(pod).collect(),
    }
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u32>().expect("a number"));
    let nodes = arguments.next().unwrap_or(500);
    let rounds = arguments.next().unwrap_or(10_000);
    let services = nodes * PODS / 3;
    let (mut compiler, mut layers) = (Compiler::new(), Layers::new(LogLimits::default()));
    for number in 0..nodes {
        compiler.apply(Input::Node(Node {
            name: format!("n{number}").into(),
            addresses: vec![address(192, number)],
            pod_cidrs: vec!["10.244.0.0/24".parse().expect("a CIDR")],
            zone: None,
            eligible: true,
        }));
    }
    for number in 0..services {
        compiler.apply(Input::Service(service(number)));
        compiler.apply(Input::Slice(slice(number, nodes, 0)));
    }
    let publish = |compiler: &mut Compiler, layers: &mut Layers| {
        let compiled = compiler.compile();
        layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default());
    };
    publish(&mut compiler, &mut layers);
    let mut agents: Vec<(Subscription, Cursor)> = (0..nodes)
        .map(|number| {
            let node: Arc<str> = format!("n{number}").into();
            let health_checks = HealthCheckPlacement::Shared;
            let subscription =
                Subscription { node, zone: None, settings: ("builtin".into(), 0), health_checks };
            let cursor = layers.head(&subscription);
            (subscription, cursor)
        })
        .collect();
    println!("{nodes} nodes, {services} Services with three endpoints");
    println!("{:>16}  {:>12}  {:>11}", "changes per node", "resident MiB", "log entries");
    let step = (rounds / 20).max(1);
    for round in 1..=rounds {
        for change in 0..nodes {
            compiler.apply(Input::Slice(slice((round * 7 + change) % services, nodes, round)));
            publish(&mut compiler, &mut layers);
        }
        for (subscription, cursor) in &mut agents {
            if let Planned::Update(plan) = layers.plan(subscription, Some(cursor)) {
                *cursor = plan.after;
            }
        }
        if round % step == 0 || round == 1 {
            println!("{round:>16}  {:>12.1}  {:>11}", resident() as f64 / 1024.0, layers.log_entries());
        }
    }
}
