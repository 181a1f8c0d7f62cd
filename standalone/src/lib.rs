//! The program `switchtower-controller`: the controller, and the subcommand `standalone`, which runs the controller and the
//! node agent of one node in one process.
//!
//! Both parts are the code of the two programs, started with command lines of their own. They communicate over loopback,
//! with TLS and a token of the TokenRequest API: the controller authenticates its own agent as it does any other.

use std::process::ExitCode;

use switchtower_controller::cli::Cli as Controller;

pub mod cli;
mod lines;
mod run;
mod token;

use cli::{Cli, Command};

/// With the allocator of glibc, an update to an agent takes a quarter more CPU time. In the library, because
/// `hack/images.sh` links the program's main file against the library alone.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs the command. Exit codes: 0 done or stopped by a signal, 1 an error, which is printed.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let Cli { command, serve } = cli;
    let args = match command {
        Some(Command::Standalone(args)) => args,
        Some(Command::Controller(command)) => {
            return switchtower_controller::run::main(Controller { command: Some(command), serve });
        }
        None => return switchtower_controller::run::main(Controller { command: None, serve }),
    };
    switchtower_controller::run::conclude(run::run(&args))
}
