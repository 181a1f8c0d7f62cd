//! The agent's own thread: it holds the view and the kernel, takes updates in, commits, acknowledges.
//!
//! Netlink requests, which block, happen here, so that the session and the health servers answer meanwhile. Files are
//! written by yet another thread ([`crate::storage::files`]).
//!
//! A commit starts at once when something changed. When it fails nothing is lost: the same
//! desired state is tried again with back-off, and acknowledged once the kernel holds it.

mod backlog;
mod controllers;
mod drift;
mod flows;
mod messages;
mod progress;
mod report;
mod snapshots;
mod trial;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use switchtower_proto::v1::{HealthCheckFailure, Nack, NackReason};
use tokio::sync::mpsc;

use crate::health::{Health, HealthTargets};
use crate::kernel::change::KernelChange;
use crate::kernel::dataplane::{Adopted, CommitError, Committed, Dataplane, Refused, Stamp};
use crate::log::LogLevel;
use crate::metrics::Metrics;
use crate::probe::Prober;
use crate::state::{Refusal, State, UdpChanges};
use crate::storage::files::StateFiles;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::trial_file::TrialFile;
use crate::traces::{Applying, Traces};

pub use flows::{Families, FlowReport, FlowTable, UdpFlow};
pub use messages::{Command, Event, Standing};

/// A controller that continues from a view sends what is new at once; this much later nothing is new.
const HOLD_AFTER_RESUME: Duration = Duration::from_secs(3);
/// Beyond this many uncommitted changes the whole view is compared instead.
const PENDING_LIMIT: usize = 100_000;
/// Longest pause between two attempts of a failing commit.
const RETRY_LIMIT: Duration = Duration::from_secs(30);

/// What an engine works with.
pub struct Parts {
    /// The kernel.
    pub dataplane: Box<dyn Dataplane>,
    /// The conntrack table.
    pub flows: Box<dyn FlowTable>,
    /// The snapshot file, if there is a state directory.
    pub snapshot: Option<SnapshotFile>,
    /// Writes files without holding up the engine.
    pub files: StateFiles,
    /// An older snapshot file is not programmed where the kernel holds nothing; `None`: whatever its age.
    pub snapshot_limit: Option<Duration>,
    /// Health answers.
    pub health: Health,
    /// Metrics.
    pub metrics: Metrics,
    /// The addresses of the node's interfaces now.
    pub host_addresses: Vec<IpAddr>,
    /// Where the controllers are, as far as known without asking anybody.
    pub controllers: Vec<SocketAddr>,
    /// Applies the conntrack settings when they change.
    pub sysctls: crate::kernel::sysctl::Sysctls,
    /// Changes the level of the log.
    pub log: LogLevel,
    /// Runs the probes of a trial of settings.
    pub prober: Box<dyn Prober>,
    /// Keeps a trial's standing across a restart, if there is a state directory.
    pub trial: Option<TrialFile>,
    /// Answers what is asked about the kernel, without holding up the engine.
    pub questions: crate::kernel::inspector::Questions,
    /// Where spans of updates and repairs go.
    pub traces: Traces,
}

/// The view, the kernel, and what is between them.
pub struct Engine {
    parts: Parts,
    state: State,
    /// What the kernel holds, as far as known.
    kernel: Option<Stamp>,
    /// The kernel could not be read, and nothing was committed since.
    unread: bool,
    pending: Vec<KernelChange>,
    backlog: backlog::Backlog,
    /// The incremental state cannot be trusted: the next commit compares everything.
    doubt: bool,
    /// The view is older than the kernel: nothing is written before a controller says what is new.
    hold: bool,
    /// When a view that a controller continues from is taken as current, if no update came until then.
    hold_until: Option<Instant>,
    /// A generation that the kernel holds only after the next commit, to be acknowledged then.
    unacknowledged: bool,
    nacked: Option<(u64, i32)>,
    /// The update that is received or committed, if it is told as spans.
    applying: Option<Applying>,
    refused: Vec<Refused>,
    passes: flows::Passes,
    retry: Option<(Instant, u32)>,
    queued: bool,
    last_commit: Option<Instant>,
    /// An update was refused: what still comes of it is dropped.
    skipping: bool,
    events: Option<mpsc::UnboundedSender<Event>>,
    dirty: bool,
    /// The snapshot file is older than its limit: it is not programmed.
    expired: bool,
    progress: progress::Progress,
    started: Instant,
    last_command: Instant,
    last_snapshot: Option<Instant>,
    drift: drift::Drift,
    /// Rules of kube-proxy exist beside ours.
    foreign_proxy: bool,
    /// Health checks changed since the last commit.
    health_checks_changed: bool,
    /// What health checks cannot be listened on.
    health_check_failures: Vec<HealthCheckFailure>,
}

