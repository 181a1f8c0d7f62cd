//! Traffic of a migration: long-lived TCP connections and UDP flows through a ClusterIP and a NodePort, and new connections,
//! from the host and from a Pod of every node.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::super::control_plane::{Kubectl, address};
use super::super::layout::Layout;
use super::super::machine::Machine;
use super::super::rolling_update::request;
use super::super::shell::wait_until;

const MANIFESTS: &str = include_str!("traffic.yaml");
/// Long-lived TCP connections.
pub(super) const CONNECTIONS: usize = 1_000;
/// UDP flows of each source.
const FLOWS: usize = 10;
/// Threads that use the TCP connections.
const WORKERS: usize = 4;
/// Interval between two uses of connections by a worker: each connection is used about every two seconds.
const PACE: Duration = Duration::from_millis(6);
/// Interval between two new connections of a source.
const INTERVAL: Duration = Duration::from_millis(10);
/// Timeout of a response.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Duration beyond which a new connection counts as slow.
pub(super) const SLOW: Duration = Duration::from_millis(900);
/// Timeout of a UDP response.
const UDP_TIMEOUT: Duration = Duration::from_millis(500);

/// A network namespace that sends.
struct Source<'a> {
    machine: &'a Machine,
    /// Address of a Pod; `None`: the host.
    pod: Option<IpAddr>,
}

impl Source<'_> {
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        match self.pod {
            Some(address) => self.machine.in_pod_network(address, work),
            None => self.machine.in_network(work),
        }
    }
}

/// Open connections and flows.
pub(super) struct Traffic<'a> {
    sources: Vec<Source<'a>>,
    connections: Vec<TcpStream>,
    flows: Vec<UdpSocket>,
    targets: Vec<SocketAddr>,
}

/// Measurements of a phase.
#[derive(Debug, Default)]
pub(super) struct Phase {
    pub(super) duration: Duration,
    /// Long-lived connections that broke.
    pub(super) broken: usize,
    /// Flows without an answer at the end.
    pub(super) dead: usize,
    /// Datagrams sent, and those without an answer.
    pub(super) datagrams: (usize, usize),
    /// New connections, and those that failed.
    pub(super) attempts: (usize, usize),
    /// New connections that took longer than [`SLOW`]: a lost first packet is sent again after a second.
    pub(super) slow: usize,
    /// Longest time of a source without a successful new connection.
    pub(super) gap: Duration,
}

impl<'a> Traffic<'a> {
    /// Creates servers and clients, and opens all connections and flows.
    ///
    /// # Errors
    /// The Service does not work.
    pub(super) fn open(kubectl: &Kubectl, layout: &Layout, machines: &'a [Machine]) -> Result<Self> {
        kubectl.apply(MANIFESTS)?;
        for object in ["deployment/web", "daemonset/client"] {
            kubectl.run(&format!("rollout status --namespace migration {object} --timeout=120s"))?;
        }
        let pods = kubectl.json("get pods --namespace migration --selector app=client")?;
        let mut sources = Vec::new();
        for machine in machines {
            let own = |pod: &&Value| pod["spec"]["nodeName"] == machine.name;
            let pod = pods["items"].as_array().and_then(|pods| pods.iter().find(own));
            let address = address(&pod.context("a node without a client")?["status"]["podIP"])?;
            sources.push(Source { machine, pod: None });
            sources.push(Source { machine, pod: Some(address) });
        }
        let service = kubectl.json("get service web --namespace migration")?;
        let cluster_ip = address(&service["spec"]["clusterIP"])?;
        let port = |number: usize| {
            let port = service["spec"]["ports"][number]["nodePort"].as_u64().unwrap_or_default();
            u16::try_from(port).context("a NodePort")
        };
        let node = kubectl.json(&format!("get node {}", layout.node_names()[0]))?;
        let node = address(&node["status"]["addresses"][0]["address"])?;
        let targets = vec![SocketAddr::new(cluster_ip, 80), SocketAddr::new(node, port(0)?)];
        let udp = [SocketAddr::new(cluster_ip, 81), SocketAddr::new(node, port(1)?)];
        let mut traffic = Self { sources, connections: Vec::new(), flows: Vec::new(), targets };
        traffic.open_all(&udp)?;
        Ok(traffic)
    }

    fn open_all(&mut self, udp: &[SocketAddr]) -> Result<()> {
        let share = CONNECTIONS.div_ceil(self.sources.len());
        for source in &self.sources {
            wait_until("an answer of the Service", Duration::from_secs(60), || {
                source.inside(|| self.targets.iter().try_for_each(|target| request(*target)))?
            })?;
            let count = share.min(CONNECTIONS - self.connections.len());
            let opened = source.inside(|| -> Result<_> {
                let connect = |number: usize| connect(self.targets[number % self.targets.len()]);
                let connections: Vec<TcpStream> = (0..count).map(connect).collect::<Result<_>>()?;
                let flows =
                    (0..FLOWS).map(|number| flow(udp[number % udp.len()])).collect::<Result<Vec<_>>>()?;
                Ok((connections, flows))
            })??;
            self.connections.extend(opened.0);
            self.flows.extend(opened.1);
        }
        ensure!(self.connections.len() == CONNECTIONS, "{} connections", self.connections.len());
        Ok(())
    }

