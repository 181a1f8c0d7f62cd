//! A replica of the controller: the real compiler and layers, and a model of the sessions (`controller/src/session.rs`)
//! and of the claims in rows (`controller/src/status/ownership.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;

use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Cursor, HealthCheckPlacement, Layers, LogLimits, Plan, Planned, Subscription};
use switchtower_core::model::LayerId;
use switchtower_node_agent_testing::fleet;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change, NackReason, Resume, Settings, Source, Update, UpdateEnd};

use crate::agent::{FromAgent, HelloView, ToAgent};
use crate::cluster::{Cluster, Objects, difference, node_name};
use crate::history::History;
use crate::kernel::Content;

struct InFlight {
    to: u64,
    after: Cursor,
}

/// A stream of a node.
pub struct Session {
    pub number: u64,
    subscription: Subscription,
    cursor: Option<Cursor>,
    generation: u64,
    highest: u64,
    kernel_at_hello: Option<(u64, Digest)>,
    in_flight: Option<InFlight>,
    due: bool,
    seen: u64,
    released: u64,
    /// The last acknowledged generation, with the number of held removals.
    pub applied: Option<(u64, usize)>,
}

/// A row in the API server, which survives all replicas.
#[derive(Debug, Clone, Default)]
pub struct Row {
    /// The resourceVersion: a write that is based on an earlier one is refused.
    pub version: u64,
    pub generation: u64,
    /// Number of the node's latest stream, and the replica that serves it.
    pub session: u64,
    pub claimant: usize,
    pub release_held_before: u64,
    /// Revision of the settings that the leader assigned.
    pub assigned: u64,
}

pub struct Controller {
    compiler: Compiler,
    pub layers: Layers,
    /// Its name, also of the process before.
    name: usize,
    instance: u64,
    known: Arc<Objects>,
    /// Version of `known`.
    pub version: u64,
    /// It makes no progress.
    pub stalled: bool,
    /// Rows as its watch delivered them.
    rows: BTreeMap<usize, Row>,
    /// Highest generation and session of each node in this process.
    sent: BTreeMap<usize, (u64, u64)>,
    last_place: BTreeMap<usize, Cursor>,
    pub sessions: BTreeMap<usize, Session>,
}

fn settings(revision: u64) -> Change {
    let settings = Settings { profile: "default".into(), revision, ..fleet::settings() };
    Change { change: Some(Op::Settings(settings)) }
}