impl Engine {
    /// Reads the kernel's stamp and the snapshot file and decides what to do with them:
    /// equal → adopted, no write; no table → the file is programmed; a file older than the kernel, or none →
    /// nothing is written before the first update.
    pub fn start(mut parts: Parts) -> Self {
        parts.health.busy();
        let stamp = parts.dataplane.stamp();
        let kept = snapshots::read(&parts);
        let (state, refused) =
            kept.view.map_or((State::new(), Vec::new()), |restored| (restored.state, restored.refused));
        let now = Instant::now();
        let mut engine = Engine {
            parts,
            state,
            kernel: None,
            unread: false,
            pending: Vec::new(),
            backlog: backlog::Backlog::default(),
            doubt: true,
            hold: false,
            hold_until: None,
            unacknowledged: false,
            nacked: None,
            applying: None,
            refused,
            passes: flows::Passes::everything(),
            retry: None,
            queued: false,
            last_commit: None,
            skipping: false,
            events: None,
            dirty: false,
            expired: kept.expired,
            progress: progress::Progress::default(),
            started: now,
            last_command: now,
            last_snapshot: None,
            drift: drift::Drift::default(),
            foreign_proxy: false,
            health_checks_changed: false,
            health_check_failures: Vec::new(),
        };
        match stamp {
            Ok(stamp) => engine.kernel = stamp,
            Err(error) => {
                tracing::warn!(%error, "the kernel's stamp cannot be read");
                engine.unread = true;
            }
        }
        if let Some(record) = kept.trial {
            engine.state.remember(record);
        }
        engine.start_from_file();
        engine
    }

