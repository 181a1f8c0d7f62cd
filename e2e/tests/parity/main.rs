//! The scenarios of kube-proxy's conformance, one test each, and random clusters: both proxies must treat the same
//! packets equally. docs/parity.md lists the scenarios.
//!
//! All tests share one control plane and two laboratories, one after another. Each state is probed from five origins,
//! at every address of every Service, and any difference from the real kube-proxy fails. In addition, each test
//! asserts the expected results of its scenario.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something it needs is missing"
)]

mod affinity_and_flows;
mod differences;
mod endpoints;
mod health;
mod outside;
mod reachability;
mod settings;
mod support;

use switchtower_e2e::parity::{Verdict, explain, generate, run, shrink};

#[test]
fn random_clusters_and_changes_agree_with_kube_proxy() {
    let mut world = support::world();
    // The program `differential` runs more cases and other seeds.
    let (seed, cases) = generate::TESTED;
    for number in 0..cases {
        let case = generate::case(seed, number);
        if let Verdict::Disagreement(found) = run(&mut world, &case).unwrap() {
            let smallest = shrink(&mut world, *found, 20).unwrap();
            panic!("{}", explain(&smallest));
        }
    }
}
