//! Rolling updates of a Deployment with 30 replicas under continuous new connections from every node, with and without
//! the drain gate, while one agent is slow. Real kubelets send the hooks.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::control_plane::{Kubectl, address};
use super::installed::metrics_addresses;
use super::layout::{Layout, Tools};
use super::machine::Machine;
use super::shell::{Results, print, run, say, wait_until};
use crate::drain_gate::{self, GATE};
use crate::lab::http::http_get;

const MANIFESTS: &str = include_str!("drain.yaml");
/// The Deployment's replicas.
const REPLICAS: usize = 30;
/// Address in the status of the Service, from a documentation block; the nodes serve it themselves.
const LOAD_BALANCER: &str = "198.51.100.30";
/// Time for which the slow agent stops at a time, and time between two stops.
const SLOWED: Duration = Duration::from_secs(2);
const AWAKE: Duration = Duration::from_millis(300);
/// Interval between two connections from a node.
const INTERVAL: Duration = Duration::from_millis(5);
/// Timeout of a connection and its response.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of a rolling update.
const ROLLED: Duration = Duration::from_secs(420);

/// Runs both updates; prints a table, a line for each check, and the total.
///
/// # Errors
/// The cluster does not respond, or a check failed.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    let bench = Bench { kubectl: Kubectl::new(layout, tools), layout: layout.clone() };
    let mut results = Results::default();
    let updated = bench.run(&mut results);
    bench.kubectl.run("delete namespace drain --ignore-not-found --wait=false")?;
    bench.kubectl.run("delete proxyprofile drain --ignore-not-found --wait=false")?;
    updated?;
    results.end("drain")
}

struct Bench {
    kubectl: Kubectl,
    layout: Layout,
}

/// Connections of a rolling update, and those without a response.
struct Update {
    connections: usize,
    losses: Vec<String>,
    duration: Duration,
}

