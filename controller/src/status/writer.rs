//! Keeps the rows in the API server as they should be, within a write budget.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::jiff::Timestamp;
use kube::api::PartialObjectMeta;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use switchtower_crds::{ProfileAssignment, ProxyStatus, ProxyStatusStatus};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::requests::{self, Outcome, Request, Stored};
use super::row::{Inputs, Row, State, row};
use super::schedule::{Budget, Schedule, minimum_interval};
use super::{Assignments, Floors, NodeEvent, Registry, StatusMetrics, StoredAssignment};
use crate::agents::Agents;
use crate::errors::is_missing_kind;
use crate::ingest::NodeIdentity;

/// Requests under way at once.
const CONCURRENCY: usize = 8;
/// An unchanged row is written again after about this time, so that foreign edits do not last.
const REFRESH: Duration = Duration::from_secs(300);
/// A controller that cannot accept agents says so on their rows after this time: the one before it may be leaving.
const CLOSED: Duration = Duration::from_secs(20);
/// Between two transitions of a row that are written before other rows' news: one that flaps holds up nobody.
const URGENT: Duration = Duration::from_secs(1);
/// After a failed request, and between attempts to list.
const RETRY: Duration = Duration::from_secs(5);

type MetadataEvents = std::pin::Pin<
    Box<dyn Stream<Item = Result<watcher::Event<PartialObjectMeta<ProxyStatus>>, watcher::Error>> + Send>,
>;

/// Settings of the writer.
#[derive(Debug, Clone)]
pub struct WriterSettings {
    /// This replica's name, as rows show it.
    pub replica: String,
    /// What is known of agents that are not connected.
    pub agents: Agents,
}

/// One node, its row, or both.
#[derive(Debug, Default)]
struct Entry {
    node: Option<NodeIdentity>,
    stored: Option<Stored>,
    /// UID of the Node and the assignment of a row that is gone.
    kept: Option<(String, ProfileAssignment)>,
    state: Option<State>,
    last_write: Option<Instant>,
    /// When the row is written again although nothing changed.
    refresh_at: Option<Instant>,
    /// When a transition was last due at once.
    urgent_at: Option<Instant>,
    in_flight: bool,
    /// `metadata.generation` as the watch saw it: above the stored one, somebody else changed the spec.
    seen_generation: Option<i64>,
    /// Another replica took the node over from this session of ours.
    yielded: Option<u64>,
}

impl Entry {
    /// The row is gone. If its Node is not, it is made again with what it assigned: a node moves to other settings by
    /// a rollout alone.
    fn row_gone(&mut self) {
        let gone = self.stored.take();
        self.kept = gone.and_then(|row| Some((row.owner?, row.assignment?))).or(self.kept.take());
    }

    /// What a new row assigns by itself.
    fn kept(&self, node: &NodeIdentity) -> Option<ProfileAssignment> {
        self.kept.as_ref().filter(|(uid, _)| **uid == *node.uid).map(|(_, assignment)| assignment.clone())
    }
}

/// The task that owns all rows.
pub struct Writer<R> {
    api: Api<ProxyStatus>,
    registry: Arc<R>,
    settings: WriterSettings,
    floors: Floors,
    assignments: Assignments,
    metrics: StatusMetrics,
    entries: HashMap<Arc<str>, Entry>,
    schedule: Schedule,
    budget: Budget,
    /// Names of a list of rows that is not complete.
    listing: Option<HashSet<Arc<str>>>,
    /// Requests under way; true: one that changes the assignment.
    running: JoinSet<(Arc<str>, bool, Outcome)>,
    started: Instant,
    nodes_synced: bool,
    complained: Option<Instant>,
    /// No request before this time: the last one failed, and the next would fail alike.
    paused_until: Option<Instant>,
}

