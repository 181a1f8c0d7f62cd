//! The parts between the API server and the fleet.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::{Api, Client};
use prometheus::Registry;
use switchtower_core::compile::Compiler;
use switchtower_core::propagation::{Limits as FollowLimits, TraceContext};
use switchtower_crds::builtin::Record;
use tokio::sync::{mpsc, oneshot, watch as channel};

use super::{RETRY, Replica};
use crate::background::Background;
use crate::builtin::{self, BuiltinError};
use crate::cli::ServeArgs;
use crate::engine::{self, EngineMetrics, Head, Outputs};
use crate::errors::{Chain, is_missing_kind};
use crate::events;
use crate::fleet::behind::BehindCollector;
use crate::fleet::metrics::StreamMetrics;
use crate::fleet::{Fleet, Parts};
use crate::metrics::health::{Busy, Health};
use crate::metrics::{self, Exemplars, Readiness};
use crate::peers;
use crate::propagation::{self, Propagation, PropagationMetrics};
use crate::rollout::{RolloutMetrics, Rollouts};
use crate::session;
use crate::status::absence::{self, Agents};
use crate::status::{
    Assignments, Floors, NodeEvent, StatusMetrics, Writer, WriterClients, WriterSettings, backlog,
};
use crate::traces::{Head as Sampled, Traces};
use crate::watch::{self, Batch, Selectors, Upstream, UpstreamCollector, WatchMetrics, Watched};

/// Leaves Services of other proxies to them, as kube-proxy does.
const SERVICE_SELECTOR: &str = "!service.kubernetes.io/service-proxy-name";
/// Leaves out the EndpointSlices of headless Services. A Service that merely bears the label then has no endpoints.
const SLICE_SELECTOR: &str = "!service.kubernetes.io/headless";
/// Capacity in batches between watches and engine: bounds memory while a compile runs.
const BATCHES: usize = 1_024;
/// Timeout of reading everything that the built-in settings are derived from.
const BUILTIN_TIMEOUT: Duration = Duration::from_secs(120);

/// The registry, and the measurements that several parts share.
pub(super) struct Telemetry {
    pub(super) registry: Registry,
    pub(super) serve: StreamMetrics,
    busy: Busy,
    upstream: Arc<Upstream>,
}

impl Telemetry {
    pub(super) fn new() -> anyhow::Result<Self> {
        let registry = metrics::registry()?;
        let serve = StreamMetrics::new(&registry)?;
        Ok(Self { registry, serve, busy: Busy::default(), upstream: Arc::default() })
    }

    pub(super) fn health(&self, readiness: &Readiness) -> Health {
        let upstream = self.upstream.clone();
        Health {
            readiness: readiness.clone(),
            busy: self.busy.clone(),
            upstream: Arc::new(move || upstream.age()),
        }
    }

    /// Exports the remaining spans.
    pub(super) async fn flush(&self, traces: Option<Arc<Traces>>) -> anyhow::Result<()> {
        if let Some(traces) = traces {
            // It waits for the exporter's thread, which needs this runtime.
            tokio::task::spawn_blocking(move || traces.shut_down()).await?;
        }
        Ok(())
    }
}

/// The trackers of changes.
pub(super) struct Changes {
    propagation: Arc<Propagation>,
    traces: Option<Arc<Traces>>,
    new_trace: Box<dyn FnMut() -> TraceContext + Send>,
}

/// Starts to follow changes, and to export traces of them if the environment asks for it.
pub(super) fn follow_changes(
    registry: &Registry,
    exemplars: Exemplars,
    traces: Option<(Traces, Sampled)>,
    tasks: &mut Background,
) -> anyhow::Result<Changes> {
    let metrics = PropagationMetrics::new(registry)?.with_exemplars(exemplars);
    let propagation = Propagation::new(FollowLimits::default(), metrics);
    let (propagation, traces, new_trace) = match traces {
        None => (propagation, None, Box::new(propagation::new_trace) as Box<_>),
        Some((traces, sampled)) => {
            let (propagation, records) = propagation.with_reader();
            let traces = Arc::new(traces);
            let exporter = traces.clone();
            tasks.spawn("traces", async move { exporter.run(records).await });
            tracing::info!("exporting traces over OTLP");
            (propagation, Some(traces), Box::new(move || sampled.trace()) as Box<_>)
        }
    };
    let propagation = Arc::new(propagation);
    tasks.spawn("overdue changes", propagation.clone().watch());
    Ok(Changes { propagation, traces, new_trace })
}

