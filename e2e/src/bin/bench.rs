//! `make bench`: measures Switchtower and the real kube-proxy.

use clap::Parser;
use switchtower_e2e::bench::{Figures, Percentiles, Proxy, Size, run};

/// Measures programming, one endpoint's change and memory against the real kube-proxy.
#[derive(Parser)]
struct Arguments {
    /// Services, each with three endpoints.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Changes of one endpoint for Switchtower.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Changes of one endpoint for kube-proxy; 0 skips kube-proxy.
    #[arg(long, default_value_t = 8)]
    oracle_changes: usize,
    /// Prints JSON only.
    #[arg(long)]
    json: bool,
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "the program prints what it measured")]
fn main() -> anyhow::Result<()> {
    let Arguments { services, changes, oracle_changes, json } = Arguments::parse();
    let size = Size { services, changes, oracle_changes };
    let figures = run(size, &|what| eprintln!("==> {what}"))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        print_table(&figures);
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the program prints what it measured")]
fn print_table(figures: &Figures) {
    let Figures { services, switchtower, kube_proxy, controller_cpu_per_change, controller_memory } = figures;
    println!("{services} Services x 3 endpoints{:>22}{:>16}", "switchtower", "kube-proxy");
    let row = |name: &str, unit: &str, value: &dyn Fn(&Proxy) -> f64| {
        let theirs = kube_proxy.as_ref().map_or("-".to_owned(), |proxy| format!("{:.1}", value(proxy)));
        println!("{name:<36}{:>12.1}{theirs:>16} {unit}", value(switchtower));
    };
    let percentiles = |name: &str, value: &dyn Fn(&Proxy) -> Percentiles| {
        row(&format!("{name}, p50"), "ms", &|proxy| value(proxy).p50);
        row(&format!("{name}, p99"), "ms", &|proxy| value(proxy).p99);
    };
    row("start to all programmed", "ms", &|proxy| proxy.first_programming);
    percentiles("API write to kernel commit", &|proxy| proxy.write_to_kernel);
    percentiles("API write to a plain watch", &|proxy| proxy.write_to_watch);
    percentiles("plain watch to kernel commit", &|proxy| proxy.watch_to_kernel);
    row("memory on the node", "MiB", &|proxy| proxy.memory);
    row("memory of processes it starts", "MiB", &|proxy| proxy.children_memory);
    println!("{:<36}{controller_cpu_per_change:>12.2}{:>16} ms", "controller's CPU for one change", "-");
    println!("{:<36}{controller_memory:>12.1}{:>16} MiB", "controller's memory", "-");
}
