//! Real packets through the programmed tables: a node, three pods and a client in network namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::sync::Barrier;

use common::*;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::Dataplane;
use switchtower_node_agent::kernel::nft::Nft;
use switchtower_proto::v1::{self as proto, Role};

/// Opens the dataplane in the laboratory's node and commits `view`.
fn program(lab: &Lab, view: &[KernelChange]) -> Nft {
    let mut nft = lab.node.run(|| Nft::open().unwrap());
    let mut changes = facts();
    changes.extend_from_slice(view);
    let committed = nft.commit(&changes, stamp(1)).unwrap();
    assert_eq!(committed.refused, vec![]);
    nft
}

fn backends(from: &Namespace, to: &str, tries: usize) -> BTreeSet<String> {
    (0..tries).map(|_| from.ask(to).unwrap().split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn cluster_ip_balances_and_masquerades_only_outside_clients() {
    let lab = Lab::new();
    let mut view = service("web", "10.96.0.10", &PODS);
    view.push(pool("web", Role::Cluster, &PODS6, &[]));
    view.push(KernelChange::Frontend(cluster_ip("web", "fd96::10")));
    let _nft = program(&lab, &view);
    for (vip, pod) in [("10.96.0.10:80", "10.244.0.1"), ("[fd96::10]:80", "fd44::1")] {
        assert_eq!(backends(&lab.pods[0], vip, 40).len(), 3, "spread over all pods");
        assert_eq!(backends(&lab.node, vip, 40).len(), 3, "from the host too");
        assert_eq!(backends(&lab.client, vip, 40).len(), 3, "and from outside");
        // A pod keeps its address, except in connections to itself.
        for _ in 0..20 {
            let answer = lab.pods[0].ask(vip).unwrap();
            let (name, source) = answer.split_once(' ').unwrap();
            assert_eq!(source == pod, name != "pod1", "{answer}");
        }
        let answer = lab.client.ask(vip).unwrap();
        assert!(answer.ends_with("10.244.0.254") || answer.ends_with("fd44::fe"), "{answer}");
    }
}

#[test]
fn affinity_expires_and_survives_loss_of_the_backend() {
    let lab = Lab::new();
    let sticky = |address: &str| proto::Frontend { affinity_seconds: 2, ..cluster_ip("web", address) };
    let view = [
        pool("web", Role::Cluster, &PODS, &[]),
        pool("web", Role::Cluster, &PODS6, &[]),
        KernelChange::Frontend(sticky("10.96.0.10")),
        KernelChange::Frontend(sticky("10.96.0.11")),
        KernelChange::Frontend(sticky("fd96::10")),
    ];
    let mut nft = program(&lab, &view);
    for (number, vip) in [(2, "10.96.0.10:80"), (3, "[fd96::10]:80")] {
        let chosen = backends(&lab.client, vip, 20);
        assert_eq!(chosen.len(), 1, "one backend while connections follow each other: {chosen:?}");
        let chosen = chosen.into_iter().next().unwrap();
        if number == 2 {
            // Affinity belongs to the service port, not to one of its addresses.
            assert_eq!(backends(&lab.client, "10.96.0.11:80", 10), BTreeSet::from([chosen.clone()]));
        }
        let index = chosen.trim_start_matches("pod").parse::<usize>().unwrap() - 1;
        let gone = if number == 2 { PODS[index] } else { PODS6[index] };
        nft.commit(&[pool("web", Role::Cluster, &[], &[gone])], stamp(number)).unwrap();
        let next = backends(&lab.client, vip, 20);
        assert_eq!(next.len(), 1, "a new backend, and then always that one: {next:?}");
        assert!(!next.contains(&chosen), "not the one that is gone");
        // After expiry, other backends are chosen at times.
        eventually("another backend after the timeout", || {
            std::thread::sleep(std::time::Duration::from_millis(2200));
            backends(&lab.client, vip, 1) != next
        });
    }
}

#[test]
fn client_keeps_its_backend_when_the_timeout_changes() {
    let lab = Lab::new();
    let sticky = |seconds| proto::Frontend { affinity_seconds: seconds, ..cluster_ip("web", "10.96.0.10") };
    let view = [pool("web", Role::Cluster, &PODS, &[]), KernelChange::Frontend(sticky(10_800))];
    let mut nft = program(&lab, &view);
    let chosen = backends(&lab.client, "10.96.0.10:80", 3);
    assert_eq!(chosen.len(), 1);
    for (number, seconds) in (2..).zip([300, 600, 61, 86_400, 10_800]) {
        nft.commit(&[KernelChange::Frontend(sticky(seconds))], stamp(number)).unwrap();
        assert_eq!(backends(&lab.client, "10.96.0.10:80", 3), chosen, "{seconds} s");
    }
}

#[test]
fn every_endpoint_of_a_large_pool_gets_its_share() {
    const ENDPOINTS: u16 = 21;
    const CONNECTIONS: usize = 2100;
    let lab = Lab::new();
    let endpoints: Vec<String> = (0..ENDPOINTS)
        .map(|number| {
            serve(&lab.pods[0], &format!("endpoint{number}"), 9000 + number);
            format!("10.244.0.1:{}", 9000 + number)
        })
        .collect();
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let sticky = proto::Frontend { affinity_seconds: 1, ..cluster_ip("web-sticky", "10.96.0.11") };
    let view = [
        pool("web", Role::Cluster, &endpoints, &[]),
        pool("web-sticky", Role::Cluster, &endpoints, &[]),
        KernelChange::Frontend(cluster_ip("web", "10.96.0.10")),
        KernelChange::Frontend(sticky),
    ];
    let _nft = program(&lab, &view);
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..CONNECTIONS {
        let answer = lab.client.ask("10.96.0.10:80").unwrap();
        *shares.entry(answer.split(' ').next().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(shares.len(), usize::from(ENDPOINTS), "{shares:?}");
    // 100 each; one in a million runs is off by five standard deviations.
    assert!(shares.values().all(|share| (50..150).contains(share)), "{shares:?}");
    assert_eq!(backends(&lab.client, "10.96.0.11:80", 5).len(), 1, "affinity finds its size too");
}

/// Connections that a client opens simultaneously find no remembered backend, and each chooses one: the first that is
/// remembered applies to all.
#[test]
fn simultaneous_first_connections_reach_one_backend() {
    const CLIENTS: u8 = 40;
    const CONNECTIONS: usize = 12;
    let lab = Lab::new();
    let view = [
        pool("web", Role::Cluster, &PODS, &[]),
        KernelChange::Frontend(proto::Frontend { affinity_seconds: 60, ..cluster_ip("web", "10.96.0.10") }),
    ];
    let _nft = program(&lab, &view);
    let lines: String =
        (0..CLIENTS).map(|number| format!("addr add 192.0.2.{}/24 dev eth0\n", 100 + number)).collect();
    run(&["ip", "-n", &lab.client.0, "-batch", "-"], &lines);
    for number in 0..CLIENTS {
        let address: IpAddr = [192, 0, 2, 100 + number].into();
        let answers: Vec<_> = lab.client.run(|| {
            let start = Barrier::new(CONNECTIONS);
            std::thread::scope(|scope| {
                let connect = || {
                    start.wait();
                    ask(Some(address), "10.96.0.10:80".parse().unwrap()).unwrap()
                };
                let threads: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(connect)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            })
        });
        let backends: BTreeSet<_> = answers.iter().map(|answer| answer.split(' ').next().unwrap()).collect();
        assert_eq!(backends.len(), 1, "client {address} met {backends:?}");
    }
}

#[test]
fn external_policy_local_keeps_client_and_short_circuits_pods() {
    let lab = Lab::new();
    let view = [
        pool("web", Role::Cluster, &PODS, &[]),
        pool("web", Role::Local, &PODS[..1], &[]),
        pool("web", Role::Cluster, &PODS6, &[]),
        pool("web", Role::Local, &PODS6[..1], &[]),
        pool("far", Role::Cluster, &PODS, &[]),
        pool("web-sticky", Role::Cluster, &PODS, &[]),
        pool("web-sticky", Role::Local, &PODS[..1], &[]),
        KernelChange::Frontend(load_balancer_local("web", "198.51.100.1")),
        KernelChange::Frontend(load_balancer_local("web", "2001:db8:5::1")),
        KernelChange::Frontend(load_balancer_local("far", "198.51.100.2")),
        KernelChange::Frontend(proto::Frontend {
            affinity_seconds: 60,
            ..load_balancer_local("web-sticky", "198.51.100.3")
        }),
    ];
    let _nft = program(&lab, &view);
    for (vip, client, bridge) in
        [("198.51.100.1:80", "192.0.2.2", "10.244.0.254"), ("[2001:db8:5::1]:80", "2001:db8::2", "fd44::fe")]
    {
        for _ in 0..10 {
            let answer = lab.client.ask_from(Some(client), vip).unwrap();
            assert_eq!(
                answer,
                format!("pod1 {client}"),
                "only the local endpoint, with the client's address"
            );
        }
        assert_eq!(backends(&lab.pods[1], vip, 40).len(), 3, "a local pod uses all endpoints");
        let answers: BTreeSet<String> = (0..40).map(|_| lab.node.ask(vip).unwrap()).collect();
        assert_eq!(answers.len(), 3, "a host process uses all endpoints");
        assert!(answers.iter().all(|answer| answer.ends_with(bridge)), "{answers:?}");
    }
    let pods: BTreeSet<String> = (0..20).map(|_| lab.pods[1].ask("198.51.100.1:80").unwrap()).collect();
    assert!(pods.contains("pod1 10.244.0.2") || pods.contains("pod3 10.244.0.2"), "no masquerade: {pods:?}");
    // No local endpoint: dropped from outside, served inside.
    assert_eq!(lab.client.ask("198.51.100.2:80"), Err("timeout".to_owned()));
    assert!(lab.pods[0].ask("198.51.100.2:80").is_ok());
    assert!(lab.node.ask("198.51.100.2:80").is_ok());
    // With affinity too.
    assert_eq!(backends(&lab.client, "198.51.100.3:80", 10), BTreeSet::from(["pod1".to_owned()]));
    assert_eq!(backends(&lab.pods[1], "198.51.100.3:80", 20).len(), 1);
}

#[test]
fn connections_without_endpoints_refused_or_dropped() {
    let lab = Lab::new();
    let drop = target(Role::Local, proto::Verdict::Drop);
    let view = [
        KernelChange::Frontend(cluster_ip("empty", "10.96.0.30")),
        KernelChange::Frontend(cluster_ip("empty", "fd96::30")),
        KernelChange::Frontend(load_balancer("empty", "198.51.100.9")),
        KernelChange::Frontend(node_port("empty", proto::Family::Ipv4, 30009)),
        KernelChange::Frontend(udp(cluster_ip("empty-udp", "10.96.0.30"))),
        KernelChange::Frontend(proto::Frontend {
            outside: drop,
            inside: drop,
            ..cluster_ip("local", "10.96.0.31")
        }),
        pool("local", Role::Cluster, &PODS, &[]),
    ];
    let mut nft = program(&lab, &view);
    for from in [&lab.client, &lab.pods[0], &lab.node] {
        for to in ["10.96.0.30:80", "[fd96::30]:80", "198.51.100.9:80", "192.0.2.1:30009", "10.96.0.30:81"] {
            let started = std::time::Instant::now();
            assert_eq!(from.ask(to), Err("refused".to_owned()), "{to}");
            // An ICMPv6 error that arrives while connect() holds the socket is only recorded: the answer to the
            // second SYN ends the connection.
            let limit = if to.starts_with('[') { 1400 } else { 500 };
            assert!(started.elapsed().as_millis() < limit, "{to} at once: {:?}", started.elapsed());
        }
        // A host process gets EPERM from send(), as with kube-proxy.
        let error = from.ask_udp("10.96.0.30:80").unwrap_err();
        assert!(error.contains("Refused") || error.contains("not permitted"), "{error}");
        assert_eq!(from.ask("10.96.0.31:80"), Err("timeout".to_owned()), "no local endpoint: dropped");
    }
    assert_eq!(lab.pods[0].ask("10.96.99.99:80"), Err("timeout".to_owned()), "no Service: dropped");
    // With endpoints, connections succeed.
    nft.commit(&[pool("empty", Role::Cluster, &PODS, &[])], stamp(2)).unwrap();
    assert!(lab.client.ask("10.96.0.30:80").is_ok());
    assert!(lab.client.ask("198.51.100.9:80").is_ok());
}

#[test]
fn source_ranges_admit_only_listed_clients() {
    let lab = Lab::new();
    let ranges = |frontend: proto::Frontend, ranges: &[&str]| proto::Frontend {
        source_ranges: ranges.iter().map(|range| cidr(range)).collect(),
        ..frontend
    };
    let view = [
        pool("web", Role::Cluster, &PODS, &[]),
        pool("web", Role::Cluster, &PODS6, &[]),
        pool("web", Role::Local, &PODS[..1], &[]),
        KernelChange::Frontend(ranges(
            load_balancer("web", "198.51.100.1"),
            &["192.0.2.3/32", "10.0.0.0/8", "10.9.0.0/16"],
        )),
        KernelChange::Frontend(ranges(
            load_balancer("web", "2001:db8:5::1"),
            &["2001:db8::3/128", "192.0.2.0/24"],
        )),
        KernelChange::Frontend(ranges(load_balancer("web", "2001:db8:5::2"), &["192.0.2.0/24"])),
        KernelChange::Frontend(ranges(load_balancer_local("web", "198.51.100.2"), &["192.0.2.3/32"])),
        KernelChange::Frontend(ranges(load_balancer("empty", "198.51.100.4"), &["192.0.2.3/32"])),
    ];
    let _nft = program(&lab, &view);
    let timeout = Err("timeout".to_owned());
    assert_eq!(lab.client.ask_from(Some("192.0.2.2"), "198.51.100.1:80"), timeout);
    assert!(lab.client.ask_from(Some("192.0.2.3"), "198.51.100.1:80").is_ok());
    assert!(lab.pods[0].ask("198.51.100.1:80").is_ok(), "10.0.0.0/8 contains the pods");
    assert_eq!(lab.client.ask_from(Some("2001:db8::2"), "[2001:db8:5::1]:80"), timeout);
    assert!(lab.client.ask_from(Some("2001:db8::3"), "[2001:db8:5::1]:80").is_ok());
    assert!(lab.client.ask("[2001:db8:5::2]:80").is_ok(), "ranges of the other family only: not filtered");
    assert_eq!(lab.client.ask_from(Some("192.0.2.2"), "198.51.100.2:80"), timeout);
    let answer = lab.client.ask_from(Some("192.0.2.3"), "198.51.100.2:80");
    assert_eq!(answer, Ok("pod1 192.0.2.3".to_owned()), "and policy Local holds for those admitted");
    assert_eq!(lab.client.ask_from(Some("192.0.2.2"), "198.51.100.4:80"), timeout);
    assert_eq!(lab.client.ask_from(Some("192.0.2.3"), "198.51.100.4:80"), Err("refused".to_owned()));
}

#[test]
fn node_ports_follow_settings_and_yield_to_explicit_frontends() {
    let lab = Lab::new();
    let explicit = {
        let mut frontend = load_balancer("other", "192.0.2.1");
        frontend.kind = proto::FrontendKind::ExternalIp as i32;
        frontend.key.as_mut().unwrap().port = 30080;
        frontend
    };
    let view = [
        pool("web", Role::Cluster, &PODS[..1], &[]),
        pool("web", Role::Cluster, &PODS6[..1], &[]),
        pool("other", Role::Cluster, &PODS[1..2], &[]),
        KernelChange::HostAddresses(vec!["192.0.2.1".parse().unwrap(), "10.244.0.254".parse().unwrap()]),
        KernelChange::Frontend(node_port("web", proto::Family::Ipv4, 30080)),
        KernelChange::Frontend(node_port("web", proto::Family::Ipv6, 30080)),
    ];
    let mut nft = program(&lab, &view);
    let name =
        |answer: Result<String, String>| answer.map(|answer| answer.split(' ').next().unwrap().to_owned());
    let (pod1, pod2) = (Ok("pod1".to_owned()), Ok("pod2".to_owned()));
    let refused = Err("refused".to_owned());
    assert_eq!(name(lab.client.ask("192.0.2.1:30080")), pod1);
    assert_eq!(name(lab.client.ask("[2001:db8::1]:30080")), pod1);
    assert_eq!(name(lab.node.ask("192.0.2.1:30080")), pod1);
    assert_eq!(name(lab.pods[0].ask("10.244.0.254:30080")), refused, "not the primary address");
    // All addresses.
    let all = proto::Settings { node_port_addresses: vec![cidr("0.0.0.0/0")], ..settings() };
    nft.commit(&[KernelChange::Settings(all)], stamp(2)).unwrap();
    assert_eq!(name(lab.pods[0].ask("10.244.0.254:30080")), pod1);
    assert_eq!(name(lab.client.ask("192.0.2.1:30080")), pod1);
    // An explicit frontend with the same key takes precedence; the NodePort is restored when it is removed.
    nft.commit(&[KernelChange::Frontend(explicit.clone())], stamp(3)).unwrap();
    assert_eq!(name(lab.client.ask("192.0.2.1:30080")), pod2);
    nft.commit(&[KernelChange::FrontendRemoved(explicit.key.unwrap())], stamp(4)).unwrap();
    assert_eq!(name(lab.client.ask("192.0.2.1:30080")), pod1);
    // Back to the primary one.
    nft.commit(&[KernelChange::Settings(settings())], stamp(5)).unwrap();
    assert_eq!(name(lab.pods[0].ask("10.244.0.254:30080")), refused);
}

#[test]
fn local_detection_settings_decide_masquerading() {
    let lab = Lab::new();
    let mut view = service("web", "10.96.0.10", &PODS);
    view.extend([
        udp_pool("dns", Role::Cluster, &PODS[1..2], &[]),
        KernelChange::Frontend(udp(cluster_ip("dns", "10.96.0.53"))),
    ]);
    let mut nft = program(&lab, &view);
    assert_eq!(lab.pods[0].ask_udp("10.96.0.53:80"), Ok("pod2 10.244.0.1".to_owned()));
    assert!(lab.client.ask_udp("10.96.0.53:80").unwrap().starts_with("pod2 10.244.0.254"));
    let from_pod = |lab: &Lab| {
        let answers = (0..40).map(|_| lab.pods[0].ask("10.96.0.10:80").unwrap());
        let others: BTreeSet<String> = answers.filter(|answer| !answer.starts_with("pod1")).collect();
        others.iter().all(|answer| answer.ends_with("10.244.0.1"))
    };
    let detection = |mode: proto::LocalDetection, interface: &str| proto::Settings {
        local_detection: mode as i32,
        interface: interface.to_owned(),
        ..settings()
    };
    let mut generation = 1;
    let mut set = |settings: proto::Settings| {
        generation += 1;
        nft.commit(&[KernelChange::Settings(settings)], stamp(generation)).unwrap();
    };
    assert!(from_pod(&lab));
    set(proto::Settings { masquerade_all: true, ..settings() });
    assert!(!from_pod(&lab), "masquerade_all");
    set(detection(proto::LocalDetection::BridgeInterface, "br0"));
    assert!(from_pod(&lab), "through the bridge");
    set(detection(proto::LocalDetection::InterfaceNamePrefix, "b"));
    assert!(from_pod(&lab), "through an interface with the prefix");
    set(detection(proto::LocalDetection::BridgeInterface, "br1"));
    assert!(!from_pod(&lab), "not through that interface");
    set(detection(proto::LocalDetection::None, ""));
    assert!(from_pod(&lab), "no detection: nothing is masqueraded");
    assert!(lab.client.ask_from(Some("192.0.2.2"), "10.96.0.10:80").unwrap().ends_with("192.0.2.2"));
    set(proto::Settings { masquerade_mark: 0x8000, ..detection(proto::LocalDetection::ClusterCidr, "") });
    assert!(from_pod(&lab), "no CIDR: no detection");
}

/// Outcome of one request by TCP or UDP.
fn outcome(from: &Namespace, protocol: proto::Protocol, to: &str) -> &'static str {
    let answer = match protocol {
        proto::Protocol::Udp => from.ask_udp(to),
        _ => from.ask(to),
    };
    match answer {
        Ok(_) => "answer",
        Err(error) if error.contains("efused") => "refused",
        Err(error) if error.contains("not permitted") => "not permitted",
        Err(error) if error.contains("timeout") || error.contains("WouldBlock") => "silence",
        Err(error) => panic!("{to}: {error}"),
    }
}

/// Frontends without an endpoint, for TCP and UDP.
fn without_endpoints(both_families: bool) -> Vec<KernelChange> {
    let mut frontends = vec![
        cluster_ip("empty", "10.96.0.30"),
        load_balancer("empty", "198.51.100.9"),
        node_port("empty", proto::Family::Ipv4, 30009),
    ];
    if both_families {
        frontends.extend([
            cluster_ip("empty", "fd96::30"),
            load_balancer("empty", "2001:db8:5::9"),
            node_port("empty", proto::Family::Ipv6, 30009),
        ]);
    }
    let both = frontends.into_iter().flat_map(|frontend| [frontend.clone(), udp(frontend)]);
    both.map(KernelChange::Frontend).collect()
}

/// The errors are those of kube-proxy in nftables mode: it refuses connections to ClusterIPs and external addresses
/// in the output hook, where a datagram's send() fails, and those to node ports in the input hook, where it does not.
#[test]
fn errors_without_endpoints_equal_kube_proxys() {
    use proto::Protocol::{Tcp, Udp};
    let lab = Lab::new();
    let _nft = program(&lab, &without_endpoints(true));
    let served = ["10.96.0.30:80", "198.51.100.9:80", "[fd96::30]:80", "[2001:db8:5::9]:80"];
    let node_ports = ["192.0.2.1:30009", "[2001:db8::1]:30009"];
    for to in served {
        assert_eq!(outcome(&lab.node, Tcp, to), "refused", "{to} from the host");
        assert_eq!(outcome(&lab.node, Udp, to), "not permitted", "{to} from the host");
    }
    for to in node_ports {
        assert_eq!(outcome(&lab.node, Tcp, to), "refused", "{to} from the host");
        assert_eq!(outcome(&lab.node, Udp, to), "refused", "{to} from the host");
    }
    for from in [&lab.pods[0], &lab.client] {
        for to in served.into_iter().chain(node_ports) {
            assert_eq!(outcome(from, Tcp, to), "refused", "{to}");
            assert_eq!(outcome(from, Udp, to), "refused", "{to}");
        }
    }
    // A pod of another node, which reaches this node with its own address.
    let lines = "addr add 10.245.0.2/32 dev eth0\nroute add 192.0.2.1/32 dev eth0 src 10.245.0.2\n\
         route add 10.96.0.0/16 via 192.0.2.1 src 10.245.0.2\n\
         route add 198.51.100.0/24 via 192.0.2.1 src 10.245.0.2\n";
    run(&["ip", "-n", &lab.client.0, "-batch", "-"], lines);
    run(&["ip", "-n", &lab.node.0, "route", "add", "10.245.0.2", "dev", "eth0"], "");
    for to in ["10.96.0.30:80", "198.51.100.9:80", "192.0.2.1:30009"] {
        assert_eq!(outcome(&lab.client, Tcp, to), "refused", "{to} from another node's pod");
        assert_eq!(outcome(&lab.client, Udp, to), "refused", "{to} from another node's pod");
    }
    // A ClusterIP's other ports, and unused addresses of the Service range.
    for (from, own) in [(&lab.pods[0], "refused"), (&lab.client, "refused"), (&lab.node, "not permitted")] {
        assert_eq!(outcome(from, Tcp, "10.96.0.30:81"), "refused");
        assert_eq!(outcome(from, Udp, "10.96.0.30:81"), own);
        assert_eq!(outcome(from, Tcp, "10.96.99.99:80"), "silence");
    }
    assert_eq!(outcome(&lab.node, Udp, "10.96.99.99:80"), "not permitted");
}

/// The packet would leave the node for the default router, which is the client here.
#[test]
fn endpoint_in_the_service_range_not_sent_out() {
    use proto::Protocol::{Tcp, Udp};
    let lab = Lab::new();
    let mut view = service("web", "10.96.0.10", &PODS);
    for (name, address, endpoint) in [
        ("alias", "10.96.0.40", "10.96.0.10:80"),
        ("itself", "10.96.0.41", "10.96.0.41:80"),
        ("nowhere", "10.96.0.42", "10.96.99.99:80"),
    ] {
        view.extend([
            pool(name, Role::Cluster, &[endpoint], &[]),
            udp_pool(name, Role::Cluster, &[endpoint], &[]),
            KernelChange::Frontend(cluster_ip(name, address)),
            KernelChange::Frontend(udp(cluster_ip(name, address))),
        ]);
    }
    view.push(KernelChange::Frontend(node_port("alias", proto::Family::Ipv4, 30040)));
    let _nft = program(&lab, &view);
    for (from, own) in [(&lab.pods[0], "refused"), (&lab.client, "refused"), (&lab.node, "not permitted")] {
        for alias in ["10.96.0.40:80", "10.96.0.41:80"] {
            assert_eq!(outcome(from, Tcp, alias), "refused", "{alias}");
            assert_eq!(outcome(from, Udp, alias), own, "{alias}");
        }
        assert_eq!(outcome(from, Tcp, "192.0.2.1:30040"), "refused");
        assert_eq!(outcome(from, Tcp, "10.96.0.42:80"), "silence");
        assert_eq!(outcome(from, Tcp, "10.96.0.10:80"), "answer", "the Service itself");
    }
}

/// Counts first packets that leave the node with a priority, in a table of the test.
const COUNT_PRIORITIES: &str = "
table inet priorities {
    chain count {
        type filter hook postrouting priority 300
        udp dport 8080 meta priority 6 counter comment \"kept\"
        udp dport 8080 meta priority 0 counter comment \"none\"
        udp dport 8080 counter comment \"all\"
    }
}";

/// Number of packets at the rule with this comment.
fn counted(lab: &Lab, comment: &str) -> u32 {
    let text = lab.node.nft(&["list", "table", "inet", "priorities"], "");
    let line = text.lines().find(|line| line.contains(comment)).unwrap();
    line.split_whitespace().skip_while(|word| *word != "packets").nth(1).unwrap().parse().unwrap()
}

/// Sends one datagram with a socket option set.
fn send_with(from: &Namespace, to: &str, level: i32, option: i32, value: i32) {
    let to: std::net::SocketAddr = to.parse().unwrap();
    from.run(move || {
        let socket = std::net::UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        let length = std::mem::size_of::<i32>() as u32;
        // SAFETY: the value outlives the call and its length is right.
        let set =
            unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
        assert_eq!(set, 0);
        socket.send_to(b"?", to).unwrap();
    });
}

#[test]
fn packets_keep_their_priority() {
    let lab = Lab::new();
    let mut view = service("web", "10.96.0.10", &PODS);
    view.extend([
        udp_pool("dns", Role::Cluster, &PODS[..1], &[]),
        udp_pool("dns", Role::Cluster, &PODS6[..1], &[]),
        KernelChange::Frontend(udp(cluster_ip("dns", "10.96.0.53"))),
        KernelChange::Frontend(udp(cluster_ip("dns", "fd96::53"))),
    ]);
    let _nft = program(&lab, &view);
    let cases: [(&Namespace, &str, i32, i32, i32, &str); 8] = [
        // No Service: the priority of the sender, or of the type of service, is kept.
        (&lab.node, "10.244.0.2:8080", libc::SOL_SOCKET, libc::SO_PRIORITY, 6, "kept"),
        (&lab.node, "[fd44::2]:8080", libc::SOL_SOCKET, libc::SO_PRIORITY, 6, "kept"),
        (&lab.client, "10.244.0.2:8080", libc::IPPROTO_IP, libc::IP_TOS, 0x10, "kept"),
        (&lab.client, "[fd44::2]:8080", libc::SOL_SOCKET, libc::SO_PRIORITY, 0, "none"),
        // A Service: no scratch value of the rules is left in the priority.
        (&lab.node, "10.96.0.53:80", libc::SOL_SOCKET, libc::SO_PRIORITY, 6, "none"),
        (&lab.node, "[fd96::53]:80", libc::SOL_SOCKET, libc::SO_PRIORITY, 6, "none"),
        (&lab.client, "10.96.0.53:80", libc::IPPROTO_IP, libc::IP_TOS, 0x10, "kept"),
        (&lab.client, "[fd96::53]:80", libc::SOL_SOCKET, libc::SO_PRIORITY, 0, "none"),
    ];
    for (from, to, level, option, value, expected) in cases {
        lab.node.nft(&["-f", "-"], COUNT_PRIORITIES);
        send_with(from, to, level, option, value);
        eventually("the packet passes", || counted(&lab, "\"all\"") == 1);
        assert_eq!(counted(&lab, expected), 1, "{to} from {}", from.0);
        lab.node.nft(&["delete", "table", "inet", "priorities"], "");
    }
    // Another program's masquerade comes first: our postrouting chain is not evaluated.
    lab.node.nft(
        &["-f", "-"],
        "table inet foreign {
            chain first {
                type nat hook postrouting priority 90
                udp dport 8080 masquerade
            }
        }",
    );
    for to in ["10.96.0.53:80", "[fd96::53]:80"] {
        lab.node.nft(&["-f", "-"], COUNT_PRIORITIES);
        send_with(&lab.node, to, libc::SOL_SOCKET, libc::SO_PRIORITY, 6);
        eventually("the packet passes", || counted(&lab, "\"all\"") == 1);
        assert_eq!(counted(&lab, "none"), 1, "{to}");
        lab.node.nft(&["delete", "table", "inet", "priorities"], "");
    }
}
