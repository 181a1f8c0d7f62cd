//! The real agent process against the real kernel, each test in a network namespace of its own, with a
//! controller in the test. Needs root and the tools `ip`, `nft` and `conntrack` (for reading only).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::process::{Agent, BINARY, programmed};
use switchtower_node_agent_testing::controller::{self, DEADLINE, FakeController};
use switchtower_node_agent_testing::fleet::{self, Fleet};
use switchtower_proto::digest::ItemRef;
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::*;

/// Runs a test on its own thread in a new network namespace. Processes that it starts inherit the namespace, which is
/// removed with the last of them.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: a plain system call that concerns this thread only.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "this test needs root: it makes a network namespace");
        shell("ip link set lo up");
        shell("ip link add eth0 type veth peer name eth1");
        // Without link-local addresses: they appear after about a second, and the agent would follow the change.
        shell("for end in eth0 eth1; do ip link set $end addrgenmode none && ip link set $end up; done");
        shell("ip addr add 192.0.2.1/24 dev eth0");
        controller::block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn table() -> String {
    shell("nft list table ip switchtower")
}

/// The table, or nothing. While the first transaction is prepared, an empty table appears, and disappears if the kernel
/// repeats the transaction.
fn listed() -> String {
    shell("nft list table ip switchtower 2>/dev/null || true")
}

fn snapshot_file_is_at(directory: &Path, at_least: std::time::SystemTime) -> bool {
    let file = directory.join("state/view.snapshot");
    std::fs::metadata(file).and_then(|metadata| metadata.modified()).is_ok_and(|time| time >= at_least)
}

#[test]
fn agent_killed_before_the_file_writes_only_the_next_change() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(50, 3);
        let (mut controller, mut agent, mut stream) = programmed(&fleet, directory.path()).await;
        eventually("the snapshot file", || snapshot_file_is_at(directory.path(), std::time::UNIX_EPOCH));
        let missed = fleet.add_endpoint(7, 5);
        stream.update(missed.clone()).await;
        assert_eq!(stream.ack().await.generation, 2);
        agent.kill();
        drop(stream);
        let before = table();

        let _agent = Agent::start(directory.path());
        let mut stream = controller.accept().await;
        assert_eq!(stream.hello.kernel.clone().unwrap().generation, 2);
        assert_eq!(stream.hello.view.clone().unwrap().generation, 1, "the file is older than the kernel");
        assert_eq!(table(), before, "nothing is written before a controller answers");
        stream.welcome(2, &[]).await;
        let (next, more) = fleet.add_endpoint(9, 5);
        let parts = missed.1.into_iter().chain(more).collect();
        stream.update((Update { from: Some(1), ..next }, parts)).await;
        let ack = stream.ack().await;
        assert_eq!(ack.generation, 3);
        // A slot and the size in the frontend's value (one deletion, one addition), nothing else.
        let operations = ack.timings.unwrap().operations;
        assert!((1..=6).contains(&operations), "{operations} operations for one endpoint");
        stream.update(fleet.add_endpoint(11, 5)).await;
        assert_eq!(stream.ack().await.timings.unwrap().operations, operations, "as in the ordinary course");
    });
}

#[test]
fn current_file_adopted_and_lost_table_programmed_from_it() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(20, 2);
        let (controller, mut agent, _stream) = programmed(&fleet, directory.path()).await;
        agent.terminate();
        let before = table();
        // No controller listens now.
        drop(controller);
        let genid =
            || shell("nft list ruleset >/dev/null; nft -j list metainfo 2>/dev/null | tr -d '\\n' || true");
        let _ = genid();
        let mut agent = Agent::start(directory.path());
        eventually("/healthz", || shell(CURL).trim() == "200");
        assert_eq!(table(), before, "adopted as it is");
        agent.terminate();
        // A reboot: no tables.
        shell("nft flush ruleset");
        let _agent = Agent::start(directory.path());
        eventually("all frontends", || listed().matches("10.96.0.").count() >= 20);
    });
}

const CURL: &str = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:10256/healthz || true";

