//! Hollow agents: the node agent's session and state, and no kernel.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use prometheus::Registry;
use switchtower_node_agent::controller::bootstrap::Controllers;
use switchtower_node_agent::controller::link::Contact;
use switchtower_node_agent::controller::session::{self, Context, Identity};
use switchtower_node_agent::drain::requests::Requests;
use switchtower_node_agent::engine::{AgentStatus, Command, Event};
use switchtower_node_agent::metrics::Metrics;
use switchtower_node_agent::state::{RefusedUpdate, State};
use switchtower_node_agent::storage::files::StateFiles;
use switchtower_proto::v1::{Ack, ApplyTimings, Nack, Stamp, Update, View};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::cluster;

/// An update that an agent applied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Applied {
    /// The time when it was applied.
    pub(super) at: Instant,
    /// The resource version of EndpointSlices that the view reflects.
    pub(super) slices: u64,
}

/// Progress of one hollow agent, read by the measurement.
#[derive(Debug, Default)]
pub(super) struct Hollow {
    generation: AtomicU64,
    slices: AtomicU64,
    streams: AtomicU64,
    snapshots: AtomicU64,
    recording: AtomicBool,
    applied: Mutex<Vec<Applied>>,
}

impl Hollow {
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn slices(&self) -> u64 {
        self.slices.load(Ordering::Acquire)
    }

    fn log(&self) -> MutexGuard<'_, Vec<Applied>> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, generation: u64, slices: u64) {
        if self.recording.load(Ordering::Acquire) {
            self.log().push(Applied { at: Instant::now(), slices });
        }
        self.slices.store(slices, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
    }
}

/// Streams and snapshots of an agent so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Returns {
    streams: u64,
    snapshots: u64,
}

/// All hollow agents. They end when this is dropped.
pub(super) struct Agents {
    agents: Vec<Agent>,
    shared: Shared,
}

struct Agent {
    hollow: Arc<Hollow>,
    name: String,
    token_file: PathBuf,
    commands: mpsc::Sender<Command>,
    /// Ends the session when it is dropped.
    stop: Option<watch::Sender<bool>>,
}

/// What all agents of a set use.
struct Shared {
    runtime: Handle,
    directory: PathBuf,
    metrics: Metrics,
    files: StateFiles,
}

impl Shared {
    /// Starts the session of an agent.
    fn connect(
        &self,
        name: &str,
        token_file: &Path,
        commands: &mpsc::Sender<Command>,
    ) -> watch::Sender<bool> {
        let (stop, stopped) = watch::channel(false);
        let directory = Some(self.directory.clone());
        let context = Context {
            controllers: Controllers::new(Vec::new(), directory, None, token_file.to_owned(), None),
            identity: Identity {
                node_name: name.to_owned(),
                kernel_version: "hollow".to_owned(),
                files: self.files.clone(),
            },
            commands: commands.clone(),
            metrics: self.metrics.clone(),
            contact: Contact::default(),
            drains: Requests::default(),
        };
        self.runtime.spawn(session::run(context, stopped));
        stop
    }
}

impl Agents {
    /// Starts one agent for each token, for the Nodes from `first` on; `directory` has the controller's CA and address.
    /// `checking` agents keep their view and check every update, the others acknowledge what an update announces.
    pub(super) fn start(
        runtime: &tokio::runtime::Runtime,
        first: usize,
        tokens: &[String],
        directory: &Path,
        checking: usize,
    ) -> Result<Self> {
        let shared = Shared {
            runtime: runtime.handle().clone(),
            directory: directory.to_owned(),
            metrics: Metrics::register(&Registry::new())?,
            files: StateFiles::start()?,
        };
        let mut agents = Vec::new();
        for (number, token) in tokens.iter().enumerate() {
            let name = cluster::node_name(first + number);
            let token_file = directory.join(format!("token-{name}"));
            std::fs::write(&token_file, token)
                .with_context(|| format!("writing {}", token_file.display()))?;
            let (commands, inbox) = mpsc::channel(16);
            let hollow = Arc::new(Hollow::default());
            // Spread over all zones and the whole time of a join.
            if number * checking / tokens.len() < (number + 1) * checking / tokens.len() {
                runtime.spawn(answer(inbox, hollow.clone()));
            } else {
                runtime.spawn(acknowledge(inbox, hollow.clone()));
            }
            let stop = Some(shared.connect(&name, &token_file, &commands));
            agents.push(Agent { hollow, name, token_file, commands, stop });
        }
        Ok(Self { agents, shared })
    }

