//! Task that compiles the input of the watches into revisions of the layers.
//!
//! Invariants: nothing is published before every watch is synced and the first compilation is done. The first event
//! is compiled at once. Events during a compilation, or while the fleet is busy with the previous publication, are
//! combined in the next one. The cost of a compilation depends on the changes, not on the size of the cluster.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntGauge, IntGaugeVec, Registry, exponential_buckets,
    register_histogram_with_registry, register_int_counter_with_registry,
    register_int_gauge_vec_with_registry, register_int_gauge_with_registry,
};
use switchtower_core::compile::{Bound, Compiler};
use switchtower_core::propagation::{Change, Publication, TraceContext};
use switchtower_proto::v1::Source;
use tokio::sync::{mpsc, watch};

use crate::events::EventSink;
use crate::fleet::Fleet;
use crate::metrics::health::Busy;
use crate::propagation::unix_nanoseconds;
use crate::status::NodeEvent;
use crate::watch::Batch;

mod intake;

use intake::{Arrival, Intake, Work};

/// Maximum number of batches per compilation.
const BATCHES: usize = 1_024;

/// Changes that an update names one by one; the others are only counted (fleet.proto: `Update.changes`).
const NAMED_CHANGES: usize = 16;

/// State of the layers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Head {
    /// Revision of the layers: one counter per process, from 1.
    pub revision: u64,
    /// Processed version of each resource.
    pub source: Source,
}

/// Outputs of the engine in addition to the layers.
#[derive(Debug)]
pub struct Outputs {
    /// `None` until the first compile is published.
    pub head: watch::Sender<Option<Head>>,
    /// Nodes, for their rows and for rollouts.
    pub nodes: Vec<mpsc::UnboundedSender<NodeEvent>>,
    /// Problems of objects.
    pub events: EventSink,
    /// Start of the current work, for the liveness probe.
    pub busy: Busy,
}

/// Metrics of the engine.
#[derive(Debug, Clone)]
pub struct EngineMetrics {
    compile: Histogram,
    first_compile: IntGauge,
    changes: IntCounter,
    idle: IntCounter,
    revision: IntGauge,
    over_limit: IntGaugeVec,
}

impl EngineMetrics {
    /// Creates and registers them.
    ///
    /// # Errors
    /// A name is already registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let compile = HistogramOpts::new(
            "switchtower_compile_seconds",
            "Time to compile and publish what arrived together.",
        );
        // From 10 microseconds to 1.3 seconds.
        let compile = compile.buckets(exponential_buckets(0.000_01, 2.0, 18)?);
        Ok(Self {
            compile: register_histogram_with_registry!(compile, registry)?,
            first_compile: register_int_gauge_with_registry!(
                "switchtower_first_compile_microseconds",
                "Time that the compile of the first complete state took.",
                registry
            )?,
            changes: register_int_counter_with_registry!(
                "switchtower_changes_total",
                "Object changes that were compiled.",
                registry
            )?,
            idle: register_int_counter_with_registry!(
                "switchtower_compiles_without_change_total",
                "Compiles of changed objects after which no node has anything to do.",
                registry
            )?,
            revision: register_int_gauge_with_registry!(
                "switchtower_revision",
                "Revision of the layers in this process.",
                registry
            )?,
            over_limit: register_int_gauge_vec_with_registry!(
                "switchtower_services_over_limit",
                "Services beyond a bound: of their own (service; the surplus is left out), of their namespace or of all \
                 Services (namespace, total; the Service is not programmed).",
                &["bound"],
                registry
            )?,
        })
    }
}

/// Everything that the task uses besides its input.
pub struct Parts {
    /// Compiles the input.
    pub compiler: Compiler,
    /// Holds the layers, and sends them.
    pub fleet: Arc<Fleet>,
    /// Receivers of results other than layers.
    pub outputs: Outputs,
    /// The task's metrics.
    pub metrics: EngineMetrics,
    /// Creates the trace context of a change.
    pub new_trace: Box<dyn FnMut() -> TraceContext + Send>,
}

/// Runs until the watches have ended. `controllers` are the addresses that no Service may take.
pub async fn run(
    parts: Parts,
    mut batches: mpsc::Receiver<Batch>,
    mut controllers: watch::Receiver<BTreeSet<SocketAddr>>,
) {
    let Parts { compiler, fleet, outputs, metrics, new_trace } = parts;
    let busy = outputs.busy.clone();
    let mut engine = Engine {
        intake: Intake::default(),
        compiler,
        fleet,
        outputs,
        metrics,
        new_trace,
        head: Head::default(),
        missing: String::new(),
        reserved: false,
    };
    let mut buffer = Vec::new();
    controllers.mark_changed();
    loop {
        tokio::select! {
            received = batches.recv_many(&mut buffer, BATCHES) => {
                if received == 0 {
                    return;
                }
            }
            Ok(()) = controllers.changed() => {
                engine.compiler.reserve(controllers.borrow_and_update().clone());
                engine.reserved = true;
            }
        }
        engine.absorb_while_busy(&mut batches, &mut buffer).await;
        let _busy = busy.begin();
        engine.step();
    }
}

