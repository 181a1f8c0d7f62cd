//! Wiring: from the command line to running parts and back.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use prometheus::{IntGauge, Registry};
use switchtower_proto::v1::ConntrackSettings;
use tokio::sync::{mpsc, watch};

use crate::cli::{Action, AgentArgs, Cli, LogFormat};
use crate::controller::bootstrap::Controllers;
use crate::controller::link::Contact;
use crate::controller::session::Identity;
use crate::engine::{Command, DriftCause, Engine, Parts};
use crate::health::{Health, health_router, metrics_router, serve, serve_node_ports};
use crate::kernel::addresses::{Addresses, kernel_version};
use crate::kernel::conntrack::{Conntrack, Reconciler};
use crate::kernel::inspector::Inspector;
use crate::kernel::nft::{ForeignProxy, KernelReader, Monitor, Nft, Notice};
use crate::kernel::sysctl::{Sysctls, Unset};
use crate::log::LogLevel;
use crate::metrics::Metrics;
use crate::probe::{RoundResults, TcpProber};
use crate::storage::files::StateFiles;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::state_lock::{LockError, StateLock};
use crate::storage::trial_file::TrialFile;
use crate::traces::Traces;

/// Commands that wait for the engine; a session that is faster than the kernel waits here.
const COMMANDS: usize = 16;
/// How long the end of an agent may take.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Many notices of one foreign transaction are one repair.
const SETTLE: Duration = Duration::from_millis(20);
/// Pause before a failed attempt to watch our tables is repeated.
const REOPEN: Duration = Duration::from_secs(5);
/// How long the start waits for a disk that does not answer.
const LOCK_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two looks whether the other agent has ended.
const LOCK_RETRY: Duration = Duration::from_millis(200);
/// The log says this often that another agent is waited for.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Does what the command line says.
///
/// # Errors
/// What kept the agent from starting; never what happens later.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let Some(action) = cli.command else { return agent(cli.agent, &cli.log_level, cli.log_format) };
    crate::log::to_stderr(&cli.log_level, cli.log_format, None)?;
    match action {
        Action::Cleanup { state_dir, stay, dry_run } => {
            crate::cleanup::run(&state_dir, dry_run, &mut std::io::stdout().lock())?;
            if stay { runtime()?.block_on(told_to_stop()) } else { Ok(()) }
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

/// Sets the kernel's connection tracking. A setting that does not exist is no failure: the agent must be able to start,
/// its first commit loads what is missing, and it reports what is not in force.
fn sysctl(settings: &ConntrackSettings) -> anyhow::Result<()> {
    if let Err(error) = Conntrack::open().and_then(|mut table| table.load()) {
        tracing::warn!(%error, "the kernel cannot load connection tracking (the module nf_conntrack_netlink)");
    }
    let (absent, refused): (Vec<_>, Vec<_>) =
        Sysctls::new("/proc/sys".as_ref()).write_all(settings).into_iter().partition(Unset::is_absent);
    if !absent.is_empty() {
        tracing::warn!(
            settings = absent.len(),
            "nf_conntrack is not loaded; its settings stay as the kernel has them"
        );
    }
    anyhow::ensure!(
        refused.is_empty(),
        "{} kernel settings could not be set; is the container privileged?",
        refused.len()
    );
    Ok(())
}

/// The runtime of a process that waits for a signal.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")
}

async fn told_to_stop() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// What became of the wait for the state directory.
enum Waited {
    /// This agent may work; without a lock where there can be none.
    Work(Option<StateLock>),
    /// A signal came first.
    Stop,
}

/// Takes the lock of the state directory, waiting as long as another agent has it: during a rolling update the one
/// before may still be ending. A directory that cannot be locked, or not in time, is no reason to serve nothing.
async fn lock(state: PathBuf) -> anyhow::Result<Waited> {
    let mut told = None;
    let taken = async {
        loop {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let directory = state.clone();
            let attempt = move || drop(sender.send(StateLock::take(&directory)));
            std::thread::Builder::new().name("state-lock".into()).spawn(attempt).context("start a thread")?;
            match tokio::time::timeout(LOCK_DEADLINE, receiver).await {
                Ok(Ok(Ok(lock))) => return Ok::<_, anyhow::Error>(Some(lock)),
                Ok(Ok(Err(error @ LockError::Held { .. }))) => {
                    if told.is_none_or(|told: Instant| told.elapsed() >= TELL_AGAIN) {
                        tracing::warn!(%error, "waiting until it ends; two agents would undo each other's changes");
                        told = Some(Instant::now());
                    }
                    tokio::time::sleep(LOCK_RETRY).await;
                }
                Ok(Ok(Err(error @ LockError::Io { .. }))) => {
                    tracing::warn!(%error, "the state directory is not usable; the agent works without it");
                    return Ok(None);
                }
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(directory = %state.display(), "the state directory does not answer; the agent works without a lock");
                    return Ok(None);
                }
            }
        }
    };
    tokio::select! {
        lock = taken => lock.map(Waited::Work),
        stop = told_to_stop() => stop.map(|()| Waited::Stop),
    }
}

