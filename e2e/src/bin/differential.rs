//! The same cluster states through the real kube-proxy and through Switchtower, with packets.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use switchtower_e2e::differential::{World, case::Case, generate, report, run, shrink};

/// Compares Switchtower with the real kube-proxy on random cluster states.
#[derive(Parser)]
struct Arguments {
    /// The same seed gives the same cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many cases.
    #[arg(long, default_value_t = 30)]
    cases: u64,
    /// Runs the case of a file instead.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Runs spent on making a disagreeing case smaller.
    #[arg(long, default_value_t = 40)]
    shrink: usize,
    /// Goes on after a disagreement.
    #[arg(long)]
    keep_going: bool,
}

#[allow(clippy::print_stdout, reason = "the program prints what it found")]
fn main() -> Result<()> {
    let Arguments { seed, cases, replay, shrink: attempts, keep_going } = Arguments::parse();
    let cases: Vec<Case> = match replay {
        Some(path) => {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            vec![serde_json::from_str(&text).with_context(|| format!("{} is no case", path.display()))?]
        }
        None => (0..cases).map(|number| generate::case(seed, number)).collect(),
    };
    println!("==> one control plane, two laboratories, both proxies");
    let mut world = World::start()?;
    let mut disagreements = 0;
    for case in &cases {
        let Some(found) = run(&mut world, case)? else {
            println!(
                "agrees     {} ({} Services, {} steps)",
                case.name,
                case.services.len(),
                case.steps.len()
            );
            continue;
        };
        disagreements += 1;
        println!("{}", report(&found));
        let smallest = shrink(&mut world, found, attempts)?;
        println!("smallest form, for --replay:\n{}", serde_json::to_string_pretty(&smallest.case)?);
        println!("{}", report(&smallest));
        if !keep_going {
            break;
        }
    }
    println!("{} cases, {disagreements} disagreements", cases.len());
    anyhow::ensure!(disagreements == 0, "the proxies disagree");
    Ok(())
}
