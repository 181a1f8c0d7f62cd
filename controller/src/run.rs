//! Starts the parts of the controller, runs them until a signal arrives, and stops them in order.
//!
//! Invariants: a replica serves agents and writes objects only while it holds the Lease; a standby watches and compiles,
//! so that it takes over without a list. No signal is lost while the process waits.
//!
//! `manifests/rbac.yaml` lists the permissions of the controller.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::admin::Admin;
use crate::admin::auth::AdminAuthenticator;
use crate::background::Background;
use crate::bootstrap::{self, CaPem};
use crate::cli::{Cli, Command, LogFormat, ServeArgs};
use crate::engine;
use crate::fleet::Fleet;
use crate::import_config;
use crate::lease::{Candidate, Fence, Holding};
use crate::metrics::{self, Exemplars, Readiness};
use crate::peers::Peers;
use crate::process::{Signals, host_name, raise_descriptor_limit};
use crate::render;
use crate::serve::Server;
use crate::serve::auth::Authenticator;
use crate::serve::keys::Keys;
use crate::serve::tls::{self, ServerTls};
use crate::session::Limits;
use crate::status::absence::Agents;
use crate::traces::{Head as Sampled, Traces};

mod api;
mod listen;
mod startup;

use api::Clients;
use startup::{Active, Synced, Telemetry};

/// Interval between attempts to reach the API server while starting.
const RETRY: Duration = Duration::from_secs(5);
/// Time that agents have to leave when the controller stops.
const DRAIN: Duration = Duration::from_secs(5);
/// Interval between two renewals of the server's certificate, which is valid for a year.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3_600);

/// Runs the command. Exit codes: 0 done or stopped by a signal, 1 an error, which is printed.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let outcome = match cli.command {
        Some(Command::Render(args)) => render::run(&args).map_err(anyhow::Error::from),
        Some(Command::ImportConfig(args)) => import_config::run(&args).map_err(anyhow::Error::from),
        None => start(cli.serve),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not be set up, and render prints to standard output.
            #[allow(clippy::print_stderr, reason = "the last output of the process")]
            {
                eprintln!("switchtower-controller: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn start(args: ServeArgs) -> anyhow::Result<()> {
    // Several crates link rustls; without a process-wide provider they could disagree and panic.
    let _ = rustls::crypto::ring::default_provider().install_default();
    raise_descriptor_limit();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let replica = args.replica.clone().unwrap_or_else(host_name);
    let exported = {
        let _inside = runtime.enter();
        Traces::from_environment(&replica)
    };
    let layer = exported.as_ref().ok().and_then(Option::as_ref).map(|(traces, _)| traces.layer());
    set_up_log(&args.log_level, args.log_format, layer);
    // The cluster is served even if traces cannot be exported.
    let traces = exported.unwrap_or_else(|error| {
        tracing::warn!(error = format!("{:#}", anyhow::Error::new(error)), "traces are not exported");
        None
    });
    runtime.block_on(serve(args, replica, traces))
}

/// Drops kube's own line for every failed request: each failure is logged where it is handled, with its consequence.
const WITHOUT_KUBE: &str = "kube_client::client::builder=off";

/// `RUST_LOG`, if set, overrides `level`.
fn set_up_log(level: &str, format: LogFormat, spans: Option<BoxedLayer>) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(format!("{WITHOUT_KUBE},{level}")));
    let filter = spans::in_log(filter);
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    let log = match format {
        LogFormat::Text => log.with_filter(filter).boxed(),
        LogFormat::Json => log.json().with_filter(filter).boxed(),
    };
    // A second call (tests) keeps the first log.
    let _ = spans::subscriber(log, spans).try_init();
}

/// A replica with its watches, compiler and metrics running. It neither serves agents nor writes objects yet.
struct Replica {
    args: ServeArgs,
    name: String,
    clients: Clients,
    agents: Agents,
    readiness: Readiness,
    telemetry: Telemetry,
    ca: CaPem,
    peers: Peers,
}

async fn serve(args: ServeArgs, name: String, traces: Option<(Traces, Sampled)>) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let fence = Fence::default();
    let mut tasks = Background::default();
    let starting = start_replica(args, name, traces, &fence, &mut tasks);
    let (replica, mut synced) = tokio::select! {
        started = starting => started?,
        () = signals.next() => return Ok(()),
    };
    let mut holding = tokio::select! {
        holding = replica.acquire_lease(&mut synced, fence) => holding?,
        ended = tasks.ended() => return Err(ended.into()),
        () = signals.next() => return Ok(()),
    };
    // Stopped before another replica can become active.
    let mut writers = Background::default();
    let Synced { fleet, active, .. } = synced;
    let listener = tokio::select! {
        listener = replica.become_active(active, &mut writers) => listener?,
        ended = tasks.ended() => return Err(ended.into()),
        lost = holding.lost() => return Err(lost.into()),
        () = signals.next() => {
            drop(writers);
            holding.release().await;
            return Ok(());
        }
    };
    let (server, tls) = replica.server(fleet, &mut tasks)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let metrics = replica.telemetry.serve.clone();
    let mut running = tokio::spawn(server.serve(listener, tls, metrics, async move {
        // An error means that the sender is gone: the process ends.
        let _ = stopped.await;
    }));
    tracing::info!(listen = %replica.args.listen, "serving agents");
    let outcome = tokio::select! {
        ended = &mut running => return ended?.context("serving agents"),
        ended = tasks.ended() => return Err(ended.into()),
        ended = writers.ended() => return Err(ended.into()),
        lost = holding.lost() => Err(lost.into()),
        () = signals.next() => Ok(()),
    };
    replica.readiness.set(false);
    drop(writers);
    if outcome.is_ok() {
        // Before the agents are sent away: the next controller listens when they look for it.
        holding.release().await;
    }
    let _ = stop.send(());
    if tokio::time::timeout(DRAIN, running).await.is_err() {
        tracing::warn!("some agents did not disconnect in time; they reconnect on their own");
    }
    replica.telemetry.flush(synced.traces).await?;
    outcome
}

