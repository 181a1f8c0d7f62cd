//! `completion`: a script for a shell.

use clap::CommandFactory as _;

use crate::args::{Cli, CompletionArgs};
use crate::output::Report;

pub(crate) fn run(args: &CompletionArgs) -> Report {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kubectl-switchtower", &mut script);
    Report::text(String::from_utf8_lossy(&script).into_owned())
}
