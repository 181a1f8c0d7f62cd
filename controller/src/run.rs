//! Starts the parts of the controller, runs them until a signal arrives, and stops them in order.
//!
//! Invariants: a replica serves agents once it has compiled complete lists and read the rows and their assignments, whether
//! or not it is the leader. It announces itself to the other replicas only while it serves. No signal is lost while the
//! process waits.
//!
//! `manifests/rbac.yaml` lists the permissions of the controller.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::admin::Admin;
use crate::admin::auth::AdminAuthenticator;
use crate::authority::nodes::NodeCertificates;
use crate::authority::rotation::Rotation;
use crate::authority::{Authority, directory};
use crate::background::Background;
use crate::bootstrap::{self, Sources};
use crate::cli::{Cli, Command, LogFormat, ServeArgs};
use crate::engine;
use crate::fleet::Fleet;
use crate::import_config;
use crate::lease::{Candidate, Fence};
use crate::metrics::{self, Exemplars, Readiness};
use crate::peers::Peers;
use crate::process::{Signals, host_name, raise_descriptor_limit};
use crate::render;
use crate::replicas::announce::Announcement;
use crate::replicas::service::{ReplicaKeys, ReplicaService};
use crate::replicas::{self, Replicas};
use crate::serve::Server;
use crate::serve::auth::Authenticator;
use crate::serve::keys::Keys;
use crate::serve::tls::ServerTls;
use crate::session::Limits;
use crate::status::absence::Agents;
use crate::traces::{Head as Sampled, Traces};

mod api;
mod certificates;
mod listen;
mod startup;

use api::Clients;
pub use api::config;
use certificates::Certificates;
use startup::{Synced, Telemetry};

/// Interval between attempts to reach the API server while starting.
const RETRY: Duration = Duration::from_secs(5);
/// Time that agents have to leave when the controller stops.
const DRAIN: Duration = Duration::from_secs(5);
/// Time that agents have to connect to another replica before this one counts as gone.
const MOVE: Duration = Duration::from_secs(2);

/// Runs the command. Exit codes: 0 done or stopped by a signal, 1 an error, which is printed.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let outcome = match cli.command {
        Some(Command::Render(args)) => render::run(&args).map_err(anyhow::Error::from),
        Some(Command::ImportConfig(args)) => import_config::run(&args).map_err(anyhow::Error::from),
        None => start(cli.serve),
    };
    conclude(outcome)
}

