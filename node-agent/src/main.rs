//! The node agent's binary; everything is in the library.

use clap::Parser as _;

fn main() -> std::process::ExitCode {
    match switchtower_node_agent::run::run(switchtower_node_agent::cli::Cli::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            // Where standard error is closed there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "switchtower-node-agent: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
