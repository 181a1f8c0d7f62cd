//! Connection tracking: the real agent with a million entries, UDP flows from before the rules, and segments outside
//! of the window. Needs root and the tool `conntrack`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use common::process::programmed;
use common::{Lab, Namespace, segment};
use switchtower_node_agent_testing::controller::block_on;
use switchtower_node_agent_testing::fleet::{self, Fleet};
use switchtower_proto::digest::ItemRef;
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::*;

fn shell(line: &str) -> String {
    common::run(&["sh", "-c", line], "")
}

/// The machine-wide limit on connections, raised until the value is dropped.
struct Limit(u64);

const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

impl Limit {
    fn raise(to: u64) -> Self {
        let before = std::fs::read_to_string(LIMIT).unwrap().trim().parse().unwrap();
        if before < to {
            std::fs::write(LIMIT, to.to_string()).unwrap();
        }
        Limit(before)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        let _ = std::fs::write(LIMIT, self.0.to_string());
    }
}

/// UDP flows of other destinations, and of the Service to each of two backends.
const OTHERS: usize = 1_000_000;
const EACH: usize = 1_000;

/// Lines for `conntrack -R`.
fn flows(count: usize, client: u8, destination: &str, port: u16, backend: &str, backend_port: u16) -> String {
    let mut lines = String::new();
    for number in 0..count {
        let [_, b, c, d] = u32::try_from(number).unwrap().to_be_bytes();
        let client = format!("{client}.{b}.{c}.{d}");
        writeln!(
            lines,
            "-I -p udp -s {client} -d {destination} --sport 1000 --dport {port} -r {backend} -q {client} \
             --reply-port-src {backend_port} --reply-port-dst 1000 -t 3600 -u SEEN_REPLY"
        )
        .unwrap();
    }
    lines
}

fn metric(name: &str) -> f64 {
    let text = shell("curl -s http://127.0.0.1:10249/metrics");
    let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit_once(' ').unwrap().1.parse().unwrap()
}

const DELETED: &str = "kubeproxy_conntrack_reconciler_deleted_entries_total";
const PASSES: &str = "kubeproxy_conntrack_reconciler_sync_duration_seconds";

