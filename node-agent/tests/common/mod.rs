//! A laboratory in network namespaces: a node with three pods on a bridge, and a client outside.
//!
//! node: 192.0.2.1 and 2001:db8::1 towards the client, 10.244.0.254/24 and fd44::fe/64 on the bridge.
//! pods: 10.244.0.1 to .3 and fd44::1 to ::3; client: 192.0.2.2 and 2001:db8::2, which sends everything to the
//! node. Servers answer each connection or datagram with "name of the pod, address of the peer".
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod node;
pub mod process;
pub mod scene;
pub mod segment;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::kernel::dataplane::Stamp;
use switchtower_proto::v1 as proto;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Runs a command and returns what it printed.
pub fn run(command: &[&str], input: &str) -> String {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("these tests need root and the program {}: {error}", command[0]));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error} (these tests need root)");
    String::from_utf8(output.stdout).unwrap()
}

/// Prefix, process id and start time, as in all names of the laboratory: `make clean-lab` removes those of ended
/// processes.
fn run_name() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The second field is the program's name in parentheses and may contain spaces.
    let (_, after_name) = stat.rsplit_once(')').unwrap();
    let start: u64 = after_name.split_whitespace().nth(19).unwrap().parse().unwrap();
    format!("stlab-{}x{start:x}", std::process::id())
}

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Namespace(pub String);

impl Namespace {
    pub fn new(purpose: &str) -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}-{purpose}", run_name());
        run(&["ip", "netns", "add", &name], "");
        run(&["ip", "-n", &name, "link", "set", "lo", "up"], "");
        Namespace(name)
    }

    /// Runs a closure in the namespace, on its own thread.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let file = File::open(format!("/run/netns/{}", self.0)).unwrap();
                // SAFETY: the descriptor is a network namespace's; only this thread moves.
                let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(result, 0, "entering a namespace needs root");
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `nft` in the namespace.
    pub fn nft(&self, arguments: &[&str], input: &str) -> String {
        let mut command = vec!["ip", "netns", "exec", &self.0, "nft"];
        command.extend(arguments);
        run(&command, input)
    }

    /// Output of `nft list table`.
    pub fn table(&self, family: &str) -> String {
        self.nft(&["list", "table", family, "switchtower"], "")
    }

    /// Sends "" to a TCP address and returns the answer.
    pub fn ask(&self, to: &str) -> Result<String, String> {
        self.ask_from(None, to)
    }

    /// The same from a given source address.
    pub fn ask_from(&self, from: Option<&str>, to: &str) -> Result<String, String> {
        let to: SocketAddr = to.parse().unwrap();
        let from: Option<IpAddr> = from.map(|from| from.parse().unwrap());
        self.run(move || ask(from, to))
    }

    /// Sends a datagram and returns the answer.
    pub fn ask_udp(&self, to: &str) -> Result<String, String> {
        let to: SocketAddr = to.parse().unwrap();
        self.run(move || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            socket.connect(to).map_err(|error| error.to_string())?;
            socket.send(b"?").map_err(|error| error.to_string())?;
            let mut buffer = [0; 100];
            let length = socket.recv(&mut buffer).map_err(|error| format!("{:?}", error.kind()))?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        })
    }
}

/// Timeout after which no answer counts as silence; longer in an emulated machine.
fn patience() -> Duration {
    let milliseconds = std::env::var("SWITCHTOWER_PATIENCE").ok().and_then(|text| text.parse().ok());
    Duration::from_millis(milliseconds.unwrap_or(1500))
}

/// One TCP request in the namespace of the calling thread. The error is "refused" or "timeout".
pub fn ask(from: Option<IpAddr>, to: SocketAddr) -> Result<String, String> {
    let stream = match from {
        None => TcpStream::connect_timeout(&to, patience()),
        Some(from) => connect_from(from, to),
    };
    let mut stream = stream.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => "timeout".to_owned(),
        other => format!("{other:?}: {error}"),
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| format!("reading: {error}"))?;
    Ok(answer)
}

fn connect_from(from: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket =
            if from.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
        socket.bind(SocketAddr::new(from, 0))?;
        let connected = tokio::time::timeout(patience(), socket.connect(to)).await;
        let stream = connected.map_err(|_| std::io::ErrorKind::TimedOut)??.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    })
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// The laboratory.
#[derive(Debug)]
pub struct Lab {
    pub node: Namespace,
    pub pods: Vec<Namespace>,
    pub client: Namespace,
}

