//! New connections while endpoints change at full speed: none fails, none leaves without NAT.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::Dataplane;
use switchtower_node_agent::kernel::nft::Nft;
use switchtower_proto::v1::{self as proto, Role};

/// Duration of the test.
const DURATION: Duration = Duration::from_secs(5);
/// Minimum number of connections and of changes for a conclusion; an emulated machine needs minutes for them.
const ENOUGH: usize = 500;
const TIMEOUT: Duration = Duration::from_secs(300);

#[test]
fn connections_succeed_with_nat_while_endpoints_churn() {
    let lab = Lab::new();
    // The client would answer packets to these addresses that leave the node without NAT.
    run(&["ip", "-n", &lab.client.0, "addr", "add", "10.96.0.10/32", "dev", "lo"], "");
    run(&["ip", "-n", &lab.client.0, "addr", "add", "fd96::10/128", "dev", "lo", "nodad"], "");
    serve(&lab.client, "leaked", 80);
    for namespace in lab.pods.iter().chain([&lab.client]) {
        run(&["ip", "netns", "exec", &namespace.0, "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1"], "");
    }
    let mut nft = lab.node.run(|| Nft::open().unwrap());
    let mut view = facts();
    for (pods, address) in [(&PODS, "10.96.0.10"), (&PODS6, "fd96::10")] {
        view.push(pool("web", Role::Cluster, pods, &[]));
        view.push(KernelChange::Frontend(cluster_ip("web", address)));
        view.push(pool("sticky", Role::Cluster, pods, &[]));
        let address = address.replace("10.96.0.10", "10.96.0.20").replace("fd96::10", "fd96::20");
        let sticky = cluster_ip("sticky", &address);
        view.push(KernelChange::Frontend(proto::Frontend { affinity_seconds: 1, ..sticky }));
    }
    nft.commit(&view, stamp(1)).unwrap();
    let (done, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let commits = std::thread::scope(|scope| {
        for (pod, to) in [(0, "10.96.0.10:80"), (1, "[fd96::10]:80"), (2, "10.96.0.20:80")] {
            let (lab, done, asked) = (&lab, &done, &asked);
            scope.spawn(move || {
                let to = to.parse().unwrap();
                lab.pods[pod].run(|| {
                    while !done.load(Ordering::Relaxed) {
                        let answer = ask(None, to).unwrap_or_else(|error| {
                            panic!("{to} after {} connections: {error}", asked.load(Ordering::Relaxed))
                        });
                        assert!(answer.starts_with("pod"), "left the node without NAT: {answer}");
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
        }
        let started = Instant::now();
        let mut commits = 0;
        let enough = |commits| commits > ENOUGH && asked.load(Ordering::Relaxed) > ENOUGH;
        while started.elapsed() < DURATION || !(enough(commits) || started.elapsed() > TIMEOUT) {
            // One of three endpoints is removed and added again; the size changes with it.
            let index = commits / 2 % 3;
            let change = |name: &str, pods: &[&str; 3]| {
                let one = [pods[index]];
                let (added, removed): (&[&str], &[&str]) =
                    if commits % 2 == 0 { (&[], &one) } else { (&one, &[]) };
                pool(name, Role::Cluster, added, removed)
            };
            let changes = [change("web", &PODS), change("web", &PODS6), change("sticky", &PODS)];
            nft.commit(&changes, stamp(commits as u64 + 2)).unwrap();
            commits += 1;
        }
        done.store(true, Ordering::Relaxed);
        commits
    });
    let asked = asked.load(Ordering::Relaxed);
    println!("{asked} connections, {commits} commits");
    assert!(asked > ENOUGH && commits > ENOUGH, "{asked} connections, {commits} commits");
    assert_eq!(nft.repair().unwrap().differences, 0);
}
