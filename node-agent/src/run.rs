//! Wiring: from the command line to running parts and back.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use prometheus::Registry;
use switchtower_proto::v1::ConntrackSettings;
use tokio::sync::{mpsc, watch};

use crate::cli::{Action, AgentArgs, Cli};
use crate::conntrack::{Conntrack, Reconciler};
use crate::contact::Contact;
use crate::controllers::Controllers;
use crate::engine::{Command, Engine, Parts};
use crate::facts::{Addresses, kernel_version};
use crate::health::{Health, health_router, metrics_router, serve, serve_node_ports};
use crate::log::LogLevel;
use crate::metrics::Metrics;
use crate::nft::{ForeignProxy, KernelReader, Monitor, Nft, Notice};
use crate::probe::TcpProber;
use crate::questions::Questions;
use crate::session::Identity;
use crate::snapshot::SnapshotFile;
use crate::sysctl::Sysctls;
use crate::traces::Traces;
use crate::trial_file::TrialFile;

/// Commands that wait for the engine; a session that is faster than the kernel waits here.
const COMMANDS: usize = 16;
/// How long the end of an agent may take.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Many notices of one foreign transaction are one repair.
const SETTLE: Duration = Duration::from_millis(20);

/// Does what the command line says.
///
/// # Errors
/// What kept the agent from starting; never what happens later.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let log = crate::log::to_stderr(&cli.log_level, cli.log_format)?;
    match cli.command {
        None => agent(cli.agent, log),
        Some(Action::Cleanup { dry_run }) => cleanup(dry_run),
        Some(Action::Sysctl { max_per_core, min, tcp_timeout_established, tcp_timeout_close_wait }) => {
            let settings = ConntrackSettings {
                max_per_core,
                min,
                tcp_established_timeout_seconds: tcp_timeout_established,
                tcp_close_wait_timeout_seconds: tcp_timeout_close_wait,
                ..ConntrackSettings::default()
            };
            let failed = Sysctls::new("/proc/sys".as_ref()).write_all(&settings);
            anyhow::ensure!(
                failed == 0,
                "{failed} kernel settings could not be set; is the container privileged?"
            );
            Ok(())
        }
    }
}

fn cleanup(dry_run: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let tables = crate::nft::inspect().context("read our nftables tables")?;
    let verb = if dry_run { "would remove" } else { "remove" };
    for table in &tables {
        let (family, chains, elements) = (table.family, table.chains.len(), table.elements.len());
        let name = crate::nft::TABLE;
        writeln!(out, "{verb} table {family} {name}: {chains} chains, {elements} elements")?;
    }
    if dry_run {
        return Ok(());
    }
    if !crate::nft::cleanup().context("remove our nftables tables")? {
        writeln!(out, "there are no tables of ours in this network namespace")?;
    }
    Ok(())
}

