//! A hollow fleet: the real controller and API server, and thousands of agents that have everything but a kernel.
//!
//! Each hollow agent is a client of its own, with a pod-bound token, a TLS connection, and the node agent's session code.
//! Some have its state code too, and acknowledge what their state holds; the others acknowledge what an update announces,
//! so that their work does not hide the controller's. The controller's CPU time and memory come from /proc and are
//! separate from those of the fleet, which runs in this process. The machine is shared by everything: compare CPU
//! times; latencies include the API server, the fleet and, where the processors are busy, their queues.

mod agent;
mod cluster;
mod extremes;
mod latency;
mod load;
mod measure;
mod plot;
mod report;
mod rows;
mod trickle;

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

pub use extremes::{Event, Extreme};
pub use latency::Latency;
pub use plot::plots;
pub use report::table;

use crate::switchtower::Fleet as Product;
use agent::{Agents, Applied};
use extremes::Extras;
use load::Load;
use measure::Usage;

/// The size and the phases of one measurement.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Agents, each with a Node.
    pub nodes: usize,
    /// Agents that keep their view and check every update. The others acknowledge what an update announces.
    pub checking: usize,
    /// Services with three endpoints each.
    pub services: usize,
    /// Length of the idle phase.
    pub idle: Duration,
    /// Single changes, each awaited on all nodes.
    pub changes: usize,
    /// Phases with this many endpoint changes per second.
    pub rates: Vec<u32>,
    /// Length of each of these phases.
    pub rate_for: Duration,
    /// Further changes over which memory is sampled; 0 leaves the phase out.
    pub memory_changes: usize,
    /// Restarts the controller and counts the agents that need a snapshot.
    pub restart: bool,
    /// Causes extreme events at the end.
    pub extremes: bool,
}

/// Results for one fleet. CPU times are those of the controller, in seconds unless named otherwise.
#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Agents.
    pub nodes: usize,
    /// Services with three endpoints each.
    pub services: usize,
    /// All agents connect at once.
    pub join: Join,
    /// Nothing changes.
    pub idle: Idle,
    /// One change at a time.
    pub single: Option<Single>,
    /// Changes at a rate.
    pub rates: Vec<Rate>,
    /// Resident memory over many changes.
    pub memory: Vec<Sample>,
    /// The controller restarts.
    pub restart: Option<Restart>,
    /// Extreme events.
    #[serde(default)]
    pub extremes: Vec<Extreme>,
}

/// All agents connect at once.
#[derive(Debug, Serialize, Deserialize)]
pub struct Join {
    /// Until every agent had acknowledged its first view, in seconds.
    pub seconds: f64,
    /// CPU time until then.
    pub cpu: f64,
    /// Resident memory then, in MiB.
    pub memory: f64,
    /// From the start of the join until every row was Synced, in seconds; `None` if that took too long.
    pub rows_seconds: Option<f64>,
    /// CPU time until then.
    pub rows_cpu: f64,
    /// Resident memory then, in MiB.
    pub rows_memory: f64,
}

/// Nothing changes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Idle {
    /// CPU time as a share of one core, in percent.
    pub core_percent: f64,
}

/// One change at a time, each awaited on all nodes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Single {
    /// Time from the API write to the nodes' acknowledgements.
    pub latency: Latency,
    /// CPU time of one change without the idle share, in milliseconds.
    pub cpu_milliseconds: f64,
    /// The same for each node, in microseconds.
    pub cpu_microseconds_per_node: f64,
}

/// Changes at a rate.
#[derive(Debug, Serialize, Deserialize)]
pub struct Rate {
    /// Changes per second that were attempted.
    pub per_second: u32,
    /// Changes per second that the API server took.
    pub written_per_second: f64,
    /// Median of the time that the API server took for a write, in milliseconds; part of the latency.
    #[serde(default)]
    pub write_p50: f64,
    /// CPU time of the hollow agents as a share of one core, in percent.
    #[serde(default)]
    pub agents_core_percent: f64,
    /// Time from the API write to the nodes' acknowledgements.
    pub latency: Latency,
    /// Median of the time to 99 % of nodes over the first quarter of the changes, in milliseconds.
    pub first_quarter: f64,
    /// The same over the last quarter: larger than the first if the lag grows.
    pub last_quarter: f64,
    /// From the last API write until all nodes held it, in seconds; `None` if that took too long.
    pub drain_seconds: Option<f64>,
    /// CPU time as a share of one core, in percent.
    pub core_percent: f64,
    /// CPU time for each change, in milliseconds.
    pub cpu_milliseconds: f64,
    /// CPU time for each change and node, in microseconds.
    pub cpu_microseconds_per_node: f64,
    /// Updates that each node received.
    pub updates_per_node: f64,
    /// Resident memory afterwards, in MiB.
    pub memory: f64,
}

