//! `make bench`: measures Switchtower and the real kube-proxy.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use switchtower_e2e::bench::packets::{self, PacketFigures, PacketSize, Proxy as Measured};
use switchtower_e2e::bench::{Figures, Percentiles, Proxy, Size, Sizes, run};
use switchtower_e2e::growth;

/// Measures Switchtower against the real kube-proxy. The figures of one run are comparable, those of two are not.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    part: Part,
    /// Numbers of endpoints of the Services.
    #[arg(long, global = true, value_enum, default_value_t = Sizes::Mixed)]
    sizes: Sizes,
    /// Prints JSON only.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Part {
    /// Programming, one endpoint's change and memory on a node.
    Node {
        /// Services.
        #[arg(long, default_value_t = 10_000)]
        services: usize,
        /// Changes of one endpoint for Switchtower.
        #[arg(long, default_value_t = 200)]
        changes: usize,
        /// Changes of one endpoint for kube-proxy; 0 skips kube-proxy.
        #[arg(long, default_value_t = 8)]
        oracle_changes: usize,
    },
    /// First packets, connections and established flows, with kube-proxy in both modes.
    Packets {
        /// Services; several numbers are measured one after the other.
        #[arg(long, value_delimiter = ',', default_value = "1,1000,10000")]
        services: Vec<usize>,
        /// Volleys of 100 first packets for each proxy and kind of traffic.
        #[arg(long, default_value_t = 60)]
        rounds: u16,
        /// Leaves kube-proxy out, which takes minutes to program tens of thousands of Services.
        #[arg(long)]
        switchtower_only: bool,
    },
    /// Growth of compilation, planning, snapshots and the agent's state with the size of the cluster.
    Growth {
        /// Writes a plot for each dimension to a directory.
        #[arg(long, value_name = "DIRECTORY")]
        plots: Option<PathBuf>,
    },
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "the program prints what it measured")]
fn main() -> anyhow::Result<()> {
    let Arguments { part, sizes, json } = Arguments::parse();
    let progress = |what: &str| eprintln!("==> {what}");
    match part {
        Part::Node { services, changes, oracle_changes } => {
            let figures = run(Size { services, sizes, changes, oracle_changes }, &progress)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&figures)?);
            } else {
                print_table(&figures, sizes);
            }
        }
        Part::Growth { plots } => {
            let report = growth::run(&progress)?;
            println!("{}", report.text.trim_end());
            if let Some(directory) = plots {
                for plot in report.plots {
                    std::fs::write(directory.join(plot.file), plot.svg)?;
                }
            }
        }
        Part::Packets { services, rounds, switchtower_only } => {
            let proxies = if switchtower_only { vec![Measured::Switchtower] } else { Measured::ALL.to_vec() };
            let mut all = Vec::new();
            for services in services {
                let size = PacketSize { services, sizes, proxies: proxies.clone(), rounds };
                let figures = packets::run(&size, &progress)?;
                if !json {
                    print_packets(&figures);
                }
                all.push(figures);
            }
            if json {
                println!("{}", serde_json::to_string_pretty(&all)?);
            }
        }
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the program prints what it measured")]
fn print_table(figures: &Figures, sizes: Sizes) {
    let Figures { services, switchtower, kube_proxy, controller_cpu_per_change, controller_memory } = figures;
    let head = format!("{services} Services, sizes {sizes:?}");
    println!("| {head:<36} | {:>12} | {:>12} |", "switchtower", "kube-proxy");
    println!("|{:-<38}|{:->13}:|{:->13}:|", "", "", "");
    let row = |name: &str, unit: &str, value: &dyn Fn(&Proxy) -> f64| {
        let theirs = kube_proxy.as_ref().map_or("-".to_owned(), |proxy| format!("{:.1}", value(proxy)));
        println!("| {:<36} | {:>12.1} | {theirs:>12} |", format!("{name}, {unit}"), value(switchtower));
    };
    let percentiles = |name: &str, value: &dyn Fn(&Proxy) -> Percentiles| {
        row(&format!("{name}, p50"), "ms", &|proxy| value(proxy).p50);
        row(&format!("{name}, p99"), "ms", &|proxy| value(proxy).p99);
    };
    row("start to all programmed", "ms", &|proxy| proxy.first_programming);
    percentiles("API write to kernel", &|proxy| proxy.write_to_kernel);
    percentiles("API write to plain watch", &|proxy| proxy.write_to_watch);
    percentiles("plain watch to kernel", &|proxy| proxy.watch_to_kernel);
    row("memory on the node", "MiB", &|proxy| proxy.memory);
    row("memory of its processes", "MiB", &|proxy| proxy.children_memory);
    println!(
        "| {:<36} | {controller_cpu_per_change:>12.2} | {:>12} |",
        "controller, CPU of a change, ms", "-"
    );
    println!("| {:<36} | {controller_memory:>12.1} | {:>12} |", "controller, memory, MiB", "-");
}

/// The ratio in parentheses is that to Switchtower.
#[allow(clippy::print_stdout, reason = "the program prints what it measured")]
fn print_packets(figures: &PacketFigures) {
    let heads: Vec<_> = figures.proxies.iter().map(|proxy| format!("{proxy:?}")).collect();
    println!("| {:<42} | {} |", format!("{} Services", figures.services), heads.join(" | "));
    println!("|{:-<44}|{}", "", "---:|".repeat(heads.len()));
    for row in &figures.rows {
        let first = row.medians.first().copied().unwrap_or(f64::NAN);
        let cell = |value: &f64| format!("{value:.1} ({:.2})", value / first);
        let cells: Vec<_> = row.medians.iter().map(cell).collect();
        println!("| {:<42} | {} |", format!("{}, {}", row.name, row.unit), cells.join(" | "));
    }
}
