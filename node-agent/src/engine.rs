//! The agent's own thread: it holds the view and the kernel, takes updates in, commits, acknowledges.
//!
//! Everything that blocks (netlink, the snapshot file) happens here, so that the session and the health
//! servers answer meanwhile. A commit starts at once when something changed. When it fails nothing is lost:
//! the same desired state is tried again with back-off, and acknowledged once the kernel holds it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use switchtower_proto::v1::{
    Ack, ApplyTimings, Deviation, Deviations, Nack, NackReason, Part, Report, Stamp as WireStamp, Update,
    UpdateEnd, View,
};
use tokio::sync::{mpsc, oneshot};

use crate::dataplane::{Adopted, CommitError, Committed, Dataplane, Refused, Stamp};
use crate::health::{Health, HealthTargets};
use crate::kernel_change::KernelChange;
use crate::metrics::Metrics;
use crate::snapshot::SnapshotFile;
use crate::state::{Refusal, State, UdpChanges};

/// The snapshot file is written after this time without a command.
const QUIET: Duration = Duration::from_secs(1);
/// And at most this often.
const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(30);
/// Beyond this many uncommitted changes the whole view is compared instead.
const PENDING_LIMIT: usize = 100_000;
/// Longest pause between two attempts of a failing commit.
const RETRY_LIMIT: Duration = Duration::from_secs(30);
/// Pause after a failed pass over the conntrack table.
const FLOW_RETRY: Duration = Duration::from_secs(2);
/// Most deviations that an Ack names.
const SAMPLES: usize = 16;

/// What the engine is asked to do.
#[derive(Debug)]
pub enum Command {
    /// A session begins: what it does not finish is dropped, and events go to it from now on.
    Attach {
        /// Where events go.
        events: mpsc::UnboundedSender<Event>,
        /// Gets what Hello says.
        standing: oneshot::Sender<Standing>,
    },
    /// An update begins.
    Begin(Box<Update>),
    /// A part of it.
    Part(Part),
    /// Its end.
    End(UpdateEnd),
    /// The addresses of the node's interfaces changed.
    HostAddresses(Vec<IpAddr>),
    /// Somebody else changed our tables, or may have.
    Drift {
        /// For the report and the metric.
        cause: &'static str,
    },
    /// A question of the controller.
    Ask {
        /// "counts" or "stamp".
        what: String,
        /// Gets the answer or why there is none.
        answer: oneshot::Sender<Result<Vec<u8>, String>>,
    },
    /// Write the snapshot file and stop. The kernel is left as it is.
    Stop,
}

/// What the engine tells the session; the session number is filled in there.
#[derive(Debug)]
pub enum Event {
    /// The kernel holds a generation.
    Ack(Ack),
    /// An update was refused, or the kernel refuses it for now.
    Nack(Nack),
    /// Drift was repaired.
    Report(Report),
}

/// What Hello says about this node.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// The kernel's stamp.
    pub kernel: Option<WireStamp>,
    /// The view that may be resumed.
    pub view: Option<View>,
    /// The addresses of the node's interfaces.
    pub addresses: Vec<IpAddr>,
}

/// Removes conntrack entries that lead UDP flows to backends that no longer serve.
pub trait FlowTable: Send {
    /// One pass; returns how many entries were deleted.
    ///
    /// # Errors
    /// The table could not be read or an entry not be deleted; the pass has to be repeated.
    fn reconcile(&mut self, stale: &StaleFlows<'_>) -> std::io::Result<usize>;
}

/// Decides which flows are stale.
pub struct StaleFlows<'a> {
    state: &'a State,
    udp: &'a UdpChanges,
}

impl StaleFlows<'_> {
    /// Whether entries of this family have to be looked at.
    pub fn concerns(&self, ipv4: bool) -> bool {
        if ipv4 { self.udp.ipv4 } else { self.udp.ipv6 }
    }

    /// Whether a UDP entry with this original destination and this source of replies is stale.
    pub fn is_stale(&self, destination: std::net::SocketAddr, backend: std::net::SocketAddr) -> bool {
        self.state.udp_flow(destination, backend, &self.udp.gone) == crate::state::Flow::Stale
    }
}

/// What an engine works with.
pub struct Parts {
    /// The kernel.
    pub dataplane: Box<dyn Dataplane>,
    /// The conntrack table.
    pub flows: Box<dyn FlowTable>,
    /// The snapshot file, if there is a state directory.
    pub snapshot: Option<SnapshotFile>,
    /// Health answers.
    pub health: Health,
    /// Metrics.
    pub metrics: Metrics,
    /// The addresses of the node's interfaces now.
    pub host_addresses: Vec<IpAddr>,
    /// Applies the conntrack settings when they change.
    pub sysctls: crate::sysctl::Sysctls,
}