/// Resident memory after a number of changes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Changes since the start.
    pub changes: usize,
    /// Resident memory in MiB.
    pub memory: f64,
}

/// The controller restarts.
#[derive(Debug, Serialize, Deserialize)]
pub struct Restart {
    /// From the controller's end until all agents were connected again, in seconds; `None` if that took too long.
    pub seconds: Option<f64>,
    /// CPU time of the new controller until then.
    pub cpu: f64,
    /// Agents that returned.
    pub returned: usize,
    /// Agents that returned without a snapshot.
    pub resumed: usize,
}

/// Builds a control plane and a fleet, and measures.
///
/// # Errors
/// A program does not start, the API server refuses, or agents do not connect.
pub fn run(plan: &Plan, progress: &dyn Fn(&str)) -> Result<Figures> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    measure::raise_descriptor_limit()?;
    progress(&format!("{} nodes: starting the control plane", plan.nodes));
    let product = Product::build(&[])?;
    product.install()?;
    let client = product.kube().client();
    progress("creating Nodes, Services and tokens");
    let kube = product.kube();
    let nodes = plan.nodes + if plan.extremes { extremes::SLOW_READERS } else { 0 };
    let load = kube.block_on(async {
        cluster::create_nodes(&client, nodes).await?;
        Load::create(&client, plan.services, plan.nodes).await
    })?;
    let tokens = kube.block_on(cluster::create_tokens(&client, nodes))?;
    product.start_controller()?;
    let directory = tempfile::tempdir().context("creating a directory for tokens")?;
    product.write_bootstrap_to(directory.path())?;
    product.controller_listens(Duration::from_secs(60))?;
    let measured = Measured { plan, product: &product, load: &load, runtime: &runtime };
    measured.all(&tokens, directory.path(), progress)
}

struct Measured<'a> {
    plan: &'a Plan,
    product: &'a Product,
    load: &'a Load,
    runtime: &'a tokio::runtime::Runtime,
}

