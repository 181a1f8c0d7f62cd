//! Flags of `migrate`.

use std::time::Duration;

use clap::{Args, Subcommand};

/// Flags of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Action.
    #[command(subcommand)]
    pub action: MigrateAction,
}

/// Actions of `migrate`.
#[derive(Debug, Subcommand)]
pub enum MigrateAction {
    /// Check whether kube-proxy can be replaced and print the steps; changes nothing
    Plan,
    /// Move nodes from kube-proxy to Switchtower; continues an interrupted migration
    Start(MigrateStartArgs),
    /// Show which proxy serves each node
    Status,
    /// Delete the DaemonSet of kube-proxy after all nodes have moved
    Finish(MigrateWaitArgs),
    /// Return all nodes to kube-proxy; continues an interrupted return
    Back(MigrateBackArgs),
}

/// Flags of `migrate start`.
#[derive(Debug, Args)]
pub struct MigrateStartArgs {
    /// Nodes to move [default: all Linux nodes]
    #[arg(value_name = "NODE")]
    pub nodes: Vec<String>,
    /// Number of nodes that move at a time
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub batch: u32,
    /// Continue although checks of migrate plan failed
    #[arg(long)]
    pub force: bool,
    /// Flags for waiting.
    #[command(flatten)]
    pub wait: MigrateWaitArgs,
}

/// Flags of `migrate back`.
#[derive(Debug, Args)]
pub struct MigrateBackArgs {
    /// Number of nodes that move at a time
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub batch: u32,
    /// Flags for waiting.
    #[command(flatten)]
    pub wait: MigrateWaitArgs,
}

/// Flags for waiting.
#[derive(Debug, Args)]
pub struct MigrateWaitArgs {
    /// Maximum time without progress, for example 30s or 5m
    #[arg(long, default_value = "5m", value_parser = super::duration, value_name = "DURATION")]
    pub timeout: Duration,
}