/// A replica that watches and compiles, and its prepared writers of objects.
pub(super) struct Synced {
    pub(super) fleet: Arc<Fleet>,
    pub(super) traces: Option<Arc<Traces>>,
    pub(super) head: channel::Receiver<Option<Head>>,
    pub(super) writers: Writers,
}

/// Starts watches, engine and layers, and prepares the writers.
pub(super) async fn start_synced(
    replica: &Replica,
    changes: Changes,
    tasks: &mut Background,
) -> anyhow::Result<Synced> {
    let Replica { args, name, clients, telemetry, fence, others, .. } = replica;
    let Telemetry { registry, serve, upstream, busy } = telemetry;
    registry.register(Box::new(UpstreamCollector::new(upstream.clone())?))?;
    let floors = Floors::default();
    let age = upstream.clone();
    let (events, publisher) = events::publisher(clients.unfenced.clone(), name, fence.clone(), registry)?;
    let sink = events.clone();
    let builtin = builtin_settings(&clients.unfenced, args).await?;
    let fleet = Fleet::new(Parts {
        settings: builtin::settings(&builtin),
        floors: floors.clone(),
        metrics: serve.clone(),
        upstream: Arc::new(move || age.age()),
        propagation: changes.propagation,
        problems: Arc::new(move |problem| sink.report_of_agent(problem)),
        others: others.clone(),
    });
    registry.register(Box::new(BehindCollector::new(fleet.clone())?))?;

    let (nodes, node_events) = mpsc::unbounded_channel();
    let writers = prepare_writers(replica, &fleet, floors, node_events, tasks)?;
    let keep = builtin::keep(clients.fenced.clone(), args.namespace.clone(), builtin, fence.clone());
    tasks.spawn("built-in settings record", keep);
    tasks.spawn("Events", publisher);
    tasks.spawn("states of replicas", fleet.clone().follow_replicas());
    tasks.spawn("silent agents", session::search(fleet.clone()));

    let batches = start_watches(&clients.unfenced, args, upstream, registry, tasks)?;
    let (head, head_seen) = channel::channel(None);
    let compiler = Compiler::new().limited(args.limits.limits());
    let (reserve, reserved) = channel::channel(peers::resolve(&args.advertise).await);
    tasks.spawn("reserved addresses", peers::reserve(replica.peers.clone(), reserve));
    let outputs = Outputs { head, nodes: vec![nodes], events, busy: busy.clone() };
    let metrics = EngineMetrics::new(registry)?;
    let new_trace = changes.new_trace;
    let parts = engine::Parts { compiler, fleet: fleet.clone(), outputs, metrics, new_trace };
    tasks.spawn("engine", engine::run(parts, batches, reserved));
    Ok(Synced { fleet, head: head_seen, traces: changes.traces, writers })
}

