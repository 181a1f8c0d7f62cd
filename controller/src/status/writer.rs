//! Keeps the rows in the API server as they should be, within a write budget.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::jiff::Timestamp;
use kube::api::PartialObjectMeta;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use switchtower_crds::{NodeState, ProfileAssignment, ProxyStatus, ProxyStatusStatus};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::absence::Agents;
use super::requests::{self, Outcome, Stored};
use super::row::{Absence, Inputs, Row, row};
use super::schedule::{
    ASSIGNMENTS_PER_SECOND, Budget, Schedule, WRITES_PER_SECOND, minimum_interval, renewal_interval,
};
use super::{Assignments, Floors, NodeEvent, Registry, StatusMetrics, StoredAssignment};
use crate::errors::is_missing_kind;
use crate::ingest::NodeIdentity;
use crate::watch::Restores;

/// After a start, rows of nodes whose agent has not come keep what they said for this long, plus [`GRACE_PER_NODE`]:
/// a restart of the controller is no transition of the whole fleet.
const GRACE: Duration = Duration::from_secs(10);
/// Every node adds this to the time that a fleet needs to come back.
const GRACE_PER_NODE: Duration = Duration::from_millis(10);
/// A controller that cannot accept agents says so on their rows after this time: the one before it may be leaving.
const CLOSED: Duration = Duration::from_secs(20);
/// Between two transitions of a row that are written before other rows' news: one that flaps holds up nobody.
const URGENT: Duration = Duration::from_secs(1);
/// From a failed request to the next one about the same row, and between attempts to list.
const RETRY: Duration = Duration::from_secs(5);
/// The same where the row is to name another revision.
const RETRY_ASSIGNMENT: Duration = Duration::from_secs(1);
/// So many failures in a row are the API server's, not those of single rows.
const FAILURES: usize = 8;
/// Then no request is made for this time.
const PAUSE: Duration = Duration::from_secs(1);