#[test]
fn health_port_reached_at_node_address_of_either_family() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        shell("ip addr flush dev eth0 && ip addr add fd00::1/64 dev eth0 nodad");
        // As in the DaemonSet, which cannot know the family of its node's address.
        let metrics = "--metrics-bind-address=127.0.0.1:10249,fd00::1:10249";
        let mut agent = Agent::start_with(Command::new(BINARY).arg(metrics), directory.path());
        let answers = |what: &str| {
            shell(&format!("curl -g -s -o /dev/null -w '%{{http_code}}' '{what}' || true")) == "200"
        };
        let everywhere = || {
            let metrics = ["http://[fd00::1]:10249/metrics", "http://127.0.0.1:10249/metrics"];
            let health = ["http://[fd00::1]:10256/livez", "http://127.0.0.1:10256/livez"];
            metrics.into_iter().chain(health).all(answers)
        };
        eventually("an answer on all addresses", everywhere);
        agent.terminate();
        // A node without IPv6 addresses.
        shell("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6");
        let _agent = Agent::start(directory.path());
        eventually("an answer by IPv4", || answers("http://127.0.0.1:10256/livez"));
    });
}

#[test]
fn drift_repaired_and_addresses_followed() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(5, 2);
        let (_controller, _agent, mut stream) = programmed(&fleet, directory.path()).await;
        shell("nft delete table ip switchtower");
        match stream.next().await {
            Some(FromAgent::Report(report)) => {
                assert_eq!((report.drift_repaired, report.session), (1, 1), "{:?}", report.drift_cause());
            }
            other => panic!("a Report is due, this came: {other:?}"),
        }
        assert!(table().contains("10.96.0.4"));
        // The settings select the addresses in these blocks; one of them is added later.
        let mut after = fleet::settings();
        fleet.digest.remove(LayerKind::Settings, ItemRef::Settings(&after));
        after.node_port_addresses = vec![Cidr { address: vec![198, 51, 100, 0], prefix_length: 24 }];
        fleet.digest.add(LayerKind::Settings, ItemRef::Settings(&after));
        stream.update(fleet.delta(LayerKind::Settings, Kind::Settings(after))).await;
        assert_eq!(stream.ack().await.generation, 2);
        let mut port = fleet::frontend(0);
        port.kind = FrontendKind::NodePort as i32;
        port.key = Some(FrontendKey { address: Vec::new(), port: 30_123, ..port.key.unwrap() });
        fleet.digest.add(LayerKind::Cluster, ItemRef::Frontend(&port));
        stream.update(fleet.delta(LayerKind::Cluster, Kind::Frontend(port))).await;
        assert_eq!(stream.ack().await.generation, 3);
        assert!(!table().contains("198.51.100.7"));
        shell("ip addr add 198.51.100.7/24 dev eth0");
        eventually("the new address serves NodePorts", || table().contains("198.51.100.7"));
        shell("ip addr del 198.51.100.7/24 dev eth0");
        eventually("and no longer", || !table().contains("198.51.100.7"));
    });
}

