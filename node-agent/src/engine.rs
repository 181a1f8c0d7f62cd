//! The engine: owns the view and the kernel, applies updates, commits and acknowledges.
//!
//! It runs in its own thread, because netlink requests block; the session and the health servers stay responsive.
//! A further thread writes files ([`crate::storage::files`]).
//!
//! Invariants:
//! * A change starts a commit immediately, or after the minimum interval of the settings.
//! * A failed commit loses nothing: the engine retries the same view with backoff, and acknowledges it once the kernel
//!   holds it.

mod backlog;
mod controllers;
mod drift;
mod flows;
mod held;
mod local_settings;
mod messages;
mod progress;
mod refusals;
mod report;
mod snapshots;
mod sync;
mod trial;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use switchtower_proto::v1::{Nack, NackReason, ProxyMode, Settings};
use tokio::sync::{mpsc, oneshot, watch};

use crate::controller::backoff::full_jitter;
use crate::drain::GateSettings;
use crate::health::{Health, HealthTargets};
use crate::kernel::change::KernelChange;
use crate::kernel::conntrack::FlowTable;
use crate::kernel::dataplane::{Adopted, CommitError, Committed, Dataplane, Refused, Stamp};
use crate::log::LogLevel;
use crate::metrics::Metrics;
use crate::probe::Prober;
use crate::state::{RefusedUpdate, State, UdpChanges};
use crate::storage::files::StateFiles;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::trial_file::TrialFile;
use crate::traces::{Applying, Traces};

pub use messages::{AgentStatus, Command, Event};
use report::Conditions;
use sync::{Acknowledgement, Confidence, Due, Reception, SyncState};

/// Hold after a resumed stream, if the kernel's generation is not above the view's. A controller that resumes a view
/// sends missing changes immediately; without an update in this time there are none.
const HOLD_AFTER_RESUME: Duration = Duration::from_secs(3);
/// Maximum number of uncommitted changes; beyond it the next commit compares the whole view.
const PENDING_LIMIT: usize = 100_000;
/// Maximum delay before the first retry of a failed commit; it doubles with each attempt.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Maximum delay between two attempts of a failing commit.
const RETRY_LIMIT: Duration = Duration::from_secs(30);

/// Dependencies of an engine.
pub(crate) struct Parts {
    /// The kernel's tables.
    pub dataplane: Box<dyn Dataplane>,
    /// The conntrack table.
    pub flows: Box<dyn FlowTable>,
    /// The snapshot file, if there is a state directory.
    pub snapshot: Option<SnapshotFile>,
    /// Writes files in the background.
    pub files: StateFiles,
    /// Maximum age of a snapshot file that is programmed where the kernel holds nothing; `None`: no limit.
    pub(crate) snapshot_limit: Option<Duration>,
    /// State behind the health endpoints.
    pub health: Health,
    /// Metrics.
    pub metrics: Metrics,
    /// Addresses of the node's interfaces.
    pub(crate) host_addresses: Vec<IpAddr>,
    /// Known addresses of controllers, without name resolution.
    pub controllers: Vec<SocketAddr>,
    /// Applies the conntrack settings when they change.
    pub sysctls: crate::kernel::sysctl::Sysctls,
    /// Log level, a setting.
    pub log: LogLevel,
    /// Runs the probes of a trial of settings.
    pub(crate) prober: Box<dyn Prober>,
    /// Record of the running trial across restarts, if there is a state directory.
    pub trial: Option<TrialFile>,
    /// Answers queries about the kernel in the background.
    pub(crate) questions: crate::kernel::inspector::Inspector,
    /// Exporter of spans for updates and repairs.
    pub(crate) traces: Traces,
    /// Mode before any settings are known.
    pub(crate) initial_mode: ProxyMode,
    /// Settings of the drain gate; its listener follows them.
    pub(crate) drain_gate: watch::Sender<GateSettings>,
}

