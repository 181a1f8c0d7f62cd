//! Writes rows to the API server, within a budget of requests.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Client};
use switchtower_admin_api::NodeState;
use switchtower_crds::{ProfileAssignment, ProxyStatus, ProxyStatusStatus};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use lanes::Lane;

use super::absence::Agents;
use super::observation::Observation;
use super::ownership::{self, Author, Claim, LatestStream, Standing};
use super::requests::{self, Stored, WriteOutcome};
use super::row::{Absence, Inputs, Row, row};
use super::schedule::{
    ASSIGNMENTS_PER_SECOND, Budget, Schedule, WRITES_PER_SECOND, minimum_interval, renewal_interval,
};
use super::{Assignments, Floors, News, NodeEvent, Registry, StatusMetrics, StoredAssignment};
use crate::errors::is_missing_kind;
use crate::ingest::NodeIdentity;
use crate::lease::Fence;
use crate::replicas::{Presence, Replicas};
use crate::server_clock::ServerClock;
use crate::watch::{Lean, Restores};

/// After a start, rows of missing agents stay unchanged for this time plus [`GRACE_PER_NODE`]: a restart of the
/// controller must not cause a transition of the whole fleet.
const GRACE: Duration = Duration::from_secs(10);
/// Additional reconnection time per node.
const GRACE_PER_NODE: Duration = Duration::from_millis(10);
/// Delay after which rows show that the controller cannot accept agents: its predecessor may still be shutting down.
const CLOSED: Duration = Duration::from_secs(20);
/// Minimum interval between prioritized transitions of one row, so that a flapping row does not delay others.
const URGENT: Duration = Duration::from_secs(1);
/// Delay after a failed request before the next one about the same row, and between attempts to list.
const RETRY: Duration = Duration::from_secs(5);
/// The same delay for an assignment.
const RETRY_ASSIGNMENT: Duration = Duration::from_secs(1);
/// Number of consecutive failures that point to the API server rather than to single rows.
const FAILURES: usize = 8;
/// Pause of all requests after that many failures.
const PAUSE: Duration = Duration::from_secs(1);

/// Interval between checks whether a replica that a row names, and that has no Lease, is gone.
const PRESENCE: Duration = Duration::from_secs(10);

mod lanes;
mod rows;
#[cfg(test)]
mod tests;

/// Clients of the API server.
#[derive(Clone)]
pub struct WriterClients {
    /// For status writes, which any replica makes.
    pub any: Client,
    /// For everything else; refuses writes while this replica is not the leader.
    pub leader: Client,
}

/// Settings of the writer, and state that it shares.
#[derive(Debug, Clone)]
pub struct WriterSettings {
    /// The replicas: names in rows.
    pub replicas: Replicas,
    /// Open while this replica is the leader.
    pub fence: Fence,
    /// Blockers of absent agents.
    pub agents: Agents,
    /// High-water marks of the generations in the rows.
    pub floors: Floors,
    /// Assignments to write.
    pub assignments: Assignments,
    /// Clock of the times in rows.
    pub clock: ServerClock,
}

/// A node, a row, or both.
#[derive(Debug, Default)]
struct Entry {
    node: Option<NodeIdentity>,
    stored: Option<Stored>,
    /// UID of the Node and the assignment of a deleted row.
    kept: Option<(String, ProfileAssignment)>,
    state: Option<NodeState>,
    last_write: Option<Instant>,
    /// Time of the next renewal without a change.
    renew_at: Option<Instant>,
    /// Time of the last prioritized transition.
    urgent_at: Option<Instant>,
    in_flight: bool,
    /// A version that the watch delivered during a request. If the response is older, the row must be read again.
    seen: Option<u64>,
    /// The row must be read again.
    outdated: bool,
}

impl Entry {
    /// Records that the row was deleted. While its Node exists, the row is created again with the same assignment: only
    /// a rollout moves a node to other settings.
    fn row_gone(&mut self) {
        let gone = self.stored.take();
        self.kept = gone.and_then(|row| Some((row.owner?, row.assignment?))).or(self.kept.take());
    }

    /// Stores the row as the API server returned it.
    fn take(&mut self, row: Stored) {
        self.outdated = self.seen.take().is_some_and(|seen| row.number() < Some(seen));
        self.stored = Some(row);
    }