#[test]
fn stale_udp_flows_deleted_and_others_kept() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(4, 1);
        // Service 3 is UDP. Its backends are this namespace's own addresses.
        let backend = |last: u8| Endpoint { address: vec![192, 0, 2, last], port: 5353 };
        shell("ip addr add 192.0.2.2/24 dev eth0 && ip route add 10.96.0.0/16 dev lo src 192.0.2.1");
        let (_controller, _agent, mut stream) = programmed(&fleet, directory.path()).await;
        let serving = PoolKey { role: Role::Serving as i32, ..fleet::pool_key(3) };
        for key in [fleet::pool_key(3), serving.clone()] {
            if key.role == Role::Serving as i32 {
                fleet.digest.add(LayerKind::Cluster, ItemRef::Pool(&key));
            }
            let mut patch =
                PoolPatch { key: Some(key.clone()), added: vec![backend(1)], removed: Vec::new() };
            if key.role == Role::Cluster as i32 {
                patch.removed.push(fleet::endpoint(3, 0));
                fleet.digest.remove(LayerKind::Cluster, ItemRef::member(&key, &fleet::endpoint(3, 0)));
            }
            fleet.digest.add(LayerKind::Cluster, ItemRef::member(&key, &backend(1)));
            stream.update(fleet.delta(LayerKind::Cluster, Kind::Pool(patch))).await;
            stream.ack().await;
        }
        let server = UdpSocket::bind("192.0.2.1:5353").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let client = UdpSocket::bind("0.0.0.0:40000").unwrap();
        client.send_to(b"hello", "10.96.0.3:80").unwrap();
        let other = UdpSocket::bind("0.0.0.0:40001").unwrap();
        other.send_to(b"direct", "192.0.2.2:6000").unwrap();
        let mut buffer = [0; 16];
        let length = server.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello", "the Service delivers");
        let entries = || shell("conntrack -L -p udp 2>/dev/null || true");
        assert!(entries().contains("dst=10.96.0.3 sport=40000"), "{}", entries());
        assert!(entries().contains("sport=40001"));

        for key in [serving, fleet::pool_key(3)] {
            fleet.digest.remove(LayerKind::Cluster, ItemRef::member(&key, &backend(1)));
            fleet.digest.add(LayerKind::Cluster, ItemRef::member(&key, &backend(2)));
            let patch = PoolPatch { key: Some(key), added: vec![backend(2)], removed: vec![backend(1)] };
            stream.update(fleet.delta(LayerKind::Cluster, Kind::Pool(patch))).await;
            stream.ack().await;
        }
        // The Ack does not wait for the pass.
        eventually("the stale flow is deleted", || !entries().contains("sport=40000"));
        assert!(entries().contains("sport=40001"), "a flow that is not ours is kept");
        let second = UdpSocket::bind("192.0.2.2:5353").unwrap();
        second.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.send_to(b"again", "10.96.0.3:80").unwrap();
        let length = second.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"again", "the same socket reaches the new backend");
    });
}

#[test]
fn health_checks_report_the_programmed_view() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(3, 1);
        let (_controller, _agent, mut stream) = programmed(&fleet, directory.path()).await;
        let key = HealthCheckKey { namespace: "shop".into(), name: "cart".into() };
        let check =
            |ready| HealthCheck { key: Some(key.clone()), port: 31_999, ready_ipv4: ready, ready_ipv6: 0 };
        let ask = || shell("curl -s -i http://192.0.2.1:31999/any || true");
        // The port comes for all nodes, the count for this one.
        stream.update(fleet.health_check(LayerKind::HealthChecks, None, check(0))).await;
        stream.ack().await;
        eventually("503", || ask().starts_with("HTTP/1.1 503"));
        assert!(ask().contains("x-load-balancing-endpoint-weight: 0"), "{}", ask());
        stream.update(fleet.health_check(LayerKind::Node, None, check(2))).await;
        stream.ack().await;
        eventually("200", || ask().starts_with("HTTP/1.1 200"));
        let answer = ask();
        assert!(answer.contains("x-load-balancing-endpoint-weight: 2"), "{answer}");
        assert!(
            answer.contains(r#""localEndpoints":2"#) && answer.contains(r#""namespace":"shop""#),
            "{answer}"
        );
        stream.update(fleet.health_check(LayerKind::Node, Some(&check(2)), check(0))).await;
        stream.ack().await;
        eventually("503", || ask().starts_with("HTTP/1.1 503"));
        assert_eq!(shell(CURL).trim(), "200");
    });
}

#[test]
fn missing_capability_reported_and_agent_stays() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(3, 1);
        let mut controller = FakeController::start("switchtower-controller").await;
        controller.write_files(directory.path());
        let mut unprivileged = Command::new("setpriv");
        unprivileged.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin", BINARY]);
        let _agent = Agent::start_with(&mut unprivileged, directory.path());
        let mut stream = controller.accept().await;
        stream.welcome(1, &[]).await;
        stream.update(fleet.snapshot()).await;
        let nack = stream.nack().await;
        assert_eq!((nack.reason, nack.errno), (NackReason::Kernel as i32, libc::EPERM), "{}", nack.detail);
        assert_eq!(shell(&CURL.replace("healthz", "livez")).trim(), "200", "it is alive");
    });
}