/// The view, the kernel, and the changes between them.
pub(crate) struct Engine {
    parts: Parts,
    state: State,
    /// The kernel's last known stamp.
    kernel: Option<Stamp>,
    confidence: Confidence,
    sync: SyncState,
    pending: Vec<KernelChange>,
    backlog: backlog::Backlog,
    reception: Reception,
    acknowledgement: Acknowledgement,
    /// The update in progress, if it is traced.
    applying: Option<Applying>,
    /// Items that the kernel refused.
    refused: Vec<Refused>,
    retries: refusals::Retries,
    flow_checks: flows::FlowChecks,
    last_commit: Option<Instant>,
    events: Option<mpsc::UnboundedSender<Event>>,
    /// The view comes from a snapshot file older than the limit: it is not programmed.
    expired: bool,
    progress: progress::Progress,
    snapshots: snapshots::Schedule,
    drift: drift::Drift,
    conditions: Conditions,
    /// Health checks changed since the last commit.
    health_checks_changed: bool,
}

impl Engine {
    /// Compares the kernel's stamp with the snapshot file:
    /// * equal: adopts the kernel's state without a write;
    /// * no table: programs the file;
    /// * a file older than the kernel, or none: writes nothing before the first update.
    pub(crate) fn start(mut parts: Parts) -> Self {
        parts.health.busy();
        let stamp = parts.dataplane.stamp();
        let (kernel, confidence) = match stamp {
            Ok(stamp) => (stamp, Confidence::MustCompare),
            Err(error) => {
                tracing::warn!(%error, "cannot read the kernel's stamp");
                (None, Confidence::Unread)
            }
        };
        let stored = snapshots::read(&parts);
        let (state, refused) =
            stored.view.map_or((State::new(), Vec::new()), |restored| (restored.state, restored.refused));
        let mut engine = Engine {
            parts,
            state,
            kernel,
            confidence,
            sync: SyncState::Idle,
            pending: Vec::new(),
            backlog: backlog::Backlog::default(),
            reception: Reception::Receiving,
            acknowledgement: Acknowledgement::default(),
            applying: None,
            refused,
            retries: refusals::Retries::default(),
            flow_checks: flows::FlowChecks::everything(),
            last_commit: None,
            events: None,
            expired: stored.expired,
            progress: progress::Progress::default(),
            snapshots: snapshots::Schedule::new(Instant::now()),
            drift: drift::Drift::default(),
            conditions: Conditions::default(),
            health_checks_changed: false,
        };
        if let Some(record) = stored.trial {
            engine.state.remember(record);
        }
        engine.parts.health.publish_mode(engine.mode());
        engine.start_from_file();
        engine
    }

    fn start_from_file(&mut self) {
        if self.expired && self.kernel.is_none() {
            tracing::warn!(
                "the snapshot file is older than --snapshot-max-age-hours and is not programmed, because its addresses \
                 may belong to other pods now; Services work on this node once a controller is connected"
            );
            (self.state, self.refused) = (State::new(), Vec::new());
            return;
        }
        let digest = self.state.digest().0;
        let generation = self.state.generation();
        match self.kernel {
            Some(stamp)
                if !self.state.is_loaded() || (stamp.generation, stamp.digest) != (generation, digest) =>
            {
                tracing::info!(
                    kernel_generation = stamp.generation,
                    file_generation = generation,
                    "the kernel is newer than the snapshot file; the agent writes nothing before a controller answers"
                );
                self.sync = SyncState::Held { until: None };
                // The kernel forwards during the hold, so load balancers may send traffic.
                if self.state.is_loaded() {
                    self.parts.health.held();
                    self.publish_health();
                }
            }
            _ if self.state.is_loaded() => {
                self.queue();
                self.attempt();
            }
            // Neither a table nor a file: a new node.
            _ => {}
        }
    }

    /// Runs until [`Command::Stop`], or until all senders are dropped.
    pub(crate) fn run(mut self, mut commands: mpsc::Receiver<Command>, runtime: &tokio::runtime::Handle) {
        loop {
            self.parts.health.idle();
            let wait = self.next_wakeup().map(|at| at.saturating_duration_since(Instant::now()));
            let command = runtime.block_on(async {
                match wait {
                    Some(wait) => tokio::time::timeout(wait, commands.recv()).await.map_err(|_| ()),
                    None => Ok(commands.recv().await),
                }
            });
            self.parts.health.busy();
            match command {
                Ok(None | Some(Command::Stop)) => break,
                Ok(Some(command)) => {
                    self.handle(command);
                    // A steady stream of commands must not starve timers.
                    if self.next_wakeup().is_some_and(|at| at <= Instant::now()) {
                        self.wake();
                    }
                }
                Err(()) => self.wake(),
            }
        }
        self.write_last_snapshot();
        self.parts.traces.shut_down();
    }

