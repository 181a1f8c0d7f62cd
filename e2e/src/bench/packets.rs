//! Cost of packets: Switchtower, kube-proxy in both modes, and no translation at all, side by side.
//!
//! Each proxy has a node of its own with a client pod and a server pod, and all of them program the same Services. A
//! *first packet* is a UDP datagram from a new port: the time of `sendto` includes connection tracking, the proxy's
//! rules, translation and delivery to the server pod's socket, because the kernel does all of it before the call
//! returns. Every datagram must arrive. Volleys of the proxies alternate, so that other load on the machine affects all
//! alike; compare within one run.

mod targets;

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::json;

use crate::lab::kube_proxy::KubeProxy;
use crate::lab::namespace::Namespace;
use crate::lab::wait;
use crate::switchtower::{Fleet, FleetNode, NodeSpec};
use targets::{ECHO, SINK, Target};

use super::Percentiles;
use super::load::{Load, Sizes};

/// First packets of a volley; a socket's receive buffer holds them.
const VOLLEY: u16 = 100;
/// Connections of a round.
const CONNECTIONS: usize = 100;
/// Round trips of an established flow in a round.
const ROUND_TRIPS: u32 = 300;
/// Maximum time in which a proxy programs all Services.
const PROGRAMMING: Duration = Duration::from_secs(600);

/// The service proxy of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Proxy {
    Switchtower,
    /// kube-proxy, mode nftables.
    Nftables,
    /// kube-proxy, mode iptables.
    Iptables,
}

impl Proxy {
    pub const ALL: [Self; 3] = [Self::Switchtower, Self::Nftables, Self::Iptables];

    /// Name of its node.
    fn node(self) -> &'static str {
        match self {
            Self::Switchtower => "switchtower",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// Size of the measurement.
#[derive(Debug, Clone)]
pub struct PacketSize {
    /// Services in addition to the measured ones.
    pub services: usize,
    /// Sizes of their pools.
    pub sizes: Sizes,
    /// Proxies to measure; kube-proxy takes minutes to program many Services.
    pub proxies: Vec<Proxy>,
    /// Volleys for each proxy and target.
    pub rounds: u16,
}

/// Medians of one kind of traffic, one for each proxy of [`PacketSize::proxies`].
#[derive(Debug, Serialize)]
pub struct Row {
    /// The traffic.
    pub name: String,
    pub unit: &'static str,
    pub medians: Vec<f64>,
}

/// Results for one number of Services.
#[derive(Debug, Serialize)]
pub struct PacketFigures {
    /// Services in addition to the measured ones.
    pub services: usize,
    pub proxies: Vec<Proxy>,
    pub rows: Vec<Row>,
}

/// Runs the measurement; `progress` receives one line per step.
///
/// # Errors
/// A part does not start, or a packet does not arrive.
pub fn run(size: &PacketSize, progress: &dyn Fn(&str)) -> Result<PacketFigures> {
    progress(&format!("{} Services: a control plane and a node for each proxy", size.services));
    let spec = |proxy: &Proxy| {
        let pods = [format!("client-{}", proxy.node()), format!("server-{}", proxy.node())];
        NodeSpec::new(proxy.node(), "a", &[&pods[0], &pods[1]])
    };
    let specs: Vec<_> = size.proxies.iter().map(spec).collect();
    let fleet = Fleet::build(&specs)?;
    fleet.install()?;
    Load::create(fleet.kube(), size.services, size.sizes)?;
    for node in fleet.nodes() {
        targets::create(&fleet, node)?;
    }
    let mut running = Vec::new();
    for (proxy, node) in size.proxies.iter().zip(fleet.nodes()) {
        progress(&format!("{proxy:?} programs everything"));
        running.extend(start(&fleet, *proxy, node)?);
    }
    let sides: Vec<Side<'_>> = fleet.nodes().iter().map(Side::new).collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for target in Target::ALL {
        progress(&format!("first packets: {}", target.name()));
        rows.push(first_packets(&sides, target, size.rounds)?);
    }
    progress("connections and round trips");
    let rounds = size.rounds / 4 + 1;
    for target in [Target::Pod, Target::ClusterIp] {
        let name = format!("connections: {}", target.name());
        rows.push(measure(&name, "1/s", &sides, rounds, |side| side.connections(target))?);
    }
    rows.push(measure("round trip of an established flow", "µs", &sides, rounds, |side| {
        side.round_trips()
    })?);
    drop(running);
    Ok(PacketFigures { services: size.services, proxies: size.proxies.clone(), rows })
}

/// Starts a proxy and waits until its node serves the last Service, and nothing is pending.
fn start(fleet: &Fleet, proxy: Proxy, node: &FleetNode) -> Result<Option<KubeProxy>> {
    let mode = match proxy {
        Proxy::Switchtower => {
            fleet.start_controller()?;
            fleet.start_agent(node)?;
            None
        }
        Proxy::Nftables => Some("nftables"),
        Proxy::Iptables => Some("iptables"),
    };
    let started = mode
        .map(|mode| KubeProxy::start(fleet.control_plane(), fleet.lab(), &node.net, &json!({"mode": mode})));
    let started = started.transpose()?;
    wait::until(&format!("{proxy:?} programs the node"), PROGRAMMING, || {
        if let Some(kube_proxy) = &started {
            kube_proxy.process().check_running()?;
            kube_proxy.is_idle(&node.net)?;
        }
        let side = Side::new(node)?;
        Target::ALL.iter().try_for_each(|target| side.volley(*target, 20_000, 1).map(drop))
    })?;
    Ok(started)
}

/// A node with its proxy, and the socket of its server pod.
struct Side<'a> {
    node: &'a FleetNode,
    sink: UdpSocket,
}

