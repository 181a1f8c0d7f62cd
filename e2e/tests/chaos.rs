//! Every fault on the real API server and kernels, under continuous traffic.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::time::{Duration, Instant};

use serde_json::json;
use switchtower_e2e::chaos::{self, Extent, Outcome, table};
use switchtower_e2e::lab::refusing_proxy::RefusingProxy;
use switchtower_e2e::probe::Transport;
use switchtower_e2e::scene::{self, Scene, answered_by, cluster_ip};
use switchtower_e2e::switchtower::{Fleet, FleetNode};

/// Time within which a row reports that the kernel is stale, with the interval of the readings.
const TRUTH: Duration = Duration::from_millis(10_500);
/// Time until a row expires whose replica cannot write it.
const EXPIRY: Duration = Duration::from_secs(31);

const SETTLED: Duration = Duration::from_secs(60);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// `make chaos` sets `SWITCHTOWER_CHAOS_ROUNDS` and may set `SWITCHTOWER_CHAOS_SEED`.
#[test]
fn faults_lose_no_connection_and_rows_report_the_truth() {
    let fleet = Fleet::start_linked(&scene::nodes()).unwrap();
    let fleet: &'static Fleet = Box::leak(Box::new(fleet));
    let (seed, rounds) = (number("SWITCHTOWER_CHAOS_SEED").unwrap_or(1), number("SWITCHTOWER_CHAOS_ROUNDS"));
    let extent = if rounds.is_some() { Extent::Complete } else { Extent::Short };
    let outcomes = chaos::run(fleet, seed, rounds.unwrap_or(1), extent).unwrap();
    println!("{}", table::table(&outcomes));
    let is_bad = |outcome: &&Outcome| {
        let limit = if outcome.fault.prevents_rows() { EXPIRY } else { TRUTH };
        outcome.lost > 0 || outcome.untrue > limit
    };
    let bad: Vec<_> = outcomes.iter().filter(is_bad).collect();
    assert!(bad.is_empty(), "seed {seed}: {bad:#?}");
}

/// Overload and faults of the API server: it answers 429, 500 and 503 to all new requests of the controller.
#[test]
fn api_server_that_refuses_for_a_minute_affects_no_packet_or_stream() {
    let fleet: &'static Fleet = Box::leak(Box::new(Fleet::build(&scene::nodes()).unwrap()));
    let proxy = RefusingProxy::start(fleet.control_plane()).unwrap();
    fleet.set_api_server(proxy.url());
    fleet.start_all().unwrap();
    let scene = Scene::of(fleet, "refused");
    let to = cluster_ip(&scene.service("web", &json!({})), false);
    scene.endpoints("web", &["a1"]);
    answered_by("at first", scene.pod("c2"), Transport::Tcp, to, &["a1"]);
    fleet.settled(SETTLED).unwrap();
    let logged = fleet.controller_log().lines().count();
    let session = |node: &FleetNode| fleet.row(&node.net.name).unwrap().connection.unwrap().session;
    let sessions: Vec<_> = fleet.nodes().iter().map(session).collect();

    proxy.refuse(true);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        answered_by("meanwhile", scene.pod("c2"), Transport::Tcp, to, &["a1"]);
        std::thread::sleep(Duration::from_secs(1));
    }
    scene.endpoints("web", &["b1"]);
    let refused = proxy.refused();
    let lines = fleet.controller_log().lines().count() - logged;
    proxy.refuse(false);
    answered_by("afterwards", scene.pod("c2"), Transport::Tcp, to, &["b1"]);
    fleet.settled(SETTLED).unwrap();
    let after: Vec<_> = fleet.nodes().iter().map(session).collect();
    assert_eq!(after, sessions, "no stream ended");
    // Retries back off, and repeated failures are logged once.
    assert!((20..1_500).contains(&refused), "{refused} requests in a minute");
    assert!(lines < 200, "{lines} lines in a minute");
    println!("{refused} requests were refused, {lines} lines were logged");
}