impl Lab {
    pub fn new() -> Self {
        let node = Namespace::new("node");
        let client = Namespace::new("client");
        let pods: Vec<Namespace> = (1..=3).map(|number| Namespace::new(&format!("pod{number}"))).collect();
        let sysctls = "
            echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
            echo 0 > /proc/sys/net/ipv4/icmp_ratelimit; echo 0 > /proc/sys/net/ipv6/icmp/ratelimit
            echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
            echo 0 > /proc/sys/net/ipv6/conf/all/accept_dad
            for each in all default; do
                echo 0 > /proc/sys/net/ipv4/conf/$each/send_redirects
                echo 0 > /proc/sys/net/ipv4/conf/$each/accept_redirects
                echo 0 > /proc/sys/net/ipv4/conf/$each/rp_filter
            done";
        run(&["ip", "netns", "exec", &node.0, "sh", "-e"], sysctls);
        for namespace in pods.iter().chain([&client]) {
            run(&["ip", "netns", "exec", &namespace.0, "sh", "-e"], sysctls);
        }
        let mut lines = format!(
            "link add br0 type bridge\nlink set br0 up\naddr add 10.244.0.254/24 dev br0\n\
             addr add fd44::fe/64 dev br0 nodad\nlink add eth0 type veth peer name eth0 netns {}\n\
             link set eth0 up\naddr add 192.0.2.1/24 dev eth0\naddr add 2001:db8::1/64 dev eth0 nodad\n\
             route add default via 192.0.2.2\nroute add default via 2001:db8::2\n",
            client.0
        );
        for (index, pod) in pods.iter().enumerate() {
            lines += &format!(
                "link add pod{index} type veth peer name eth0 netns {}\nlink set pod{index} master br0\n\
                 link set pod{index} type bridge_slave hairpin on\nlink set pod{index} up\n",
                pod.0
            );
        }
        run(&["ip", "-n", &node.0, "-batch", "-"], &lines);
        for (index, pod) in pods.iter().enumerate() {
            let number = index + 1;
            let lines = format!(
                "link set eth0 up\naddr add 10.244.0.{number}/24 dev eth0\naddr add fd44::{number}/64 dev eth0 nodad\n\
                 route add default via 10.244.0.254\nroute add default via fd44::fe\n"
            );
            run(&["ip", "-n", &pod.0, "-batch", "-"], &lines);
        }
        let lines = "link set eth0 up\naddr add 192.0.2.2/24 dev eth0\naddr add 192.0.2.3/24 dev eth0\n\
             addr add 2001:db8::2/64 dev eth0 nodad\naddr add 2001:db8::3/64 dev eth0 nodad\n\
             route add default via 192.0.2.1\nroute add default via 2001:db8::1\n";
        run(&["ip", "-n", &client.0, "-batch", "-"], lines);
        let lab = Lab { node, pods, client };
        for (index, pod) in lab.pods.iter().enumerate() {
            serve(pod, &format!("pod{}", index + 1), 8080);
        }
        serve(&lab.client, "client", 8080);
        for pod in &lab.pods {
            for client in ["192.0.2.2:8080", "[2001:db8::2]:8080"] {
                eventually("a pod reaches the client", || pod.ask(client).is_ok());
            }
        }
        // From here on, neighbours are known: a test that measures times does not wait for their discovery.
        for (from, pod) in [("192.0.2.3", "10.244.0.1:8080"), ("2001:db8::3", "[fd44::1]:8080")] {
            eventually("the client reaches a pod", || lab.client.ask_from(Some(from), pod).is_ok());
        }
        lab
    }
}

/// Serves TCP and UDP on a port of a namespace, both families, as long as the test runs.
pub fn serve(namespace: &Namespace, name: &str, port: u16) {
    let (tcp, udp) =
        namespace.run(|| (TcpListener::bind(("::", port)).unwrap(), UdpSocket::bind(("::", port)).unwrap()));
    let (tcp_name, udp_name) = (name.to_owned(), name.to_owned());
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = tcp.accept() {
            let _ = stream.write_all(format!("{tcp_name} {}", peer.ip().to_canonical()).as_bytes());
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(format!("{udp_name} {}", peer.ip().to_canonical()).as_bytes(), peer);
        }
    });
}

/// Polls until a condition holds; panics with `what` after ten seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "did not happen within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A stamp with this generation.
pub fn stamp(generation: u64) -> Stamp {
    Stamp { generation, digest: u128::from(generation) << 64 | 7, facts: 1, deviations: 0 }
}

