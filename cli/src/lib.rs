//! `kubectl switchtower`: what the fleet does, why a packet goes where it goes, and whether a change has arrived.
//!
//! It reads ProxyStatus and other objects with the user's own rights, and asks the controller's admin API with a
//! token that the API server mints for it (`controller`). Every command makes a value and a text of it
//! (`output`); `-o json|yaml` prints the value. Nothing is changed but by `rollout`.
//!
//! Exit codes: 0 all is well, 1 something is wrong and was named, 2 it cannot be told (wrong usage, no connection, a
//! missing right).

pub mod args;
mod cluster;
mod commands;
mod controller;
mod diagnosis;
mod error;
mod forward;
mod output;

use std::process::ExitCode;

use args::{Cli, Command};
use error::CliError;
use output::{Exit, Report, Style};

/// Runs a command and prints what it found.
#[must_use]
pub fn main(cli: &Cli) -> ExitCode {
    let style = Style::detect(cli.global.color);
    // Several crates link rustls; without a process-wide provider they could disagree and panic.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(cli, style)),
        Err(error) => Err(CliError::new(format!("starting the runtime: {error}"))),
    };
    let exit = match outcome {
        Ok(report) => {
            output::print(&report, cli.global.output);
            report.exit
        }
        Err(error) => {
            output::print_error(&error, style);
            Exit::Unknown
        }
    };
    ExitCode::from(exit as u8)
}

async fn run(cli: &Cli, style: Style) -> Result<Report, CliError> {
    let global = &cli.global;
    match &cli.command {
        Command::Status(args) => commands::status::run(global, args, style).await,
        Command::Explain(args) => commands::explain::run(global, args, style).await,
        Command::Diff(args) => commands::diff::run(global, args, style).await,
        Command::Rules(args) => commands::rules::run(global, args).await,
        Command::Trace(args) => commands::trace::run(global, args, style).await,
        Command::Wait(args) => commands::wait::run(global, args).await,
        Command::Rollout(args) => commands::rollout::run(global, args, style).await,
        Command::Check(args) => commands::check::run(global, args, style).await,
        Command::Codes(args) => commands::codes::run(args),
        Command::Completion(args) => Ok(commands::completion::run(args)),
        Command::Complete(args) => Ok(commands::completion::complete(global, args).await),
    }
}
