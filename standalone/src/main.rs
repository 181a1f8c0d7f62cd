//! `switchtower-controller`: see [`switchtower_standalone::cli`].

use std::process::ExitCode;

use clap::Parser as _;
use switchtower_standalone::cli::Cli;

fn main() -> ExitCode {
    switchtower_standalone::main(Cli::parse())
}