/// The view, the kernel, and what is between them.
pub struct Engine {
    parts: Parts,
    state: State,
    /// What the kernel holds, as far as known.
    kernel: Option<Stamp>,
    pending: Vec<KernelChange>,
    /// The incremental state cannot be trusted: the next commit compares everything.
    doubt: bool,
    /// The view is older than the kernel: nothing is written before a controller says what is new.
    hold: bool,
    /// A generation that the kernel holds only after the next commit, to be acknowledged then.
    unacknowledged: bool,
    nacked: Option<(u64, i32)>,
    refused: Vec<Refused>,
    udp: UdpChanges,
    retry: Option<(Instant, u32)>,
    /// When the conntrack table is looked at again after a pass that failed.
    flow_retry: Option<Instant>,
    queued: bool,
    last_commit: Option<Instant>,
    /// An update was refused: what still comes of it is dropped.
    skipping: bool,
    events: Option<mpsc::UnboundedSender<Event>>,
    dirty: bool,
    last_snapshot: Option<Instant>,
    drift_repaired: u64,
}

impl Engine {
    /// Reads the kernel's stamp and the snapshot file and decides what to do with them:
    /// equal → adopted, no write; no table → the file is programmed; a file older than the kernel, or none →
    /// nothing is written before the first update.
    pub fn start(mut parts: Parts) -> Self {
        let stamp = parts.dataplane.stamp();
        let restored = match parts.snapshot.as_ref().map(SnapshotFile::read).transpose() {
            Ok(restored) => restored.flatten(),
            Err(error) => {
                tracing::warn!(%error, "the snapshot file is ignored");
                None
            }
        };
        let (state, refused) =
            restored.map(|restored| (restored.state, restored.refused)).unwrap_or((State::new(), Vec::new()));
        let mut engine = Engine {
            parts,
            state,
            kernel: None,
            pending: Vec::new(),
            doubt: true,
            hold: false,
            unacknowledged: false,
            nacked: None,
            refused,
            udp: UdpChanges::default(),
            retry: None,
            flow_retry: None,
            queued: false,
            last_commit: None,
            skipping: false,
            events: None,
            dirty: false,
            last_snapshot: None,
            drift_repaired: 0,
        };
        match stamp {
            Ok(stamp) => engine.kernel = stamp,
            Err(error) => tracing::warn!(%error, "the kernel's stamp cannot be read"),
        }
        engine.start_from_file();
        engine
    }

    fn start_from_file(&mut self) {
        let digest = self.state.digest().0;
        let generation = self.state.generation();
        match self.kernel {
            Some(stamp)
                if !self.state.is_loaded() || (stamp.generation, stamp.digest) != (generation, digest) =>
            {
                tracing::info!(
                    kernel_generation = stamp.generation,
                    file_generation = generation,
                    "the kernel is newer than the snapshot file: nothing is written before a controller answers"
                );
                self.hold = true;
            }
            _ if self.state.is_loaded() => {
                self.queue();
                self.sync();
            }
            // Neither a table nor a file: a new node.
            _ => {}
        }
    }

    /// Runs until [`Command::Stop`] or until all senders are gone.
    pub fn run(mut self, mut commands: mpsc::Receiver<Command>, runtime: &tokio::runtime::Handle) {
        loop {
            let wait = self.next_wakeup().map(|at| at.saturating_duration_since(Instant::now()));
            let command = runtime.block_on(async {
                match wait {
                    Some(wait) => tokio::time::timeout(wait, commands.recv()).await.map_err(|_| ()),
                    None => Ok(commands.recv().await),
                }
            });
            match command {
                Ok(None | Some(Command::Stop)) => break,
                Ok(Some(command)) => self.handle(command),
                Err(()) => self.wake(),
            }
        }
        if self.dirty {
            self.write_snapshot();
        }
    }

    fn next_wakeup(&self) -> Option<Instant> {
        let now = Instant::now();
        let snapshot = (self.dirty && self.parts.snapshot.is_some()).then(|| {
            self.last_snapshot.map_or(now + QUIET, |last| (last + SNAPSHOT_INTERVAL).max(now + QUIET))
        });
        let commit = (self.queued && self.retry.is_none()).then(|| self.earliest_commit().unwrap_or(now));
        [snapshot, commit, self.retry.map(|(at, _)| at), self.flow_retry].into_iter().flatten().min()
    }

