//! Growth of the costs of pure parts with the size of the cluster: no API server, no network, no kernel.
//!
//! One dimension grows while the others stay at a base size. A cost is the shortest of several runs, because other load
//! on the machine only adds time. The exponent of the power law that fits best shows how a cost grows: 0 is constant,
//! 1 is linear.

mod cluster;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use switchtower_core::layer::{Cursor, HealthCheckPlacement, Planned, Subscription};
use switchtower_node_agent::state::State;
use switchtower_proto::v1::{Update, UpdateEnd};

use crate::plot::{Plot, Series, svg};
use cluster::{Cluster, node_name, zone_of};

/// Runs of a cost that is cheap to repeat, and of one that is not.
const CHEAP: u32 = 200;
const EXPENSIVE: u32 = 5;

/// The size of a synthetic cluster.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub services: u32,
    /// Endpoints of each Service.
    pub endpoints: u32,
    pub nodes: u32,
    /// Zones; with more than one, EndpointSlices have zone hints.
    pub zones: u32,
    /// Endpoint changes of one publication.
    pub changes: u32,
}

/// The size from which each dimension grows.
const BASE: Size = Size { services: 2_000, endpoints: 3, nodes: 200, zones: 3, changes: 1 };

/// A dimension of the cluster, with the sizes to measure.
struct Dimension {
    name: &'static str,
    file: &'static str,
    sizes: Vec<Size>,
    value: fn(&Size) -> u32,
}

fn dimensions() -> Vec<Dimension> {
    let vary = |values: &[u32], set: fn(&mut Size, u32)| {
        let size = |value: &u32| {
            let mut size = BASE;
            set(&mut size, *value);
            size
        };
        values.iter().map(size).collect()
    };
    vec![
        Dimension {
            name: "services",
            file: "growth-services.svg",
            sizes: vary(&[1_000, 3_000, 10_000, 30_000, 60_000], |size, value| size.services = value),
            value: |size| size.services,
        },
        Dimension {
            name: "endpoints",
            file: "growth-endpoints.svg",
            sizes: vary(&[1, 3, 10, 30, 100], |size, value| size.endpoints = value),
            value: |size| size.endpoints,
        },
        Dimension {
            name: "nodes",
            file: "growth-nodes.svg",
            sizes: vary(&[100, 300, 1_000, 3_000, 10_000], |size, value| size.nodes = value),
            value: |size| size.nodes,
        },
        Dimension {
            name: "zones",
            file: "growth-zones.svg",
            sizes: vary(&[2, 4, 8, 16, 32], |size, value| size.zones = value),
            value: |size| size.zones,
        },
        Dimension {
            name: "changes",
            file: "growth-changes.svg",
            sizes: vary(&[1, 3, 10, 30, 100, 300], |size, value| size.changes = value),
            value: |size| size.changes,
        },
    ]
}

/// Costs at one size, in microseconds.
#[derive(Debug, Clone, Copy)]
struct Costs {
    /// Compilation of everything, after a start.
    compile: f64,
    /// Compilation of the changes, their digests and logs.
    publish: f64,
    /// The plan of the update for each node, apart from the first one, which joins the changes for all.
    plan: f64,
    /// The snapshot of the cluster, encoded and compressed once for all nodes.
    snapshot: f64,
    /// An agent's work on the snapshot, without the kernel.
    take_snapshot: f64,
    /// An agent's work on the update, without the kernel.
    take_update: f64,
}

