//! An agent: the real state machine, and a model of the engine around it.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_node_agent::state::{Applied, RefusedUpdate, State, StoredHolds};
use switchtower_proto::v1::{Change, LayerKind, NackReason, Part, Resume, Update, UpdateEnd};

use crate::kernel::Kernel;

/// A message of the controller.
pub enum ToAgent {
    Welcome { session: u64, resumed: bool },
    Update(Update),
    Part(Part),
    End(UpdateEnd),
    Release(u64),
}

/// The view in Hello.
#[derive(Debug)]
pub struct HelloView {
    pub digest: [u8; 16],
    pub generation: u64,
    pub resume: Option<Resume>,
    /// Version of the objects that the view contains.
    pub source: u64,
}

/// A message of the agent.
#[derive(Debug)]
pub enum FromAgent {
    Hello { kernel: Option<(u64, u128)>, view: Option<HelloView>, session: u64 },
    Ack { session: u64, generation: u64, digest: u128, held: usize },
    Nack { session: u64, generation: u64, reason: NackReason, kept: u64 },
}

/// The snapshot file.
struct File {
    update: Update,
    items: Vec<(LayerKind, Change)>,
    holds: StoredHolds,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    Idle,
    Queued,
    /// The kernel is newer than the view; `resumed`: the controller has resumed it, so nothing is missing.
    Held {
        resumed: bool,
    },
}

impl fmt::Debug for ToAgent {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ToAgent::Welcome { session, resumed } => write!(out, "Welcome {session}, resumed: {resumed}"),
            ToAgent::Update(update) => write!(out, "Update from {:?} to {}", update.from, update.to),
            ToAgent::Part(part) => write!(out, "Part of layer {}, kind {}", part.layer, part.kind),
            ToAgent::End(end) => write!(out, "End {}", end.to),
            ToAgent::Release(before) => write!(out, "ReleaseHeld before {before}"),
        }
    }
}

pub struct Agent {
    pub state: State,
    pub kernel: Kernel,
    pub sync: Sync,
    /// Number of commits, for checks after each.
    pub commits: u64,
    /// Number of changes of the view and its holds, for checks after each.
    pub changes: u64,
    /// Number of starts.
    pub starts: u64,
    pending: Vec<KernelChange>,
    must_compare: bool,
    due: bool,
    nacked: Option<u64>,
    discarding: bool,
    session: u64,
    /// Session of the last Welcome since the start.
    last_session: u64,
    file: Option<File>,
    out: VecDeque<FromAgent>,
}

impl Agent {
    pub fn new() -> Self {
        Self {
            state: State::new(),
            kernel: Kernel::default(),
            sync: Sync::Idle,
            commits: 0,
            changes: 0,
            starts: 0,
            pending: Vec::new(),
            must_compare: true,
            due: false,
            nacked: None,
            discarding: false,
            session: 0,
            last_session: 0,
            file: None,
            out: VecDeque::new(),
        }
    }

    /// Number of frontends and non-empty pools that the kernel should hold.
    pub fn items(&self) -> usize {
        let counts = |change: &KernelChange| match change {
            KernelChange::Frontend(_) => true,
            KernelChange::Pool { added, .. } => !added.is_empty(),
            _ => false,
        };
        self.state.view().iter().filter(|change| counts(change)).count()
    }

    fn view_stamp(&self) -> (u64, u128) {
        (self.state.generation(), self.state.digest().0)
    }

    /// Version of the objects that the view contains.
    pub fn source(&self) -> u64 {
        self.state.source().map_or(0, |source| source.services)
    }

    /// Opens a stream.
    pub fn hello(&mut self) -> FromAgent {
        self.state.abandon();
        self.out.clear();
        (self.discarding, self.nacked, self.session) = (false, None, 0);
        if let Sync::Held { resumed } = &mut self.sync {
            *resumed = false;
        }
        self.due |= self.sync == Sync::Queued;
        let view = self.state.is_loaded().then(|| HelloView {
            digest: self.state.digest().to_bytes(),
            generation: self.state.generation(),
            resume: self.state.resume().cloned(),
            source: self.source(),
        });
        FromAgent::Hello { kernel: self.kernel.stamp, view, session: self.last_session }
    }

    pub fn receive(&mut self, message: ToAgent, now: Instant) {
        match message {
            ToAgent::Welcome { session, resumed } => {
                (self.session, self.last_session) = (session, session);
                // Below the kernel's generation, an update follows.
                let newer = self.kernel.stamp.is_some_and(|(kernel, _)| kernel > self.state.generation());
                if let (Sync::Held { resumed: known }, true) = (&mut self.sync, resumed && !newer) {
                    *known = true;
                }
            }
            ToAgent::Update(update) => {
                if let Sync::Held { resumed } = &mut self.sync {
                    *resumed = false;
                }
                self.discarding = false;
                let result = self.state.begin(&update);
                self.refuse(update.to, result);
            }
            ToAgent::Part(_) | ToAgent::End(_) if self.discarding => {}
            ToAgent::Part(part) => {
                let to = self.state.receiving().unwrap_or(self.state.generation());
                let result = self.state.part(&part);
                self.refuse(to, result);
            }
            ToAgent::End(end) => match self.state.end(&end, now) {
                Ok(applied) => self.take(applied),
                Err(refusal) => self.refuse(end.to, Err(refusal)),
            },
            ToAgent::Release(before) => self.release(before),
        }
    }

