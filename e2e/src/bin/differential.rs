//! Differential test: the same cluster states and packets through the real kube-proxy and through Switchtower.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use switchtower_e2e::parity::{Verdict, World, case::Case, explain, generate, report, run, shrink};

/// Compares Switchtower with the real kube-proxy on random cluster states.
#[derive(Parser)]
struct Arguments {
    /// Seed of the random cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of cases.
    #[arg(long, default_value_t = 30)]
    cases: u64,
    /// Replay the case in this file instead.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Maximum number of runs to shrink a disagreeing case.
    #[arg(long, default_value_t = 40)]
    shrink: usize,
    /// Continue after a disagreement.
    #[arg(long)]
    keep_going: bool,
    /// Folder for disagreeing cases, each as a file for --replay.
    #[arg(long, default_value = "/tmp")]
    save: PathBuf,
}

#[allow(clippy::print_stdout, reason = "the program prints what it found")]
fn main() -> Result<()> {
    let Arguments { seed, cases, replay, shrink: attempts, keep_going, save } = Arguments::parse();
    let cases: Vec<Case> = match replay {
        Some(path) => {
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            vec![serde_json::from_str(&text).with_context(|| format!("{} is not a case", path.display()))?]
        }
        None => (0..cases).map(|number| generate::case(seed, number)).collect(),
    };
    println!("==> starting one control plane, two laboratories, both proxies");
    let start = Instant::now();
    let mut world = World::start()?;
    println!("started in {:.1} s", start.elapsed().as_secs_f64());
    let mut disagreements = 0;
    for case in &cases {
        let before = Instant::now();
        let found = match run(&mut world, case)? {
            Verdict::Agreement { states, wavered } => {
                let probes: usize = states.iter().map(Vec::len).sum();
                let Case { name, settings, services, steps } = case;
                println!(
                    "agrees     {name} ({} Services, {} steps, {probes} kinds of packets, {:.1} s; {settings})",
                    services.len(),
                    steps.len(),
                    before.elapsed().as_secs_f64()
                );
                for once in &wavered {
                    println!("    kube-proxy differed once\n{once}");
                }
                continue;
            }
            Verdict::Disagreement(found) => *found,
        };
        disagreements += 1;
        println!("{}", report(&found));
        let smallest = shrink(&mut world, found, attempts)?;
        println!("==> smallest case found\n{}", explain(&smallest));
        let file = save.join(format!("switchtower-{}.json", smallest.case.name.replace(' ', "-")));
        std::fs::write(&file, serde_json::to_string_pretty(&smallest.case)?)
            .with_context(|| format!("writing {}", file.display()))?;
        println!("==> replay with: --replay {}", file.display());
        if !keep_going {
            break;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} cases in {seconds:.0} s, {disagreements} disagreements", cases.len());
    anyhow::ensure!(disagreements == 0, "the proxies disagree");
    Ok(())
}