/// Costs by name.
type Named = [(&'static str, fn(&Costs) -> f64); 6];
const COSTS: Named = [
    ("compile everything", |costs| costs.compile),
    ("publish changes", |costs| costs.publish),
    ("plan an update for a node", |costs| costs.plan),
    ("encode a snapshot", |costs| costs.snapshot),
    ("agent: take a snapshot", |costs| costs.take_snapshot),
    ("agent: take an update", |costs| costs.take_update),
];

/// Tables and plots.
#[derive(Debug)]
pub struct Report {
    /// Markdown.
    pub text: String,
    pub plots: Vec<Plot>,
}

/// Measures all dimensions; `progress` receives one line per size.
///
/// # Errors
/// An agent refuses an update, which is a defect.
pub fn run(progress: &dyn Fn(&str)) -> Result<Report> {
    let mut report = Report { text: String::new(), plots: Vec::new() };
    for dimension in dimensions() {
        let mut measured = Vec::new();
        for size in &dimension.sizes {
            let value = (dimension.value)(size);
            progress(&format!("{value} {}", dimension.name));
            measured.push((value, measure(*size)?));
        }
        let series = COSTS.map(|(name, cost)| {
            Series::new(name, measured.iter().map(|(value, costs)| (f64::from(*value), cost(costs))))
        });
        table(&mut report.text, dimension.name, &measured, &series);
        let svg = svg("CPU time, µs", dimension.name, &series);
        report.plots.push(Plot { file: dimension.file, svg });
    }
    Ok(report)
}

fn table(text: &mut String, name: &str, measured: &[(u32, Costs)], series: &[Series]) {
    let heads: Vec<_> = measured.iter().map(|(value, _)| value.to_string()).collect();
    let mut lines = vec![
        format!("| CPU time, µs, by {name} | {} | exponent |", heads.join(" | ")),
        format!("|---|{}", "---:|".repeat(heads.len() + 1)),
    ];
    for ((name, cost), series) in COSTS.iter().zip(series) {
        let cells: Vec<_> = measured.iter().map(|(_, costs)| format!("{:.1}", cost(costs))).collect();
        let exponent = series.exponent().unwrap_or(f64::NAN);
        lines.push(format!("| {name} | {} | {exponent:.2} |", cells.join(" | ")));
    }
    text.push_str(&lines.join("\n"));
    text.push_str("\n\n");
}

/// The shortest run in microseconds.
fn shortest(runs: u32, mut run: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let mut shortest = Duration::MAX;
    for _ in 0..runs {
        shortest = shortest.min(run()?);
    }
    Ok(shortest.as_secs_f64() * 1e6)
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

fn subscription(node: u32, size: Size) -> Subscription {
    Subscription {
        node: node_name(node),
        zone: Some(zone_of(node, size.zones)),
        settings: ("builtin".into(), 0),
        health_checks: HealthCheckPlacement::Shared,
    }
}

fn measure(size: Size) -> Result<Costs> {
    let runs = if size.services * size.endpoints > 50_000 { 3 } else { EXPENSIVE };
    let compile = shortest(runs, || {
        let mut compiler = cluster::compiler(size);
        Ok(timed(|| compiler.compile()).0)
    })?;
    let mut cluster = Cluster::new(size);
    let snapshot = shortest(runs, || match cluster.layers.plan(&subscription(0, size), None) {
        Planned::Compress(raw) => Ok(timed(|| raw.compress()).0),
        other => bail!("no snapshot to compress: {other:?}"),
    })?;
    let mut agent = Agent::new(&mut cluster, size)?;
    let take_snapshot = shortest(runs, || agent.take_everything(&cluster))?;
    let (mut publish, mut plan, mut take_update) = (f64::MAX, f64::MAX, f64::MAX);
    for round in 0..CHEAP / size.changes.min(20) {
        let first = subscription(0, size);
        let before = [cluster.layers.head(&first), agent.cursor.clone()];
        cluster.change(round);
        publish = publish.min(timed(|| cluster.publish()).0.as_secs_f64() * 1e6);
        let _ = cluster.layers.plan(&first, Some(&before[0]));
        let (took, planned) = timed(|| cluster.layers.plan(&agent.subscription, Some(&before[1])));
        plan = plan.min(took.as_secs_f64() * 1e6);
        take_update = take_update.min(agent.take(planned)?.as_secs_f64() * 1e6);
    }
    Ok(Costs { compile, publish, plan, snapshot, take_snapshot, take_update })
}

/// A node's place at the controller, and its agent's state.
struct Agent {
    subscription: Subscription,
    cursor: Cursor,
    state: State,
    generation: u64,
}

impl Agent {
    fn new(cluster: &mut Cluster, size: Size) -> Result<Self> {
        let subscription = subscription(1, size);
        while let Planned::Compress(raw) = cluster.layers.plan(&subscription, None) {
            cluster.layers.keep(raw.compress());
        }
        let cursor = cluster.layers.head(&subscription);
        Ok(Self { subscription, cursor, state: State::new(), generation: 0 })
    }

    /// Takes the snapshot into an empty state.
    fn take_everything(&mut self, cluster: &Cluster) -> Result<Duration> {
        (self.state, self.generation) = (State::new(), 0);
        self.take(cluster.layers.plan(&self.subscription, None))
    }

    fn take(&mut self, planned: Planned) -> Result<Duration> {
        let Planned::Update(plan) = planned else { bail!("nothing to send: {planned:?}") };
        let to = self.generation + plan.changes.max(1);
        let update = Update {
            from: (!plan.whole).then_some(self.generation),
            to,
            digest: plan.after.digest().to_bytes().to_vec(),
            ..Update::default()
        };
        let (took, taken) = timed(|| -> Result<()> {
            self.state.begin(&update).context("the agent refuses an update")?;
            plan.parts
                .iter()
                .try_for_each(|part| self.state.part(part))
                .context("the agent refuses a part")?;
            self.state.end(&UpdateEnd { to }, Instant::now()).context("the agent refuses an end")?;
            Ok(())
        });
        taken?;
        (self.generation, self.cursor) = (to, plan.after);
        Ok(took)
    }
}