    /// Returns true if the Node owns the row and the stored version is the latest that is known.
    fn is_known(&self) -> bool {
        let owner = self.stored.as_ref().and_then(|stored| stored.owner.as_deref());
        let owned = self.node.as_ref().is_some_and(|node| owner == Some(&*node.uid));
        owned && !self.outdated
    }

    /// Returns the claim in the row.
    fn claim(&self) -> Option<Claim<'_>> {
        let connection = self.stored.as_ref()?.status.as_ref()?.connection.as_ref()?;
        Some((&connection.replica, u64::try_from(connection.session).unwrap_or(0)))
    }

    /// Returns the assignment of the node's deleted row.
    fn kept(&self, node: &NodeIdentity) -> Option<ProfileAssignment> {
        self.kept.as_ref().filter(|(uid, _)| **uid == *node.uid).map(|(_, assignment)| assignment.clone())
    }
}

/// The task that writes all rows.
pub struct Writer<R> {
    api: Api<Lean<ProxyStatus>>,
    leader_api: Api<Lean<ProxyStatus>>,
    registry: Arc<R>,
    settings: WriterSettings,
    metrics: StatusMetrics,
    entries: HashMap<Arc<str>, Entry>,
    schedule: Schedule,
    budget: Budget,
    assignment_budget: Budget,
    /// Names from a list of rows that is not complete yet.
    listing: Option<HashSet<Arc<str>>>,
    /// Requests in flight.
    running: JoinSet<(Arc<str>, Lane, WriteOutcome)>,
    /// Number of assignments in flight.
    assigning: usize,
    /// Number of consecutive failures.
    failures: usize,
    started: Instant,
    nodes_synced: bool,
    error_logged: Option<Instant>,
    /// End of a pause after repeated failures.
    paused_until: Option<Instant>,
}

impl<R: Registry> Writer<R> {
    /// Creates a writer without rows.
    #[must_use]
    pub fn new(
        clients: WriterClients,
        registry: Arc<R>,
        settings: WriterSettings,
        metrics: StatusMetrics,
    ) -> Self {
        let now = Instant::now();
        Self {
            api: Api::all(clients.any),
            leader_api: Api::all(clients.leader),
            registry,
            settings,
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
            error_logged: None,
            paused_until: None,
        }
    }

    /// Reads all rows once, so that new sessions continue above their generations.
    ///
    /// # Errors
    /// The API server refused, or the CRD is not installed; [`Writer::run`] retries.
    pub async fn load(&mut self) -> Result<(), kube::Error> {
        for (name, stored) in requests::list(&self.api).await? {
            self.publish(&name, &stored);
            self.entries.entry(name).or_default().stored = Some(stored);
        }
        self.settings.assignments.set_loaded();
        Ok(())
    }