    fn next_wakeup(&self) -> Option<Instant> {
        let now = Instant::now();
        let sync = self.sync.next(self.earliest_commit(now)).map(|(at, _)| at);
        let round = self.state.round_due().filter(|_| self.sync == SyncState::Idle);
        let pass = self.flow_checks.next(now, self.reconcilable());
        let (snapshot, drift) = (self.snapshot_due(), self.drift.due(now));
        [snapshot, sync, pass, round, drift, self.refused_due()].into_iter().flatten().min()
    }

    fn wake(&mut self) {
        let now = Instant::now();
        match self.sync.next(self.earliest_commit(now)).filter(|(at, _)| *at <= now) {
            Some((_, Due::Commit)) => self.attempt(),
            Some((_, Due::Release)) => {
                // The kernel's content is not newer than the view; otherwise the controller would have sent an update.
                self.release();
                self.acknowledgement.due = true;
                self.queue_and_sync();
            }
            None => {}
        }
        self.reconcile_flows();
        self.probe();
        self.repair_if_due();
        self.retry_refused();
        if self.snapshot_due().is_some_and(|at| at <= now) {
            self.keep_snapshot();
        }
    }

    /// Executes one command.
    pub(crate) fn handle(&mut self, command: Command) {
        self.snapshots.command(Instant::now());
        match command {
            Command::Attach { events, status } => self.attach(events, status),
            Command::Resumed => self.resumed(Instant::now()),
            Command::Begin(update) => {
                self.hold(None);
                self.reception = Reception::Receiving;
                self.backlog.begin(&update);
                self.applying = self.parts.traces.begin(&update);
                let result = self.state.begin(&update);
                self.refuse(update.to, result);
            }
            Command::Part(_) | Command::End(_) if self.reception == Reception::Discarding => {}
            Command::Part(part) => {
                let to = self.state.receiving().unwrap_or(self.state.generation());
                let result = self.state.part(&part);
                self.refuse(to, result);
            }
            Command::End(end) => match self.state.end(&end, Instant::now()) {
                Ok(applied) => self.take(applied),
                Err(refusal) => self.refuse(end.to, Err(refusal)),
            },
            Command::ReleaseHeld { before } => self.release_held(before),
            Command::HostAddresses(addresses) => self.addresses_changed(addresses),
            Command::Controllers { addresses, done } => {
                self.controllers_changed(addresses);
                drop(done);
            }
            Command::Drift { cause, noticed } => {
                self.drift.notice(cause, noticed);
                self.repair_if_due();
            }
            Command::ForeignProxy(present) => {
                if present && self.mode() == ProxyMode::Shadow {
                    tracing::info!("kube-proxy serves this node");
                } else if present {
                    tracing::warn!(
                        "another kube-proxy has rules on this node; remove them with kube-proxy --cleanup"
                    );
                } else {
                    tracing::info!("the rules of another kube-proxy are gone");
                }
                self.conditions.foreign_proxy = present;
                self.report_conditions();
            }
            Command::HealthCheckFailures(failures) => {
                self.conditions.health_check_failures = failures;
                self.report_conditions();
            }
            Command::DrainGate(failure) => {
                self.conditions.drain_gate_unheard = failure;
                self.report_conditions();
            }
            Command::Flows(report) => self.flows(report),
            Command::Probed { number, measured } => self.probed(number, measured),
            Command::Ask { query, answer } => self.parts.questions.ask(&query, answer),
            Command::Stop => {}
        }
    }

    fn attach(&mut self, events: mpsc::UnboundedSender<Event>, status: oneshot::Sender<AgentStatus>) {
        self.state.abandon();
        self.reception = Reception::Receiving;
        self.applying = None;
        self.acknowledgement.forget();
        self.hold(None);
        self.events = Some(events);
        // A dropped receiver means that the session has ended; the next one attaches itself.
        let _ = status.send(self.status());
        let unset = !self.parts.sysctls.unset().is_empty();
        if unset || self.conditions != Conditions::default() {
            self.report_conditions();
        }
    }

