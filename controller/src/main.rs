//! `switchtower-controller`: see [`switchtower_controller::cli`].

use std::process::ExitCode;

use clap::Parser as _;
use switchtower_controller::cli::Cli;

fn main() -> ExitCode {
    switchtower_controller::run::main(Cli::parse())
}