impl Bench {
    fn run(&self, results: &mut Results) -> Result<()> {
        say(&format!("{REPLICAS} replicas behind a ClusterIP, a NodePort and a LoadBalancer address"));
        self.kubectl.apply(MANIFESTS)?;
        let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER}]}}}).to_string();
        let patch =
            ["patch", "service", "web", "--namespace=drain", "--subresource=status", "--patch", &status];
        self.kubectl.run_arguments(&patch)?;
        self.open_gate()?;
        self.rolled_out()?;
        let targets = self.targets()?;

        say("rolling update without the gate");
        let without = self.update(&targets, &json!({"metadata": {"annotations": {"update": "1"}}}))?;
        say("rolling update to the template with the hook, whose old Pods do not have it yet");
        let hook = json!({"httpGet": {"port": GATE, "path": "/drained"}});
        let container = json!({"name": "web", "lifecycle": {"preStop": hook}});
        self.patch(&json!({"spec": {"containers": [container]}}))?;
        self.rolled_out()?;
        let before = self.waits()?;
        say("rolling update with the gate");
        let with = self.update(&targets, &json!({"metadata": {"annotations": {"update": "2"}}}))?;
        // The last hooks may outlast the rollout.
        wait_until("the end of all hooks", Duration::from_secs(60), || {
            let answered = self.waits()?.count.saturating_sub(before.count);
            ensure!(answered >= REPLICAS as u64, "{answered} of {REPLICAS} hooks have ended");
            Ok(())
        })?;
        let waits = self.waits()?.since(&before);

        print("| gate | replicas | seconds | connections | lost | wait p50 | wait p99 |")?;
        print("|---|---|---|---|---|---|---|")?;
        let row = |gate: &str, update: &Update, waits: &str| {
            let seconds = update.duration.as_secs();
            let (connections, lost) = (update.connections, update.losses.len());
            print(&format!("| {gate} | {REPLICAS} | {seconds} | {connections} | {lost} | {waits} |"))
        };
        row("no", &without, "- | -")?;
        let (median, high) = (waits.quantile(0.5), waits.quantile(0.99));
        row("yes", &with, &format!("≤ {median:.2} s | ≤ {high:.2} s"))?;
        results.add("connections are lost without the gate", || {
            ensure!(
                !without.losses.is_empty(),
                "none of {}: the test cannot show the gate",
                without.connections
            );
            Ok(())
        })?;
        results.add("no connection is lost with the gate", || {
            ensure!(with.losses.is_empty(), "{:?}", with.losses.iter().take(5).collect::<Vec<_>>());
            Ok(())
        })?;
        results.add("the median wait is the slow agent's share plus a second", || {
            ensure!(median <= SLOWED.as_secs_f64() + 1.1, "{median} s");
            Ok(())
        })
    }

    /// Sets the gate for all nodes by a profile, and waits until every agent listens.
    fn open_gate(&self) -> Result<()> {
        self.kubectl.apply(&drain_gate::profile("drain").to_string())?;
        wait_until("a listener on every node", Duration::from_secs(60), || {
            for node in self.layout.node_names() {
                let machine = Machine::find(&self.layout, &node)?;
                machine.in_network(|| TcpStream::connect(("127.0.0.1", GATE)))?.context(node)?;
            }
            Ok(())
        })
    }

    fn patch(&self, template: &Value) -> Result<()> {
        let patch = json!({"spec": {"template": template}}).to_string();
        self.kubectl.run_arguments(&[
            "patch",
            "deployment",
            "web",
            "--namespace=drain",
            "--patch",
            &patch,
        ])?;
        Ok(())
    }

    fn rolled_out(&self) -> Result<()> {
        let timeout = ROLLED.as_secs();
        self.kubectl
            .run(&format!("rollout status --namespace drain deployment/web --timeout={timeout}s"))
            .map(drop)
    }

    /// ClusterIP, NodePort of the first node, and LoadBalancer address.
    fn targets(&self) -> Result<Vec<SocketAddr>> {
        let service = self.kubectl.json("get service web --namespace drain")?;
        let node = self.kubectl.json(&format!("get node {}", self.layout.node_names()[0]))?;
        let node_port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no NodePort")?;
        Ok(vec![
            SocketAddr::new(address(&service["spec"]["clusterIP"])?, 80),
            SocketAddr::new(address(&node["status"]["addresses"][0]["address"])?, u16::try_from(node_port)?),
            SocketAddr::new(LOAD_BALANCER.parse()?, 80),
        ])
    }

    /// Changes the template and follows the update under load, with one agent slow.
    fn update(&self, targets: &[SocketAddr], template: &Value) -> Result<Update> {
        let nodes = self.layout.node_names();
        let slow = Machine::find(&self.layout, nodes.last().context("the cluster has no nodes")?)?;
        let (ended, count, losses) = (AtomicBool::new(false), AtomicUsize::new(0), Mutex::new(Vec::new()));
        let (ended, count, losses) = (&ended, &count, &losses);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let mut threads = vec![scope.spawn(move || slow_down(&slow, ended))];
            for name in &nodes {
                threads.push(scope.spawn(move || {
                    let machine = Machine::find(&self.layout, name)?;
                    machine.in_network(|| {
                        connect_until(ended, targets, count, |loss| {
                            if let Ok(mut losses) = losses.lock() {
                                losses.push(format!("{name} {loss}"));
                            }
                        });
                    })
                }));
            }
            let rolled = self.patch(template).and_then(|()| self.rolled_out());
            // The last Pods of the old template are still terminating.
            let gone = rolled
                .and_then(|()| wait_until("the old Pods' end", Duration::from_secs(90), || self.settled()));
            ended.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().unwrap_or_else(|_| bail!("a thread panicked"))?;
            }
            gone
        })?;
        let losses = losses.lock().map(|losses| losses.clone()).unwrap_or_default();
        Ok(Update { connections: count.load(Ordering::Relaxed), losses, duration: start.elapsed() })
    }

    /// Succeeds when no Pod is terminating.
    fn settled(&self) -> Result<()> {
        let pods = self.kubectl.json("get pods --namespace drain")?;
        let count = pods["items"].as_array().map_or(0, Vec::len);
        ensure!(count == REPLICAS, "{count} Pods");
        Ok(())
    }

    /// Returns the controller's histogram of the gate's queries, over all verdicts.
    fn waits(&self) -> Result<Waits> {
        let addresses = metrics_addresses(&self.kubectl, "switchtower-controller")?;
        Waits::parse(&http_get(*addresses.first().context("no controller is ready")?, "/metrics")?)
    }
}