    fn wake(&mut self) {
        let now = Instant::now();
        if self.retry.is_some_and(|(at, _)| at <= now) || (self.queued && self.retry.is_none()) {
            self.sync();
        }
        if self.flow_retry.is_some_and(|at| at <= now) {
            self.reconcile_flows();
        }
        let due = self.last_snapshot.is_none_or(|last| last + SNAPSHOT_INTERVAL <= now);
        if self.dirty && due {
            self.write_snapshot();
        }
    }

    /// Takes one command.
    pub fn handle(&mut self, command: Command) {
        match command {
            Command::Attach { events, standing } => {
                self.state.abandon();
                self.skipping = false;
                self.events = Some(events);
                // A receiver that is gone is a session that is gone; the next one attaches anew.
                let _ = standing.send(self.standing());
            }
            Command::Begin(update) => {
                self.skipping = false;
                let result = self.state.begin(&update);
                self.refuse(update.to, result);
            }
            Command::Part(_) | Command::End(_) if self.skipping => {}
            Command::Part(part) => {
                let to = self.state.receiving().unwrap_or(self.state.generation());
                let result = self.state.part(&part);
                self.refuse(to, result);
            }
            Command::End(end) => match self.state.end(&end) {
                Ok(applied) => self.take(applied),
                Err(refusal) => self.refuse(end.to, Err(refusal)),
            },
            Command::HostAddresses(addresses) => {
                if self.parts.host_addresses != addresses {
                    self.parts.host_addresses.clone_from(&addresses);
                    self.pending.push(KernelChange::HostAddresses(addresses));
                    self.publish_health();
                    self.queue_and_sync();
                }
            }
            Command::Drift { cause } => self.repair(cause),
            Command::Ask { what, answer } => {
                let _ = answer.send(self.answer(&what));
            }
            Command::Stop => {}
        }
    }

    fn standing(&mut self) -> Standing {
        let view = self.state.is_loaded().then(|| View {
            digest: self.state.digest().to_bytes().to_vec(),
            generation: self.state.generation(),
            resume: self.state.resume().cloned(),
            source: self.state.source().copied(),
        });
        let kernel = self.kernel.map(|stamp| WireStamp {
            generation: stamp.generation,
            digest: stamp.digest.to_le_bytes().to_vec(),
        });
        // A view that the kernel does not hold yet is acknowledged once it does.
        self.unacknowledged |= self.queued;
        Standing { kernel, view, addresses: self.parts.host_addresses.clone() }
    }

    fn refuse(&mut self, to: u64, result: Result<(), Refusal>) {
        if let Err(Refusal { reason, detail }) = result {
            tracing::warn!(generation = to, ?reason, %detail, "update refused");
            self.skipping = true;
            self.nack(to, reason, 0, detail);
        }
    }

    fn nack(&mut self, generation: u64, reason: NackReason, errno: i32, detail: String) {
        let kept = self.kernel.map_or(0, |stamp| stamp.generation);
        self.send(Event::Nack(Nack { session: 0, generation, reason: reason as i32, errno, detail, kept }));
    }

    fn send(&mut self, event: Event) {
        if self.events.as_ref().is_some_and(|events| events.send(event).is_err()) {
            self.events = None;
        }
    }

    fn take(&mut self, applied: crate::state::Applied) {
        if self.doubt || self.pending.len() + applied.changes.len() > PENDING_LIMIT {
            self.doubt = true;
            self.pending.clear();
        } else {
            self.pending.extend(applied.changes);
        }
        self.udp.merge(applied.udp);
        self.hold = false;
        self.unacknowledged = true;
        let counts = self.state.counts();
        self.parts.metrics.services.set(counts.services as i64);
        self.parts.metrics.endpoints.set(counts.endpoints as i64);
        self.queue_and_sync();
    }

    fn queue(&mut self) {
        if !self.queued {
            self.queued = true;
            self.parts.health.queued();
            self.parts.metrics.queued();
        }
    }

    fn queue_and_sync(&mut self) {
        if self.hold || !self.state.is_loaded() {
            return;
        }
        self.queue();
        if self.earliest_commit().is_none_or(|at| at <= Instant::now()) {
            self.sync();
        }
    }