impl<'a> Side<'a> {
    fn new(node: &'a FleetNode) -> Result<Self> {
        let server = &node.pods[1];
        let sink = server.namespace.run(|| UdpSocket::bind(("0.0.0.0", SINK)))?;
        let sink = sink.context("listening in the server pod")?;
        sink.set_nonblocking(true)?;
        Ok(Self { node, sink })
    }

    fn origin(&self, target: Target) -> &Namespace {
        if target.is_from_outside() { &self.node.net.client } else { &self.node.pods[0].namespace }
    }

    /// Sends datagrams from new ports; returns the median time of one in microseconds.
    fn volley(&self, target: Target, first_port: u16, count: u16) -> Result<f64> {
        while self.sink.recv(&mut [0; 16]).is_ok() {}
        let to = target.address(self.node);
        let times = self.origin(target).run(|| -> Result<Vec<f64>> {
            let bind = |port| UdpSocket::bind(("0.0.0.0", port)).context("binding a port");
            let sockets: Vec<_> = (first_port..first_port + count).map(bind).collect::<Result<_>>()?;
            let send = |socket: &UdpSocket| {
                let start = Instant::now();
                socket.send_to(b"first", to)?;
                Ok(start.elapsed().as_secs_f64() * 1e6)
            };
            sockets.iter().map(send).collect()
        })??;
        // Delivery may be deferred to another context.
        let deadline = Instant::now() + Duration::from_millis(200);
        let mut arrived = 0;
        while arrived < count && Instant::now() < deadline {
            match self.sink.recv(&mut [0; 16]) {
                Ok(_) => arrived += 1,
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
        let name = &self.node.net.name;
        ensure!(arrived == count, "{name}: {arrived} of {count} packets arrived ({}, {to})", target.name());
        Ok(Percentiles::of(times)?.p50)
    }

    /// Connections per second, one after the other, each accepted and closed by the server pod.
    fn connections(&self, target: Target) -> Result<f64> {
        let to = target.address(self.node);
        let server = self.node.pods[1].namespace.run(|| TcpListener::bind(("0.0.0.0", SINK)))?;
        let server = server.context("listening in the server pod")?;
        let took = std::thread::scope(|scope| {
            scope.spawn(|| {
                pin();
                server.incoming().take(CONNECTIONS).for_each(drop);
            });
            self.origin(target).run(|| {
                pin();
                connect(to)
            })?
        })?;
        Ok(CONNECTIONS as f64 / took.as_secs_f64())
    }

    /// Median round trip of a UDP flow in microseconds.
    fn round_trips(&self) -> Result<f64> {
        let to = SocketAddr::new(Target::ClusterIp.address(self.node).ip(), ECHO);
        let times = self.origin(Target::ClusterIp).run(|| -> Result<Vec<f64>> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            let mut times = Vec::new();
            for _ in 0..ROUND_TRIPS {
                let start = Instant::now();
                socket.send(b"ping")?;
                socket.recv(&mut [0; 256]).context("no answer")?;
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
            Ok(times)
        })??;
        Ok(Percentiles::of(times)?.p50)
    }
}

/// Keeps the calling thread on the first processor: client and server then take turns, and the time of a connection is
/// the work for it, without the wake-up of another processor.
fn pin() {
    // SAFETY: a set of processors is a plain bit mask, and the kernel copies it during the call. A failure costs accuracy.
    unsafe {
        let mut first: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut first);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const first);
    }
}

/// Opens connections, waits until the server closes each, and returns the time for all.
fn connect(to: SocketAddr) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(1)).context("connecting")?;
        // A reset leaves no TIME_WAIT that would exhaust the ports.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        (&stream).read(&mut [0]).context("waiting for the end of a connection")?;
    }
    Ok(start.elapsed())
}

fn first_packets(sides: &[Side<'_>], target: Target, rounds: u16) -> Result<Row> {
    let mut port = 21_000;
    let name = format!("first packet: {}", target.name());
    measure(&name, "µs", sides, rounds, |side| {
        port = if port > 64_000 { 21_000 } else { port + VOLLEY };
        side.volley(target, port, VOLLEY)
    })
}

/// Alternates between the proxies; returns each one's median over the rounds.
fn measure(
    name: &str,
    unit: &'static str,
    sides: &[Side<'_>],
    rounds: u16,
    mut one: impl FnMut(&Side<'_>) -> Result<f64>,
) -> Result<Row> {
    let mut values = vec![Vec::new(); sides.len()];
    for round in 0..usize::from(rounds) {
        // Nobody is always first.
        for step in 0..sides.len() {
            let number = (round + step) % sides.len();
            values[number].push(one(&sides[number])?);
        }
    }
    let median = |values| Ok(Percentiles::of(values)?.p50);
    Ok(Row { name: name.to_owned(), unit, medians: values.into_iter().map(median).collect::<Result<_>>()? })
}
