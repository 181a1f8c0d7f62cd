//! Wiring of the agent: executes the command line, starts all parts and stops them.

mod shutdown;
mod sockets;
mod startup;
mod tasks;

use std::net::SocketAddr;

use anyhow::Context as _;
use axum::Router;
use prometheus::Registry;
use switchtower_proto::v1::ConntrackSettings;
use tokio::sync::{mpsc, watch};

use crate::cleanup;
use crate::cli::{Action, AgentArgs, Cli, LogFormat};
use crate::controller::bootstrap::Controllers;
use crate::controller::link::Contact;
use crate::controller::session::{Context, Identity};
use crate::drain::requests::Requests;
use crate::engine::{Command, Engine, Parts};
use crate::health::{Health, health_router, metrics_router, serve, serve_in_mode, serve_node_ports};
use crate::kernel::addresses::kernel_version;
use crate::kernel::conntrack::{Conntrack, Reconciler};
use crate::kernel::inspector::Inspector;
use crate::kernel::nft::KernelReader;
use crate::kernel::sysctl::{Sysctls, Unset};
use crate::metrics::{self, Metrics};
use crate::probe::TcpProber;
use crate::storage::files::StateFiles;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::trial_file::TrialFile;
use shutdown::{StopSignals, until_stopped, wait_for};
use sockets::Sockets;
use startup::{Waited, bound_memory, raise_descriptor_limit, telemetry, wait_for_lock};
use tasks::{probe_results, sender};

/// Capacity of the engine's queue; a session that is faster than the kernel blocks on it.
const COMMANDS: usize = 16;

/// Executes the command line.
///
/// # Errors
/// The agent cannot start, or its engine exits unexpectedly.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    run_with(cli, || Ok(()))
}

/// Executes the command line for a program that contains the agent. `started` runs once allocator and log are set up, and
/// may start threads: an agent must not be the second to set them up.
///
/// # Errors
/// As [`run`], or `started` fails.
pub fn run_with(cli: Cli, started: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let Some(action) = cli.command else {
        bound_memory();
        return agent(cli.agent, &cli.log_level, cli.log_format, started);
    };
    crate::log::to_stderr(&cli.log_level, cli.log_format, None)?;
    match action {
        Action::Cleanup { state_dir, stay, dry_run } => {
            let mode = if dry_run { cleanup::Mode::DryRun } else { cleanup::Mode::Remove };
            cleanup::run(&state_dir, mode, &mut std::io::stdout().lock())?;
            if stay {
                runtime()?.block_on(async {
                    StopSignals::listen()?.next().await;
                    Ok(())
                })
            } else {
                Ok(())
            }
        }
        Action::Sysctl { max_per_core, min, tcp_timeout_established, tcp_timeout_close_wait } => {
            let settings = ConntrackSettings {
                max_per_core,
                min,
                tcp_established_timeout_seconds: tcp_timeout_established,
                tcp_close_wait_timeout_seconds: tcp_timeout_close_wait,
                ..ConntrackSettings::default()
            };
            sysctl(&settings)
        }
    }
}

/// Applies the settings of connection tracking. An absent setting is no error: the first commit of the agent loads the
/// module, and the agent reports settings that are not in force.
fn sysctl(settings: &ConntrackSettings) -> anyhow::Result<()> {
    if let Err(error) = Conntrack::open().and_then(|mut table| table.load()) {
        tracing::warn!(%error, "cannot load connection tracking (module nf_conntrack_netlink)");
    }
    let (absent, refused): (Vec<_>, Vec<_>) =
        Sysctls::new("/proc/sys".as_ref()).write_all(settings).into_iter().partition(Unset::is_absent);
    if !absent.is_empty() {
        tracing::warn!(
            settings = absent.len(),
            "nf_conntrack is not loaded; its settings keep the kernel's values"
        );
    }
    anyhow::ensure!(
        refused.is_empty(),
        "cannot apply {} kernel settings; check that the container is privileged",
        refused.len()
    );
    Ok(())
}

/// Starts the runtime of the main thread.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")
}

/// Registers the metrics of the agent and of its process.
fn register_metrics(node_name: &str) -> anyhow::Result<(Registry, Metrics)> {
    let registry = Registry::new();
    let metrics = Metrics::register(&registry).context("register metrics")?;
    metrics::register_info(&registry, node_name).context("register metrics")?;
    #[cfg(target_os = "linux")]
    registry
        .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
        .context("register process metrics")?;
    Ok((registry, metrics))
}

