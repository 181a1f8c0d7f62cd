//! Puts the parts together and runs them until a signal comes.
//!
//! What the controller may do in the cluster (its RBAC), by resource:
//! - get, list, watch: services, endpointslices.discovery.k8s.io, nodes, servicecidrs.networking.k8s.io
//! - create: tokenreviews.authentication.k8s.io (the tokens of agents and of the admin API's callers); get:
//!   /openid/v1/jwks (whether a token is the API server's at all)
//! - get, list, watch, create, patch, delete: proxystatuses.switchtower.dev; get, update: proxystatuses/status.
//!   With the admission plugin OwnerReferencesPermissionEnforcement also update: nodes/finalizers, because rows
//!   are owned by Nodes (without blocking their deletion, so that most clusters do not ask for it)
//! - get, list, watch, patch: proxyprofiles.switchtower.dev; get, list, watch, create, patch, delete:
//!   proxyrollouts.switchtower.dev; get, update: the status of both
//! - create, patch: events.events.k8s.io
//! - in its own namespace, get, create: secrets (`switchtower-ca`); get, list, watch, patch, create: configmaps
//!   (`switchtower-bootstrap`); get, list, watch, create: configmaps (`switchtower-builtin-settings`); get, list,
//!   watch: pods (why an agent does not run)
//! - get: configmaps named `kube-proxy` (in kube-system)

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use prometheus::Registry;
use switchtower_core::compile::Compiler;
use switchtower_core::compiled::Compiled;
use switchtower_core::model::Input;
use switchtower_core::propagation::{Limits as FollowLimits, Publication, TraceContext};
use switchtower_crds::builtin::Record;
use switchtower_proto::v1::Source;
use switchtower_telemetry::spans::{self, BoxedLayer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch as channel};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::admin::Admin;
use crate::admin::auth::AdminAuthenticator;
use crate::agents::{self, Agents, Obstacle};
use crate::background::Background;
use crate::bootstrap::{self, Bootstrap, BootstrapError, CaPem};
use crate::builtin::{self, BuiltinError};
use crate::cli::{Cli, Command, LogFormat, ServeArgs};
use crate::engine::{self, EngineMetrics, Head, Outputs, Pipeline};
use crate::errors::{Chain, is_missing_kind};
use crate::metrics::health::{Busy, Health};
use crate::metrics::{self, Exemplars, Readiness};
use crate::process::{Signals, host_name, raise_descriptor_limit};
use crate::propagation::{self, Propagation, PropagationMetrics};
use crate::rollout::{RolloutMetrics, Rollouts};
use crate::serve::Server;
use crate::serve::auth::Authenticator;
use crate::serve::behind::BehindCollector;
use crate::serve::fleet::Fleet;
use crate::serve::keys::Keys;
use crate::serve::metrics::ServeMetrics;
use crate::serve::session::Limits;
use crate::serve::tls::{self, ServerTls};
use crate::status::{Assignments, Floors, StatusMetrics, Writer, WriterSettings};
use crate::traces::{Head as Sampled, Traces};
use crate::watch::{self, Batch, Selectors, Upstream, UpstreamCollector, WatchMetrics, Watched};
use crate::{events, render};

/// Services of other proxies are left out by the API server, as kube-proxy has it.
const SERVICE_SELECTOR: &str = "!service.kubernetes.io/service-proxy-name";
/// EndpointSlices of headless Services too. A Service that only bears the label has no endpoints then.
const SLICE_SELECTOR: &str = "!service.kubernetes.io/headless";
/// Batches between the watches and the engine: bounds memory while a compile runs.
const BATCHES: usize = 1_024;
/// Between attempts to reach the API server while starting.
const RETRY: Duration = Duration::from_secs(5);
/// Timeout of a request about the CA.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest look at what the built-in settings are decided from.
const LONG_PATIENCE: Duration = Duration::from_secs(120);
/// How long agents have to leave when the controller ends.
const DRAIN: Duration = Duration::from_secs(5);
/// Between two renewals of the server's certificate.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3_600);

/// Runs the command. Exit codes: 0 done or ended by a signal, 1 an error, which is printed.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let outcome = match cli.command {
        Some(Command::Render(args)) => render::run(&args).map_err(anyhow::Error::from),
        None => start(cli.serve),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not be set up, and render prints to standard output.
            #[allow(clippy::print_stderr, reason = "the last words of the process")]
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
    // Traces tell what happens; that they cannot be exported must not keep the cluster from being served.
    let traces = exported.unwrap_or_else(|error| {
        tracing::warn!(error = format!("{:#}", anyhow::Error::new(error)), "traces are not exported");
        None
    });
    runtime.block_on(serve(args, replica, traces))
}

