//! Duration of commits by number of Services. The bounds are wide: they detect a cost that grows with the cluster, not
//! a slow machine. `--nocapture` prints the figures; `SCALE_SERVICES=50000` measures more of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::*;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::Dataplane;
use switchtower_node_agent::kernel::nft::Nft;
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

/// CPU time of this thread: a transaction is handled inside `send()`, and others share the machine.
fn cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure outlives the call.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time of one commit.
fn commit(nft: &mut Nft, changes: &[KernelChange]) -> Duration {
    let before = cpu();
    let committed = nft.commit(changes, stamp(1)).unwrap();
    assert_eq!(committed.refused, vec![]);
    cpu() - before
}

/// Realistic pool sizes, many small and few large: Pareto with exponent 1.2, 1 to 400.
fn pareto(services: u32) -> Vec<u32> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let size = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = ((state >> 33) as f64 + 1.0) / f64::from(1u32 << 31);
        (uniform.powf(-1.0 / 1.2) as u32).min(400)
    };
    (0..services).map(size).collect()
}

fn mixed_endpoint(service: u32, number: u32) -> String {
    format!("10.{}.{}.{}:{}", 128 + (service >> 8) % 100, service & 255, number % 200, 8000 + number / 200)
}

fn service_address(number: u32) -> String {
    format!("10.{}.{}.{}", 96 + (number >> 16), number >> 8 & 255, number & 255)
}

fn mixed(sizes: &[u32]) -> Vec<KernelChange> {
    let mut view = facts();
    for (number, size) in (0..).zip(sizes) {
        let endpoints: Vec<String> = (0..*size).map(|index| mixed_endpoint(number, index)).collect();
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        view.extend(service(&format!("service-{number}"), &service_address(number), &endpoints));
    }
    view
}

#[derive(Debug)]
#[allow(dead_code, reason = "printed")]
struct Mixed {
    endpoints: u32,
    load: Duration,
    /// Of adding and removing one endpoint, for Services of every size.
    half: Duration,
    worst: Duration,
    /// The same of the largest Services.
    largest_half: Duration,
    largest_worst: Duration,
    after_flush: Duration,
}

fn measure_mixed(services: u32) -> Mixed {
    let node = Namespace::new("mixed");
    let mut nft = node.run(|| Nft::open().unwrap());
    let sizes = pareto(services);
    let load = commit(&mut nft, &mixed(&sizes));
    let mut order: Vec<u32> = (0..services).collect();
    order.sort_unstable_by_key(|number| sizes[*number as usize]);
    let mut one_more = |numbers: &[u32]| {
        let mut times = Vec::new();
        for number in numbers {
            let name = format!("service-{number}");
            // Always a size that the pool did not have before, over a class where there is one.
            let more: Vec<String> = (0..3).map(|index| mixed_endpoint(*number, 1000 + index)).collect();
            for endpoint in &more {
                times.push(commit(&mut nft, &[pool(&name, Role::Cluster, &[endpoint], &[])]));
            }
            for endpoint in &more {
                times.push(commit(&mut nft, &[pool(&name, Role::Cluster, &[], &[endpoint])]));
            }
        }
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() - 1])
    };
    let spread: Vec<u32> = (0..80).map(|step| order[step * order.len() / 80]).collect();
    let (half, worst) = one_more(&spread);
    let (largest_half, largest_worst) = one_more(&order[order.len() - 80..]);
    node.nft(&["flush", "ruleset"], "");
    let before = cpu();
    assert!(nft.repair().unwrap().differences > 0);
    let after_flush = cpu() - before;
    Mixed { endpoints: sizes.iter().sum(), load, half, worst, largest_half, largest_worst, after_flush }
}

