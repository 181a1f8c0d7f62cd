//! `kubectl switchtower`: inspect and operate the Switchtower service proxy.
//!
//! Commands read ProxyStatus and other objects with the permissions of the user, and query the controller's admin API
//! with a short-lived token (`controller`). Every command returns a value and a text (`output`); `-o json|yaml` prints
//! the value. Only `rollout`, also in the page of `dashboard`, `release-held` and
//! `migrate` change objects.
//!
//! Exit codes: 0 no problem found, 1 a problem was found and reported, 2 the command could not be completed (usage
//! error, no connection, missing permission).

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

/// Runs a command and prints its report.
#[must_use]
pub fn main(cli: &Cli) -> ExitCode {
    let style = Style::detect(cli.global.color);
    // Without a process-wide provider rustls panics if several providers are linked.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(cli, style)),
        Err(error) => Err(CliError::new(format!("cannot start the runtime: {error}"))),
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
        Command::Compare(args) => commands::compare::run(global, args, style).await,
        Command::ReleaseHeld(args) => commands::release_held::run(global, args).await,
        Command::Rules(args) => commands::rules::run(global, args).await,
        Command::Trace(args) => commands::trace::run(global, args, style).await,
        Command::Wait(args) => commands::wait::run(global, args).await,
        Command::Rollout(args) => commands::rollout::run(global, args, style).await,
        Command::Check(args) => commands::check::run(global, args, style).await,
        Command::Migrate(args) => commands::migrate::run(global, args, style).await,
        Command::Bundle(args) => commands::bundle::run(global, args).await,
        Command::Dashboard(args) => commands::dashboard::run(global, args).await,
        Command::Codes(args) => commands::codes::run(args),
        Command::Completion(args) => Ok(commands::completion::run(args)),
        Command::Complete(args) => Ok(commands::completion::complete(global, args).await),
    }
}