/// Leaves out kube's own line for every failed request: each failure is logged where it is handled, with what follows
/// from it.
const WITHOUT_KUBE: &str = "kube_client::client::builder=off";

/// RUST_LOG, if it is set, chooses instead of `level`.
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

async fn serve(args: ServeArgs, replica: String, traces: Option<(Traces, Sampled)>) -> anyhow::Result<()> {
    // From here on no signal is lost, whatever is waited for.
    let mut signals = Signals::listen()?;
    let config = kube_config(&args).await?;
    let api_server = config.cluster_url.authority().cloned().context("the API server's URL has no host")?;
    let client = Client::try_from(config).context("setting up the client of the API server")?;
    let controllers = bootstrap::advertised(&args.advertise, args.listen, &api_server)
        .context("finding the address that agents can reach; name it with --advertise")?;
    let args = ServeArgs { advertise: controllers.clone(), ..args };
    let registry = metrics::registry()?;
    let serve = ServeMetrics::new(&registry)?;
    let measured = Measured { serve, registry, busy: Busy::default(), upstream: Arc::default() };
    let Measured { registry, serve: serve_metrics, .. } = &measured;
    let readiness = Readiness::default();
    // What can be refused at once is refused before anything is started.
    let agents = Agents::default();
    let listener = listen(args.listen, &agents).await?;
    let mut tasks = Background::default();
    let exemplars = Exemplars::default();
    let metrics = metrics::bind(
        args.metrics_listen,
        registry.clone(),
        exemplars.clone(),
        measured.health(&readiness),
        serve_metrics.clone(),
    );
    tasks.spawn("metrics", metrics.await?);
    let followed = follow_changes(registry, exemplars, traces, &mut tasks)?;

    let starting = async {
        let ca = certificate_authority(&client, &args).await?;
        let parts = start_parts(&client, &args, &replica, &agents, &measured, followed, &mut tasks).await?;
        anyhow::Ok((ca, parts))
    };
    let (ca, parts) = tokio::select! {
        started = starting => started?,
        () = signals.next() => return Ok(()),
    };
    let bootstrap = Bootstrap { ca_certificate: ca.certificate.clone(), controllers: controllers.clone() };
    tasks
        .spawn("the bootstrap ConfigMap", bootstrap::keep(client.clone(), args.namespace.clone(), bootstrap));
    let Parts { fleet, traces, mut head } = parts;
    let compiled_and_listening = async {
        let compiled = engine::first_head(&mut head).await;
        anyhow::ensure!(compiled, "the engine ended before the first compile; its log says why");
        match listener {
            Some(listener) => Ok(listener),
            None => listen_in_the_end(args.listen, &agents).await,
        }
    };
    let listener = tokio::select! {
        listener = compiled_and_listening => listener?,
        ended = tasks.ended() => return Err(ended.into()),
        () = signals.next() => return Ok(()),
    };
    let callers = AdminAuthenticator::new(client.clone(), &args.namespace);
    let admin = Admin::new(fleet.clone(), callers, &replica);
    let keys = Arc::new(Keys::new(client.clone(), registry)?);
    let authenticator =
        Authenticator::new(client, keys, &args.audience, &args.namespace, &args.agent_service_account);
    let limits = Limits { replica, peers: controllers, ..Limits::default() };
    let tls = Arc::new(ServerTls::from_pointee(tls::server_config(&ca)?));
    let admin_tls = Arc::new(ServerTls::from_pointee(tls::admin_config(&ca)?));
    tasks.spawn("certificates", renew_certificates(tls.clone(), admin_tls.clone(), ca));
    tasks.spawn("the admin API", serve_admin(admin, args.admin_listen, admin_tls, serve_metrics.clone()));
    let server = Server::new(fleet, Arc::new(authenticator), limits);
    let (stop, stopped) = oneshot::channel::<()>();
    let mut running = tokio::spawn(server.serve(listener, tls, serve_metrics.clone(), async move {
        // An error means that the sender is gone: the process ends.
        let _ = stopped.await;
    }));
    readiness.set(true);
    tracing::info!(listen = %args.listen, "serving agents");
    tokio::select! {
        ended = &mut running => return ended?.context("serving agents"),
        ended = tasks.ended() => return Err(ended.into()),
        () = signals.next() => {}
    }
    readiness.set(false);
    let _ = stop.send(());
    if tokio::time::timeout(DRAIN, running).await.is_err() {
        tracing::warn!("some agents did not leave in time; they reconnect by themselves");
    }
    export_the_rest(traces).await
}