#[test]
fn one_endpoint_costs_the_same_at_every_size() {
    let services = std::env::var("SCALE_SERVICES").ok().and_then(|text| text.parse().ok());
    let small = measure_mixed(1000);
    let large = measure_mixed(services.unwrap_or(10_000));
    println!("1,000 services: {small:?}\nlarge: {large:?}");
    for half in [large.half, large.largest_half] {
        assert!(half < small.half * 4 + Duration::from_millis(1), "{small:?} {large:?}");
    }
    // No commit's cost grows with the cluster.
    assert!(large.worst.max(large.largest_worst) < Duration::from_millis(10), "{large:?}");
}

/// CPU time of `count` Services with `alter`ed frontends, and of one endpoint of another Service after that.
fn measure_altered(count: u32, alter: impl Fn(u32, &mut switchtower_proto::v1::Frontend)) -> [Duration; 2] {
    let node = Namespace::new("altered");
    let mut nft = node.run(|| Nft::open().unwrap());
    commit(&mut nft, &view(1000));
    let mut changes = Vec::new();
    for number in 0..count {
        let name = format!("altered-{number}");
        let mut frontend = load_balancer(&name, &format!("198.51.{}.{}", number >> 8, number & 255));
        alter(number, &mut frontend);
        changes.push(pool(&name, Role::Cluster, &PODS, &[]));
        changes.push(KernelChange::Frontend(frontend));
    }
    let load = commit(&mut nft, &changes);
    let one = [mixed_endpoint(1, 2000)];
    let one: Vec<&str> = one.iter().map(String::as_str).collect();
    let mut times: Vec<Duration> = (0..50)
        .map(|round| {
            let (added, removed): (&[&str], &[&str]) = if round % 2 == 0 { (&one, &[]) } else { (&[], &one) };
            commit(&mut nft, &[pool("service-1", Role::Cluster, added, removed)])
        })
        .collect();
    times.sort_unstable();
    [load, times[times.len() / 2]]
}

#[test]
fn large_load_split_into_transactions() {
    let node = Namespace::new("parts");
    let mut nft = node.run(|| Nft::open().unwrap());
    // As at the start of an agent: the tables are known to be absent.
    let view = mixed(&pareto(20_000));
    let before = nft.ruleset_generation().unwrap();
    let committed = nft.adopt(&view, stamp(7)).unwrap().committed.unwrap();
    let transactions = nft.ruleset_generation().unwrap() - before;
    println!("{} operations in {transactions} transactions, {:?}", committed.operations, committed.commit);
    assert!(transactions > 3, "{transactions} transactions");
    assert_eq!(nft.stamp().unwrap(), Some(stamp(7)));
    assert_eq!(nft.repair().unwrap().differences, 0);
    assert!(node.run(|| Nft::open().unwrap()).adopt(&view, stamp(7)).unwrap().committed.is_none());
}

#[test]
fn affinity_timeouts_do_not_slow_other_services() {
    let [load, one] = measure_altered(3000, |number, frontend| frontend.affinity_seconds = 1 + number * 28);
    println!("3,000 affinity timeouts: load {load:?}, then one endpoint of another Service {one:?}");
    assert!(load < Duration::from_secs(2) && one < Duration::from_millis(5), "{load:?} {one:?}");
}

#[test]
fn source_ranges_cost_grows_linearly() {
    let range =
        |number: u32, index: u32| cidr(&format!("{}.{}.{}.0/28", 20 + number, index >> 8, index & 255));
    // The same total of 40,000: one list per Service, and one list for all.
    let own = measure_altered(40, |number, frontend| {
        frontend.source_ranges = (0..1000).map(|index| range(number, index)).collect();
    });
    let shared = measure_altered(40, |_, frontend| {
        frontend.source_ranges = (0..1000).map(|index| range(0, index)).collect();
    });
    let small = measure_altered(2000, |number, frontend| {
        frontend.source_ranges = (0..20).map(|index| range(number % 200, index + number / 200)).collect();
    });
    println!("40 x 1,000 own ranges {own:?}, shared {shared:?}; 2,000 x 20 own ranges {small:?}");
    for [load, one] in [own, shared, small] {
        assert!(load < Duration::from_secs(4) && one < Duration::from_millis(5), "{load:?} {one:?}");
    }
}