impl Measured<'_> {
    fn all(
        &self,
        tokens: &[String],
        directory: &std::path::Path,
        progress: &dyn Fn(&str),
    ) -> Result<Figures> {
        let Plan { nodes, services, .. } = *self.plan;
        progress("joining");
        let (tokens, slow) = tokens.split_at(nodes);
        let (mut agents, join) = self.join(tokens, directory)?;
        progress("idle");
        let idle = self.idle()?;
        progress("single changes");
        let single = (self.plan.changes > 0).then(|| self.single(&agents, &idle)).transpose()?;
        let mut rates = Vec::new();
        for &rate in &self.plan.rates {
            progress(&format!("{rate} changes per second"));
            rates.push(self.rate(&agents, rate)?);
        }
        let memory = self.memory(&agents, progress)?;
        let restart = if self.plan.restart {
            progress("restarting the controller");
            Some(self.restart(&agents)?)
        } else {
            None
        };
        let extremes = if self.plan.extremes {
            let other = tempfile::tempdir().context("creating a directory for tokens")?;
            self.product.write_bootstrap_to(other.path())?;
            self.extremes(&mut agents, &Extras { tokens: slow, directory: other.path() }, progress)?
        } else {
            Vec::new()
        };
        Ok(Figures { nodes, services, join, idle, single, rates, memory, restart, extremes })
    }

    fn usage(&self) -> Result<Usage> {
        self.product.check_controller()?;
        Usage::of(self.product.controller_id().context("the controller does not run")?)
    }

    fn updates_per_node(&self, updates: &[Vec<Applied>]) -> f64 {
        updates.iter().map(Vec::len).sum::<usize>() as f64 / self.plan.nodes as f64
    }

    /// The longest wait for a fleet of this size.
    fn patience(&self) -> Duration {
        Duration::from_secs(60 + self.plan.nodes as u64 / 20)
    }

    fn join(&self, tokens: &[String], directory: &std::path::Path) -> Result<(Agents, Join)> {
        let before = self.usage()?;
        let agents = Agents::start(self.runtime, 0, tokens, directory, self.plan.checking)?;
        let joined =
            agents.wait("all agents have a view", self.patience(), |agent| agent.generation() > 0)?;
        let after = self.usage()?;
        let kube = self.product.kube();
        let rows = kube.block_on(rows::wait_until_current(
            &kube.client(),
            self.plan.nodes,
            before.at,
            self.patience() * 2,
        ))?;
        let written = self.usage()?;
        let join = Join {
            seconds: joined.duration_since(before.at).as_secs_f64(),
            cpu: after.cpu - before.cpu,
            memory: after.memory,
            rows_seconds: rows.map(|took| took.as_secs_f64()),
            rows_cpu: written.cpu - before.cpu,
            rows_memory: written.memory,
        };
        Ok((agents, join))
    }

    fn idle(&self) -> Result<Idle> {
        // The end of the join is not idle time.
        std::thread::sleep(Duration::from_secs(3));
        let before = self.usage()?;
        std::thread::sleep(self.plan.idle);
        Ok(Idle { core_percent: self.usage()?.core_percent_since(&before) })
    }

    fn single(&self, agents: &Agents, idle: &Idle) -> Result<Single> {
        agents.record();
        let before = self.usage()?;
        let mut changes = Vec::new();
        for _ in 0..self.plan.changes {
            let change = self.product.kube().block_on(self.load.change())?;
            agents.wait("one change", self.patience(), |agent| agent.slices() >= change.version)?;
            changes.push(change);
            // Rows and acknowledgements of the last nodes belong to this change.
            std::thread::sleep(Duration::from_millis(1_000));
        }
        let after = self.usage()?;
        let seconds = after.at.duration_since(before.at).as_secs_f64();
        let cpu = after.cpu - before.cpu - idle.core_percent / 100.0 * seconds;
        let cpu_milliseconds = cpu * 1_000.0 / self.plan.changes as f64;
        Ok(Single {
            latency: Latency::of(&changes, &agents.take()).0,
            cpu_milliseconds,
            cpu_microseconds_per_node: cpu_milliseconds * 1_000.0 / self.plan.nodes as f64,
        })
    }

    fn rate(&self, agents: &Agents, per_second: u32) -> Result<Rate> {
        agents.record();
        let own = Usage::of(std::process::id())?;
        let before = self.usage()?;
        let changes = self.product.kube().block_on(self.load.run(per_second, self.plan.rate_for))?;
        let written = self.usage()?;
        let last = changes.iter().map(|change| change.version).max().context("no change was written")?;
        let drained = agents.wait("all changes", self.patience(), |agent| agent.slices() >= last).ok();
        let after = self.usage()?;
        let own = Usage::of(std::process::id())?.core_percent_since(&own);
        let writes: Vec<_> = changes.iter().map(|change| change.write.as_secs_f64() * 1_000.0).collect();
        let count = changes.len() as f64;
        let updates = agents.take();
        let (latency, each) = Latency::of(&changes, &updates);
        let quarter = each.len().div_ceil(4);
        let cpu_milliseconds = (after.cpu - before.cpu) * 1_000.0 / count;
        Ok(Rate {
            per_second,
            written_per_second: count / written.at.duration_since(before.at).as_secs_f64(),
            write_p50: latency::median(&writes),
            agents_core_percent: own,
            latency,
            first_quarter: latency::median(&each[..quarter.min(each.len())]),
            last_quarter: latency::median(&each[each.len() - quarter.min(each.len())..]),
            drain_seconds: drained.map(|at| at.saturating_duration_since(written.at).as_secs_f64()),
            core_percent: after.core_percent_since(&before),
            cpu_milliseconds,
            cpu_microseconds_per_node: cpu_milliseconds * 1_000.0 / self.plan.nodes as f64,
            updates_per_node: self.updates_per_node(&updates),
            memory: after.memory,
        })
    }

    fn memory(&self, agents: &Agents, progress: &dyn Fn(&str)) -> Result<Vec<Sample>> {
        const SAMPLES: usize = 10;
        let mut samples = Vec::new();
        for step in 0..=SAMPLES {
            if self.plan.memory_changes == 0 {
                break;
            }
            if step > 0 {
                let changes = self.plan.memory_changes.div_ceil(SAMPLES);
                let version = self.product.kube().block_on(self.load.change_many(changes))?;
                agents.wait("many changes", self.patience() * 4, |agent| agent.slices() >= version)?;
            }
            let sample = Sample { changes: self.load.changes(), memory: self.usage()?.memory };
            progress(&format!("{} changes: {:.0} MiB", sample.changes, sample.memory));
            samples.push(sample);
        }
        Ok(samples)
    }

    fn restart(&self, agents: &Agents) -> Result<Restart> {
        let before = agents.returns();
        let began = std::time::Instant::now();
        self.product.stop_controller(libc::SIGTERM)?;
        self.product.start_controller()?;
        let back = agents.wait_for_return(&before, self.patience()).ok();
        let usage = self.usage()?;
        let (returned, resumed) = agents.returned_since(&before);
        let seconds = back.map(|at| at.duration_since(began).as_secs_f64());
        Ok(Restart { seconds, cpu: usage.cpu, returned, resumed })
    }
}
