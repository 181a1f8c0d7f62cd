//! How long commits take, by number of Services. The bounds are wide: they catch a cost that grows with the
//! cluster, not a slow machine. `--nocapture` prints the figures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::*;
use switchtower_node_agent::dataplane::Dataplane;
use switchtower_node_agent::kernel_change::KernelChange;
use switchtower_node_agent::nft::Nft;
use switchtower_proto::v1::Role;

fn endpoints(service: u32) -> [String; 3] {
    [1u32, 2, 3].map(|number| format!("10.{}.{}.{number}:8080", 128 + (service >> 8) % 100, service & 255))
}

fn view(services: u32) -> Vec<KernelChange> {
    let mut view = facts();
    for number in 0..services {
        let endpoints = endpoints(number);
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        let address = format!("10.{}.{}.{}", 96 + (number >> 16), number >> 8 & 255, number & 255);
        view.extend(service(&format!("service-{number}"), &address, &endpoints));
    }
    view
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[derive(Debug)]
#[allow(dead_code, reason = "printed")]
struct Figures {
    load: Duration,
    load_kernel: Duration,
    half: Duration,
    ninety_nine: Duration,
    mirror: usize,
}

fn measure(services: u32) -> Figures {
    let node = Namespace::new("scale");
    let mut nft = node.run(|| Nft::open().unwrap());
    let view = view(services);
    let before = resident();
    let started = Instant::now();
    let committed = nft.commit(&view, stamp(1)).unwrap();
    let load = started.elapsed();
    assert_eq!(committed.refused, vec![]);
    let mirror = resident().saturating_sub(before);
    let mut times: Vec<Duration> = Vec::new();
    for round in 0..400u32 {
        let number = round / 2 * 7919 % services;
        let endpoint = endpoints(number)[1].clone();
        let one = [endpoint.as_str()];
        let (added, removed): (&[&str], &[&str]) = if round % 2 == 0 { (&[], &one) } else { (&one, &[]) };
        let change = [pool(&format!("service-{number}"), Role::Cluster, added, removed)];
        let started = Instant::now();
        let committed = nft.commit(&change, stamp(u64::from(round) + 2)).unwrap();
        times.push(started.elapsed());
        assert!(committed.operations < 20, "{committed:?}");
    }
    times.sort_unstable();
    let (half, ninety_nine) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    Figures { load, load_kernel: committed.commit, half, ninety_nine, mirror }
}

#[test]
fn one_endpoint_costs_the_same_in_a_large_cluster() {
    let small = measure(1000);
    let large = measure(10_000);
    println!("1,000 services: {small:?}\n10,000 services: {large:?}");
    assert!(large.half < small.half * 4 + Duration::from_millis(2), "{small:?} {large:?}");
    assert!(large.half < Duration::from_millis(20), "{large:?}");
}