/// Returns the names of resources whose first list is not complete, for the log.
fn names(intake: &Intake) -> String {
    intake.missing().map(|resource| resource.name()).collect::<Vec<_>>().join(", ")
}

struct Engine {
    intake: Intake,
    compiler: Compiler,
    fleet: Arc<Fleet>,
    outputs: Outputs,
    metrics: EngineMetrics,
    new_trace: Box<dyn FnMut() -> TraceContext + Send>,
    head: Head,
    /// Resources that were logged as missing.
    missing: String,
    /// The addresses of controllers changed since the last compile.
    reserved: bool,
}

impl Engine {
    /// Absorbs the batches in `buffer`, and those that arrive before the fleet is ready for the next publication.
    async fn absorb_while_busy(&mut self, batches: &mut mpsc::Receiver<Batch>, buffer: &mut Vec<Batch>) {
        let propagation = self.fleet.propagation().clone();
        let ready = propagation.ready_for_publication();
        tokio::pin!(ready);
        loop {
            for batch in buffer.drain(..) {
                self.intake.absorb(batch);
            }
            tokio::select! {
                biased;
                () = &mut ready => return,
                received = batches.recv_many(buffer, BATCHES) => if received == 0 {
                    return;
                },
            }
        }
    }

    fn step(&mut self) {
        let Some(work) = self.intake.take() else {
            let missing = names(&self.intake);
            if missing != self.missing {
                tracing::info!(missing, "waiting for the first lists");
                self.missing = missing;
            }
            return;
        };
        let Work { inputs, problems, nodes, source, changed } = work;
        self.outputs.events.report(problems);
        for event in nodes {
            for sink in &self.outputs.nodes {
                // The receiving task may have ended during shutdown.
                let _ = sink.send(event.clone());
            }
        }
        let first = self.head.revision == 0;
        let reserved = std::mem::take(&mut self.reserved);
        if !inputs.is_empty() || first || reserved {
            self.compile(inputs, changed, first);
        }
        if self.head.source != source {
            self.fleet.advance(source);
        }
        self.head.source = source;
        let head = self.head;
        self.outputs.head.send_if_modified(|known| {
            let changed = *known != Some(head);
            *known = Some(head);
            changed
        });
    }

    /// Gives the inputs to the compiler. Returns a description of the first effective changes, and their number.
    fn apply(&mut self, inputs: Vec<Arrival>) -> (Vec<Change>, u32) {
        let (mut changes, mut total) = (Vec::new(), 0_u32);
        for Arrival { input, cause } in inputs {
            // The compiler consumes the input: described before its effect is known.
            let described = cause
                .as_ref()
                .filter(|_| changes.len() < NAMED_CHANGES)
                .map(|cause| cause.describe(&input, (self.new_trace)()));
            if self.compiler.apply(input) && cause.is_some() {
                total = total.saturating_add(1);
                changes.extend(described);
            }
        }
        (changes, total)
    }

    fn compile(&mut self, inputs: Vec<Arrival>, changed: Source, first: bool) {
        let (started, compiling) = (Instant::now(), unix_nanoseconds(SystemTime::now()));
        let objects = inputs.len();
        let (changes, total) = self.apply(inputs);
        let mut compiled = self.compiler.compile();
        // Not part of publishing: pods may change without a change of any layer.
        self.fleet.pods_changed(&compiled.pods);
        self.fleet.host_pods_changed(&compiled.host_pods);
        self.outputs.events.report(std::mem::take(&mut compiled.problems));
        if first || !compiled.changes.is_empty() || !compiled.removed.is_empty() {
            let publication = Publication { changes, total, compiling, published: compiling };
            self.head.revision = self.fleet.publish(compiled, publication, changed);
            self.head.source = changed;
        } else {
            self.metrics.idle.inc();
        }
        let elapsed = started.elapsed();
        for bound in Bound::ALL {
            let services = i64::try_from(self.compiler.bounded(bound)).unwrap_or(i64::MAX);
            self.metrics.over_limit.with_label_values(&[bound.name()]).set(services);
        }
        self.metrics.changes.inc_by(total.into());
        self.metrics.revision.set(i64::try_from(self.head.revision).unwrap_or(i64::MAX));
        if first {
            self.metrics.first_compile.set(i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX));
            tracing::info!(
                objects,
                milliseconds = elapsed.as_millis(),
                revision = self.head.revision,
                "first state compiled; agents are served from now on"
            );
        } else {
            self.metrics.compile.observe(elapsed.as_secs_f64());
        }
    }
}

/// Waits until the first compilation is published. Returns false if the engine has ended.
pub async fn first_head(head: &mut watch::Receiver<Option<Head>>) -> bool {
    head.wait_for(Option::is_some).await.is_ok()
}

#[cfg(test)]
mod tests;