    /// When the next commit may start; the interval is a setting, 0 by default.
    fn earliest_commit(&self) -> Option<Instant> {
        let interval = self.state.settings().map_or(0, |settings| settings.minimum_interval_milliseconds);
        self.last_commit.map(|last| last + Duration::from_millis(u64::from(interval.min(1_000))))
    }

    fn stamp(&self) -> Stamp {
        Stamp {
            generation: self.state.generation(),
            digest: self.state.digest().0,
            facts: self.facts(),
            deviations: self.refused.len() as u32,
        }
    }

    fn facts(&self) -> u64 {
        use prost::Message as _;
        let mut hasher = blake3::Hasher::new();
        if let Some(settings) = self.state.settings() {
            hasher.update(&settings.encode_to_vec());
        }
        if let Some(node) = self.state.node() {
            hasher.update(&node.encode_to_vec());
        }
        for address in &self.parts.host_addresses {
            hasher.update(address.to_string().as_bytes());
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    }

    /// One attempt to make the kernel hold the view.
    fn sync(&mut self) {
        let (stamp, started) = (self.stamp(), Instant::now());
        let mode = if self.doubt { "full" } else { "delta" };
        let result = if self.doubt {
            let mut view = self.state.view();
            view.insert(0, KernelChange::HostAddresses(self.parts.host_addresses.clone()));
            self.parts
                .dataplane
                .adopt(&view, stamp)
                .map(|Adopted { committed, refused }| Committed { refused, ..committed.unwrap_or_default() })
        } else {
            self.parts.dataplane.commit(&self.pending, stamp)
        };
        self.last_commit = Some(Instant::now());
        match result {
            Ok(committed) => {
                self.parts.metrics.applied(mode, stamp.generation, started.elapsed());
                self.committed(stamp, committed);
            }
            Err(error) => self.failed(&error),
        }
    }

    fn committed(&mut self, stamp: Stamp, committed: Committed) {
        if self.doubt {
            release_memory();
        }
        self.pending.clear();
        (self.doubt, self.queued, self.retry, self.nacked) = (false, false, None, None);
        self.dirty |= self.kernel.map(|kernel| (kernel.generation, kernel.digest))
            != Some((stamp.generation, stamp.digest))
            || self.refused != committed.refused
            || self.last_snapshot.is_none();
        self.kernel = Some(stamp);
        self.refused.clone_from(&committed.refused);
        self.parts.metrics.refused.set(self.refused.len() as i64);
        self.parts.health.applied();
        self.publish_health();
        let started = Instant::now();
        self.reconcile_flows();
        if let Some(conntrack) = self.state.settings().and_then(|settings| settings.conntrack) {
            self.parts.sysctls.apply(&conntrack, &self.parts.metrics);
        }
        tracing::info!(
            generation = stamp.generation,
            operations = committed.operations,
            plan_us = committed.plan.as_micros() as u64,
            commit_us = committed.commit.as_micros() as u64,
            refused = self.refused.len(),
            "the kernel holds the generation"
        );
        if std::mem::take(&mut self.unacknowledged) {
            let ack = self.ack(stamp, &committed, started.elapsed());
            self.send(Event::Ack(ack));
        }
    }

    fn ack(&self, stamp: Stamp, committed: &Committed, conntrack: Duration) -> Ack {
        let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let counts = self.state.counts();
        Ack {
            session: 0,
            generation: stamp.generation,
            digest: stamp.digest.to_le_bytes().to_vec(),
            deviations: self.deviations(stamp.digest),
            timings: Some(ApplyTimings {
                plan_microseconds: microseconds(committed.plan),
                commit_microseconds: microseconds(committed.commit),
                conntrack_microseconds: microseconds(conntrack),
                operations: committed.operations,
                services: counts.services as u32,
                endpoints: counts.endpoints as u32,
            }),
        }
    }

    /// Held removals and settings fallback come with the delete budget and rollouts; refused items are now.
    fn deviations(&self, desired: u128) -> Option<Deviations> {
        if self.refused.is_empty() {
            return None;
        }
        // Equal for equal sets of refused items over equal views; it is compared, never decoded.
        let effective = self.refused.iter().fold(desired, |digest, refused| {
            let mut first = [0; 16];
            first.copy_from_slice(&blake3::hash(refused.item.as_bytes()).as_bytes()[..16]);
            digest.wrapping_sub(u128::from_le_bytes(first))
        });
        let samples = self.refused.iter().take(SAMPLES).map(|Refused { item, reason, errno }| Deviation {
            item: item.clone(),
            reason: reason.clone(),
            errno: *errno,
        });
        Some(Deviations {
            held: 0,
            refused: self.refused.len() as u32,
            settings_revision: 0,
            effective_digest: effective.to_le_bytes().to_vec(),
            samples: samples.collect(),
        })
    }

    fn failed(&mut self, error: &CommitError) {
        let (errno, generation) = (error.errno(), self.state.generation());
        self.parts.metrics.failed(errno);
        let attempt = self.retry.map_or(0, |(_, attempt)| attempt + 1);
        let pause = crate::backoff::full_jitter(Duration::from_millis(500), RETRY_LIMIT, attempt);
        self.retry = Some((Instant::now() + pause, attempt));
        tracing::error!(generation, attempt, %error, "nothing was committed; trying again");
        if self.pending.len() > PENDING_LIMIT {
            self.doubt = true;
            self.pending.clear();
        }
        // Said once per generation and error number, however often it is tried.
        if self.unacknowledged && self.nacked != Some((generation, errno)) {
            self.nacked = Some((generation, errno));
            self.nack(generation, NackReason::Kernel, errno, error.to_string());
        }
    }

    fn reconcile_flows(&mut self) {
        if !self.udp.ipv4 && !self.udp.ipv6 {
            return;
        }
        let started = Instant::now();
        let stale = StaleFlows { state: &self.state, udp: &self.udp };
        match self.parts.flows.reconcile(&stale) {
            Ok(deleted) => {
                self.parts.metrics.conntrack_deleted.inc_by(deleted as u64);
                self.udp = UdpChanges::default();
                self.flow_retry = None;
            }
            // What is to be looked at stays noted.
            Err(error) => {
                tracing::warn!(%error, "conntrack entries could not be reconciled; trying again");
                self.flow_retry = Some(Instant::now() + FLOW_RETRY);
            }
        }
        self.parts.metrics.conntrack_duration.observe(started.elapsed().as_secs_f64());
    }

    fn publish_health(&self) {
        if self.kernel.is_none() {
            return;
        }
        self.parts.health.publish(HealthTargets::of(&self.state, &self.parts.host_addresses));
    }

    fn repair(&mut self, cause: &'static str) {
        if self.hold {
            // Only a table that is gone is worth an older view.
            if let Ok(None) = self.parts.dataplane.stamp()
                && self.state.is_loaded()
            {
                self.hold = false;
                self.queue_and_sync();
            }
            return;
        }
        if !self.state.is_loaded() || self.doubt {
            return;
        }
        match self.parts.dataplane.repair() {
            Ok(0) => {}
            Ok(differences) => {
                self.drift_repaired += 1;
                self.parts.metrics.drift.with_label_values(&[cause]).inc();
                tracing::warn!(differences, cause, "foreign changes of our tables were repaired");
                let report = Report {
                    session: 0,
                    drift_repaired: self.drift_repaired,
                    drift_cause: cause.into(),
                    foreign_proxy: false,
                };
                self.send(Event::Report(report));
            }
            Err(error) => {
                self.doubt = true;
                self.queue();
                self.failed(&error);
            }
        }
    }

    fn write_snapshot(&mut self) {
        let Some(file) = &self.parts.snapshot else { return };
        self.last_snapshot = Some(Instant::now());
        match file.write(&self.state, &self.refused) {
            Ok(()) => {
                self.dirty = false;
                self.parts.metrics.snapshot();
            }
            Err(error) => tracing::warn!(%error, "the snapshot file could not be written"),
        }
    }

    fn answer(&mut self, what: &str) -> Result<Vec<u8>, String> {
        let json = match what {
            "counts" => {
                let counts = self.state.counts();
                serde_json::json!({
                    "services": counts.services, "frontends": counts.frontends, "pools": counts.pools,
                    "endpoints": counts.endpoints, "items": counts.items, "refused": self.refused.len(),
                })
            }
            "stamp" => {
                let stamp = self.parts.dataplane.stamp().map_err(|error| error.to_string())?;
                match stamp {
                    None => serde_json::Value::Null,
                    Some(stamp) => serde_json::json!({
                        "generation": stamp.generation, "digest": format!("{:032x}", stamp.digest),
                        "facts": format!("{:016x}", stamp.facts), "deviations": stamp.deviations,
                    }),
                }
            }
            other => return Err(format!("this agent answers \"counts\" and \"stamp\", not {other:?}")),
        };
        serde_json::to_vec(&json).map_err(|error| error.to_string())
    }
}

/// Hands freed memory back to the system: a whole view in transit leaves tens of MiB behind otherwise.
fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests;