    /// Sets the end of the hold, if there is one.
    fn hold(&mut self, end: Option<Instant>) {
        if let SyncState::Held { until } = &mut self.sync {
            *until = end;
        }
    }

    /// The controller resumed the view.
    fn resumed(&mut self, now: Instant) {
        // A controller never leaves a node below the generation of its kernel, so an update follows, however late. To
        // commit the view before it arrives would revert the kernel to an earlier generation.
        let newer = self.kernel.is_some_and(|stamp| stamp.generation > self.state.generation());
        self.hold((!newer).then_some(now + HOLD_AFTER_RESUME));
    }

    /// Ends the hold.
    fn release(&mut self) {
        if self.sync.is_held() {
            self.sync = SyncState::Idle;
        }
    }

    fn addresses_changed(&mut self, addresses: Vec<IpAddr>) {
        if self.parts.host_addresses == addresses {
            return;
        }
        self.parts.host_addresses.clone_from(&addresses);
        if !self.confidence.must_compare() {
            // Only the last list counts, however many arrive while commits fail.
            self.pending.retain(|change| !matches!(change, KernelChange::HostAddresses(_)));
            self.pending.push(KernelChange::HostAddresses(addresses));
        }
        // Until the commit, packets to a new address of the node passed without translation.
        self.flow_checks.add(UdpChanges::all());
        if self.sync.is_held() {
            self.publish_health();
        }
        self.queue_and_sync();
    }