mod lanes;
#[cfg(test)]
mod tests;

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
    state: Option<NodeState>,
    last_write: Option<Instant>,
    /// When the row is renewed although nothing changed.
    renew_at: Option<Instant>,
    /// When a transition was last due at once.
    urgent_at: Option<Instant>,
    in_flight: bool,
    /// `metadata.generation` as the watch saw it: above the stored one, somebody else changed the spec.
    seen_generation: Option<i64>,
    /// A list has another version of it than the stored one, maybe an older one: it is read again.
    in_doubt: bool,
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

    /// The row as it was read or answered. Another replica may have claimed it.
    fn take(&mut self, name: &str, row: Stored, replica: &str, session: u64) {
        if taken_over(self.stored.as_ref(), &row, replica, session) {
            tracing::info!(node = name, "another replica serves this node now; its row is left to it");
            self.yielded = Some(session);
        }
        (self.stored, self.in_doubt) = (Some(row), false);
    }

    /// The row is the Node's, and nobody else changed it since it was read.
    fn is_known(&self) -> bool {
        let owner = self.stored.as_ref().and_then(|stored| stored.owner.as_deref());
        let owned = self.node.as_ref().is_some_and(|node| owner == Some(&*node.uid));
        let generation = self.stored.as_ref().and_then(|stored| stored.generation);
        owned && !self.in_doubt && self.seen_generation <= generation
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
    assignment_budget: Budget,
    /// Names of a list of rows that is not complete.
    listing: Option<HashSet<Arc<str>>>,
    /// Requests under way; true: one that changes the assignment.
    running: JoinSet<(Arc<str>, bool, Outcome)>,
    /// How many of them change the assignment.
    assigning: usize,
    /// Requests that failed since one succeeded.
    failures: usize,
    started: Instant,
    nodes_synced: bool,
    complained: Option<Instant>,
    /// No request before this time: the last ones failed, and the next would fail alike.
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
            budget: Budget::new(WRITES_PER_SECOND, now),
            assignment_budget: Budget::new(ASSIGNMENTS_PER_SECOND, now),
            listing: None,
            running: JoinSet::new(),
            assigning: 0,
            failures: 0,
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
    pub async fn run(
        mut self,
        loaded: bool,
        mut nodes: mpsc::UnboundedReceiver<NodeEvent>,
        mut restores: Restores,
    ) {
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
                Ok(()) = restores.changed() => rows = self.watch_metadata(),
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
        let (object, gone, listed) = match event {
            Ok(Init) => {
                self.listing = Some(HashSet::new());
                return;
            }
            Ok(InitDone) => return self.listed(),
            Ok(InitApply(object)) => {
                self.listing.get_or_insert_default().insert(object.name_any().into());
                (object, false, true)
            }
            Ok(Apply(object)) => (object, false, false),
            Ok(Delete(object)) => (object, true, false),
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
        } else if listed && object.metadata.resource_version.as_deref() != Some(&stored.version) {
            // After a restore of etcd older versions are what there is.
            entry.in_doubt = true;
            entry.seen_generation = object.metadata.generation;
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
        let (Some(_), Some(stored)) = (&entry.node, &entry.stored) else {
            let left_over = entry.node.is_none() && entry.stored.is_some() && self.nodes_synced;
            if entry.node.is_some() || left_over {
                self.schedule.push(name, true);
            } else if entry.stored.is_none() && entry.node.is_none() {
                self.forget(name);
            }
            return;
        };
        if !entry.is_known() {
            self.schedule.push(name, true);
            return;
        }
        if self.assignments.wish(name, stored.assignment.as_ref()).is_some() {
            // Its status is looked at when that is done.
            self.schedule.push_assignment(name);
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
            if row.confirmed {
                self.renew(name, now);
            }
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

    /// An unchanged row, renewed so that its readers can tell it from one that nobody writes any more; foreign edits do
    /// not last either. Those of a controller that just started are spread over the first interval.
    fn renew(&mut self, name: &Arc<str>, now: Instant) {
        let interval = renewal_interval(self.entries.len());
        let Some(entry) = self.entries.get_mut(name) else { return };
        let date = *entry.renew_at.get_or_insert_with(|| now + interval.mul_f64(rand::random()));
        if date > now {
            self.schedule.at(name, date);
        } else {
            self.schedule.push(name, false);
        }
    }

    /// The row as it should be. `None`: another replica has the node.
    fn make(&mut self, name: &Arc<str>) -> Option<Row> {
        let nodes = self.entries.len();
        let entry = self.entries.get_mut(name)?;
        let observation = self.registry.observe(name);
        match (entry.yielded, &observation) {
            (Some(session), Some(observed)) if observed.session > session => entry.yielded = None,
            (Some(_), _) => return None,
            (None, _) => {}
        }
        let closed = self.settings.agents.are_kept_out() && self.started.elapsed() >= CLOSED;
        let settled = self.registry.settled() || closed;
        let absence = if settled { Absence::Certain } else { awaited(self.started.elapsed(), nodes) };
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
            absence,
            now: Timestamp::now(),
        });
        self.metrics.moved(entry.state, Some(row.state));
        entry.state = Some(row.state);
        Some(row)
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
        self.assigning -= usize::from(assigned);
        if !matches!(outcome, Outcome::Failed(_)) {
            self.failures = 0;
        }
        if let Outcome::Stored(stored) | Outcome::Conflict(stored) = &outcome {
            self.read(name, stored);
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.in_flight = false;
        let session = self.registry.observe(name).map_or(0, |observed| observed.session);
        match outcome {
            Outcome::Stored(stored) => {
                entry.take(name, *stored, &self.settings.replica, session);
                entry.kept = None;
            }
            Outcome::Conflict(stored) => {
                if assigned {
                    self.assignments.forget_wish(name);
                }
                entry.take(name, *stored, &self.settings.replica, session);
            }
            Outcome::Missing => entry.row_gone(),
            Outcome::Failed(error) => {
                self.complain(&error);
                let now = Instant::now();
                self.failures += 1;
                if self.failures >= FAILURES {
                    self.paused_until = Some(now + PAUSE);
                }
                self.schedule.at(name, now + if assigned { RETRY_ASSIGNMENT } else { RETRY });
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

/// What a missing agent means before streams have been accepted for long.
fn awaited(elapsed: Duration, nodes: usize) -> Absence {
    let grace = GRACE + GRACE_PER_NODE * u32::try_from(nodes).unwrap_or(u32::MAX);
    match grace.checked_sub(elapsed) {
        Some(rest) if !rest.is_zero() => Absence::Expected(rest),
        _ => Absence::Overdue,
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
