//! `kubectl switchtower`: see the crate's library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    kubectl_switchtower::main(&kubectl_switchtower::args::Cli::parse())
}