#[test]
fn memory_follows_the_view() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(10_000, 3);
        let (_controller, agent, mut stream) = programmed(&fleet, directory.path()).await;
        for round in 0..50 {
            stream.update(fleet.add_endpoint(round, 5)).await;
            let timings = stream.ack().await.timings.unwrap();
            if round == 49 {
                println!("one endpoint: {timings:?}");
            }
        }
        eventually("the snapshot file", || snapshot_file_is_at(directory.path(), std::time::UNIX_EPOCH));
        let resident = agent.resident_kilobytes();
        println!("resident at 10,000 services with 3 endpoints: {resident} kB");
        // The target of a release build is 30 MiB; a build without optimisation has larger code.
        assert!(resident < 45_000, "{resident} kB resident");
    });
}

/// A frontend that captures connections to `address`.
fn captured(address: std::net::SocketAddr) -> Frontend {
    let std::net::IpAddr::V4(ip) = address.ip() else { panic!("the controller listens on IPv4") };
    let frontend = fleet::frontend(0);
    let key =
        FrontendKey { address: ip.octets().to_vec(), port: address.port().into(), ..frontend.key.unwrap() };
    Frontend { key: Some(key), kind: FrontendKind::ExternalIp as i32, ..frontend }
}

fn captures(address: std::net::SocketAddr) -> bool {
    let listed = shell("nft list map ip switchtower frontends");
    listed.contains(&format!("{} . tcp . {} ", address.ip(), address.port()))
}

#[test]
fn service_at_the_controllers_address_locks_no_agent_out() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(3, 2);
        let (mut controller, mut agent, mut stream) = programmed(&fleet, directory.path()).await;
        // The compiler refuses such a Service; a controller of another version may not.
        stream.update(fleet.add_frontend(captured(controller.address))).await;
        let ack = stream.ack().await;
        let deviations = ack.deviations.expect("the row names it");
        assert!(format!("{deviations:?}").contains("reaches a controller"), "{deviations:?}");
        assert!(!captures(controller.address));
        // Three restarts: the stream ends, the agent ends and reads its snapshot file, the agent is killed.
        drop(stream);
        let stream = controller.accept().await;
        agent.terminate();
        drop((stream, agent));
        let mut agent = Agent::start(directory.path());
        let stream = controller.accept().await;
        assert_eq!(stream.hello.view.as_ref().unwrap().generation, 2);
        assert!(!captures(controller.address));
        agent.kill();
    });
}

#[test]
fn agent_frees_its_way_from_rules_that_captured_it() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(3, 2);
        let (mut controller, mut agent, mut stream) = programmed(&fleet, directory.path()).await;
        eventually("the snapshot file", || snapshot_file_is_at(directory.path(), std::time::UNIX_EPOCH));
        // Killed before the file is written: at start the agent may write only what frees its way to the controller.
        stream.update(fleet.add_endpoint(1, 5)).await;
        stream.ack().await;
        agent.kill();
        drop(stream);
        let address = controller.address;
        let key = format!("{} . tcp . {}", address.ip(), address.port());
        let refuse = format!("nft add element ip switchtower frontends '{{ {key} : 0:4 }}'");
        for state_is_lost in [false, true] {
            shell(&refuse);
            shell(&format!("nft add element ip switchtower refused '{{ {key} }}'"));
            if state_is_lost {
                std::fs::remove_dir_all(directory.path().join("state")).unwrap();
            }
            assert!(captures(address));
            assert!(std::net::TcpStream::connect(address).is_err());
            let mut agent = Agent::start(directory.path());
            let stream = controller.accept().await;
            assert_eq!(stream.hello.kernel.as_ref().unwrap().generation, 2);
            assert!(!captures(address));
            agent.kill();
        }
    });
}

