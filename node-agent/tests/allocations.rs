//! Upper bounds on memory allocations: deterministic, unlike times, so that a regression of the hot paths fails a test
//! on any machine.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test that prints its figures")]

mod common;

use std::time::Instant;

use allocation_counter::measure;
use common::{Namespace, facts, pool, service, stamp};
use switchtower_node_agent::kernel::dataplane::Dataplane as _;
use switchtower_node_agent::kernel::nft::Nft;
use switchtower_node_agent::state::State;
use switchtower_node_agent_testing::fleet::Fleet;
use switchtower_proto::v1::{Part, Role, Update, UpdateEnd};

/// Rounds, of which the cheapest counts: sometimes a map grows.
const ROUNDS: u32 = 16;

fn take(state: &mut State, (update, parts): &(Update, Vec<Part>)) {
    state.begin(update).unwrap();
    parts.iter().for_each(|part| state.part(part).unwrap());
    state.end(&UpdateEnd { to: update.to }, Instant::now()).unwrap();
}

/// Allocations of one endpoint's update in a view of this size.
fn update(services: u32) -> u64 {
    let mut fleet = Fleet::new(services, 3);
    let mut state = State::new();
    take(&mut state, &fleet.snapshot());
    let one = |round| {
        let update = fleet.add_endpoint(round * 7, 3);
        measure(|| take(&mut state, &update)).count_total
    };
    (0..ROUNDS).map(one).min().unwrap()
}

/// Allocations of one endpoint's commit with this many Services in the kernel.
fn commit(services: u32) -> u64 {
    let node = Namespace::new("allocations");
    let mut nft = node.run(|| Nft::open().unwrap());
    let mut view = facts();
    for number in 0..services {
        let [_, _, a, b] = number.to_be_bytes();
        view.extend(service(
            &format!("s{number}"),
            &format!("10.96.{a}.{b}"),
            &[&format!("10.128.{a}.{b}:80")],
        ));
    }
    nft.commit(&view, stamp(1)).unwrap();
    let one = |round: u32| {
        let endpoint = ["10.250.1.1:80"];
        let (added, removed): (&[&str], &[&str]) =
            if round.is_multiple_of(2) { (&endpoint, &[]) } else { (&[], &endpoint) };
        let change = [pool("s7", Role::Cluster, added, removed)];
        measure(|| _ = nft.commit(&change, stamp(u64::from(round) + 2)).unwrap()).count_total
    };
    (0..ROUNDS).map(one).min().unwrap()
}

#[test]
fn update_of_an_endpoint_allocates_the_same_at_any_size() {
    let (few, many) = (update(1_000), update(8_000));
    println!("one endpoint's update: {few} allocations at 1,000 services, {many} at 8,000");
    assert!(few <= 40 && many <= few + few / 4, "{few} allocations at 1,000 services, {many} at 8,000");
}

#[test]
fn commit_of_an_endpoint_allocates_the_same_at_any_size() {
    let (few, many) = (commit(500), commit(4_000));
    println!("one endpoint's commit: {few} allocations at 500 services, {many} at 4,000");
    assert!(few <= 70 && many <= few + few / 4, "{few} allocations at 500 services, {many} at 4,000");
}