fn agent(args: AgentArgs, log: LogLevel) -> anyhow::Result<()> {
    bound_memory();
    let node_name = args.hostname_override.or(args.node_name);
    let node_name = node_name.context("no --node-name; in a pod, take it from spec.nodeName")?;
    let controllers = Controllers::new(
        args.controller,
        args.bootstrap_dir,
        args.ca_file,
        args.token_file,
        Some(args.state_dir.clone()),
    );
    // All netlink sockets are opened here, by the first thread: they belong to its network namespace.
    let kernel = Nft::open().context("open nf_tables netlink; does this kernel have CONFIG_NF_TABLES?")?;
    let monitor = kernel.port().and_then(Monitor::open);
    let foreign = ForeignProxy::open().context("open nf_tables netlink")?;
    let flows = Conntrack::open().context("open conntrack netlink")?;
    let mut addresses = Addresses::open().context("open route netlink")?;
    let host_addresses = addresses.read().context("read the addresses of the interfaces")?;
    let registry = Registry::new();
    let metrics = Metrics::register(&registry).context("register metrics")?;
    #[cfg(target_os = "linux")]
    registry
        .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
        .context("register process metrics")?;
    let health = Health::default();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    let traces = {
        let _inside = runtime.enter();
        Traces::from_environment(&node_name).context("set up the export of spans")?
    };
    let (commands, received) = mpsc::channel(COMMANDS);
    let parts = Parts {
        dataplane: Box::new(kernel),
        flows: Box::new(
            Reconciler::start(flows, commands.clone()).context("start the thread for conntrack")?,
        ),
        snapshot: Some(SnapshotFile::new(&args.state_dir)),
        health: health.clone(),
        metrics: metrics.clone(),
        host_addresses,
        sysctls: Sysctls::new("/proc/sys".as_ref()),
        log,
        prober: Box::new(TcpProber::new(runtime.handle().clone(), commands.clone())),
        trial: Some(TrialFile::new(&args.state_dir)),
        questions: KernelReader::open().and_then(Questions::start).context("open a socket for questions")?,
        traces,
    };
    let handle = runtime.handle().clone();
    let engine = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || Engine::start(parts).run(received, &handle))
        .context("start the engine's thread")?;
    let to_engine = commands.clone();
    std::thread::Builder::new()
        .name("addresses".into())
        .spawn(move || addresses.follow(&to_engine))
        .context("start the thread that follows addresses")?;
    let to_engine = commands.clone();
    std::thread::Builder::new()
        .name("foreign-proxy".into())
        .spawn(move || foreign.follow(&to_engine))
        .context("start the thread that looks for kube-proxy's rules")?;
    match monitor {
        Ok(monitor) => watch_drift(monitor, commands.clone())?,
        Err(error) => tracing::warn!(%error, "foreign changes of our tables are not noticed"),
    }
    let identity = Identity { node_name, kernel_version: kernel_version() };
    let servers = (args.healthz_bind_address, args.metrics_bind_address);
    let contact = Contact::default();
    let result = runtime.block_on(async {
        tokio::spawn(serve(servers.0, "health", health_router(&health, &contact, &metrics)));
        let router = metrics_router(registry);
        for address in servers.1 {
            tokio::spawn(serve(address, "metrics", router.clone()));
        }
        tokio::spawn(serve_node_ports(health, metrics.clone(), commands.clone()));
        until_stopped(controllers, identity, commands, metrics, contact).await
    });
    wait_for(&runtime, &engine);
    result
}

async fn until_stopped(
    controllers: Controllers,
    identity: Identity,
    commands: mpsc::Sender<Command>,
    metrics: Metrics,
    contact: Contact,
) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let (stop, stopped) = watch::channel(false);
    let session =
        tokio::spawn(crate::session::run(controllers, identity, commands.clone(), metrics, contact, stopped));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; the kernel keeps what it holds");
    // Receivers that are gone have stopped already.
    let _ = stop.send(true);
    let _ = session.await;
    let _ = commands.send(Command::Stop).await;
    Ok(())
}

/// The engine's thread needs the runtime's timers until it ends, so both are waited for together.
fn wait_for(runtime: &tokio::runtime::Runtime, engine: &std::thread::JoinHandle<()>) {
    let ended = runtime.block_on(async {
        tokio::time::timeout(STOP_DEADLINE, async {
            while !engine.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    });
    if ended.is_err() {
        tracing::warn!("the engine did not end in time; the snapshot file may be older than the kernel");
    }
}

fn watch_drift(mut monitor: Monitor, commands: mpsc::Sender<Command>) -> anyhow::Result<()> {
    let follow = move || {
        loop {
            match monitor.wait(Duration::from_secs(3600)) {
                Ok(None) => {}
                Ok(Some(mut notice)) => {
                    std::thread::sleep(SETTLE);
                    if let Ok(Some(later)) = monitor.drain() {
                        notice = if notice == Notice::TableDeleted { notice } else { later };
                    }
                    let cause = match notice {
                        Notice::Changed => "changed",
                        Notice::TableDeleted => "table_deleted",
                        Notice::Overflow => "overflow",
                    };
                    if commands.blocking_send(Command::Drift { cause }).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "foreign changes of our tables cannot be followed; trying again");
                    std::thread::sleep(Duration::from_secs(5));
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("drift".into())
        .spawn(follow)
        .context("start the thread that watches drift")?;
    Ok(())
}

/// Large buffers go back to the system when they are freed, and few arenas hold the rest.
fn bound_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes plain numbers and is called before other threads exist.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 10);
    }
}