/// Opens connections to the targets in turn until `ended`.
pub(super) fn connect_until(
    ended: &AtomicBool,
    targets: &[SocketAddr],
    count: &AtomicUsize,
    mut lost: impl FnMut(String),
) {
    for target in targets.iter().cycle() {
        if ended.load(Ordering::Relaxed) {
            return;
        }
        count.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = request(*target) {
            lost(format!("to {target}: {error:#}"));
        }
        std::thread::sleep(INTERVAL);
    }
}

pub(super) fn request(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, TIMEOUT).context("connecting")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET /hostname HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").context("sending")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("receiving")?;
    ensure!(text.starts_with("HTTP/1.1 200 "), "{text:?}");
    Ok(())
}

/// Stops the machine's agent for [`SLOWED`] at a time until `ended`.
fn slow_down(machine: &Machine, ended: &AtomicBool) -> Result<()> {
    let agent = machine.processes("switchtower-node-agent")?;
    let agent = agent.first().context("no agent")?.to_string();
    while !ended.load(Ordering::Relaxed) {
        run("kill", ["-STOP", &agent])?;
        std::thread::sleep(SLOWED);
        run("kill", ["-CONT", &agent])?;
        std::thread::sleep(AWAKE);
    }
    Ok(())
}

/// A histogram: number of values at most as large as each bound, in seconds.
#[derive(Debug, Default)]
struct Waits {
    buckets: Vec<(f64, u64)>,
    count: u64,
}

impl Waits {
    fn parse(metrics: &str) -> Result<Self> {
        let mut buckets: BTreeMap<u64, u64> = BTreeMap::new();
        for line in metrics.lines().filter(|line| line.starts_with("switchtower_drain_gate_seconds_bucket")) {
            let bound = line.split("le=\"").nth(1).and_then(|rest| rest.split('"').next());
            let bound: f64 = bound.context("a bucket without a bound")?.parse()?;
            let count: u64 = line.rsplit(' ').next().context("a bucket without a value")?.parse()?;
            // Positive floating-point numbers have the order of their bits.
            *buckets.entry(bound.to_bits()).or_default() += count;
        }
        let buckets: Vec<_> =
            buckets.into_iter().map(|(bits, count)| (f64::from_bits(bits), count)).collect();
        let count = buckets.last().map_or(0, |(_, count)| *count);
        Ok(Self { buckets, count })
    }

    fn since(mut self, before: &Self) -> Self {
        for (bound, count) in &mut self.buckets {
            let earlier = before.buckets.iter().find(|(known, _)| known == bound);
            *count -= earlier.map_or(0, |(_, count)| *count);
        }
        self.count -= before.count;
        self
    }

    /// Returns the upper bound of the bucket with this quantile, in seconds.
    fn quantile(&self, share: f64) -> f64 {
        let rank = (self.count as f64 * share).ceil() as u64;
        let found = self.buckets.iter().find(|(_, count)| *count >= rank);
        found.map_or(f64::INFINITY, |(bound, _)| *bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_bounds_of_new_values_over_all_verdicts() {
        let bucket = |verdict: &str, bound: &str, count: u64| {
            format!("switchtower_drain_gate_seconds_bucket{{verdict=\"{verdict}\",le=\"{bound}\"}} {count}\n")
        };
        let text = |counts: [u64; 3]| {
            let drained: String = ["0.5", "1", "+Inf"]
                .iter()
                .zip(counts)
                .map(|(bound, count)| bucket("Drained", bound, count))
                .collect();
            drained
                + &bucket("TimedOut", "0.5", 0)
                + &bucket("TimedOut", "1", 0)
                + &bucket("TimedOut", "+Inf", 1)
        };
        let before = Waits::parse(&text([1, 1, 1])).unwrap();
        let waits = Waits::parse(&text([4, 10, 10])).unwrap().since(&before);
        assert_eq!((waits.count, waits.quantile(0.3), waits.quantile(0.99)), (9, 0.5, 1.0));
    }
}