/// Returns the exit code of the program; prints an error.
#[must_use]
pub fn conclude(outcome: anyhow::Result<()>) -> ExitCode {
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

/// Runs a controller until a signal arrives. Keeps an existing log.
///
/// # Errors
/// It cannot start, or one of its parts ended.
pub fn start(args: ServeArgs) -> anyhow::Result<()> {
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
pub const WITHOUT_KUBE: &str = "kube_client::client::builder=off";

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

/// A replica with its watches, compiler and metrics running. It does not serve agents yet.
struct Replica {
    args: ServeArgs,
    name: String,
    clients: Clients,
    fence: Fence,
    others: replicas::Client,
    announcement: Announcement,
    serving: watch::Sender<bool>,
    agents: Agents,
    readiness: Readiness,
    telemetry: Telemetry,
    authority: watch::Receiver<Authority>,
    peers: Peers,
}

async fn serve(args: ServeArgs, name: String, traces: Option<(Traces, Sampled)>) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let mut tasks = Background::default();
    let starting = start_replica(args, name, traces, &mut tasks);
    let (replica, mut synced) = tokio::select! {
        started = starting => started?,
        () = signals.next() => return Ok(()),
    };
    let compiled = tokio::select! {
        compiled = engine::first_head(&mut synced.head) => compiled,
        ended = tasks.ended() => return Err(ended.into()),
        () = signals.next() => return Ok(()),
    };
    anyhow::ensure!(compiled, "the engine ended before the first compile; its log says why");
    let mut writers = Background::default();
    let Synced { fleet, writers: prepared, .. } = synced;
    let listener = tokio::select! {
        listener = async { prepared.start(&mut writers).await; replica.listen().await } => listener?,
        ended = tasks.ended() => return Err(ended.into()),
        () = signals.next() => return Ok(()),
    };
    let (server, tls) = replica.server(fleet, &mut tasks)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let metrics = replica.telemetry.serve.clone();
    let mut running = tokio::spawn(server.serve(listener, tls, metrics, async move {
        // An error means that the sender is gone: the process ends.
        let _ = stopped.await;
    }));
    replica.readiness.set(true);
    replica.serving.send_replace(true);
    tracing::info!(listen = %replica.args.listen, "serving agents");
    let candidacy = replica.candidate().start();
    let outcome = tokio::select! {
        ended = &mut running => return ended?.context("serving agents"),
        ended = tasks.ended() => Err(ended.into()),
        ended = writers.ended() => Err(ended.into()),
        () = signals.next() => Ok(()),
    };
    replica.readiness.set(false);
    drop(writers);
    candidacy.withdraw().await;
    let _ = stop.send(());
    if tokio::time::timeout(DRAIN, running).await.is_err() {
        tracing::warn!("some agents did not disconnect in time; they reconnect on their own");
    }
    replica.leave().await;
    replica.telemetry.flush(synced.traces).await?;
    outcome
}

/// Starts everything except the server of the agents.
async fn start_replica(
    args: ServeArgs,
    name: String,
    traces: Option<(Traces, Sampled)>,
    tasks: &mut Background,
) -> anyhow::Result<(Replica, Synced)> {
    let fence = Fence::default();
    let config = api::config(&args).await?;
    let api_server = config.cluster_url.authority().cloned().context("the API server's URL has no host")?;
    let telemetry = Telemetry::new()?;
    let clients = Clients::new(&config, &fence, &telemetry.registry)?;
    let advertise = bootstrap::advertised(&args.advertise, args.listen, &api_server)
        .context("finding the address that agents can reach; name it with --advertise")?;
    let args = ServeArgs { advertise, ..args };
    let agents = Agents::default();
    // An address that cannot be bound is an error at once. The port stays closed until agents can be served, so that they
    // connect to another replica.
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
    let authority = api::authority(&clients.unfenced, &args).await?;
    let (peers, sender) = Peers::new(args.advertise.clone());
    let duration = args.lease_duration();
    let replicas = Replicas::new(&name, duration);
    let others = replicas::Client::new(replicas.clone(), &authority)
        .context("using the CA for queries to other replicas")?;
    let (client, addresses) = (clients.unfenced.clone(), args.advertise.clone());
    let announcement = Announcement::new(client, &args.namespace, &name, addresses, duration);
    let (serving, is_serving) = watch::channel(false);
    tasks.spawn("Leases of replicas", announcement.clone().keep(replicas, fence.clone(), is_serving, sender));
    let (sender, authority) = watch::channel(authority);
    let replica = Replica {
        args,
        name,
        clients,
        fence,
        others,
        announcement,
        serving,
        agents,
        readiness,
        telemetry,
        authority,
        peers,
    };
    replica.keep_authority(sender, tasks);
    let synced = startup::start_synced(&replica, changes, tasks).await?;
    Ok((replica, synced))
}

impl Replica {
    fn candidate(&self) -> Candidate {
        let (client, duration) = (self.clients.unfenced.clone(), self.args.lease_duration());
        Candidate::new(client, &self.args.namespace, &self.name, duration, self.fence.clone())
    }

    /// Publishes the CAs and the replicas for agents, and rotates a CA that the Secret holds.
    fn keep_authority(&self, sender: watch::Sender<Authority>, tasks: &mut Background) {
        let Self { args, clients, fence, .. } = self;
        let (client, namespace) = (clients.fenced.clone(), args.namespace.clone());
        let (published, seen) = watch::channel(None);
        let rotation = Rotation {
            client: client.clone(),
            namespace: namespace.clone(),
            published: seen,
            fence: fence.clone(),
            delay: args.ca_rotation_delay(),
        };
        match &args.tls_dir {
            Some(directory) => tasks.spawn("CA", directory::follow(directory.clone(), sender)),
            None => tasks.spawn("CA", rotation.run(clients.unfenced.clone(), sender)),
        }
        if !args.no_bootstrap {
            let sources = Sources { authority: self.authority.clone(), peers: self.peers.clone(), published };
            tasks.spawn("bootstrap ConfigMap", bootstrap::keep(client, namespace, sources, fence.clone()));
        }
    }

    /// Opens the port for agents.
    async fn listen(&self) -> anyhow::Result<TcpListener> {
        match listen::bind(self.args.listen, &self.agents).await? {
            Some(listener) => Ok(listener),
            None => listen::bind_with_retry(self.args.listen, &self.agents).await,
        }
    }

    /// Deletes the Lease of this replica, once its agents had time to connect to another one: the leader then writes the rows
    /// of those that did not.
    async fn leave(&self) {
        self.serving.send_replace(false);
        if !self.others.replicas().peers().is_empty() {
            tokio::time::sleep(MOVE).await;
        }
        self.announcement.withdraw().await;
    }

    /// Starts the admin API and returns the server of the agents with its TLS configuration.
    fn server(&self, fleet: Arc<Fleet>, tasks: &mut Background) -> anyhow::Result<(Server, Arc<ServerTls>)> {
        let Self { args, clients, telemetry, name, others, .. } = self;
        let client = clients.unfenced.clone();
        let authenticator = AdminAuthenticator::new(client.clone(), &args.namespace);
        let admin = Admin::new(fleet.clone(), authenticator, name, telemetry.registry.clone());
        let mut authority = self.authority.clone();
        let keys_of_replicas = ReplicaKeys::new(&authority.borrow_and_update());
        let replica = ReplicaService::new(admin.routes_for_replicas(), keys_of_replicas.clone());
        let keys = Arc::new(Keys::new(client.clone(), &telemetry.registry)?);
        let authenticator =
            Authenticator::new(client, keys, &args.audience, &args.namespace, &args.agent_service_account);
        let nodes = NodeCertificates::new(&authority.borrow())?;
        let limits = Limits {
            replica: name.clone(),
            peers: self.peers.clone(),
            certificates: Some(nodes.clone()),
            ..Limits::default()
        };
        let certificates = Certificates::new(
            &authority.borrow(),
            others.clone(),
            keys_of_replicas,
            nodes,
            &telemetry.registry,
        )?;
        let (tls, admin_tls) = (certificates.agents.clone(), certificates.admin.clone());
        tasks.spawn("certificates", certificates.follow(authority));
        let metrics = telemetry.serve.clone();
        tasks.spawn("admin API", listen::serve_admin(admin, args.admin_listen, admin_tls, metrics));
        Ok((Server::new(fleet, Arc::new(authenticator), limits, replica), tls))
    }
}