/// Starts everything that a standby needs too.
async fn start_replica(
    args: ServeArgs,
    name: String,
    traces: Option<(Traces, Sampled)>,
    fence: &Fence,
    tasks: &mut Background,
) -> anyhow::Result<(Replica, Synced)> {
    let config = api::config(&args).await?;
    let api_server = config.cluster_url.authority().cloned().context("the API server's URL has no host")?;
    let clients = Clients::new(config, fence)?;
    let advertise = bootstrap::advertised(&args.advertise, args.listen, &api_server)
        .context("finding the address that agents can reach; name it with --advertise")?;
    let args = ServeArgs { advertise, ..args };
    let telemetry = Telemetry::new()?;
    let agents = Agents::default();
    // An address that cannot be bound is an error at once. The port stays closed on a standby, so that agents move on
    // to the active controller.
    drop(listen::bind(args.listen, &agents).await?);
    let readiness = Readiness::default();
    let exemplars = Exemplars::default();
    let metrics = metrics::bind(
        args.metrics_listen,
        telemetry.registry.clone(),
        exemplars.clone(),
        telemetry.health(&readiness),
        telemetry.serve.clone(),
    );
    tasks.spawn("metrics", metrics.await?);
    let changes = startup::follow_changes(&telemetry.registry, exemplars, traces, tasks)?;
    let ca = api::certificate_authority(&clients.unfenced, &args).await?;
    let (peers, sender) = Peers::new(args.advertise.clone());
    let replica = Replica { args, name, clients, agents, readiness, telemetry, ca, peers };
    let synced = startup::start_synced(&replica, changes, sender, tasks).await?;
    Ok((replica, synced))
}

impl Replica {
    /// Waits for the first compile, then for the Lease. The replica is ready once it has compiled.
    async fn acquire_lease(&self, synced: &mut Synced, fence: Fence) -> anyhow::Result<Holding> {
        let compiled = engine::first_head(&mut synced.head).await;
        anyhow::ensure!(compiled, "the engine ended before the first compile; its log says why");
        self.readiness.set(true);
        let duration = Duration::from_secs(self.args.lease_seconds.into());
        let client = self.clients.unfenced.clone();
        let mut candidate = Candidate::new(client, &self.args.namespace, &self.name, duration, fence);
        candidate.acquire().await;
        tracing::info!("this controller is active");
        Ok(candidate.hold())
    }

    /// Starts the writers, then opens the port for agents.
    async fn become_active(&self, active: Active, writers: &mut Background) -> anyhow::Result<TcpListener> {
        let listener = listen::bind(self.args.listen, &self.agents).await?;
        active.start(writers).await;
        let (client, namespace) = (self.clients.fenced.clone(), self.args.namespace.clone());
        let certificate = self.ca.certificate.clone();
        let keep = bootstrap::keep(client, namespace, certificate, self.peers.clone());
        writers.spawn("bootstrap ConfigMap", keep);
        match listener {
            Some(listener) => Ok(listener),
            None => listen::bind_with_retry(self.args.listen, &self.agents).await,
        }
    }

    /// Starts the admin API and returns the server of the agents with its TLS configuration.
    fn server(&self, fleet: Arc<Fleet>, tasks: &mut Background) -> anyhow::Result<(Server, Arc<ServerTls>)> {
        let Self { args, clients, telemetry, ca, name, .. } = self;
        let client = clients.unfenced.clone();
        let authenticator = AdminAuthenticator::new(client.clone(), &args.namespace);
        let admin = Admin::new(fleet.clone(), authenticator, name, telemetry.registry.clone());
        let keys = Arc::new(Keys::new(client.clone(), &telemetry.registry)?);
        let authenticator =
            Authenticator::new(client, keys, &args.audience, &args.namespace, &args.agent_service_account);
        let limits = Limits { replica: name.clone(), peers: self.peers.clone(), ..Limits::default() };
        let tls = Arc::new(ServerTls::from_pointee(tls::server_config(ca)?));
        let admin_tls = Arc::new(ServerTls::from_pointee(tls::admin_config(ca)?));
        tasks.spawn("certificates", renew_certificates(tls.clone(), admin_tls.clone(), ca.clone()));
        let metrics = telemetry.serve.clone();
        tasks.spawn("admin API", listen::serve_admin(admin, args.admin_listen, admin_tls, metrics));
        Ok((Server::new(fleet, Arc::new(authenticator), limits), tls))
    }
}

/// New connections get a fresh certificate every [`RENEWAL`].
async fn renew_certificates(agents: Arc<ServerTls>, admin: Arc<ServerTls>, ca: CaPem) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        match (tls::server_config(&ca), tls::admin_config(&ca)) {
            (Ok(for_agents), Ok(for_admin)) => {
                agents.store(Arc::new(for_agents));
                admin.store(Arc::new(for_admin));
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "failed to renew the server certificate; retrying");
            }
        }
    }
}