    fn start_from_file(&mut self) {
        if self.expired && self.kernel.is_none() {
            tracing::warn!(
                "the snapshot file is older than --snapshot-max-age-hours and is not programmed: addresses in it may \
                 belong to other pods by now. Services work on this node once a controller is connected"
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
                    "the kernel is newer than the snapshot file: nothing is written before a controller answers"
                );
                self.hold = true;
                // It forwards meanwhile, and load balancers must know.
                if self.state.is_loaded() {
                    self.parts.health.held();
                    self.publish_health();
                }
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
                    // Commands that never stop must not keep anything else from being done.
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
        let commit = (self.queued && self.retry.is_none()).then(|| self.earliest_commit().unwrap_or(now));
        let retry = self.retry.map(|(at, _)| at);
        let round = self.state.round_due().filter(|_| !self.queued && !self.hold);
        let pass = self.passes.next(now).filter(|_| self.kernel_holds_view());
        let (snapshot, drift) = (self.snapshot_due(), self.drift.due(now));
        [snapshot, commit, retry, pass, self.hold_until, round, drift].into_iter().flatten().min()
    }

    fn wake(&mut self) {
        let now = Instant::now();
        let commit_due = match self.retry {
            Some((at, _)) => at <= now,
            None => self.queued && self.earliest_commit().is_none_or(|at| at <= now),
        };
        if commit_due {
            self.sync();
        }
        if self.hold_until.take_if(|at| *at <= now).is_some() {
            // What the kernel holds beyond the view was taken back meanwhile, or an update would have come.
            (self.hold, self.unacknowledged) = (false, true);
            self.queue_and_sync();
        }
        self.look_at_flows();
        self.probe();
        self.repair_if_due();
        if self.snapshot_due().is_some_and(|at| at <= now) {
            self.keep_snapshot();
        }
    }

    /// Takes one command.
    pub fn handle(&mut self, command: Command) {
        self.last_command = Instant::now();
        match command {
            Command::Attach { events, standing } => {
                self.state.abandon();
                // A new session was told nothing of what failed.
                (self.skipping, self.applying, self.nacked) = (false, None, None);
                self.hold_until = None;
                self.events = Some(events);
                // A receiver that is gone is a session that is gone; the next one attaches anew.
                let _ = standing.send(self.standing());
                let unset = !self.parts.sysctls.unset().is_empty();
                if self.foreign_proxy || unset || !self.health_check_failures.is_empty() {
                    self.tell("", None);
                }
            }
            Command::Resumed => self.hold_until = self.hold.then(|| Instant::now() + HOLD_AFTER_RESUME),
            Command::Begin(update) => {
                self.hold_until = None;
                self.skipping = false;
                self.backlog.begin(&update);
                self.applying = self.parts.traces.begin(&update);
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
                tracing::warn!(present, "kube-proxy's rules beside ours");
                self.foreign_proxy = present;
                self.tell("", None);
            }
            Command::HealthCheckFailures(failures) => {
                self.health_check_failures = failures;
                self.tell("", None);
            }
            Command::Flows(report) => self.flows(report),
            Command::Probed { number, measured } => self.probed(number, measured),
            Command::Ask { query, answer } => self.ask(&query, answer),
            Command::Stop => {}
        }
    }

    fn addresses_changed(&mut self, addresses: Vec<IpAddr>) {
        if self.parts.host_addresses == addresses {
            return;
        }
        self.parts.host_addresses.clone_from(&addresses);
        if !self.doubt {
            // The last ones are the ones that count, however many come while nothing can be committed.
            self.pending.retain(|change| !matches!(change, KernelChange::HostAddresses(_)));
            self.pending.push(KernelChange::HostAddresses(addresses));
        }
        // Packets to a new address of the node passed without translation until the commit.
        self.passes.add(UdpChanges::all());
        if self.hold {
            self.publish_health();
        }
        self.queue_and_sync();
    }

    fn refuse(&mut self, to: u64, result: Result<(), Refusal>) {
        if let Err(Refusal { reason, detail }) = result {
            tracing::warn!(generation = to, ?reason, %detail, "update refused");
            self.skipping = true;
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
        self.passes.add(applied.udp);
        if applied.changes.iter().any(concerns_all_flows) {
            self.passes.add(UdpChanges::all());
        }
        if self.doubt || self.pending.len() + applied.changes.len() > PENDING_LIMIT {
            self.doubt = true;
            self.pending.clear();
        } else {
            self.pending.extend(applied.changes);
        }
        self.health_checks_changed |= applied.health_checks;
        self.hold = false;
        self.unacknowledged = true;
        let counts = self.state.counts();
        self.parts.metrics.services.set(counts.services as i64);
        self.parts.metrics.endpoints.set(counts.endpoints as i64);
        if applied.trial {
            self.trial_moved();
        }
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
            deviations: self.refused.len() as u32 + u32::from(self.state.settings_deviation().is_some()),
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
        let (stamp, started, began) = (self.stamp(), Instant::now(), SystemTime::now());
        let mode = if self.doubt { "full" } else { "delta" };
        let result = if self.doubt {
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
            applying.attempted(self.doubt, began, &result);
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
        // Not at every commit: what is published is all health checks of the node.
        let health = self.kernel.is_none() || self.doubt || std::mem::take(&mut self.health_checks_changed);
        let health = health || self.pending.iter().any(concerns_health);
        if self.doubt {
            release_memory();
        }
        if self.doubt && committed.operations > 0 || self.refused != committed.refused {
            // The kernel held something else until now.
            self.passes.add(UdpChanges::all());
        }
        self.pending.clear();
        self.backlog.committed(&self.parts.metrics.programming);
        (self.doubt, self.queued, self.retry, self.nacked) = (false, false, None, None);
        self.dirty |= self.kernel.map(|kernel| (kernel.generation, kernel.digest))
            != Some((stamp.generation, stamp.digest))
            || self.refused != committed.refused
            || self.last_snapshot.is_none();
        self.kernel = Some(stamp);
        self.unread = false;
        self.refused.clone_from(&committed.refused);
        self.parts.metrics.refused.set(self.refused.len() as i64);
        self.parts.health.applied();
        if health {
            self.publish_health();
        }
        let mut unset_changed = false;
        if let Some(settings) = self.state.settings() {
            let conntrack = settings.conntrack.unwrap_or_default();
            unset_changed = self.parts.sysctls.apply(&conntrack, &self.parts.metrics);
            if self.parts.log.apply(&settings.log_level) {
                self.progress.tell_next();
            }
        }
        self.progress.committed(stamp.generation, committed, Instant::now());
        if std::mem::take(&mut self.unacknowledged) {
            let ack = self.ack(stamp, committed);
            if let Some(applying) = &self.applying {
                applying.held();
            }
            self.send(Event::Ack(ack));
        }
        if unset_changed {
            self.tell("", None);
        }
        self.look_at_flows();
        self.probe();
    }

    fn failed(&mut self, error: &CommitError) {
        let (errno, generation) = (error.errno(), self.state.generation());
        self.parts.metrics.failed(errno);
        let attempt = self.retry.map_or(0, |(_, attempt)| attempt + 1);
        let pause = crate::controller::backoff::full_jitter(Duration::from_millis(500), RETRY_LIMIT, attempt);
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

    fn kernel_holds_view(&self) -> bool {
        self.kernel.is_some() && self.state.is_loaded() && !self.queued && !self.hold
    }

    fn publish_health(&self) {
        if self.kernel.is_none() {
            return;
        }
        self.parts.health.publish(HealthTargets::of(&self.state, &self.parts.host_addresses));
    }
}

/// Health answers depend on it: eligibility, or the addresses that they are given on.
fn concerns_health(change: &KernelChange) -> bool {
    matches!(change, KernelChange::Node(_) | KernelChange::Settings(_) | KernelChange::HostAddresses(_))
}

/// Which packets are translated or get another source may depend on it, whatever their Service.
fn concerns_all_flows(change: &KernelChange) -> bool {
    matches!(change, KernelChange::Node(_) | KernelChange::Settings(_))
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