async fn export_the_rest(traces: Option<Arc<Traces>>) -> anyhow::Result<()> {
    if let Some(traces) = traces {
        // It waits for the exporter's thread, which needs this runtime.
        tokio::task::spawn_blocking(move || traces.shut_down()).await?;
    }
    Ok(())
}

/// The address that agents connect to. `None`: another program has it, maybe the controller before this one;
/// rows tell until it is free.
async fn listen(address: SocketAddr, agents: &Agents) -> anyhow::Result<Option<TcpListener>> {
    match TcpListener::bind(address).await {
        Ok(listener) => {
            agents.closed(None);
            Ok(Some(listener))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            agents.closed(Some(Obstacle::new(
                "ControllerNotListening",
                format!(
                    "The controller cannot accept agents: another program uses {address}. Stop it, or choose another \
                     port with --listen."
                ),
            )));
            Ok(None)
        }
        Err(error) => Err(error)
            .with_context(|| format!("listening for agents on {address}; choose another with --listen")),
    }
}

async fn listen_in_the_end(address: SocketAddr, agents: &Agents) -> anyhow::Result<TcpListener> {
    loop {
        tracing::error!(%address, "another program uses the address; agents wait, and it is tried again");
        tokio::time::sleep(RETRY).await;
        if let Some(listener) = listen(address, agents).await? {
            return Ok(listener);
        }
    }
}

/// The registry, and what more than one part counts in.
struct Measured {
    registry: Registry,
    serve: ServeMetrics,
    busy: Busy,
    upstream: Arc<Upstream>,
}

impl Measured {
    fn health(&self, readiness: &Readiness) -> Health {
        let upstream = self.upstream.clone();
        Health {
            readiness: readiness.clone(),
            busy: self.busy.clone(),
            upstream: Arc::new(move || upstream.age()),
        }
    }
}

/// What the streams need of the parts that run by themselves.
struct Parts {
    fleet: Arc<Fleet>,
    traces: Option<Arc<Traces>>,
    head: channel::Receiver<Option<Head>>,
}

/// Starts everything between the API server and the fleet: watches, engine, rows, Events.
async fn start_parts(
    client: &Client,
    args: &ServeArgs,
    replica: &str,
    agents: &Agents,
    measured: &Measured,
    followed: Followed,
    tasks: &mut Background,
) -> anyhow::Result<Parts> {
    let Measured { registry, serve: serve_metrics, upstream, .. } = measured;
    registry.register(Box::new(UpstreamCollector::new(upstream.clone())?))?;
    let floors = Floors::default();
    let age = upstream.clone();
    let Followed { propagation, traces, new_trace } = followed;
    let age = Arc::new(move || age.age());
    let (events, publisher) = events::publisher(client.clone(), replica, registry)?;
    tasks.spawn("Events", publisher);
    let sink = events.clone();
    let problems = Arc::new(move |problem| sink.report([problem]));
    let builtin = builtin_settings_of(client, args).await?;
    tasks.spawn(
        "the record of the built-in settings",
        builtin::keep(client.clone(), args.namespace.clone(), builtin.clone()),
    );
    let fleet = Fleet::new(
        builtin::settings(&builtin),
        floors.clone(),
        serve_metrics.clone(),
        age,
        propagation,
        problems,
    );
    registry.register(Box::new(BehindCollector::new(fleet.clone())?))?;

    // Rows first: sessions continue from the generations in them.
    let settings = WriterSettings { replica: replica.to_owned(), agents: agents.clone() };
    let assignments = Assignments::default();
    let metrics = StatusMetrics::new(registry)?;
    let mut writer =
        Writer::new(client.clone(), fleet.clone(), settings, floors, assignments.clone(), metrics);
    let loaded = read_first("ProxyStatus", async || writer.load().await).await;
    // Then the settings that they name, so that no node gets others for a moment.
    let metrics = RolloutMetrics::new(registry)?;
    let mut rollouts = Rollouts::new(client.clone(), replica, fleet.clone(), assignments, metrics);
    read_first("ProxyProfile and ProxyRollout", async || rollouts.load().await).await;
    let (nodes, node_events) = mpsc::unbounded_channel();
    tasks.spawn("rows", writer.run(loaded, node_events, upstream.restores()));
    let account = args.agent_service_account.clone();
    let pods = agents::follow::run(
        client.clone(),
        args.namespace.clone(),
        account,
        agents.clone(),
        upstream.restores(),
    );
    tasks.spawn("the agents' Pods", pods);
    tasks.spawn("questions to agents", agents::ask::run(agents.clone()));
    let (more_nodes, node_events) = mpsc::unbounded_channel();
    tasks.spawn("rollouts", rollouts.run(node_events, upstream.restores()));

    let batches = start_watches(client, args, upstream, registry, tasks)?;
    let (head, head_seen) = channel::channel(None);
    let compiler = Compiler::new().reserving(bootstrap::resolve(&args.advertise).await);
    let pipeline = FleetPipeline { compiler, fleet: fleet.clone() };
    let outputs = Outputs { head, nodes: vec![nodes, more_nodes], events, busy: measured.busy.clone() };
    let metrics = EngineMetrics::new(registry)?;
    tasks.spawn("the engine", engine::run(pipeline, outputs, metrics, new_trace, batches));
    Ok(Parts { fleet, head: head_seen, traces })
}