    /// Writes rows until the sender of node events is dropped. `loaded` is true if [`Writer::load`] succeeded.
    pub async fn run(
        mut self,
        loaded: bool,
        mut nodes: mpsc::UnboundedReceiver<NodeEvent>,
        mut restores: Restores,
    ) {
        if !loaded && self.retry_load(&mut nodes).await.is_break() {
            return;
        }
        self.consider_all();
        let mut rows = self.watch_rows();
        let (mut turns, mut presence) = (self.settings.fence.turns(), self.settings.replicas.changes());
        let (registry, assignments) = (self.registry.clone(), self.settings.assignments.clone());
        let agents = self.settings.agents.clone();
        loop {
            let wake = self.start_requests();
            tokio::select! {
                event = nodes.recv() => match event {
                    Some(event) => self.node(event),
                    None => return,
                },
                changed = registry.changed() => for (name, news) in changed {
                    match news {
                        News::Transition => self.consider(&name),
                        News::Progress => self.progressed(&name),
                    }
                },
                changed = agents.changed() => changed.iter().for_each(|name| self.consider(name)),
                requested = assignments.next_requests() => requested.iter().for_each(|name| self.consider(name)),
                Some(event) = rows.next() => self.row_event(event),
                () = turns.changed() => self.led(),
                Ok(()) = presence.changed() => self.consider_all(),
                Ok(()) = restores.changed() => rows = self.watch_rows(),
                Some(Ok((name, lane, outcome))) = self.running.join_next() => {
                    self.finished(&name, lane, outcome);
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

    /// Retries until the rows were read. Breaks when the sender of node events is dropped.
    async fn retry_load(&mut self, nodes: &mut mpsc::UnboundedReceiver<NodeEvent>) -> ControlFlow<()> {
        loop {
            match self.load().await {
                Ok(()) => return ControlFlow::Continue(()),
                Err(error) => self.log_error(&error),
            }
            let pause = tokio::time::sleep(RETRY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    event = nodes.recv() => match event {
                        Some(event) => self.node(event),
                        None => return ControlFlow::Break(()),
                    },
                }
            }
        }
    }

    fn consider_all(&mut self) {
        let names: Vec<_> = self.entries.keys().cloned().collect();
        names.iter().for_each(|name| self.consider(name));
    }

    /// This replica became the leader, or ceased to be.
    fn led(&mut self) {
        if !self.settings.fence.is_open() {
            // The next leader decides on its own.
            self.settings.assignments.cancel_all();
        }
        self.consider_all();
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

    /// Schedules the comparison of a row for the time when it may be written: further progress until then costs nothing.
    fn progressed(&mut self, name: &Arc<str>) {
        let (interval, now) = (minimum_interval(self.entries.len()), Instant::now());
        let last_write = self.entries.get(name).and_then(|entry| entry.last_write);
        match last_write.map(|at| at + interval).filter(|date| *date > now) {
            Some(date) => self.schedule.at(name, date),
            None => self.consider(name),
        }
    }

    /// Computes one row, and queues its write or schedules the next check.
    fn consider(&mut self, name: &Arc<str>) {
        let interval = minimum_interval(self.entries.len());
        let Some(entry) = self.entries.get_mut(name) else { return };
        if entry.in_flight {
            return; // `finished` considers it again.
        }
        let (Some(_), Some(stored)) = (&entry.node, &entry.stored) else {
            let left_over = entry.node.is_none() && entry.stored.is_some() && self.nodes_synced;
            if self.settings.fence.is_open() && (entry.node.is_some() || left_over) {
                self.schedule.push(name, true);
            } else if entry.stored.is_none() && entry.node.is_none() {
                self.forget(name);
            }
            return;
        };
        if !entry.is_known() {
            if entry.outdated || self.settings.fence.is_open() {
                self.schedule.push(name, true);
            }
            return;
        }
        if self.settings.fence.is_open()
            && self.settings.assignments.requested(name, stored.assignment.as_ref()).is_some()
        {
            // `finished` considers its status.
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

    /// Renews an unchanged row, so that readers can distinguish it from an abandoned one; this also reverts edits by
    /// others. After a start the renewals are spread over the first interval.
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

    /// Computes the row; `None` if another replica writes it.
    fn make(&mut self, name: &Arc<str>) -> Option<Row> {
        let nodes = self.entries.len();
        let observation = self.registry.observe(name);
        let author = self.author(name, observation.as_ref());
        let entry = self.entries.get_mut(name)?;
        let observation = match author {
            Author::Serving => observation,
            // An earlier stream to this replica does not count.
            Author::Leader => None,
            Author::Other | Author::Superseded => {
                let lost = observation.filter(|known| known.lost_since.is_some());
                if lost.is_some_and(|lost| entry.claim().is_some_and(|(_, theirs)| theirs >= lost.session)) {
                    self.registry.moved(name);
                }
                if author == Author::Superseded {
                    tracing::info!(
                        node = &**name,
                        "the agent has a later stream to another replica; ending this one"
                    );
                    self.registry.supersede(name);
                }
                self.metrics.moved(entry.state.take(), None);
                self.settings.agents.set_missing(name, false);
                return None;
            }
        };
        let closed = self.settings.agents.are_rejected() && self.started.elapsed() >= CLOSED;
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
        let blocker = missing.then(|| agents.blocker(name, kubelet)).flatten();
        let row = row(Inputs {
            observation: observation.as_ref(),
            blocker: blocker.as_ref(),
            previous: stored.and_then(|stored| stored.status.as_ref()),
            row_generation: stored.and_then(|stored| stored.generation),
            replica: self.settings.replicas.own(),
            absence,
            now: Timestamp::now(),
            ahead: self.settings.clock.ahead(),
        });
        self.metrics.moved(entry.state, Some(row.state));
        entry.state = Some(row.state);
        Some(row)
    }

    /// Returns the right of this replica to write the row's status. Schedules a check if the replica that the row names
    /// may turn out to be gone.
    fn author(&mut self, name: &Arc<str>, observation: Option<&Observation>) -> Author {
        let Some(entry) = self.entries.get(name) else { return Author::Other };
        let (claim, replicas) = (entry.claim(), &self.settings.replicas);
        let presence = claim.map(|(claimant, _)| replicas.presence(claimant));
        let author = ownership::author(
            claim,
            Standing {
                replica: replicas.own(),
                stream: observation
                    .map(|known| LatestStream { session: known.session, open: known.lost_since.is_none() }),
                leads: self.settings.fence.is_open(),
                claimant_gone: presence == Some(Presence::Gone),
            },
        );
        if author == Author::Other && presence == Some(Presence::Awaited) && self.settings.fence.is_open() {
            self.schedule.at(name, Instant::now() + PRESENCE);
        }
        author
    }

    /// Publishes high-water marks and assignment of a row that was read.
    fn publish(&self, name: &Arc<str>, stored: &Stored) {
        self.settings.floors.set(name, stored.release_held_before, stored.status.as_ref());
        self.registry.release_held(name, stored.release_held_before);
        let had_agent = stored.status.as_ref().is_some_and(|status| status.connection.is_some());
        let row = StoredAssignment { profile: stored.assignment.clone(), had_agent };
        self.settings.assignments.set(name, &row);
    }

    fn finished(&mut self, name: &Arc<str>, lane: Lane, outcome: WriteOutcome) {
        self.metrics.written(outcome.label());
        self.assigning -= usize::from(lane == Lane::Assignment);
        if !matches!(outcome, WriteOutcome::Failed(_)) {
            self.failures = 0;
        }
        if let WriteOutcome::Stored(stored) | WriteOutcome::Conflict(stored) = &outcome {
            self.publish(name, stored);
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.in_flight = false;
        match outcome {
            WriteOutcome::Stored(stored) => {
                entry.take(*stored);
                entry.kept = None;
            }
            WriteOutcome::Conflict(stored) => {
                if lane == Lane::Assignment {
                    self.settings.assignments.cancel(name);
                }
                entry.take(*stored);
            }
            WriteOutcome::Missing => entry.row_gone(),
            WriteOutcome::Failed(error) => {
                self.log_error(&error);
                let now = Instant::now();
                self.failures += 1;
                if self.failures >= FAILURES {
                    self.paused_until = Some(now + PAUSE);
                }
                let delay = match lane {
                    Lane::Assignment => RETRY_ASSIGNMENT,
                    Lane::Row => RETRY,
                };
                self.schedule.at(name, now + delay);
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
        self.settings.floors.remove(name);
        self.settings.assignments.remove(name);
    }

    /// Logs at most one error per minute: many rows fail for the same cause.
    fn log_error(&mut self, error: &kube::Error) {
        let now = Instant::now();
        if self.error_logged.is_some_and(|at| now.duration_since(at) < Duration::from_secs(60)) {
            return;
        }
        self.error_logged = Some(now);
        if is_missing_kind(error) {
            tracing::error!(
                "the kind ProxyStatus (switchtower.dev/v1alpha1) is not installed; install it with \
                 `kubectl apply -k crds/yaml`; agents are served without it; retrying"
            );
        } else {
            tracing::warn!(%error, "failed to write ProxyStatus; agents are served without it; retrying");
        }
    }
}

/// Returns the meaning of a missing agent for this time after the start.
fn awaited(elapsed: Duration, nodes: usize) -> Absence {
    let grace = GRACE + GRACE_PER_NODE * u32::try_from(nodes).unwrap_or(u32::MAX);
    match grace.checked_sub(elapsed) {
        Some(rest) if !rest.is_zero() => Absence::Expected(rest),
        _ => Absence::Overdue,
    }
}

/// Returns true if STATE or the status or reason of a condition changed: such a row is written at once.
fn is_transition(before: &ProxyStatusStatus, after: &ProxyStatusStatus) -> bool {
    let summary = |status: &ProxyStatusStatus| -> Vec<(String, String, String)> {
        let conditions = status.conditions.iter();
        conditions.map(|known| (known.type_.clone(), known.status.clone(), known.reason.clone())).collect()
    };
    before.state != after.state || summary(before) != summary(after)
}

async fn sleep_until(date: Option<Instant>) {
    match date {
        Some(date) => tokio::time::sleep_until(date).await,
        None => std::future::pending().await,
    }
}