/// Prepares the writers of rows and rollouts. Events of Nodes wait until the rows were read.
fn prepare_writers(
    replica: &Replica,
    fleet: &Arc<Fleet>,
    floors: Floors,
    node_events: mpsc::UnboundedReceiver<NodeEvent>,
    tasks: &mut Background,
) -> anyhow::Result<Writers> {
    let Replica { args, name, clients, agents, telemetry, fence, others, .. } = replica;
    let Telemetry { registry, upstream, .. } = telemetry;
    let assignments = Assignments::default();
    let settings = WriterSettings {
        replicas: others.replicas().clone(),
        fence: fence.clone(),
        agents: agents.clone(),
        floors,
        assignments: assignments.clone(),
        clock: clients.clock.clone(),
    };
    let leader = clients.fenced.clone();
    let metrics = StatusMetrics::new(registry)?;
    let row_clients = WriterClients { any: clients.unfenced.clone(), leader: leader.clone() };
    let writer = Writer::new(row_clients, fleet.clone(), settings, metrics);
    let metrics = RolloutMetrics::new(registry)?;
    let leadership = (fence.clone(), others.clone());
    let clock = clients.clock.clone();
    let rollouts = Rollouts::new(leader, name, fleet.clone(), assignments, leadership, metrics)
        .timed_by(move || clock.now());
    let account = args.agent_service_account.clone();
    let pods = absence::follow::run(
        clients.unfenced.clone(),
        args.namespace.clone(),
        account,
        agents.clone(),
        upstream.restores(),
    );
    let (rows, row_events) = mpsc::unbounded_channel();
    let (more, rollout_events) = mpsc::unbounded_channel();
    let (activate, activated) = oneshot::channel::<()>();
    let forward = backlog::forward(node_events, vec![rows, more], async move {
        if activated.await.is_err() {
            // The process is ending, or a part of it failed to start.
            std::future::pending::<()>().await;
        }
    });
    tasks.spawn("Nodes", forward);
    tasks.spawn("agent Pods", pods);
    Ok(Writers {
        writer,
        rollouts,
        row_events,
        rollout_events,
        activate,
        agents: agents.clone(),
        upstream: upstream.clone(),
    })
}

/// The writers of rows and rollouts, ready to start.
pub(super) struct Writers {
    writer: Writer<Fleet>,
    rollouts: Rollouts,
    row_events: mpsc::UnboundedReceiver<NodeEvent>,
    rollout_events: mpsc::UnboundedReceiver<NodeEvent>,
    activate: oneshot::Sender<()>,
    agents: Agents,
    upstream: Arc<Upstream>,
}

impl Writers {
    /// Reads rows and assignments, then starts the writers. Agents may be served once it returns.
    pub(super) async fn start(self, tasks: &mut Background) {
        let Self { mut writer, mut rollouts, row_events, rollout_events, activate, .. } = self;
        // Rows first: sessions continue from the generations in them.
        let loaded = read_first("ProxyStatus", async || writer.load().await).await;
        // Then the settings that they name, so that no node gets different ones for a moment.
        read_first("ProxyProfile and ProxyRollout", async || rollouts.load().await).await;
        tasks.spawn("rows", writer.run(loaded, row_events, self.upstream.restores()));
        tasks.spawn("queries to agents", absence::ask::run(self.agents));
        tasks.spawn("rollouts", rollouts.run(rollout_events, self.upstream.restores()));
        let _ = activate.send(());
    }
}

/// Reads the built-in settings before any node is served. Retries while the API server is unreachable or permissions
/// are missing: a guess would change every node twice.
async fn builtin_settings(client: &Client, args: &ServeArgs) -> anyhow::Result<Record> {
    loop {
        match tokio::time::timeout(BUILTIN_TIMEOUT, builtin::load(client, &args.namespace, args.builtin_mode))
            .await
        {
            Ok(Ok(record)) => return Ok(record),
            Ok(Err(error @ BuiltinError::Api { .. })) => {
                tracing::error!(error = %Chain(&error), "failed to load the built-in settings; agents wait; retrying");
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => tracing::error!(
                "failed to load the built-in settings: the API server does not answer; agents wait; retrying"
            ),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Reads the objects that determine the settings of nodes, retrying until it succeeds: without them, agents would get
/// the built-in settings, outside of any rollout. Returns false if the kind is not installed.
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
        tracing::warn!(kind, error = %Chain(&error), "failed to read; agents wait; retrying");
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
    async fn start_waits_for_unreadable_rows_but_not_for_a_missing_kind() {
        let mut answers = vec![Ok(()), Err(refused(500, "")), Err(refused(403, "")), Err(refused(404, "n"))];
        assert!(read_first("rows", async || answers.pop().unwrap()).await);
        assert!(answers.is_empty());
        assert!(!read_first("rows", async || Err(refused(404, ""))).await);
    }
}
