//! Micro-benchmarks of the agent, with allocations: `make bench PART=micro`. Commits go to the kernel, in a network
//! namespace, and need root.
//!
//! Each Service has three endpoints. The costs of one endpoint change must not grow with the number of Services.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark ends at the first error")]
#![allow(missing_docs, reason = "names of benchmarks")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Namespace, facts, pool, service, stamp};
use divan::Bencher;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::Dataplane as _;
use switchtower_node_agent::kernel::nft::Nft;
use switchtower_node_agent::state::{Applied, State};
use switchtower_node_agent_testing::fleet::Fleet;
use switchtower_proto::v1::{Part, Role, Update, UpdateEnd};

#[global_allocator]
static ALLOCATOR: divan::AllocProfiler = divan::AllocProfiler::system();

const SERVICES: [u32; 3] = [1_000, 10_000, 50_000];

fn main() {
    divan::main();
}

fn take(state: &mut State, (update, parts): &(Update, Vec<Part>)) -> Applied {
    state.begin(update).unwrap();
    parts.iter().for_each(|part| state.part(part).unwrap());
    state.end(&UpdateEnd { to: update.to }, Instant::now()).unwrap()
}

#[divan::bench(args = SERVICES, sample_count = 5)]
fn take_snapshot(bencher: Bencher<'_, '_>, services: u32) {
    let snapshot = Fleet::new(services, 3).snapshot();
    bencher.with_inputs(State::new).bench_local_values(|mut state| {
        take(&mut state, &snapshot);
        state
    });
}

#[divan::bench(args = SERVICES)]
fn take_one_endpoint(bencher: Bencher<'_, '_>, services: u32) {
    let mut fleet = Fleet::new(services, 3);
    let mut state = State::new();
    take(&mut state, &fleet.snapshot());
    let mut number = 0;
    let mut next = || {
        number += 1;
        fleet.add_endpoint(number * 97 % services, 3 + number / services)
    };
    bencher.with_inputs(&mut next).bench_local_values(|update| take(&mut state, &update));
}

fn view(services: u32) -> Vec<KernelChange> {
    let mut view = facts();
    for number in 0..services {
        let [_, a, b, c] = number.to_be_bytes();
        let endpoints = [1, 2, 3].map(|pod| format!("10.{}.{b}.{c}:{}", 128 + a, 8_000 + pod));
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        view.extend(service(&format!("service-{number}"), &format!("10.{}.{b}.{c}", 96 + a), &endpoints));
    }
    view
}

#[divan::bench(args = SERVICES, sample_count = 3, sample_size = 1)]
fn commit_everything(bencher: Bencher<'_, '_>, services: u32) {
    let view = view(services);
    let node = || {
        let node = Namespace::new("bench");
        let nft = node.run(|| Nft::open().unwrap());
        (node, nft)
    };
    bencher.with_inputs(node).bench_local_values(|(node, mut nft)| {
        nft.commit(&view, stamp(1)).unwrap();
        (node, nft)
    });
}

#[divan::bench(args = SERVICES)]
fn commit_one_endpoint(bencher: Bencher<'_, '_>, services: u32) {
    let node = Namespace::new("bench");
    let mut nft = node.run(|| Nft::open().unwrap());
    nft.commit(&view(services), stamp(1)).unwrap();
    let mut generation = 1;
    bencher.bench_local(|| {
        generation += 1;
        let endpoint = ["10.250.1.1:80"];
        let (added, removed): (&[&str], &[&str]) =
            if generation % 2 == 0 { (&endpoint, &[]) } else { (&[], &endpoint) };
        nft.commit(&[pool("service-7", Role::Cluster, added, removed)], stamp(generation)).unwrap()
    });
}
