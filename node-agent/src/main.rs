//! Binary of the node agent; the code is in the library.

use clap::Parser as _;

fn main() -> std::process::ExitCode {
    match switchtower_node_agent::run::run(switchtower_node_agent::cli::Cli::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            // A closed standard error leaves no way to report.
            let _ = writeln!(std::io::stderr(), "switchtower-node-agent: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