/// The soft limit of descriptors is often 1,024, and hundreds of health check ports take one for each address.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write one rlimit that lives through them.
    let raised = unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
        } else {
            -1
        }
    };
    if raised != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

fn agent(args: AgentArgs, log_level: &str, log_format: LogFormat) -> anyhow::Result<()> {
    bound_memory();
    let snapshot_limit = args.snapshot_limit();
    let node_name = args.hostname_override.or(args.node_name);
    let node_name = node_name.context("no --node-name; in a pod, take it from spec.nodeName")?;
    let runtime = runtime()?;
    let (traces, log) = telemetry(&runtime, &node_name, log_level, log_format)?;
    raise_descriptor_limit();
    let Waited::Work(_lock) = runtime.block_on(lock(args.state_dir.clone()))? else { return Ok(()) };
    let controllers = Controllers::new(
        args.controller,
        args.bootstrap_dir,
        args.ca_file,
        args.token_file,
        Some(args.state_dir.clone()),
    );
    // All netlink sockets are opened here, by the first thread: they belong to its network namespace.
    let kernel = Nft::open().context("open nf_tables netlink; does this kernel have CONFIG_NF_TABLES?")?;
    let own_port = kernel.port().context("open nf_tables netlink")?;
    let monitor = Monitor::open(own_port);
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
    let (commands, received) = mpsc::channel(COMMANDS);
    let files = StateFiles::start().context("start the thread that writes state files")?;
    let parts = Parts {
        dataplane: Box::new(kernel),
        flows: Box::new(
            Reconciler::start(flows, sender(&commands, Command::Flows))
                .context("start the thread for conntrack")?,
        ),
        snapshot: Some(SnapshotFile::new(&args.state_dir)),
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
    };
    let handle = runtime.handle().clone();
    let engine = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || Engine::start(parts).run(received, &handle))
        .context("start the engine's thread")?;
    follow("addresses", &commands, move |commands| {
        addresses.follow(sender(commands, Command::HostAddresses));
    })?;
    follow("foreign-proxy", &commands, move |commands| {
        foreign.follow(sender(commands, Command::ForeignProxy));
    })?;
    let watched = metrics.drift_watched.clone();
    follow("drift", &commands, move |commands| watch_drift(monitor, own_port, commands, &watched))?;
    let identity = Identity { node_name, kernel_version: kernel_version(), files };
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
    let (stop, stopped) = watch::channel(false);
    let session = tokio::spawn(crate::controller::session::run(
        controllers,
        identity,
        commands.clone(),
        metrics,
        contact,
        stopped,
    ));
    tokio::select! {
        signal = told_to_stop() => signal?,
        () = commands.closed() => {
            anyhow::bail!("the engine's thread ended by itself; what it said last is in the log. The kernel keeps what it holds");
        }
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

/// Returns a function that sends notices to the engine as commands; it breaks once the engine has ended.
fn sender<T, C: Fn(T) -> Command>(
    commands: &mpsc::Sender<Command>,
    command: C,
) -> impl Fn(T) -> ControlFlow<()> + use<T, C> {
    let commands = commands.clone();
    move |notice| match commands.blocking_send(command(notice)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

/// Forwards the results of probes to the engine.
fn probe_results(
    runtime: &tokio::runtime::Runtime,
    commands: &mpsc::Sender<Command>,
) -> mpsc::Sender<RoundResults> {
    let (results, mut received) = mpsc::channel(1);
    let commands = commands.clone();
    runtime.spawn(async move {
        while let Some(RoundResults { number, measured }) = received.recv().await {
            // An engine that has ended needs no results.
            let _ = commands.send(Command::Probed { number, measured }).await;
        }
    });
    results
}

/// Runs what tells the engine of changes, in a thread of its own.
fn follow(
    name: &str,
    commands: &mpsc::Sender<Command>,
    body: impl FnOnce(&mpsc::Sender<Command>) + Send + 'static,
) -> anyhow::Result<()> {
    let commands = commands.clone();
    let thread = std::thread::Builder::new().name(name.into()).spawn(move || body(&commands));
    thread.map(drop).with_context(|| format!("start the thread {name}"))
}

/// Tells the engine of foreign changes of our tables, until it is gone. Without a monitor, one is opened as soon as
/// that is possible; what was changed until then is looked for.
fn watch_drift(
    opened: std::io::Result<Monitor>,
    own_port: u32,
    commands: &mpsc::Sender<Command>,
    watched: &IntGauge,
) {
    let mut monitor = match opened {
        Ok(monitor) => monitor,
        Err(error) => {
            tracing::warn!(%error, "foreign changes of our tables are not noticed; trying again");
            let Some(monitor) = until_opened(|| Monitor::open(own_port), commands) else { return };
            tracing::info!("foreign changes of our tables are noticed from now on");
            let unwatched = Command::Drift { cause: DriftCause::Unwatched, noticed: Instant::now() };
            if commands.blocking_send(unwatched).is_err() {
                return;
            }
            monitor
        }
    };
    watched.set(1);
    loop {
        match monitor.wait(Duration::from_secs(3600)) {
            Ok(None) => {}
            Ok(Some(mut notice)) => {
                std::thread::sleep(SETTLE);
                if let Ok(Some(later)) = monitor.drain() {
                    notice = if notice == Notice::TableDeleted { notice } else { later };
                }
                let cause = match notice {
                    Notice::Changed => DriftCause::Changed,
                    Notice::TableDeleted => DriftCause::TableDeleted,
                    Notice::Overflow => DriftCause::Overflow,
                };
                let drift = Command::Drift { cause, noticed: Instant::now() };
                if commands.blocking_send(drift).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "foreign changes of our tables cannot be followed; trying again");
                std::thread::sleep(REOPEN);
            }
        }
    }
}

/// Tries until it succeeds; `None` if the engine is gone.
fn until_opened<T>(open: impl Fn() -> std::io::Result<T>, commands: &mpsc::Sender<Command>) -> Option<T> {
    while !commands.is_closed() {
        std::thread::sleep(REOPEN);
        if let Ok(opened) = open() {
            return Some(opened);
        }
    }
    None
}

/// The spans and the log, which begin together: the log's subscriber exports ordinary spans.
fn telemetry(
    runtime: &tokio::runtime::Runtime,
    node_name: &str,
    log_level: &str,
    log_format: LogFormat,
) -> anyhow::Result<(Traces, LogLevel)> {
    let exported = {
        let _inside = runtime.enter();
        Traces::from_environment(node_name)
    };
    let layer = exported.as_ref().ok().and_then(Traces::layer);
    let log = crate::log::to_stderr(log_level, log_format, layer)?;
    // Spans tell what happens; that they cannot be exported must not keep a node from being served.
    let traces = exported.unwrap_or_else(|error| {
        tracing::warn!(error = format!("{:#}", anyhow::Error::new(error)), "spans are not exported");
        Traces::none()
    });
    if traces.are_exported() {
        tracing::info!("spans of updates and of what else is done are exported over OTLP");
    }
    Ok((traces, log))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_ends_by_itself_ends_the_agent_with_an_error() {
        let metrics = Metrics::register(&Registry::new()).unwrap();
        let identity = Identity {
            node_name: "n".into(),
            kernel_version: String::new(),
            files: StateFiles::start().unwrap(),
        };
        let controllers = Controllers::new(Vec::new(), None, None, "/nonexistent".into(), None);
        let (commands, received) = mpsc::channel(1);
        let engine = std::thread::spawn(move || {
            let _received = received;
            panic!("this is a test");
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ended = runtime.block_on(async {
            let agent = until_stopped(controllers, identity, commands, metrics, Contact::default());
            tokio::time::timeout(Duration::from_secs(20), agent).await.unwrap()
        });
        assert!(engine.join().is_err());
        assert!(ended.unwrap_err().to_string().contains("engine"));
    }

    #[test]
    fn what_is_not_opened_at_first_is_tried_until_the_engine_is_gone() {
        let (commands, received) = mpsc::channel(1);
        drop(received);
        assert_eq!(until_opened(|| Ok(1), &commands), None);
    }
}