/// Starts the engine in a thread of its own.
fn start_engine(
    parts: Parts,
    commands: mpsc::Receiver<Command>,
    runtime: tokio::runtime::Handle,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || Engine::start(parts).run(commands, &runtime))
        .context("start the engine's thread")
}

/// Starts the servers of health and probes.
fn listen(probes: SocketAddr, healthz: SocketAddr, health: &Health, router: Router) {
    tokio::spawn(serve(probes, "probes", router.clone()));
    tokio::spawn(serve_in_mode(healthz, "health", router, health.mode()));
}

/// Starts the servers of metrics.
fn listen_for_metrics(addresses: Vec<SocketAddr>, health: &Health, registry: Registry) {
    let router = metrics_router(registry);
    for address in addresses {
        tokio::spawn(serve_in_mode(address, "metrics", router.clone(), health.mode()));
    }
}

fn node_name(args: &AgentArgs) -> anyhow::Result<String> {
    let name = args.hostname_override.as_ref().or(args.node_name.as_ref());
    name.cloned().context("missing --node-name; in a pod, set it from spec.nodeName")
}

/// Runs the agent until a stop signal.
fn agent(
    args: AgentArgs,
    log_level: &str,
    log_format: LogFormat,
    started: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let snapshot_limit = args.snapshot_limit();
    let node_name = node_name(&args)?;
    let runtime = runtime()?;
    let (traces, log) = telemetry(&runtime, &node_name, log_level, log_format)?;
    started()?;
    raise_descriptor_limit();
    let waited = runtime.block_on(wait_for_lock(&args.state_dir))?;
    let Waited::Start(_lock, mut signals) = waited else { return Ok(()) };
    let controllers = Controllers::new(
        args.controller,
        args.bootstrap_dir,
        args.ca_file,
        args.token_file,
        Some(args.state_dir.clone()),
    );
    // In the main thread: sockets belong to the network namespace of the thread that opens them.
    let Sockets { kernel, flows, host_addresses, watched } = Sockets::open()?;
    let (registry, metrics) = register_metrics(&node_name)?;
    let health = Health::default();
    health.publish_mode(args.initial_mode.into());
    let (commands, received) = mpsc::channel(COMMANDS);
    let files = StateFiles::start().context("start the thread that writes state files")?;
    let parts = Parts {
        dataplane: Box::new(kernel),
        flows: Box::new(
            Reconciler::start(flows, sender(&commands, Command::Flows))
                .context("start the thread for conntrack")?,
        ),
        snapshot: Some(SnapshotFile::new(&args.state_dir, &node_name)),
        files: files.clone(),
        snapshot_limit,
        health: health.clone(),
        metrics: metrics.clone(),
        host_addresses,
        controllers: controllers.known_addresses(),
        sysctls: Sysctls::new("/proc/sys".as_ref()),
        log,
        prober: Box::new(TcpProber::new(runtime.handle().clone(), probe_results(&runtime, &commands))),
        trial: Some(TrialFile::new(&args.state_dir)),
        questions: KernelReader::open().and_then(Inspector::start).context("open a socket for queries")?,
        traces,
        initial_mode: args.initial_mode.into(),
        drain_gate: watch::Sender::default(),
    };
    let drain_port = parts.drain_gate.subscribe();
    let engine = start_engine(parts, received, runtime.handle().clone())?;
    watched.follow(&commands, &metrics)?;
    let identity = Identity { node_name, kernel_version: kernel_version(), files };
    let contact = Contact::default();
    let result = runtime.block_on(async {
        let router = health_router(&health, &contact, &metrics);
        listen(args.probe_bind_address, args.healthz_bind_address, &health, router);
        listen_for_metrics(args.metrics_bind_address, &health, registry);
        tokio::spawn(serve_node_ports(health, metrics.clone(), commands.clone()));
        let drains = Requests::default();
        tokio::spawn(crate::drain::server::serve(drain_port, drains.clone(), commands.clone()));
        let context = Context { controllers, identity, commands, metrics, contact, drains };
        until_stopped(context, &mut signals).await
    });
    wait_for(&runtime, &engine);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_name_the_node() {
        let (registry, _) = register_metrics("worker-1").unwrap();
        let families = registry.gather();
        let info = families.iter().find(|family| family.name() == "switchtower_agent_info").unwrap();
        let labels = info.get_metric()[0].get_label();
        let node = labels.iter().find(|label| label.name() == "node").unwrap();
        assert_eq!(node.value(), "worker-1");
    }
}
