//! Measures Switchtower and the real kube-proxy with the same API server, Services and events.
//!
//! Both are observed from outside: through the kernel's notification of committed transactions, and through /proc. A
//! plain watch on the same API server sees every change too (write → watch event), which is the lower bound for any
//! proxy. The machine is shared and noisy: compare only within one run.

mod load;
pub mod packets;
mod resources;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::json;

use crate::lab::kube_proxy::KubeProxy;
use crate::lab::wait;
use crate::observe::commits::Commits;
use crate::switchtower::{Fleet, FleetNode, NodeSpec};
use load::Load;
pub use load::Sizes;
use resources::{cpu_time, peak_of_children, resident};

/// Size of the measurement.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Services.
    pub services: usize,
    /// Numbers of their endpoints.
    pub sizes: Sizes,
    /// Endpoint changes measured with Switchtower.
    pub changes: usize,
    /// Endpoint changes measured with kube-proxy, which takes seconds for each; 0 skips kube-proxy.
    pub oracle_changes: usize,
}

/// Results; durations in milliseconds, memory in MiB.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Services.
    pub services: usize,
    pub switchtower: Proxy,
    /// The real kube-proxy, unless skipped.
    pub kube_proxy: Option<Proxy>,
    /// CPU time of the controller per change.
    pub controller_cpu_per_change: f64,
    /// Resident memory of the controller.
    pub controller_memory: f64,
}

/// Results of one proxy.
#[derive(Debug, Serialize)]
pub struct Proxy {
    /// Time from process start to the last commit of the first programming.
    pub first_programming: f64,
    /// Time from the API write to the kernel's commit.
    pub write_to_kernel: Percentiles,
    /// Time from the API write to a plain watch's event, for the same writes.
    pub write_to_watch: Percentiles,
    /// Time from the plain watch's event to the kernel's commit.
    pub watch_to_kernel: Percentiles,
    /// Resident memory of the process on the node.
    pub memory: f64,
    /// Peak resident memory of its child processes; 0 without children.
    pub children_memory: f64,
}

/// Median and 99th percentile.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    /// 99th percentile; the maximum of fewer than 100 samples.
    pub p99: f64,
}

impl Percentiles {
    fn of(mut samples: Vec<f64>) -> Result<Self> {
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (samples.len() as f64 * share).ceil() as usize;
            samples.get(index.saturating_sub(1)).copied().context("no changes were measured")
        };
        Ok(Self { p50: at(0.5)?, p99: at(0.99)? })
    }
}

/// Runs the measurement; `progress` receives one line per step.
///
/// # Errors
/// A part does not start, or a change does not reach the kernel in time.
pub fn run(size: Size, progress: &dyn Fn(&str)) -> Result<Figures> {
    progress("a control plane and two nodes");
    let specs = [NodeSpec::new("n1", "a", &[]), NodeSpec::new("n2", "a", &[])];
    let fleet = Fleet::build(&specs)?;
    fleet.install()?;
    progress(&format!("creating {} Services", size.services));
    let load = Load::create(fleet.kube(), size.services, size.sizes)?;
    fleet.start_controller()?;
    wait::until("the controller has compiled everything", Duration::from_secs(60), || {
        let microseconds = fleet.controller_metric("switchtower_first_compile_microseconds", "")?;
        anyhow::ensure!(microseconds > 0.0, "not yet");
        Ok(())
    })?;
    let controller = fleet.controller_id().context("the controller is not running")?;
    let [ours, theirs] = fleet.nodes() else { anyhow::bail!("expected two nodes") };

    progress("Switchtower programs everything");
    let commits = Commits::listen(&ours.net.namespace)?;
    let started = Instant::now();
    fleet.start_agent(ours)?;
    let first = commits.last(Duration::from_secs(60), Duration::from_secs(3));
    let first_programming = since(started, first.context("the agent commits nothing")?);
    progress(&format!("{} changes of one endpoint", size.changes));
    let cpu = cpu_time(controller)?;
    let changes = measure(&load, &commits, size.changes, Duration::ZERO, Duration::from_secs(10))?;
    let controller_cpu_per_change = (cpu_time(controller)? - cpu) / size.changes as f64;
    let agent = fleet.agent_id(ours).context("the agent is not running")?;
    let memory = resident(agent)?;
    let switchtower = changes.figures(first_programming, memory, 0.0)?;
    let controller_memory = resident(controller)?;

    let kube_proxy = match size.oracle_changes {
        0 => None,
        changes => Some(oracle(&fleet, theirs, &load, changes, progress)?),
    };
    Ok(Figures {
        services: size.services,
        switchtower,
        kube_proxy,
        controller_cpu_per_change,
        controller_memory,
    })
}

fn oracle(
    fleet: &Fleet,
    node: &FleetNode,
    load: &Load<'_>,
    count: usize,
    progress: &dyn Fn(&str),
) -> Result<Proxy> {
    progress("kube-proxy programs everything");
    let commits = Commits::listen(&node.net.namespace)?;
    let started = Instant::now();
    let proxy = KubeProxy::start(fleet.control_plane(), fleet.lab(), &node.net, &json!({}))?;
    let first = commits.last(Duration::from_secs(180), Duration::from_secs(10));
    proxy.process().check_running()?;
    let first_programming = since(started, first.context("kube-proxy commits nothing")?);
    progress(&format!("{count} changes of one endpoint"));
    // kube-proxy waits a second between syncs and cleans up in separate transactions: start each change from rest.
    let rest = Duration::from_secs(4);
    let children = peak_of_children(proxy.process().id());
    let changes = measure(load, &commits, count, rest, Duration::from_secs(60))?;
    changes.figures(first_programming, resident(proxy.process().id())?, children.stop())
}

struct Changes {
    write_to_kernel: Vec<f64>,
    write_to_watch: Vec<f64>,
}

impl Changes {
    fn figures(self, first_programming: f64, memory: f64, children_memory: f64) -> Result<Proxy> {
        let both = self.write_to_kernel.iter().zip(&self.write_to_watch);
        // The proxy's own watch may deliver a change before the plain one does.
        let watch_to_kernel = both.map(|(kernel, watch)| (kernel - watch).max(0.0)).collect();
        Ok(Proxy {
            first_programming,
            write_to_kernel: Percentiles::of(self.write_to_kernel)?,
            write_to_watch: Percentiles::of(self.write_to_watch)?,
            watch_to_kernel: Percentiles::of(watch_to_kernel)?,
            memory,
            children_memory,
        })
    }
}

fn measure(
    load: &Load<'_>,
    commits: &Commits,
    count: usize,
    rest: Duration,
    timeout: Duration,
) -> Result<Changes> {
    let mut changes = Changes { write_to_kernel: Vec::new(), write_to_watch: Vec::new() };
    let watch = load.watch()?;
    for _ in 0..count {
        std::thread::sleep(rest);
        commits.forget();
        let written = Instant::now();
        let version = load.change()?;
        let seen = watch.wait_for(&version, timeout).context("the plain watch does not see the change")?;
        let committed = commits.next(timeout).context("a change does not reach the kernel")?;
        changes.write_to_kernel.push(since(written, committed));
        changes.write_to_watch.push(since(written, seen));
    }
    Ok(changes)
}

fn since(start: Instant, end: Instant) -> f64 {
    end.saturating_duration_since(start).as_secs_f64() * 1000.0
}
