//! `make fleet`: the controller's cost and the propagation of changes with thousands of hollow agents.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use switchtower_e2e::fleet::{Figures, Plan, plots, run, table};

/// Measures the real controller with hollow agents: real clients, tokens and views, no kernel.
#[derive(Parser)]
struct Arguments {
    /// Agents; several sizes are measured one after the other, each on a control plane of its own.
    #[arg(long, value_delimiter = ',', default_value = "100,500,1000")]
    nodes: Vec<usize>,
    /// Agents that keep their view and check every update, 100 by default. The others acknowledge the digest that an
    /// update announces, so that their work does not hide the controller's on the same machine.
    #[arg(long, default_value_t = 100)]
    checking: usize,
    /// Services, each with three endpoints.
    #[arg(long, default_value_t = 1_000)]
    services: usize,
    /// Single endpoint changes, each awaited on all nodes.
    #[arg(long, default_value_t = 20)]
    changes: usize,
    /// Endpoint changes per second, one phase for each rate.
    #[arg(long, value_delimiter = ',', default_value = "10,100")]
    rates: Vec<u32>,
    /// Length of each of these phases and of the idle phase, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Further changes over which the controller's memory is sampled.
    #[arg(long, default_value_t = 0)]
    memory_changes: usize,
    /// Leaves out the restart of the controller.
    #[arg(long)]
    no_restart: bool,
    /// Causes extreme events at the end, such as a restart of all agents.
    #[arg(long)]
    extremes: bool,
    /// Writes the figures to a file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Prints the tables of files that `--json` wrote, and measures nothing.
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    from: Vec<PathBuf>,
    /// Writes plots of the costs by number of agents, with fitted exponents, to a directory.
    #[arg(long, value_name = "DIRECTORY")]
    plots: Option<PathBuf>,
}

#[allow(clippy::print_stdout, reason = "the program prints what it measured")]
fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let all = if arguments.from.is_empty() { measure(&arguments)? } else { read(&arguments.from)? };
    println!("{}", table(&all));
    if let Some(directory) = &arguments.plots {
        for plot in plots(&all) {
            std::fs::write(directory.join(plot.file), plot.svg)?;
        }
    }
    Ok(())
}

fn read(files: &[PathBuf]) -> anyhow::Result<Vec<Figures>> {
    let mut all: Vec<Figures> = Vec::new();
    for path in files {
        let file = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let figures: Vec<_> =
            serde_json::from_slice(&file).with_context(|| format!("parsing {}", path.display()))?;
        all.extend(figures);
    }
    all.sort_by_key(|figures| figures.nodes);
    Ok(all)
}

#[allow(clippy::print_stderr, reason = "the program prints its progress")]
fn measure(arguments: &Arguments) -> anyhow::Result<Vec<Figures>> {
    let mut all = Vec::new();
    for &nodes in &arguments.nodes {
        let plan = Plan {
            nodes,
            checking: arguments.checking.min(nodes),
            services: arguments.services,
            idle: Duration::from_secs(arguments.seconds),
            changes: arguments.changes,
            rates: arguments.rates.clone(),
            rate_for: Duration::from_secs(arguments.seconds),
            memory_changes: arguments.memory_changes,
            restart: !arguments.no_restart,
            extremes: arguments.extremes,
        };
        all.push(run(&plan, &|what| eprintln!("==> {what}"))?);
        // After each size: a later one may fail.
        if let Some(path) = &arguments.json {
            std::fs::write(path, serde_json::to_vec_pretty(&all)?)?;
        }
        eprintln!("{}", table(&all[all.len() - 1..]));
    }
    Ok(all)
}
