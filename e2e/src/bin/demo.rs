//! `make demo`: runs the demonstration, or removes the remains of killed runs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use switchtower_e2e::demo;
use switchtower_e2e::lab::cleanup;

/// Shows what Switchtower does on a real control plane with three nodes and real packets.
#[derive(Parser)]
struct Arguments {
    /// Keep everything running until Ctrl-C and print how to explore it.
    #[arg(long)]
    keep: bool,
    /// Write the output as an SVG image as well.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Only remove the remains of killed runs.
    #[arg(long, conflicts_with_all = ["keep", "svg"])]
    sweep: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.sweep {
        anstream::println!("{} leftovers removed", cleanup::sweep());
        return ExitCode::SUCCESS;
    }
    demo::main(arguments.keep, arguments.svg.as_deref())
}