/// The status and body of an answer on the health port.
fn health(path: &str) -> (String, String) {
    let answer = shell(&format!("curl -s -m 5 -w '\\n%{{http_code}}' http://127.0.0.1:10256{path} || true"));
    let (body, code) = answer.trim_end().rsplit_once('\n').unwrap_or(("", answer.trim_end()));
    (code.to_owned(), body.to_owned())
}

#[test]
fn stalled_disk_delays_neither_commits_nor_repairs() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(20, 2);
        let state = directory.path().join("state");
        std::fs::create_dir(&state).unwrap();
        // Opening it for writing blocks, as on a disk that does not respond.
        shell(&format!("mkfifo {}", state.join("view.new").display()));
        let (_controller, _agent, mut stream) = programmed(&fleet, directory.path()).await;
        // The file is due after a second of quiet.
        std::thread::sleep(Duration::from_secs(2));
        stream.update(fleet.add_endpoint(7, 5)).await;
        assert_eq!(stream.ack().await.generation, 2);
        shell("nft delete table ip switchtower");
        eventually("the table is back", || {
            listed().contains("10.96.0.") && listed().contains("hook prerouting")
        });
        assert_eq!(health("/livez").0, "200");
    });
}

/// Mounts a file system of 64 KiB on a new state directory, for this test only. Returns the directory.
fn small_disk(directory: &Path) -> PathBuf {
    let state = directory.join("state");
    std::fs::create_dir(&state).unwrap();
    // SAFETY: a plain system call that concerns this thread only.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
    shell("mount --make-rprivate /");
    shell(&format!("mount -t tmpfs -o size=64k tmpfs {}", state.display()));
    state
}

#[test]
fn full_disk_stops_neither_commits_nor_a_restart() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let state = small_disk(directory.path());
        // The view is larger than the disk.
        let mut fleet = Fleet::new(1_000, 2);
        let (mut controller, mut agent, mut stream) = programmed(&fleet, directory.path()).await;
        eventually("the failed write is logged", || agent.log().contains("No space left on device"));
        stream.update(fleet.add_endpoint(7, 5)).await;
        assert_eq!(stream.ack().await.generation, 2);
        let names = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| name != "view.new"), "a part of the view is left");
        shell(&format!("dd if=/dev/zero of={} bs=4096 2>/dev/null || true", state.join("filler").display()));
        agent.kill();
        drop(stream);
        let _agent = Agent::start(directory.path());
        let mut stream = controller.accept().await;
        stream.welcome(2, &[]).await;
        assert_eq!(stream.hello.kernel.clone().unwrap().generation, 2);
        let (mut update, parts) = fleet.snapshot();
        update.from = None;
        stream.update((update, parts)).await;
        assert_eq!(stream.ack().await.digest, fleet.digest.to_bytes());
        shell("nft delete table ip switchtower");
        eventually("the table is back", || listed().contains("hook prerouting"));
        assert_eq!(health("/livez").0, "200");
    });
}

#[test]
fn read_only_disk_stops_neither_commits_nor_a_restart() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let state = small_disk(directory.path());
        let mut fleet = Fleet::new(20, 2);
        let (mut controller, mut agent, stream) = programmed(&fleet, directory.path()).await;
        eventually("the snapshot file", || snapshot_file_is_at(directory.path(), std::time::UNIX_EPOCH));
        agent.kill();
        drop(stream);
        shell(&format!("mount -o remount,ro {}", state.display()));
        let agent = Agent::start(directory.path());
        let mut stream = controller.accept().await;
        assert_eq!(stream.hello.view.clone().unwrap().generation, 1, "the file is read");
        stream.welcome(2, &[]).await;
        let (update, parts) = fleet.add_endpoint(7, 5);
        stream.update((Update { from: Some(1), ..update }, parts)).await;
        assert_eq!(stream.ack().await.generation, 2);
        assert!(agent.log().contains("Read-only file system"), "{}", agent.log());
    });
}