impl<R: Registry> Writer<R> {
    /// A writer that has not read anything yet.
    #[must_use]
    pub fn new(
        client: Client,
        registry: Arc<R>,
        settings: WriterSettings,
        floors: Floors,
        assignments: Assignments,
        metrics: StatusMetrics,
    ) -> Self {
        let now = Instant::now();
        Self {
            api: Api::all(client),
            registry,
            settings,
            floors,
            assignments,
            metrics,
            entries: HashMap::new(),
            schedule: Schedule::default(),
            budget: Budget::new(now),
            listing: None,
            running: JoinSet::new(),
            started: now,
            nodes_synced: false,
            complained: None,
            paused_until: None,
        }
    }

    /// Reads all rows once, so that new sessions start from their generations.
    ///
    /// # Errors
    /// The API server refused, or the CRD is not installed; [`Writer::run`] goes on trying.
    pub async fn load(&mut self) -> Result<(), kube::Error> {
        for (name, stored) in requests::list(&self.api).await? {
            self.read(&name, &stored);
            self.entries.entry(name).or_default().stored = Some(stored);
        }
        self.assignments.set_loaded();
        Ok(())
    }

    /// Writes rows until the sender of node events is gone. `loaded`: [`Writer::load`] succeeded.
    pub async fn run(mut self, loaded: bool, mut nodes: mpsc::UnboundedReceiver<NodeEvent>) {
        if !loaded && !self.load_in_the_end(&mut nodes).await {
            return;
        }
        let names: Vec<_> = self.entries.keys().cloned().collect();
        names.iter().for_each(|name| self.consider(name));
        let mut rows = self.watch_metadata();
        let (registry, assignments) = (self.registry.clone(), self.assignments.clone());
        let agents = self.settings.agents.clone();
        loop {
            let wake = self.start_requests();
            tokio::select! {
                event = nodes.recv() => match event {
                    Some(event) => self.node(event),
                    None => return,
                },
                changed = registry.changed() => changed.iter().for_each(|name| self.consider(name)),
                changed = agents.changed() => changed.iter().for_each(|name| self.consider(name)),
                wished = assignments.wished() => wished.iter().for_each(|name| self.consider(name)),
                Some(event) = rows.next() => self.metadata(event),
                Some(Ok((name, assigned, outcome))) = self.running.join_next() => {
                    self.finished(&name, assigned, outcome);
                }
                () = sleep_until(wake) => {
                    let now = Instant::now();
                    while let Some(name) = self.schedule.pop_due(now) {
                        self.consider(&name);
                    }
                }
            }
        }
    }

