//! Deterministic simulation of the protocol: the compiler and the layers of the controller, and the state machine of the
//! agents, under a seeded scheduler with virtual time. Connections, sessions and the commit loop are small models of the
//! real ones; kernels are in memory.
//!
//! One number replays a run:
//!
//! ```sh
//! SWITCHTOWER_SEED=7 cargo test -p switchtower-node-agent --test simulation
//! SWITCHTOWER_SEEDS=1000000 cargo test --release -p switchtower-node-agent --test simulation
//! ```
//!
//! `SWITCHTOWER_FIRST_SEED` continues where an earlier run ended.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where a property is violated")]
#![allow(clippy::print_stdout, reason = "the numbers of faults")]
#![allow(unreachable_pub, reason = "modules of one test program")]

mod agent;
mod budget;
mod cluster;
mod controller;
mod history;
mod kernel;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use world::World;

/// Number of seeds of an ordinary run.
const SEEDS: u64 = 1_000;
/// Seeds beyond these that found a defect, the last one in the simulation itself.
const FOUND: [u64; 3] = [7_170, 341_998, 950_355];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Runs a seed; returns the violated property.
fn run(seed: u64, verbose: bool) -> Result<world::Counts, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, verbose).run())).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}

#[test]
fn properties_hold_under_every_schedule() {
    if let Some(seed) = number("SWITCHTOWER_SEED") {
        run(seed, true).unwrap();
        return;
    }
    for seed in FOUND {
        run(seed, false).unwrap();
    }
    let seeds = number("SWITCHTOWER_SEEDS").unwrap_or(SEEDS);
    let first = number("SWITCHTOWER_FIRST_SEED").unwrap_or_default();
    let (next, failed) = (AtomicU64::new(first), AtomicU64::new(u64::MAX));
    let mut total = world::Counts::default();
    std::thread::scope(|scope| {
        let work = || {
            let mut counts = world::Counts::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= (first + seeds).min(failed.load(Ordering::Relaxed)) {
                    return counts;
                }
                match run(seed, false) {
                    Ok(more) => counts.add(&more),
                    Err(_) => drop(failed.fetch_min(seed, Ordering::Relaxed)),
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| total.add(&thread.join().unwrap()));
    });
    let failed = failed.into_inner();
    assert_eq!(failed, u64::MAX, "replay with SWITCHTOWER_SEED={failed}");
    println!("{seeds} seeds: {total:?}");
    // Every fault and every outcome occurs.
    assert!(total.least() > 0 || seeds < 100, "{total:?}");
}