pub fn bytes(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub fn cidr(text: &str) -> proto::Cidr {
    let (address, length) = text.split_once('/').unwrap();
    proto::Cidr { address: bytes(address), prefix_length: length.parse().unwrap() }
}

pub fn service_port(name: &str, protocol: proto::Protocol) -> proto::ServicePort {
    proto::ServicePort {
        namespace: "default".to_owned(),
        name: name.to_owned(),
        port: String::new(),
        protocol: protocol as i32,
    }
}

fn family(address: &str) -> proto::Family {
    if address.contains(':') { proto::Family::Ipv6 } else { proto::Family::Ipv4 }
}

pub fn target(role: proto::Role, when_empty: proto::Verdict) -> Option<proto::Target> {
    Some(proto::Target { role: role as i32, when_empty: when_empty as i32 })
}

/// A ClusterIP frontend of service `name`: `address` and TCP port 80.
pub fn cluster_ip(name: &str, address: &str) -> proto::Frontend {
    proto::Frontend {
        key: Some(proto::FrontendKey {
            family: family(address) as i32,
            address: bytes(address),
            protocol: proto::Protocol::Tcp as i32,
            port: 80,
        }),
        kind: proto::FrontendKind::ClusterIp as i32,
        service_port: Some(service_port(name, proto::Protocol::Tcp)),
        outside: target(proto::Role::Cluster, proto::Verdict::Reject),
        inside: target(proto::Role::Cluster, proto::Verdict::Reject),
        affinity_seconds: 0,
        source_ranges: Vec::new(),
    }
}

/// A load-balancer frontend with policy Cluster.
pub fn load_balancer(name: &str, address: &str) -> proto::Frontend {
    proto::Frontend { kind: proto::FrontendKind::LoadBalancer as i32, ..cluster_ip(name, address) }
}

/// The same with policy Local.
pub fn load_balancer_local(name: &str, address: &str) -> proto::Frontend {
    let outside = target(proto::Role::Local, proto::Verdict::Drop);
    proto::Frontend { outside, ..load_balancer(name, address) }
}

/// A NodePort frontend with policy Cluster.
pub fn node_port(name: &str, family: proto::Family, port: u32) -> proto::Frontend {
    proto::Frontend {
        key: Some(proto::FrontendKey {
            family: family as i32,
            address: Vec::new(),
            protocol: proto::Protocol::Tcp as i32,
            port,
        }),
        kind: proto::FrontendKind::NodePort as i32,
        ..cluster_ip(name, "0.0.0.0")
    }
}

/// The same frontend for UDP.
pub fn udp(mut frontend: proto::Frontend) -> proto::Frontend {
    let protocol = proto::Protocol::Udp as i32;
    if let Some(key) = &mut frontend.key {
        key.protocol = protocol;
    }
    if let Some(port) = &mut frontend.service_port {
        port.protocol = protocol;
    }
    frontend
}

pub fn endpoint(text: &str) -> proto::Endpoint {
    let address: SocketAddr = text.parse().unwrap();
    proto::Endpoint { address: bytes(&address.ip().to_string()), port: u32::from(address.port()) }
}

pub fn pool_key(
    name: &str,
    protocol: proto::Protocol,
    role: proto::Role,
    family: proto::Family,
) -> proto::PoolKey {
    proto::PoolKey {
        service_port: Some(service_port(name, protocol)),
        family: family as i32,
        role: role as i32,
    }
}

/// Adds and removes members of a TCP pool.
pub fn pool(name: &str, role: proto::Role, added: &[&str], removed: &[&str]) -> KernelChange {
    let all = added.iter().chain(removed);
    let family =
        if all.clone().any(|text| text.starts_with('[')) { proto::Family::Ipv6 } else { proto::Family::Ipv4 };
    KernelChange::Pool {
        key: pool_key(name, proto::Protocol::Tcp, role, family),
        added: added.iter().map(|text| endpoint(text)).collect(),
        removed: removed.iter().map(|text| endpoint(text)).collect(),
    }
}

/// The same for UDP.
pub fn udp_pool(name: &str, role: proto::Role, added: &[&str], removed: &[&str]) -> KernelChange {
    let mut change = pool(name, role, added, removed);
    if let KernelChange::Pool { key, .. } = &mut change {
        key.service_port = Some(service_port(name, proto::Protocol::Udp));
    }
    change
}

/// Node facts and settings of the laboratory: pods are known by the node's pod CIDR.
pub fn facts() -> Vec<KernelChange> {
    let local = ["10.244.0.1", "10.244.0.2", "10.244.0.3", "fd44::1", "fd44::2", "fd44::3"];
    let mut facts = vec![
        KernelChange::Node(proto::NodeRecord {
            name: "node".to_owned(),
            addresses: vec![bytes("192.0.2.1"), bytes("2001:db8::1")],
            pod_cidrs: vec![cidr("10.244.0.0/24"), cidr("fd44::/64")],
            eligible: true,
            zone: String::new(),
        }),
        KernelChange::Settings(settings()),
        KernelChange::ServiceCidr(cidr("10.96.0.0/16")),
        KernelChange::ServiceCidr(cidr("fd96::/112")),
    ];
    facts.extend(local.map(|address| {
        KernelChange::LocalEndpoint(proto::LocalEndpoint {
            address: bytes(address),
            protocol: proto::Protocol::Tcp as i32,
            port: 8080,
        })
    }));
    facts
}

pub fn settings() -> proto::Settings {
    proto::Settings {
        profile: "builtin".to_owned(),
        local_detection: proto::LocalDetection::NodeCidr as i32,
        masquerade_mark: 0x4000,
        ..proto::Settings::default()
    }
}

/// A Service with a ClusterIP and these endpoints.
pub fn service(name: &str, address: &str, endpoints: &[&str]) -> Vec<KernelChange> {
    vec![pool(name, proto::Role::Cluster, endpoints, &[]), KernelChange::Frontend(cluster_ip(name, address))]
}

pub const PODS: [&str; 3] = ["10.244.0.1:8080", "10.244.0.2:8080", "10.244.0.3:8080"];
pub const PODS6: [&str; 3] = ["[fd44::1]:8080", "[fd44::2]:8080", "[fd44::3]:8080"];