    /// Retries until the rows could be read. False: the controller ends.
    async fn load_in_the_end(&mut self, nodes: &mut mpsc::UnboundedReceiver<NodeEvent>) -> bool {
        loop {
            match self.load().await {
                Ok(()) => return true,
                Err(error) => self.complain(&error),
            }
            let pause = tokio::time::sleep(RETRY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    event = nodes.recv() => match event {
                        Some(event) => self.node(event),
                        None => return false,
                    },
                }
            }
        }
    }

    fn watch_metadata(&self) -> MetadataEvents {
        let api: Api<PartialObjectMeta<ProxyStatus>> = Api::all(self.api.clone().into_client());
        Box::pin(watcher(api, watcher::Config::default()).default_backoff())
    }

    fn node(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::Applied(identity) => {
                let name = identity.name.clone();
                let entry = self.entries.entry(name.clone()).or_default();
                if entry.node.as_ref() != Some(&identity) {
                    entry.node = Some(identity);
                    self.consider(&name);
                }
            }
            NodeEvent::Gone(name) => {
                if let Some(entry) = self.entries.get_mut(&name) {
                    entry.node = None;
                    self.consider(&name);
                }
            }
            NodeEvent::Synced => {
                self.nodes_synced = true;
                let left_over = self.entries.iter().filter(|(_, entry)| entry.node.is_none());
                let names: Vec<_> = left_over.map(|(name, _)| name.clone()).collect();
                names.iter().for_each(|name| self.consider(name));
            }
        }
    }

    /// Somebody deleted a row or changed its spec; our own writes come back here too and change nothing.
    fn metadata(&mut self, event: Result<watcher::Event<PartialObjectMeta<ProxyStatus>>, watcher::Error>) {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let (object, gone) = match event {
            Ok(Init) => {
                self.listing = Some(HashSet::new());
                return;
            }
            Ok(InitDone) => return self.listed(),
            Ok(InitApply(object)) => {
                self.listing.get_or_insert_default().insert(object.name_any().into());
                (object, false)
            }
            Ok(Apply(object)) => (object, false),
            Ok(Delete(object)) => (object, true),
            Err(error) => {
                tracing::debug!(%error, "watching ProxyStatus failed; it is tried again");
                return;
            }
        };
        let name: Arc<str> = object.name_any().into();
        let Some(entry) = self.entries.get_mut(&name) else { return };
        let Some(stored) = &mut entry.stored else { return };
        if gone && object.metadata.uid.as_deref() == Some(&stored.uid) {
            entry.row_gone();
        } else if !gone && object.metadata.generation > stored.generation {
            entry.seen_generation = object.metadata.generation;
        } else {
            return;
        }
        self.consider(&name);
    }

    /// Rows that are in no complete list went while the watch was down. One that was made meanwhile is found again when
    /// it is to be created.
    fn listed(&mut self) {
        let Some(listed) = self.listing.take() else { return };
        let missing = |(name, entry): &(&Arc<str>, &mut Entry)| {
            entry.stored.is_some() && !entry.in_flight && !listed.contains(*name)
        };
        let gone: Vec<Arc<str>> = self
            .entries
            .iter_mut()
            .filter(missing)
            .map(|(name, entry)| {
                entry.row_gone();
                name.clone()
            })
            .collect();
        gone.iter().for_each(|name| self.consider(name));
    }

    /// Looks at one row: is it due to be written, or when is it to be looked at again?
    fn consider(&mut self, name: &Arc<str>) {
        let interval = minimum_interval(self.entries.len());
        let Some(entry) = self.entries.get_mut(name) else { return };
        if entry.in_flight {
            return; // It is looked at when the request has ended.
        }
        let (Some(node), Some(stored)) = (&entry.node, &entry.stored) else {
            let left_over = entry.node.is_none() && entry.stored.is_some() && self.nodes_synced;
            if entry.node.is_some() || left_over {
                self.schedule.push(name, true);
            } else if entry.stored.is_none() && entry.node.is_none() {
                self.forget(name);
            }
            return;
        };
        let wish = self.assignments.wish(name, stored.assignment.as_ref());
        if stored.owner.as_deref() != Some(&*node.uid)
            || wish.is_some()
            || entry.seen_generation > stored.generation
        {
            self.schedule.push(name, true);
            return;
        }
        let (last_write, before) = (entry.last_write, stored.status.clone());
        let Some(row) = self.make(name) else { return };
        let now = Instant::now();
        if let Some(delay) = row.check_after {
            self.schedule.at(name, now + delay);
        }
        if before.is_none() {
            self.schedule.push(name, true);
        } else if before.as_ref().is_some_and(|before| is_transition(before, &row.status)) {
            self.transition(name, now);
        } else if before.as_ref() == Some(&row.status) {
            self.refresh(name, now);
        } else {
            match last_write.map(|at| at + interval).filter(|date| *date > now) {
                Some(date) => self.schedule.at(name, date),
                None => self.schedule.push(name, false),
            }
        }
    }

    fn transition(&mut self, name: &Arc<str>, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        match entry.urgent_at.map(|at| at + URGENT).filter(|date| *date > now) {
            Some(date) => self.schedule.at(name, date),
            None => {
                entry.urgent_at = Some(now);
                self.schedule.push(name, true);
            }
        }
    }

    /// An unchanged row. Those of a controller that just started are refreshed in the course of the first
    /// minutes, not all at once.
    fn refresh(&mut self, name: &Arc<str>, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let date = *entry.refresh_at.get_or_insert_with(|| now + REFRESH.mul_f64(rand::random()));
        if date > now {
            self.schedule.at(name, date);
        } else {
            self.schedule.push(name, false);
        }
    }

    /// The row as it should be. `None`: another replica has the node.
    fn make(&mut self, name: &Arc<str>) -> Option<Row> {
        let entry = self.entries.get_mut(name)?;
        let observation = self.registry.observe(name);
        match (entry.yielded, &observation) {
            (Some(session), Some(observed)) if observed.session > session => entry.yielded = None,
            (Some(_), _) => return None,
            (None, _) => {}
        }
        let closed = || self.settings.agents.are_kept_out() && self.started.elapsed() >= CLOSED;
        let settled = self.registry.settled() || closed();
        let kubelet = entry.node.as_ref().and_then(|node| node.kubelet_lost.as_deref());
        let agents = &self.settings.agents;
        let stored = entry.stored.as_ref();
        let came_before = stored.and_then(|stored| stored.status.as_ref()?.connection.as_ref()).is_some();
        let missing = match &observation {
            Some(observed) => observed.lost_since.is_some(),
            None => settled || !came_before,
        };
        agents.set_missing(name, missing);
        let obstacle = missing.then(|| agents.obstacle(name, kubelet)).flatten();
        let row = row(Inputs {
            observation: observation.as_ref(),
            obstacle: obstacle.as_ref(),
            previous: stored.and_then(|stored| stored.status.as_ref()),
            row_generation: stored.and_then(|stored| stored.generation),
            replica: &self.settings.replica,
            settled,
            now: Timestamp::now(),
        });
        self.metrics.moved(entry.state, Some(row.state));
        entry.state = Some(row.state);
        Some(row)
    }

    /// Starts what the budget allows. Returns when to wake up at the latest.
    fn start_requests(&mut self) -> Option<Instant> {
        let mut wake = self.schedule.next_date();
        self.paused_until = self.paused_until.filter(|date| *date > Instant::now());
        if let Some(date) = self.paused_until {
            return Some(wake.map_or(date, |known| known.min(date)));
        }
        while self.schedule.has_work() && self.running.len() < CONCURRENCY {
            if let Err(date) = self.budget.take(Instant::now()) {
                wake = Some(wake.map_or(date, |known| known.min(date)));
                break;
            }
            let Some(name) = self.schedule.pop() else { break };
            let Some(request) = self.next_request(&name) else { continue };
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.in_flight = true;
                let now = Instant::now();
                entry.last_write = Some(now);
                entry.refresh_at = Some(now + REFRESH.mul_f64(0.9 + 0.2 * rand::random::<f64>()));
            }
            let api = self.api.clone();
            let assigned = matches!(request, Request::Assign(..));
            self.running.spawn(async move {
                let outcome = request.run(api).await;
                (name, assigned, outcome)
            });
        }
        wake
    }

    fn next_request(&mut self, name: &Arc<str>) -> Option<Request> {
        let entry = self.entries.get(name).filter(|entry| !entry.in_flight)?;
        let assignment = entry.stored.as_ref().and_then(|stored| stored.assignment.as_ref());
        let wish = self.assignments.wish(name, assignment);
        match (&entry.node, &entry.stored) {
            (None, None) => None,
            (None, Some(stored)) => Some(Request::Delete(name.clone(), stored.clone())),
            (Some(node), None) => Some(Request::Create(node.clone(), wish.or_else(|| entry.kept(node)))),
            (Some(node), Some(stored)) if stored.owner.as_deref() != Some(&*node.uid) => {
                Some(Request::Adopt(node.clone(), stored.clone()))
            }
            (Some(_), Some(stored)) if entry.seen_generation > stored.generation => {
                Some(Request::Read(name.clone()))
            }
            (Some(_), Some(stored)) => {
                let stored = stored.clone();
                if let Some(wish) = wish {
                    return Some(Request::Assign(name.clone(), Box::new(stored), wish));
                }
                let row = self.make(name)?;
                Some(Request::Write(name.clone(), Box::new(stored), Box::new(row.status)))
            }
        }
    }

    /// What others are to know of a row as it was read.
    fn read(&self, name: &Arc<str>, stored: &Stored) {
        self.floors.set(name, stored.status.as_ref());
        let had_agent = stored.status.as_ref().is_some_and(|status| status.connection.is_some());
        let row = StoredAssignment { profile: stored.assignment.clone(), had_agent };
        self.assignments.set(name, &row);
    }

    fn finished(&mut self, name: &Arc<str>, assigned: bool, outcome: Outcome) {
        self.metrics.written(outcome.label());
        if let Outcome::Stored(stored) | Outcome::Conflict(stored) = &outcome {
            self.read(name, stored);
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.in_flight = false;
        match outcome {
            Outcome::Stored(stored) => {
                entry.stored = Some(*stored);
                entry.kept = None;
            }
            Outcome::Conflict(stored) => {
                if assigned {
                    self.assignments.forget_wish(name);
                }
                let session = self.registry.observe(name).map_or(0, |observed| observed.session);
                if taken_over(entry.stored.as_ref(), &stored, &self.settings.replica, session) {
                    tracing::info!(node = %name, "another replica serves this node now; its row is left to it");
                    entry.yielded = Some(session);
                }
                entry.stored = Some(*stored);
            }
            Outcome::Missing => entry.row_gone(),
            Outcome::Failed(error) => {
                self.complain(&error);
                self.paused_until = Some(Instant::now() + RETRY);
                self.schedule.at(name, Instant::now() + RETRY);
                return;
            }
        }
        self.consider(name);
    }

    fn forget(&mut self, name: &Arc<str>) {
        if let Some(entry) = self.entries.remove(name) {
            self.metrics.moved(entry.state, None);
        }
        self.settings.agents.set_missing(name, false);
        self.floors.remove(name);
        self.assignments.remove(name);
    }

    /// At most once a minute: rows are many, and the cause is one.
    fn complain(&mut self, error: &kube::Error) {
        let now = Instant::now();
        if self.complained.is_some_and(|at| now.duration_since(at) < Duration::from_secs(60)) {
            return;
        }
        self.complained = Some(now);
        if is_missing_kind(error) {
            tracing::error!(
                "the kind ProxyStatus (switchtower.dev/v1alpha1) is not installed; install it with \
                 `kubectl apply -k crds/yaml`; agents are served meanwhile, and it is tried again"
            );
        } else {
            tracing::warn!(%error, "writing ProxyStatus failed; agents are served meanwhile, and it is tried again");
        }
    }
}

/// Another replica claimed the row after we last read it, with a session that is not older than ours.
fn taken_over(before: Option<&Stored>, now: &Stored, replica: &str, session: u64) -> bool {
    let connection = |stored: &Stored| stored.status.as_ref().and_then(|status| status.connection.clone());
    let Some(claimed) = connection(now) else { return false };
    let changed = before.and_then(connection).as_ref() != Some(&claimed);
    changed
        && claimed.replica != replica
        && u64::try_from(claimed.session).is_ok_and(|theirs| theirs >= session)
}

/// STATE or a condition's status or reason changed: worth a write at once.
fn is_transition(before: &ProxyStatusStatus, after: &ProxyStatusStatus) -> bool {
    let words = |status: &ProxyStatusStatus| -> Vec<(String, String, String)> {
        let conditions = status.conditions.iter();
        conditions.map(|known| (known.type_.clone(), known.status.clone(), known.reason.clone())).collect()
    };
    before.state != after.state || words(before) != words(after)
}

async fn sleep_until(date: Option<Instant>) {
    match date {
        Some(date) => tokio::time::sleep_until(date).await,
        None => std::future::pending().await,
    }
}