impl Controller {
    /// Starts a process with complete lists of objects and rows.
    pub fn new<'a>(
        name: usize,
        instance: u64,
        cluster: &Cluster,
        rows: impl Iterator<Item = &'a Row>,
    ) -> Self {
        // Short logs, so that snapshots of single layers occur.
        let limits = LogLimits { entries: 8, bytes: 1 << 16, node_entries: 64 };
        let mut layers = Layers::new(limits);
        let revisions =
            (0..3).map(|revision| (LayerId::Settings("default".into(), revision), vec![settings(revision)]));
        layers.apply(revisions.collect(), &[], Vec::new(), Source::default());
        let mut controller = Self {
            compiler: Compiler::new(),
            layers,
            name,
            instance,
            known: Arc::default(),
            version: 0,
            stalled: false,
            rows: rows.cloned().enumerate().collect(),
            sent: BTreeMap::new(),
            last_place: BTreeMap::new(),
            sessions: BTreeMap::new(),
        };
        controller.compile(cluster);
        controller
    }

    fn source(&self) -> Source {
        Source { services: self.version, ..Source::default() }
    }

    /// Compiles what the watches deliver.
    pub fn compile(&mut self, cluster: &Cluster) {
        self.version = cluster.version;
        if Arc::ptr_eq(&self.known, &cluster.objects) {
            return;
        }
        let inputs = difference(&self.known, &cluster.objects);
        self.known = cluster.objects.clone();
        if inputs.is_empty() {
            return;
        }
        for input in inputs {
            self.compiler.apply(input);
        }
        let compiled = self.compiler.compile();
        let applied = self.layers.apply(compiled.changes, &compiled.removed, Vec::new(), self.source());
        assert_eq!(applied.dropped, 0, "malformed changes from the compiler");
    }

    fn subscription(&self, node: usize) -> Subscription {
        let name = node_name(node);
        let zone: Option<Arc<str>> = self.compiler.zone_of(&name);
        let revision = self.row(node).assigned;
        let settings = ("default".into(), revision);
        Subscription { node: name, zone, settings, health_checks: HealthCheckPlacement::Shared }
    }

    fn row(&self, node: usize) -> Row {
        self.rows.get(&node).cloned().unwrap_or_default()
    }

    /// Takes a row from the watch. A later stream to another replica supersedes the one here.
    pub fn watch(&mut self, node: usize, row: &Row) {
        self.rows.insert(node, row.clone());
        let superseded = |session: &Session| row.claimant != self.name && session.number <= row.session;
        if self.sessions.get(&node).is_some_and(superseded) {
            self.sessions.remove(&node);
        }
    }

    /// Returns true if this replica has what a node has seen, or the same content.
    pub fn covers(&self, node: usize, view: &HelloView) -> bool {
        self.version >= view.source || self.head(node).1.to_bytes() == view.digest
    }

    /// Takes the Hello of a new stream, which supersedes the node's last one.
    pub fn open(
        &mut self,
        node: usize,
        kernel: Option<(u64, u128)>,
        view: Option<&HelloView>,
        last_session: u64,
    ) -> (u64, ToAgent) {
        let (subscription, row) = (self.subscription(node), self.row(node));
        let (sent, session) = self.sent.get(&node).copied().unwrap_or_default();
        let number = session.max(row.session).max(last_session) + 1;
        let generation = view.map_or(0, |view| view.generation);
        let kernel_generation = kernel.map_or(0, |(generation, _)| generation);
        let highest = sent.max(row.generation).max(kernel_generation).max(generation);
        let cursor = view.and_then(|view| {
            let digest = Digest::from_bytes(&view.digest)?;
            let own = |resume: &&Resume| resume.instance == self.instance.to_le_bytes();
            let revision = view.resume.as_ref().filter(own).map(|resume| resume.revision);
            let resume = |subscription| self.layers.resume(subscription, revision, digest);
            resume(&subscription).or_else(|| resume(self.last_place.get(&node)?.subscription()))
        });
        let resumed = cursor.is_some();
        self.sent.insert(node, (highest, number));
        let session = Session {
            number,
            subscription,
            cursor,
            generation,
            highest,
            kernel_at_hello: kernel.map(|(generation, digest)| (generation, Digest(digest))),
            in_flight: None,
            due: true,
            seen: 0,
            released: 0,
            applied: None,
        };
        self.sessions.insert(node, session);
        (number, ToAgent::Welcome { session: number, resumed })
    }

    /// Sends pending changes unless an update is unacknowledged.
    pub fn advance(&mut self, node: usize, history: &mut History) -> Vec<ToAgent> {
        let (subscription, row) = (self.subscription(node), self.row(node));
        let Some(session) = self.sessions.get_mut(&node) else { return Vec::new() };
        let mut out = Vec::new();
        if std::mem::replace(&mut session.released, row.release_held_before) != row.release_held_before {
            out.push(ToAgent::Release(row.release_held_before));
        }
        if session.in_flight.is_some() {
            return out;
        }
        let changed = session.seen != self.layers.revision() || session.subscription != subscription;
        if !changed && !session.due {
            return out;
        }
        session.seen = self.layers.revision();
        session.subscription = subscription;
        session.due = false;
        let plan = loop {
            match self.layers.plan(&session.subscription, session.cursor.as_ref()) {
                Planned::Compress(raw) => self.layers.keep(raw.compress()),
                Planned::Update(plan) => break *plan,
                Planned::Nothing(after) if session.generation < session.highest => {
                    let (parts, infos, source) = (Vec::new(), Vec::new(), self.layers.source());
                    break Plan { whole: false, snapshot: false, parts, changes: 0, infos, after, source };
                }
                Planned::Nothing(after) => {
                    self.last_place.insert(node, after.clone());
                    session.cursor = Some(after);
                    return out;
                }
            }
        };
        self.update(node, plan, history, &mut out);
        out
    }

    fn update(&mut self, node: usize, plan: Plan, history: &mut History, out: &mut Vec<ToAgent>) {
        let Some(session) = self.sessions.get_mut(&node) else { return };
        let Plan { whole, parts, changes, after, .. } = plan;
        let digest = after.digest();
        let held = session.kernel_at_hello.take() == Some((session.highest, digest));
        let keeps = held && session.generation < session.highest;
        let to = if keeps { session.highest } else { session.highest + changes.max(1) };
        session.highest = to;
        self.sent.entry(node).or_default().0 = to;
        let update = Update {
            from: (!whole).then_some(session.generation),
            to,
            digest: digest.to_bytes().to_vec(),
            // The version that the plan contains: events without an effect on the layers count too.
            source: Some(Source { services: self.version, ..Source::default() }),
            resume: Some(Resume {
                instance: self.instance.to_le_bytes().to_vec(),
                revision: after.revision(),
            }),
            ..Update::default()
        };
        let content = Content::of(&self.layers.view(after.subscription(), None));
        history.sent(node, to, digest.0, content);
        out.push(ToAgent::Update(update));
        out.extend(parts.into_iter().map(ToAgent::Part));
        out.push(ToAgent::End(UpdateEnd { to }));
        session.in_flight = Some(InFlight { to, after });
    }

    /// Takes a message of the node's current stream.
    pub fn receive(&mut self, node: usize, message: &FromAgent, history: &mut History) {
        let Some(session) = self.sessions.get_mut(&node) else { return };
        match *message {
            FromAgent::Ack { session: number, generation, digest, held } if number == session.number => {
                let in_flight = session.in_flight.take_if(|in_flight| in_flight.to == generation);
                let at = match in_flight {
                    Some(in_flight) => in_flight.after,
                    None => {
                        assert_eq!(generation, session.generation, "acknowledged but not sent");
                        let Some(cursor) = session.cursor.clone() else { return };
                        cursor
                    }
                };
                assert_eq!(digest, at.digest().0, "acknowledged with another digest");
                history.acknowledged(node, generation, digest);
                (session.generation, session.applied) = (generation, Some((generation, held)));
                session.due |= session.generation < session.highest;
                self.last_place.insert(node, at.clone());
                session.cursor = Some(at);
            }
            FromAgent::Nack { session: number, generation, reason, kept } if number == session.number => {
                let in_flight = session.in_flight.as_ref().is_some_and(|one| one.to == generation);
                if in_flight && reason != NackReason::Kernel {
                    session.in_flight = None;
                    session.due = true;
                    if reason != NackReason::UnknownFeature || kept != session.generation {
                        session.cursor = None;
                    }
                }
            }
            FromAgent::Ack { .. } | FromAgent::Nack { .. } | FromAgent::Hello { .. } => {}
        }
    }

    /// Writes the row of a node that this replica serves. A conflict is resolved by reading the row first.
    pub fn write_row(&mut self, node: usize, row: &mut Row) {
        if self.row(node).version != row.version {
            self.watch(node, row);
        }
        if let (Some(session), Some((generation, _))) = (self.sessions.get(&node), self.sent.get(&node)) {
            row.version += 1;
            row.generation = row.generation.max(*generation);
            (row.session, row.claimant) = (session.number, self.name);
            self.rows.insert(node, row.clone());
        }
    }

    /// Returns the desired content and digest of a node.
    pub fn head(&self, node: usize) -> (Content, Digest) {
        let subscription = self.subscription(node);
        let content = Content::of(&self.layers.view(&subscription, None));
        (content, self.layers.head(&subscription).digest())
    }
}
