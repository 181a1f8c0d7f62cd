//! `switchtower-controller`: see [`switchtower_standalone::cli`].

use std::process::ExitCode;

use clap::Parser as _;
use switchtower_standalone::cli::Cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    switchtower_standalone::main(Cli::parse())
}