    fn refuse(&mut self, to: u64, result: Result<(), RefusedUpdate>) {
        if let Err(refusal) = result {
            assert_ne!(refusal.reason, NackReason::Malformed, "{refusal}");
            self.discarding = true;
            self.nack(to, refusal.reason);
        }
    }

    fn nack(&mut self, generation: u64, reason: NackReason) {
        let kept = self.kernel.stamp.map_or(0, |(generation, _)| generation);
        self.out.push_back(FromAgent::Nack { session: 0, generation, reason, kept });
    }

    fn take(&mut self, applied: Applied) {
        self.changes += 1;
        if !self.must_compare {
            self.pending.extend(applied.changes);
        }
        self.due = true;
        self.commit();
    }

    fn release(&mut self, before: u64) {
        let held = self.state.held();
        let released = self.state.release_held(before);
        if self.state.held() == held {
            return;
        }
        self.changes += 1;
        if !self.must_compare {
            self.pending.extend(released.changes);
        }
        self.due = true;
        if !matches!(self.sync, Sync::Held { .. }) {
            self.commit();
        }
    }

    fn commit(&mut self) {
        let stamp = self.view_stamp();
        let done = match self.must_compare {
            true => self.kernel.adopt(&self.state.view(), stamp),
            false => self.kernel.commit(&self.pending, stamp),
        };
        if !done {
            self.sync = Sync::Queued;
            if self.due && self.nacked.replace(stamp.0) != Some(stamp.0) {
                self.nack(stamp.0, NackReason::Kernel);
            }
            return;
        }
        self.commits += 1;
        self.pending.clear();
        (self.must_compare, self.sync, self.nacked) = (false, Sync::Idle, None);
        if std::mem::take(&mut self.due) {
            let (generation, digest) = self.view_stamp();
            assert_eq!(self.kernel.stamp, Some((generation, digest)), "acknowledged before the commit");
            let held = self.state.held();
            self.out.push_back(FromAgent::Ack { session: 0, generation, digest, held });
        }
    }

    /// Returns the messages to send. Before Welcome they wait.
    pub fn outgoing(&mut self) -> VecDeque<FromAgent> {
        if self.session == 0 {
            return VecDeque::new();
        }
        let mut out = std::mem::take(&mut self.out);
        for message in &mut out {
            if let FromAgent::Ack { session, .. } | FromAgent::Nack { session, .. } = message {
                *session = self.session;
            }
        }
        out
    }

    /// A timer: retries a failed commit, or ends the hold of a resumed view.
    pub fn wake(&mut self) {
        match self.sync {
            Sync::Queued => self.commit(),
            Sync::Held { resumed: true } => {
                self.due = true;
                self.commit();
            }
            Sync::Idle | Sync::Held { resumed: false } => {}
        }
    }

    /// Writes the snapshot file.
    pub fn save(&mut self) {
        if !self.state.is_loaded() {
            return;
        }
        let mut items = Vec::new();
        let exported: Result<(), ()> = self.state.export(&mut |layer, change| {
            items.push((layer, change));
            Ok(())
        });
        exported.unwrap();
        let update = Update {
            to: self.state.generation(),
            digest: self.state.digest().to_bytes().to_vec(),
            resume: self.state.resume().cloned(),
            source: self.state.source().copied(),
            ..Update::default()
        };
        self.file = Some(File { update, items, holds: self.state.stored_holds() });
    }

    /// Starts again with what the file and the kernel hold.
    pub fn restart(&mut self, now: Instant) {
        self.state = State::new();
        if let Some(File { update, items, holds }) = &self.file {
            let mut items = items.iter().cloned().map(Ok);
            self.state.restore(update, &mut items, now).unwrap();
            self.state.restore_holds(holds).unwrap();
        }
        (self.changes, self.starts) = (self.changes + 1, self.starts + 1);
        self.pending.clear();
        (self.must_compare, self.due, self.nacked, self.sync) = (true, false, None, Sync::Idle);
        (self.discarding, self.last_session) = (false, 0);
        let loaded = self.state.is_loaded();
        match self.kernel.stamp {
            Some(stamp) if !loaded || stamp != self.view_stamp() => self.sync = Sync::Held { resumed: false },
            _ if loaded => self.commit(),
            _ => {}
        }
    }

    /// The tables are gone with the kernel. Returns the generation that the file has.
    pub fn reboot(&mut self, now: Instant) -> u64 {
        self.kernel.clear();
        self.restart(now);
        self.state.generation()
    }
}