/// The built-in settings, before any node gets some. An API server that cannot be reached yet, or permissions that are
/// still missing, are waited for: to guess would be to change every node when it is known better.
async fn builtin_settings_of(client: &Client, args: &ServeArgs) -> anyhow::Result<Record> {
    loop {
        match tokio::time::timeout(LONG_PATIENCE, builtin::load(client, &args.namespace)).await {
            Ok(Ok(record)) => return Ok(record),
            Ok(Err(error @ BuiltinError::Api { .. })) => {
                tracing::error!(error = %Chain(&error), "no built-in settings yet; agents wait, and it is tried again");
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {
                tracing::error!(
                    "no built-in settings yet: the API server does not answer; it is tried again"
                );
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Reads what says which settings nodes have, however long it takes: agents that were served before would get the
/// built-in ones, outside of any rollout. False: the kind is not installed, so there are no objects of it.
async fn read_first(kind: &'static str, mut read: impl AsyncFnMut() -> Result<(), kube::Error>) -> bool {
    loop {
        let error = match read().await {
            Ok(()) => return true,
            Err(error) => error,
        };
        if is_missing_kind(&error) {
            tracing::warn!(
                kind,
                "not installed (`kubectl apply -k crds/yaml`); nodes get the built-in settings"
            );
            return false;
        }
        tracing::warn!(kind, error = %Chain(&error), "not read yet; agents wait, and it is tried again");
        tokio::time::sleep(RETRY).await;
    }
}

/// What knows how changes fare.
struct Followed {
    propagation: Arc<Propagation>,
    traces: Option<Arc<Traces>>,
    new_trace: Box<dyn FnMut() -> TraceContext + Send>,
}

/// Starts to follow changes, and to export traces of them if the environment asks for it.
fn follow_changes(
    registry: &Registry,
    exemplars: Exemplars,
    traces: Option<(Traces, Sampled)>,
    tasks: &mut Background,
) -> anyhow::Result<Followed> {
    let metrics = PropagationMetrics::new(registry)?.with_exemplars(exemplars);
    let propagation = Propagation::new(FollowLimits::default(), metrics);
    let (propagation, traces, new_trace) = match traces {
        None => (propagation, None, Box::new(propagation::new_trace) as Box<_>),
        Some((traces, sampled)) => {
            let (propagation, records) = propagation.with_reader();
            let traces = Arc::new(traces);
            let exporter = traces.clone();
            tasks.spawn("traces", async move { exporter.run(records).await });
            tracing::info!("traces of changes, and spans of what else is done, are exported over OTLP");
            (propagation, Some(traces), Box::new(move || sampled.trace()) as Box<_>)
        }
    };
    let propagation = Arc::new(propagation);
    tasks.spawn("changes that are late", propagation.clone().watch());
    Ok(Followed { propagation, traces, new_trace })
}

/// The compiler in front of the fleet's layers.
struct FleetPipeline {
    compiler: Compiler,
    fleet: Arc<Fleet>,
}

impl Pipeline for FleetPipeline {
    fn compile(&mut self, inputs: Vec<Input>) -> Compiled {
        inputs.into_iter().for_each(|input| self.compiler.apply(input));
        let compiled = self.compiler.compile();
        // Not with the layers: pods may come and go without a change of any.
        self.fleet.pods_changed(&compiled.pods);
        compiled
    }

    fn publish(&mut self, compiled: Compiled, publication: Publication, source: Source) -> u64 {
        self.fleet.publish(compiled, publication, source)
    }

    fn advance(&mut self, source: Source) {
        self.fleet.advance(source);
    }
}

/// Without the admin API agents are served all the same: a port that is taken is waited for.
async fn serve_admin(admin: Admin, address: SocketAddr, tls: Arc<ServerTls>, metrics: ServeMetrics) {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => admin.clone().serve(listener, tls.clone(), metrics.clone()).await,
            Err(error) => {
                tracing::warn!(%error, %address, "kubectl switchtower cannot be served; --admin-listen names another address");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The server's certificate is valid for a year; connections to come get a new one every month.
async fn renew_certificates(agents: Arc<ServerTls>, admin: Arc<ServerTls>, ca: CaPem) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        match (tls::server_config(&ca), tls::admin_config(&ca)) {
            (Ok(for_agents), Ok(for_admin)) => {
                agents.store(Arc::new(for_agents));
                admin.store(Arc::new(for_admin));
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "renewing the server's certificate failed; it is tried again");
            }
        }
    }
}

async fn kube_config(args: &ServeArgs) -> anyhow::Result<Config> {
    let Some(path) = &args.kubeconfig else {
        return Config::infer().await.context(
            "finding the API server: this is no pod with a ServiceAccount, and there is no kubeconfig; name one with \
             --kubeconfig",
        );
    };
    let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("using the current context of {}", path.display()))
}

/// The CA of the flags' choice. An API server that cannot be reached yet, or permissions that are still
/// missing, are waited for.
async fn certificate_authority(client: &Client, args: &ServeArgs) -> anyhow::Result<CaPem> {
    if let Some(directory) = &args.tls_dir {
        return Ok(bootstrap::ca_from_directory(directory, tls::generate_ca)?);
    }
    loop {
        let read = bootstrap::ca_from_secret(client, &args.namespace, tls::generate_ca);
        match tokio::time::timeout(PATIENCE, read).await {
            Ok(Ok(ca)) => return Ok(ca),
            Ok(Err(error @ BootstrapError::Secret { .. })) => {
                tracing::error!(error = %Chain(&error), "no CA yet; it is tried again");
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => tracing::error!("no CA yet: the API server does not answer; it is tried again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Starts the four watches. They end when the receiver is dropped.
fn start_watches(
    client: &Client,
    args: &ServeArgs,
    upstream: &Arc<Upstream>,
    registry: &Registry,
    tasks: &mut Background,
) -> anyhow::Result<mpsc::Receiver<Batch>> {
    let (sink, batches) = mpsc::channel(BATCHES);
    let metrics = WatchMetrics::new(registry)?;
    let labels = |text: &str| Selectors { labels: Some(text.to_owned()).filter(|text| !text.is_empty()) };
    let mut start = Start { client, upstream, metrics: &metrics, sink: &sink, tasks };
    start.watch::<Service>(labels(SERVICE_SELECTOR));
    start.watch::<EndpointSlice>(labels(SLICE_SELECTOR));
    start.watch::<Node>(labels(&args.node_selector));
    start.watch::<ServiceCIDR>(Selectors::default());
    Ok(batches)
}

struct Start<'a> {
    client: &'a Client,
    upstream: &'a Arc<Upstream>,
    metrics: &'a WatchMetrics,
    sink: &'a mpsc::Sender<Batch>,
    tasks: &'a mut Background,
}

impl Start<'_> {
    fn watch<K: Watched>(&mut self, selectors: Selectors) {
        let Self { client, upstream, metrics, sink, tasks } = self;
        let api = Api::all((*client).clone());
        let watch = watch::run::<K>(api, selectors, (*upstream).clone(), (*metrics).clone(), (*sink).clone());
        tasks.spawn(K::RESOURCE.name(), watch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u16, name: &str) -> kube::Error {
        let details = serde_json::json!({"name": name});
        let status = serde_json::json!({"status": "Failure", "code": code, "reason": "Scripted",
            "message": "scripted", "details": details});
        kube::Error::Api(Box::new(serde_json::from_value(status).unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn the_start_waits_for_rows_that_cannot_be_read_but_not_for_a_kind_that_is_not_there() {
        let mut answers = vec![Ok(()), Err(refused(500, "")), Err(refused(403, "")), Err(refused(404, "n"))];
        assert!(read_first("rows", async || answers.pop().unwrap()).await);
        assert!(answers.is_empty());
        assert!(!read_first("rows", async || Err(refused(404, ""))).await);
    }
}