/// Waits until the agent has made this many passes. The session continues during the wait.
async fn passed(count: f64) {
    let deadline = Instant::now() + Duration::from_secs(180);
    while metric(&format!("{PASSES}_count")) < count {
        assert!(Instant::now() < deadline, "no pass number {count} within three minutes");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn stale_udp_flows_deleted_in_one_pass_among_a_million() {
    let _limit = Limit::raise(1_100_000);
    let namespace = Namespace::new("million");
    namespace.run(|| block_on(a_million_flows()));
}

#[allow(clippy::print_stdout, reason = "the time that it took is worth reading")]
async fn a_million_flows() {
    // Service 3 is UDP.
    let mut fleet = Fleet::new(4, 1);
    let serving = PoolKey { role: Role::Serving as i32, ..fleet::pool_key(3) };
    let backend = |last: u8| Endpoint { address: vec![10, 244, 9, last], port: 5353 };
    fleet.add_pool(serving.clone(), vec![backend(1), backend(2)]);
    fleet.generation = 1;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("flows");
    let all = [
        flows(OTHERS, 11, "172.16.0.1", 53, "172.16.0.1", 53),
        flows(EACH, 12, "10.96.0.3", 80, "10.244.9.1", 5353),
        flows(EACH, 13, "10.96.0.3", 80, "10.244.9.2", 5353),
    ];
    std::fs::write(&file, all.concat()).unwrap();
    // Before the session starts: it would miss its answers during the load.
    shell(&format!("conntrack -R {}", file.display()));
    let udp = |more: &str| {
        let lines = shell(&format!("conntrack -L -p udp {more} 2>/dev/null | wc -l"));
        lines.trim().parse::<usize>().unwrap()
    };
    assert_eq!(udp("-d 10.96.0.3"), 2 * EACH);
    let (_controller, agent, mut stream) = programmed(&fleet, directory.path()).await;
    // One pass is made after every start.
    passed(1.0).await;
    assert_eq!(metric(DELETED), 0.0, "nothing is stale yet");
    let (passes_before, seconds_before) =
        (metric(&format!("{PASSES}_count")), metric(&format!("{PASSES}_sum")));
    let processor_before = agent.processor_seconds();

    fleet.digest.remove(LayerKind::Cluster, ItemRef::member(&serving, &backend(1)));
    let patch = PoolPatch { key: Some(serving), added: Vec::new(), removed: vec![backend(1)] };
    stream.update(fleet.delta(LayerKind::Cluster, Kind::Pool(patch))).await;
    stream.ack().await;
    // The Ack does not wait for the pass.
    passed(passes_before + 1.0).await;
    assert_eq!(metric(DELETED) as usize, EACH);
    assert_eq!(udp("-d 10.96.0.3"), EACH, "the flows to the backend that serves");
    assert_eq!(udp(""), OTHERS + EACH, "only the stale ones are gone");
    let pass = metric(&format!("{PASSES}_sum")) - seconds_before;
    assert_eq!(metric(&format!("{PASSES}_count")) - passes_before, 1.0, "one pass");
    let processor = agent.processor_seconds() - processor_before;
    println!("{} flows: the pass took {pass:.2} s, {processor:.2} s of the processor", OTHERS + 2 * EACH);
    // CPU time, because elapsed time depends on other processes. One request per entry would take far more.
    assert!(processor < 20.0, "the pass took {processor} s of the processor");
}

/// A Service with UDP port 80 at 10.96.0.3 and 198.51.100.3 (externalTrafficPolicy Local) and with node port 30053; a
/// pod of the laboratory is its endpoint.
fn udp_service() -> Fleet {
    let mut fleet = Fleet::new(0, 0);
    let mut node_port = fleet::frontend(3);
    node_port.kind = FrontendKind::NodePort as i32;
    let key = node_port.key.take().unwrap();
    node_port.key = Some(FrontendKey { address: Vec::new(), port: 30_053, ..key });
    fleet.add_frontend(fleet::frontend(3));
    fleet.add_frontend(node_port);
    // Local pods use every endpoint; others only those of the node, and it has none.
    let mut local = fleet::frontend(3);
    local.kind = FrontendKind::LoadBalancer as i32;
    local.key.as_mut().unwrap().address = vec![198, 51, 100, 3];
    local.outside = Some(Target { role: Role::Local as i32, when_empty: Verdict::Drop as i32 });
    fleet.add_frontend(local);
    for role in [Role::Cluster, Role::Serving] {
        let key = PoolKey { role: role as i32, ..fleet::pool_key(3) };
        fleet.add_pool(key, vec![Endpoint { address: vec![10, 244, 0, 1], port: 8080 }]);
    }
    fleet.generation = 1;
    fleet
}

fn node_ports_at(address: [u8; 4], revision: u64) -> Settings {
    let block = Cidr { address: address.to_vec(), prefix_length: 24 };
    Settings { revision, node_port_addresses: vec![block], ..fleet::settings() }
}

/// The datagrams of a flow without translation keep its entry: only its deletion lets the next one be translated.
#[test]
fn udp_flow_from_before_the_rules_healed() {
    let lab = Lab::new();
    let client = |port: u16| {
        let socket = lab.client.run(|| UdpSocket::bind(("192.0.2.2", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    };
    let answered = |socket: &UdpSocket, to: &str| {
        socket.send_to(b"?", to).unwrap();
        let mut buffer = [0; 100];
        socket.recv(&mut buffer).is_ok_and(|length| buffer[..length].starts_with(b"pod1"))
    };
    let tracked = |port: u16| {
        let lines = shell(&format!("conntrack -L -p udp --orig-port-src {port} 2>/dev/null"));
        assert!(lines.contains("UNREPLIED"), "an entry without translation: {lines}");
    };
    lab.node.run(|| {
        block_on(async {
            let mut fleet = udp_service();
            fleet.replace_settings(node_ports_at([198, 51, 100, 0], 1));
            fleet.generation = 1;
            let directory = tempfile::tempdir().unwrap();
            let (_controller, agent, mut stream) = programmed(&fleet, directory.path()).await;

            // Another user of connection tracking: without any, the kernel tracks nothing once our table is gone.
            shell("nft add table ip tracker");
            shell("nft 'add chain ip tracker watch { type filter hook prerouting priority 0; }'");
            shell("nft add rule ip tracker watch ct state new accept");
            let flow = client(40_000);
            agent.pause();
            shell("nft delete table ip switchtower");
            assert!(!answered(&flow, "10.96.0.3:80"), "the rules are missing");
            tracked(40_000);
            agent.resume();
            common::eventually("healed after the repair", || answered(&flow, "10.96.0.3:80"));
            let report = stream.next().await;
            assert!(matches!(report, Some(FromAgent::Report(_))), "{report:?}");

            let flow = client(40_001);
            assert!(!answered(&flow, "192.0.2.1:30053"), "the address does not serve node ports");
            tracked(40_001);
            stream.update(fleet.replace_settings(node_ports_at([192, 0, 2, 0], 2))).await;
            stream.ack().await;
            common::eventually("healed after the change of addresses", || answered(&flow, "192.0.2.1:30053"));

            let flow = lab.pods[1].run(|| UdpSocket::bind("10.244.0.2:40002").unwrap());
            flow.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            assert!(!answered(&flow, "198.51.100.3:80"), "the detection does not cover the pod");
            let settings = Settings {
                local_detection: LocalDetection::ClusterCidr as i32,
                cluster_cidrs: vec![Cidr { address: vec![10, 244, 0, 0], prefix_length: 16 }],
                ..node_ports_at([192, 0, 2, 0], 3)
            };
            stream.update(fleet.replace_settings(settings)).await;
            stream.ack().await;
            common::eventually("healed after the change of detection", || answered(&flow, "198.51.100.3:80"));
        });
    });
}

/// Both ends of a connection from outside the cluster to a pod through a ClusterIP.
fn connection(lab: &Lab) -> (TcpStream, TcpStream) {
    let listener = lab.pods[0].run(|| TcpListener::bind("10.244.0.1:9090").unwrap());
    let mut client = lab.client.run(|| TcpStream::connect("10.96.0.0:80").unwrap());
    let (mut server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    }
    let mut buffer = [0; 5];
    client.write_all(b"hello").unwrap();
    server.read_exact(&mut buffer).unwrap();
    server.write_all(b"there").unwrap();
    client.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"there");
    (client, server)
}

/// Returns whether the connection still carries data from the client to the pod.
fn carries(client: &mut TcpStream, server: &mut TcpStream) -> bool {
    // A reset crosses two namespaces.
    std::thread::sleep(Duration::from_millis(300));
    let mut buffer = [0; 5];
    client.write_all(b"again").is_ok() && server.read_exact(&mut buffer).is_ok()
}

/// Connection tracking treats a segment far ahead of the window as invalid and does not translate it back; the receiver
/// has no such connection and resets it.
#[test]
fn segment_out_of_window_resets_only_with_strict_tracking() {
    let lab = Lab::new();
    lab.node.run(|| {
        block_on(async {
            let mut fleet = Fleet::new(0, 0);
            fleet.add_frontend(fleet::frontend(0));
            fleet.add_pool(fleet::pool_key(0), vec![Endpoint { address: vec![10, 244, 0, 1], port: 9090 }]);
            fleet.generation = 1;
            let directory = tempfile::tempdir().unwrap();
            let (_controller, _agent, mut stream) = programmed(&fleet, directory.path()).await;
            for (revision, tcp_be_liberal) in [(2, false), (3, true)] {
                let conntrack = Some(ConntrackSettings { tcp_be_liberal, ..Default::default() });
                let settings = Settings { revision, conntrack, ..fleet::settings() };
                stream.update(fleet.replace_settings(settings)).await;
                stream.ack().await;
                let (mut client, mut server) = connection(&lab);
                lab.pods[0].run(|| segment::send_far_ahead_of_the_window(&server));
                let survives = carries(&mut client, &mut server);
                assert_eq!(survives, tcp_be_liberal, "tcpBeLiberal {tcp_be_liberal}");
            }
        });
    });
}