    /// Number of open connections.
    #[must_use]
    pub(super) fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Runs `action` under traffic. Broken connections are closed.
    ///
    /// # Errors
    /// The action failed, or a namespace cannot be entered.
    pub(super) fn during(&mut self, action: impl FnOnce() -> Result<()>) -> Result<Phase> {
        let (ended, start) = (AtomicBool::new(false), Instant::now());
        let ended = &ended;
        let counts = Counts::default();
        let counts = &counts;
        let connections = std::mem::take(&mut self.connections);
        let mut chunks: Vec<Vec<TcpStream>> = (0..WORKERS).map(|_| Vec::new()).collect();
        for (number, connection) in connections.into_iter().enumerate() {
            chunks[number % WORKERS].push(connection);
        }
        let mut phase = Phase::default();
        let (targets, flows) = (&self.targets, &self.flows);
        std::thread::scope(|scope| -> Result<()> {
            let workers: Vec<_> =
                chunks.into_iter().map(|chunk| scope.spawn(move || converse(chunk, ended))).collect();
            let udp = scope.spawn(move || echo(flows, counts, ended));
            let probers: Vec<_> = self
                .sources
                .iter()
                .map(|source| scope.spawn(move || source.inside(|| probe(targets, counts, ended))))
                .collect();
            // The state before the action is part of the measurement.
            std::thread::sleep(Duration::from_secs(2));
            let done = action();
            std::thread::sleep(Duration::from_secs(2));
            ended.store(true, Ordering::Relaxed);
            phase.duration = start.elapsed();
            for worker in workers {
                let (open, broken) = worker.join().unwrap_or_default();
                self.connections.extend(open);
                phase.broken += broken;
            }
            phase.dead = udp.join().unwrap_or(usize::MAX);
            for prober in probers {
                let gap = prober.join().unwrap_or_else(|_| bail!("a thread panicked"))?;
                phase.gap = phase.gap.max(gap);
            }
            done
        })?;
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        phase.datagrams = (read(&counts.datagrams), read(&counts.unanswered));
        phase.attempts = (read(&counts.attempts), read(&counts.lost));
        phase.slow = read(&counts.slow);
        Ok(phase)
    }
}

#[derive(Default)]
struct Counts {
    datagrams: AtomicUsize,
    unanswered: AtomicUsize,
    attempts: AtomicUsize,
    lost: AtomicUsize,
    slow: AtomicUsize,
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&target, TIMEOUT).context("connecting")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    exchange(&mut stream)?;
    Ok(stream)
}

/// Sends a request and reads its response; the connection stays open.
fn exchange(stream: &mut TcpStream) -> Result<()> {
    write!(stream, "GET /hostname HTTP/1.1\r\nHost: web\r\n\r\n").context("sending")?;
    let (mut text, mut buffer) = (String::new(), [0; 1_024]);
    loop {
        let length = stream.read(&mut buffer).context("receiving")?;
        ensure!(length > 0, "the server closed the connection");
        text += &String::from_utf8_lossy(&buffer[..length]);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let expected = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        if body.len() >= expected.context("a response without a length")?.trim().parse()? {
            return Ok(());
        }
    }
}

/// Uses the connections in turn. Returns those that are open, and the number of those that broke.
fn converse(mut connections: Vec<TcpStream>, ended: &AtomicBool) -> (Vec<TcpStream>, usize) {
    let before = connections.len();
    // Each connection is used at least once.
    loop {
        connections.retain_mut(|stream| {
            std::thread::sleep(PACE);
            exchange(stream).is_ok()
        });
        if ended.load(Ordering::Relaxed) {
            let broken = before - connections.len();
            return (connections, broken);
        }
    }
}

fn flow(target: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).context("opening a UDP socket")?;
    socket.connect(target).context("connecting a UDP socket")?;
    socket.set_read_timeout(Some(UDP_TIMEOUT))?;
    Ok(socket)
}

/// Sends on each flow in turn. Returns the number of flows whose last datagram was not answered.
fn echo(flows: &[UdpSocket], counts: &Counts, ended: &AtomicBool) -> usize {
    let mut buffer = [0; 512];
    loop {
        let mut dead = 0;
        for flow in flows {
            counts.datagrams.fetch_add(1, Ordering::Relaxed);
            let answered = flow.send(b"echo x\n").is_ok() && flow.recv(&mut buffer).is_ok();
            if !answered {
                dead += 1;
                counts.unanswered.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(PACE);
        }
        if ended.load(Ordering::Relaxed) {
            return dead;
        }
    }
}

/// Opens new connections to the targets in turn. Returns the longest time between two that succeeded.
fn probe(targets: &[SocketAddr], counts: &Counts, ended: &AtomicBool) -> Duration {
    let (mut last, mut gap) = (Instant::now(), Duration::ZERO);
    for target in targets.iter().cycle() {
        counts.attempts.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        match request(*target) {
            Ok(()) => {
                counts.slow.fetch_add(usize::from(began.elapsed() > SLOW), Ordering::Relaxed);
                gap = gap.max(last.elapsed());
                last = Instant::now();
            }
            Err(_) => {
                counts.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        if ended.load(Ordering::Relaxed) {
            break;
        }
        std::thread::sleep(INTERVAL);
    }
    gap.max(last.elapsed())
}