    /// Restarts all agents within `duration`, one after the other. They keep what they hold.
    pub(super) fn restart_all(&mut self, duration: Duration) {
        let began = Instant::now();
        let count = self.agents.len() as u32;
        for (number, agent) in (0..count).zip(&mut self.agents) {
            std::thread::sleep((duration * number / count).saturating_sub(began.elapsed()));
            agent.stop = None;
            agent.stop = Some(self.shared.connect(&agent.name, &agent.token_file, &agent.commands));
        }
    }

    fn hollow(&self) -> impl Iterator<Item = &Arc<Hollow>> {
        self.agents.iter().map(|agent| &agent.hollow)
    }

    /// Waits until `done` is true of all agents; returns the time when it was.
    pub(super) fn wait(
        &self,
        what: &str,
        patience: Duration,
        done: impl Fn(&Hollow) -> bool,
    ) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        // Agents that are done are not checked again.
        let mut next = 0;
        loop {
            while self.agents.get(next).is_some_and(|agent| done(&agent.hollow)) {
                next += 1;
            }
            let now = Instant::now();
            if next == self.agents.len() {
                return Ok(now);
            }
            if now > deadline {
                let done = self.hollow().filter(|agent| done(agent)).count();
                bail!("{what}: {done} of {} agents after {patience:?}", self.agents.len());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts to log updates.
    pub(super) fn record(&self) {
        for agent in self.hollow() {
            agent.log().clear();
            agent.recording.store(true, Ordering::Release);
        }
    }

    /// Stops to log updates and returns them by agent.
    pub(super) fn take(&self) -> Vec<Vec<Applied>> {
        let take = |agent: &Arc<Hollow>| {
            agent.recording.store(false, Ordering::Release);
            std::mem::take(&mut *agent.log())
        };
        self.hollow().map(take).collect()
    }

    /// Returns the streams and snapshots of each agent so far.
    pub(super) fn returns(&self) -> Vec<Returns> {
        let returns = |agent: &Arc<Hollow>| Returns {
            streams: agent.streams.load(Ordering::Acquire),
            snapshots: agent.snapshots.load(Ordering::Acquire),
        };
        self.hollow().map(returns).collect()
    }

    /// Waits until every agent had a new stream.
    pub(super) fn wait_for_return(&self, before: &[Returns], patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        while self.returned_since(before).0 < self.agents.len() {
            anyhow::ensure!(Instant::now() < deadline, "not all agents returned within {patience:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Instant::now())
    }

    /// Agents that have had a new stream since `before`, and those of them that needed no snapshot.
    pub(super) fn returned_since(&self, before: &[Returns]) -> (usize, usize) {
        let returned = self.returns().into_iter().zip(before);
        let returned: Vec<_> = returned.filter(|(now, then)| now.streams > then.streams).collect();
        let resumed = returned.iter().filter(|(now, then)| now.snapshots == then.snapshots).count();
        (returned.len(), resumed)
    }
}

/// The engine of an agent without a kernel: takes updates into the state and acknowledges what it holds.
async fn answer(mut inbox: mpsc::Receiver<Command>, hollow: Arc<Hollow>) {
    let mut state = State::new();
    let mut events: Option<mpsc::UnboundedSender<Event>> = None;
    let mut skipping = false;
    while let Some(command) = inbox.recv().await {
        let event = match command {
            Command::Attach { events: sender, status: reply } => {
                state.abandon();
                skipping = false;
                events = Some(sender);
                // Fails only if the session has ended.
                let _ = reply.send(status(&state));
                None
            }
            Command::Resumed => {
                hollow.streams.fetch_add(1, Ordering::AcqRel);
                None
            }
            Command::Begin(update) => {
                skipping = false;
                if update.from.is_none() {
                    hollow.streams.fetch_add(1, Ordering::AcqRel);
                    hollow.snapshots.fetch_add(1, Ordering::AcqRel);
                }
                state.begin(&update).err().map(|refusal| (update.to, refusal))
            }
            Command::Part(_) | Command::End(_) if skipping => None,
            Command::Part(part) => {
                let to = state.receiving().unwrap_or(state.generation());
                state.part(&part).err().map(|refusal| (to, refusal))
            }
            Command::End(end) => match state.end(&end, Instant::now()) {
                Ok(applied) => {
                    let slices = state.source().map_or(0, |source| source.endpoint_slices);
                    hollow.note(state.generation(), slices);
                    send(&events, Event::Ack(ack(&state, applied.changes.len())));
                    None
                }
                Err(refusal) => Some((end.to, refusal)),
            },
            Command::Ask { answer, .. } => {
                let _ = answer.send(Err("a hollow agent has no kernel".to_owned()));
                None
            }
            // Dropping `done` lets the session connect.
            _ => None,
        };
        if let Some((generation, RefusedUpdate { reason, detail })) = event {
            skipping = true;
            let kept = state.generation();
            let reason = reason as i32;
            send(&events, Event::Nack(Nack { session: 0, generation, reason, errno: 0, detail, kept }));
        }
    }
}

/// The engine of an agent that keeps no view: acknowledges the digest that each update announces.
async fn acknowledge(mut inbox: mpsc::Receiver<Command>, hollow: Arc<Hollow>) {
    let mut held: Option<Update> = None;
    let mut arriving: Option<Update> = None;
    let mut events: Option<mpsc::UnboundedSender<Event>> = None;
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Attach { events: sender, status: reply } => {
                (arriving, events) = (None, Some(sender));
                // Fails only if the session has ended.
                let _ = reply.send(held.as_ref().map_or_else(AgentStatus::default, announced_status));
            }
            Command::Resumed => {
                hollow.streams.fetch_add(1, Ordering::AcqRel);
            }
            Command::Begin(update) => {
                if update.from.is_none() {
                    hollow.streams.fetch_add(1, Ordering::AcqRel);
                    hollow.snapshots.fetch_add(1, Ordering::AcqRel);
                }
                arriving = Some(*update);
            }
            Command::End(_) => {
                let Some(update) = arriving.take() else { continue };
                hollow.note(update.to, update.source.map_or(0, |source| source.endpoint_slices));
                let (generation, digest) = (update.to, update.digest.clone());
                let timings = Some(ApplyTimings::default());
                send(&events, Event::Ack(Ack { generation, digest, timings, ..Ack::default() }));
                held = Some(update);
            }
            Command::Ask { answer, .. } => {
                let _ = answer.send(Err("a hollow agent has no kernel".to_owned()));
            }
            // Dropping `done` lets the session connect.
            _ => {}
        }
    }
}

fn announced_status(held: &Update) -> AgentStatus {
    let Update { to: generation, digest, resume, source, .. } = held.clone();
    AgentStatus {
        kernel: Some(Stamp { generation, digest: digest.clone() }),
        view: Some(View { digest, generation, resume, source }),
        ..AgentStatus::default()
    }
}

fn send(events: &Option<mpsc::UnboundedSender<Event>>, event: Event) {
    if let Some(events) = events {
        // Fails only if the session has ended; the next one reports its status.
        let _ = events.send(event);
    }
}

fn status(state: &State) -> AgentStatus {
    if !state.is_loaded() {
        return AgentStatus::default();
    }
    let digest = state.digest().to_bytes().to_vec();
    let generation = state.generation();
    let (resume, source) = (state.resume().cloned(), state.source().copied());
    AgentStatus {
        kernel: Some(Stamp { generation, digest: digest.clone() }),
        view: Some(View { digest, generation, resume, source }),
        ..AgentStatus::default()
    }
}

fn ack(state: &State, operations: usize) -> Ack {
    let counts = state.counts();
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    Ack {
        session: 0,
        generation: state.generation(),
        digest: state.digest().to_bytes().to_vec(),
        deviations: None,
        timings: Some(ApplyTimings {
            operations: count(operations),
            services: count(counts.services),
            endpoints: count(counts.endpoints),
            ..ApplyTimings::default()
        }),
        ..Ack::default()
    }
}