    fn refuse(&mut self, to: u64, result: Result<(), RefusedUpdate>) {
        if let Err(RefusedUpdate { reason, detail }) = result {
            tracing::warn!(generation = to, ?reason, %detail, "update refused");
            self.reception = Reception::Discarding;
            if let Some(applying) = self.applying.take() {
                applying.refused(reason.as_str_name());
            }
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
        if let Some(applying) = &self.applying {
            applying.received();
        }
        self.expired = false;
        self.backlog.take(&applied.changes, &self.parts.metrics.programming);
        self.flow_checks.add(applied.udp);
        if applied.changes.iter().any(concerns_all_flows) {
            self.flow_checks.add(UdpChanges::all());
        }
        if self.confidence.must_compare() || self.pending.len() + applied.changes.len() > PENDING_LIMIT {
            self.confidence.lose();
            self.pending.clear();
        } else {
            self.pending.extend(applied.changes);
        }
        self.health_checks_changed |= applied.health_checks;
        self.held_changed(applied.held);
        self.release();
        self.acknowledgement.due = true;
        let counts = self.state.counts();
        self.parts.metrics.services.set(counts.services as i64);
        self.parts.metrics.endpoints.set(counts.endpoints as i64);
        if applied.trial {
            self.trial_changed();
        }
        self.queue_and_sync();
    }

    fn queue(&mut self) {
        self.flow_checks.outdated();
        if !self.sync.is_queued() {
            self.sync = SyncState::Queued;
            self.parts.health.queued();
            self.parts.metrics.queued();
        }
    }

    fn queue_and_sync(&mut self) {
        if self.sync.is_held() || !self.state.is_loaded() {
            return;
        }
        self.queue();
        let now = Instant::now();
        if self.earliest_commit(now) <= now {
            self.attempt();
        }
    }

    /// Returns the earliest start of the next commit; the minimum interval is a setting, 0 by default.
    fn earliest_commit(&self, now: Instant) -> Instant {
        let interval = self.state.settings().map_or(0, |settings| settings.minimum_interval_milliseconds);
        let interval = Duration::from_millis(u64::from(interval.min(1_000)));
        self.last_commit.map_or(now, |last| last + interval)
    }

    /// Tries once to commit the view.
    fn attempt(&mut self) {
        let (stamp, started, began) = (self.stamp(), Instant::now(), SystemTime::now());
        let full = self.confidence.must_compare();
        let mode = if full { "full" } else { "delta" };
        let result = if full {
            let mut view = self.state.view();
            view.insert(0, KernelChange::HostAddresses(self.parts.host_addresses.clone()));
            view.insert(0, KernelChange::Controllers(self.parts.controllers.clone()));
            self.parts
                .dataplane
                .adopt(&view, stamp)
                .map(|Adopted { committed, refused }| Committed { refused, ..committed.unwrap_or_default() })
        } else {
            self.parts.dataplane.commit(&self.pending, stamp)
        };
        self.last_commit = Some(Instant::now());
        if let Some(applying) = &self.applying {
            applying.attempted(full, began, &result);
        }
        match result {
            Ok(committed) => {
                self.parts.metrics.applied(mode, stamp.generation, started.elapsed());
                self.committed(stamp, &committed);
            }
            Err(error) => self.failed(&error),
        }
    }

    fn committed(&mut self, stamp: Stamp, committed: &Committed) {
        let full = self.confidence.must_compare();
        // Not at every commit: the health targets cover all health checks of the node.
        let health = self.kernel.is_none() || full || std::mem::take(&mut self.health_checks_changed);
        let health = health || self.pending.iter().any(concerns_health);
        if full {
            release_memory();
        }
        if full && committed.operations > 0 || self.refused != committed.refused {
            // The kernel forwarded by other rules until now.
            self.flow_checks.add(UdpChanges::all());
        }
        self.pending.clear();
        self.backlog.committed(&self.parts.metrics.programming);
        (self.confidence, self.sync) = (Confidence::Incremental, SyncState::Idle);
        let is_new = self.kernel.map(|kernel| (kernel.generation, kernel.digest))
            != Some((stamp.generation, stamp.digest))
            || self.refused != committed.refused;
        self.snapshots.committed(is_new);
        self.kernel = Some(stamp);
        self.refused.clone_from(&committed.refused);
        self.retries.schedule(&self.refused, Instant::now());
        self.parts.metrics.refused.set(self.refused.len() as i64);
        self.parts.health.applied();
        if health {
            self.publish_health();
        }
        let conditions_changed = self.apply_local_settings();
        self.progress.committed(stamp.generation, committed, Instant::now());
        if self.acknowledgement.take() {
            let ack = self.ack(stamp, committed);
            if let Some(applying) = &self.applying {
                applying.held();
            }
            self.send(Event::Ack(ack));
        }
        if conditions_changed {
            self.report_conditions();
        }
        self.reconcile_flows();
        self.probe();
    }

    fn failed(&mut self, error: &CommitError) {
        let (errno, generation) = (error.errno(), self.state.generation());
        self.parts.metrics.failed(errno);
        self.flow_checks.failed(error);
        let attempt = self.sync.next_attempt();
        let delay = full_jitter(FIRST_RETRY, RETRY_LIMIT, attempt);
        self.sync = SyncState::Retrying { at: Instant::now() + delay, attempt };
        tracing::error!(generation, attempt, %error, retry_in_ms = delay.as_millis() as u64, "commit failed");
        if self.pending.len() > PENDING_LIMIT {
            self.confidence.lose();
            self.pending.clear();
        }
        if self.acknowledgement.nack(generation, errno) {
            self.nack(generation, NackReason::Kernel, errno, error.to_string());
        }
    }

    /// Handles a failure outside of a commit, after which the kernel may hold anything: the next commit compares.
    fn mirror_lost(&mut self, error: &CommitError) {
        self.confidence.lose();
        self.queue();
        self.failed(error);
    }

    /// Returns the mode of the settings in force.
    fn mode(&self) -> ProxyMode {
        self.state.settings().map_or(self.parts.initial_mode, Settings::mode)
    }

    fn kernel_holds_view(&self) -> bool {
        self.kernel.is_some() && self.state.is_loaded() && self.sync == SyncState::Idle
    }

    fn publish_health(&self) {
        self.parts.health.publish_mode(self.mode());
        if self.kernel.is_none() {
            return;
        }
        self.parts.health.publish(HealthTargets::of(&self.state, &self.parts.host_addresses));
    }
}

/// Returns whether health answers depend on the change: by eligibility, or by the addresses of health check ports.
fn concerns_health(change: &KernelChange) -> bool {
    matches!(change, KernelChange::Node(_) | KernelChange::Settings(_) | KernelChange::HostAddresses(_))
}

/// Returns whether the change may affect translation or masquerading of any Service.
fn concerns_all_flows(change: &KernelChange) -> bool {
    matches!(change, KernelChange::Node(_) | KernelChange::Settings(_))
}

/// Returns freed memory to the system; a full comparison otherwise leaves tens of MiB allocated.
fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests;