/// A disk image may contain the state of the node that it was made from.
#[test]
fn state_of_another_node_is_not_programmed() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(20, 2);
        let (controller, mut agent, stream) = programmed(&fleet, directory.path()).await;
        agent.terminate();
        drop((stream, controller));
        shell("nft delete table ip switchtower; nft delete table ip6 switchtower");
        let mut other = Command::new(BINARY);
        other.args(["--hostname-override", "node-2"]);
        let agent = Agent::start_with(&mut other, directory.path());
        eventually("it says why", || agent.log().contains("is of node node-1, not of node-2"));
        eventually("it starts", || health("/livez").0 == "200");
        std::thread::sleep(Duration::from_secs(1));
        assert!(!listed().contains("10.96.0."), "{}", listed());
        drop(agent);
        let _agent = Agent::start(directory.path());
        eventually("its own state is programmed", || listed().contains("10.96.0."));
    });
}

#[test]
fn agent_with_unusable_files_never_becomes_ready() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(5, 2);
        let (controller, mut agent, stream) = programmed(&fleet, directory.path()).await;
        eventually("ready", || health("/readyz").0 == "200");
        std::fs::write(directory.path().join("controllers"), "127.0.0.1:1\n").unwrap();
        drop(stream);
        drop(controller);
        let deadline = Instant::now() + DEADLINE;
        while !health("/connection").1.contains("ControllerUnreachable") {
            assert!(Instant::now() < deadline, "the controller is still there");
            // The controller's side of the stream ends in this thread.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(health("/readyz").0, "200", "that takes no working node out");
        agent.terminate();

        // A restart while the controller is unavailable: the snapshot file is current and the agent is healthy.
        let mut agent = Agent::start(directory.path());
        eventually("ready by the file", || health("/readyz").0 == "200");
        agent.terminate();

        // A broken update of the agents: the view exists, and no controller can be found.
        let mut bad = Command::new(BINARY);
        bad.env("SWITCHTOWER_CA_FILE", directory.path().join("absent"));
        let _agent = Agent::start_with(&mut bad, directory.path());
        eventually("it says why", || health("/readyz").1.contains("BootstrapMissing"));
        assert_eq!(health("/readyz").0, "503");
        assert_eq!(health("/healthz").0, "200", "the data plane works");
    });
}

#[test]
fn second_agent_waits_until_the_first_ends() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(5, 2);
        let (mut controller, mut first, stream) = programmed(&fleet, directory.path()).await;
        let second = Agent::start(directory.path());
        eventually("the second logs that it waits", || second.log().contains("another node agent"));
        let cleanup = || {
            let state = directory.path().join("state");
            let args = ["cleanup", "--log-level", "error", "--state-dir"];
            let output = Command::new(BINARY).args(args).arg(state).output().unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let (cleaned, why) = cleanup();
        assert!(!cleaned && why.contains("stop the node agent"), "{why}");
        drop(stream);
        first.terminate();
        let stream = controller.accept().await;
        assert_eq!(stream.hello.kernel.clone().unwrap().generation, 1);
        drop((stream, second, first));
        eventually("the lock is free", || cleanup().0);
        assert!(!shell("nft list tables").contains("switchtower"));
        assert!(!directory.path().join("state").exists());
    });
}

#[test]
fn idle_connections_do_not_block_the_health_port() {
    in_namespace(|| async {
        let directory = tempfile::tempdir().unwrap();
        let (_controller, _agent, _stream) = programmed(&Fleet::new(2, 1), directory.path()).await;
        let idle: Vec<_> =
            (0..400).map(|_| std::net::TcpStream::connect("127.0.0.1:10256").unwrap()).collect();
        for path in ["/livez", "/healthz", "/readyz"] {
            assert_eq!(health(path).0, "200", "{path} with {} idle connections", idle.len());
        }
    });
}

#[test]
fn signal_during_the_start_is_not_lost() {
    in_namespace(async || {
        for _ in 0..30 {
            let directory = tempfile::tempdir().unwrap();
            let mut agent = Agent::start(directory.path());
            while !agent.handles_termination() {
                std::thread::yield_now();
            }
            agent.signal_termination();
            eventually("the agent stops", || agent.has_exited());
        }
    });
}
