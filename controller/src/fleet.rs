//! Registry of nodes, their streams and the layers, shared by sessions, the engine and the writer of rows.
//!
//! Invariants: a lock is held for O(change) work only and never across an await. Lock order: nodes,
//! drains, layers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, SystemTime};

use switchtower_core::compiled::{Compiled, Problem};
use switchtower_core::layer::{
    Applied, Cursor, HealthCheckPlacement, Layers, LogLimits, Planned, Subscription,
};
use switchtower_core::locality::Localities;
use switchtower_core::model::LayerId;
use switchtower_core::propagation::{Delivery, Publication, Slot};
use switchtower_core::wire;
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change, GoAwayReason, NodeRecord, Resume, Settings, Source};
use tokio::sync::Notify;

pub mod addresses;
pub mod behind;
pub mod drain;
pub(crate) mod elsewhere;
mod inspect;
mod locality;
pub mod metrics;
mod news;
pub mod queries;
mod reports;
mod settings;
mod signal;

pub use inspect::Reach;
use news::observe;
#[cfg(test)]
pub(crate) use reports::tests::fleet as fleet_with_one_node;
pub use settings::{SettingsAssignment, SettingsName, builtin_settings};
pub(crate) use signal::Signal;

use addresses::KnownAddresses;
use metrics::StreamMetrics;

use crate::propagation::{Propagation, unix_nanoseconds};
use crate::replicas;
use crate::status::{Floor, Floors, News, Observation};
use crate::sync::{lock, read, write};

/// Time since the API server last responded on every watch; `None` before it did.
pub type UpstreamAge = Arc<dyn Fn() -> Option<Duration> + Send + Sync>;
/// Receiver of problems that nodes report; never blocks.
pub type ProblemSink = Arc<dyn Fn(Problem) + Send + Sync>;

/// Time that agents have to connect after the start, before a missing one is reported: an agent retries only every 30
/// seconds after a long outage, and a fleet that reconnects at once needs some time.
const CONNECT_GRACE: Duration = Duration::from_secs(45);

#[derive(Debug, Default)]
struct Node {
    /// `None`: the Node does not exist.
    subscription: Option<Subscription>,
    signal: Option<Arc<Signal>>,
    /// Position that the agent acknowledged last.
    cursor: Option<Cursor>,
    /// Revision of the layers that includes the assignment of its settings.
    assigned_at: u64,
    /// Slot in the propagation tracker, from the first acknowledgement of the stream to its end.
    slot: Option<Slot>,
    observation: Option<Observation>,
    /// Rate limit of its reports about Services.
    report_limit: reports::ReportLimit,
    facts: locality::NodeFacts,
    /// Most significant change that was reported to the writer of rows and not read since.
    news: Option<News>,
}

/// Nodes that a new revision affects.
#[derive(Debug, Default)]
struct ChangedNodes {
    /// Nodes without a stream.
    idle: Vec<Arc<str>>,
    /// Nodes whose acknowledgement is pending.
    followed: Vec<Slot>,
    /// Nodes with a stream, if the pools of addresses are recorded.
    open: Vec<Arc<str>>,
}

#[derive(Debug, Default)]
struct Nodes {
    nodes: HashMap<Arc<str>, Node>,
    zones: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Revisions of settings that have a layer, except the built-in one.
    settings: BTreeMap<SettingsName, Settings>,
    /// Revision of each node; the built-in one if absent.
    assigned: HashMap<Arc<str>, SettingsName>,
    localities: Localities,
    /// Changes for the writer of rows.
    news: Vec<(Arc<str>, News)>,
}

/// All nodes and layers.
pub struct Fleet {
    nodes: Mutex<Nodes>,
    layers: RwLock<Layers>,
    builtin: SettingsName,
    builtin_settings: Settings,
    floors: Floors,
    instance: [u8; 16],
    ready: AtomicBool,
    /// Time from which streams have been accepted.
    accepting: OnceLock<tokio::time::Instant>,
    metrics: StreamMetrics,
    upstream: UpstreamAge,
    propagation: Arc<Propagation>,
    problems: ProblemSink,
    changed: Notify,
    /// Serializes the compression of snapshots; a waiting session finds the snapshot ready.
    compressing: tokio::sync::Mutex<()>,
    /// Known source addresses of agents.
    known: Arc<KnownAddresses>,
    drains: Arc<drain::Drains>,
    /// Processed version of each resource, including bookmarks.
    processed: Mutex<Source>,
    others: replicas::Client,
    elsewhere: elsewhere::Elsewhere,
}

/// Everything that a fleet needs from outside.
pub struct Parts {
    /// Settings of nodes without a profile.
    pub settings: Settings,
    /// High-water marks of the generations in the rows.
    pub floors: Floors,
    /// Metrics of streams.
    pub metrics: StreamMetrics,
    /// Age of the input of the watches.
    pub upstream: UpstreamAge,
    /// Follows changes through the fleet.
    pub propagation: Arc<Propagation>,
    /// Receives problems that agents report.
    pub problems: ProblemSink,
    /// The other replicas.
    pub others: replicas::Client,
}

#[cfg(test)]
impl Parts {
    /// The built-in settings, and an API server that was never heard.
    pub(crate) fn for_tests() -> Self {
        use crate::propagation::PropagationMetrics;
        let registry = prometheus::Registry::new();
        let metrics = PropagationMetrics::new(&registry).unwrap();
        Self {
            settings: builtin_settings(),
            floors: Floors::default(),
            metrics: StreamMetrics::new(&registry).unwrap(),
            upstream: Arc::new(|| None),
            propagation: Arc::new(Propagation::new(Default::default(), metrics)),
            problems: Arc::new(drop),
            others: replicas::Client::alone(),
        }
    }
}

impl Fleet {
    /// Creates a fleet without nodes. It is ready after the first [`Fleet::publish`].
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { settings, floors, metrics, upstream, propagation, problems, others } = parts;
        let builtin: SettingsName = (settings.profile.as_str().into(), settings.revision);
        let mut layers = Layers::new(LogLimits::default());
        let layer = LayerId::Settings(builtin.0.clone(), builtin.1);
        let changes = BTreeMap::from([(layer, vec![settings::change(settings.clone())])]);
        layers.apply(changes, &[], Vec::new(), Source::default());
        Arc::new(Self {
            nodes: Mutex::default(),
            layers: RwLock::new(layers),
            builtin,
            builtin_settings: settings,
            floors,
            instance: rand::random(),
            ready: AtomicBool::new(false),
            accepting: OnceLock::new(),
            metrics,
            upstream,
            propagation,
            problems,
            changed: Notify::new(),
            compressing: tokio::sync::Mutex::default(),
            known: Arc::default(),
            drains: Arc::default(),
            processed: Mutex::default(),
            others,
            elsewhere: elsewhere::Elsewhere::default(),
        })
    }

    /// Known source addresses of agents.
    pub(crate) fn known(&self) -> &Arc<KnownAddresses> {
        &self.known
    }

    /// Records that streams are accepted.
    pub(crate) fn accept(&self) {
        self.accepting.get_or_init(tokio::time::Instant::now);
        self.drains.restart();
    }

    /// Returns true once agents have had enough time to connect, so that a missing one is reported.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.settled_at().is_some()
    }

    /// Returns the time at which [`Fleet::settled`] became true.
    #[must_use]
    pub fn settled_at(&self) -> Option<tokio::time::Instant> {
        let at = self.accepting.get().map(|since| *since + CONNECT_GRACE);
        at.filter(|at| *at <= tokio::time::Instant::now())
    }

    /// Applies the result of a compilation and wakes the sessions that it affects. Returns the new revision of the
    /// layers. `source`: versions of the latest lists and changes. Those of bookmarks belong to [`Fleet::advance`]: replicas get
    /// them at different times.
    pub fn publish(&self, compiled: Compiled, mut publication: Publication, source: Source) -> u64 {
        let Compiled { changes, removed, .. } = compiled;
        let records: BTreeMap<Arc<str>, NodeRecord> = changes.iter().filter_map(node_record).collect();
        let infos = self.propagation.describe(&publication);
        *lock(&self.processed) = source;
        let mut nodes = lock(&self.nodes);
        let applied = self.write(|layers| layers.apply(changes, &removed, infos, source));
        if applied.dropped > 0 {
            tracing::error!(dropped = applied.dropped, "malformed changes from the compiler were dropped");
        }
        for id in removed {
            // A Node that was recreated at once keeps its settings and its stream.
            if let LayerId::Node(node) = id
                && !records.contains_key(&node)
            {
                nodes.unassign(&node);
                self.known.remove_node(&node);
                self.drains.removed(&node);
                self.mark(&mut nodes, &node, News::Transition);
            }
        }
        if !self.ready() {
            self.drains.expect(records.keys());
        }
        for (node, record) in records {
            nodes.assign(&node, &record, &self.builtin);
            let addresses = record.addresses.iter().filter_map(|octets| wire::address(octets));
            self.known.set_node(&node, addresses.collect());
            self.detection_changed(&mut nodes, &node);
            self.mark(&mut nodes, &node, News::Transition);
        }
        self.ready.store(true, Ordering::Release);
        publication.published = unix_nanoseconds(SystemTime::now());
        let ChangedNodes { idle, followed, open } = nodes.wake(&applied);
        // Under the lock, so that an acknowledgement of this revision cannot come first.
        self.propagation.publish(applied.revision, publication, &followed);
        if let Some(moves) = &applied.moves {
            self.drains.published(applied.revision, moves, &open);
        }
        self.mark_all(&mut nodes, &idle, News::Progress);
        applied.revision
    }

    /// Records the versions up to which the resources are processed, including bookmarks.
    pub fn advance(&self, processed: Source) {
        *lock(&self.processed) = processed;
    }

    /// The other replicas.
    pub(crate) fn others(&self) -> &replicas::Client {
        &self.others
    }

    /// Ends all streams with a reason.
    pub fn end_all(&self, reason: GoAwayReason) {
        self.each_signal(|signal| signal.end(reason));
    }

    /// Wakes all sessions.
    fn wake_all(&self) {
        self.each_signal(|signal| signal.notify.notify_one());
    }

    /// Wakes the sessions whose agents have sent nothing for this long.
    pub(crate) fn wake_silent(&self, silence: Duration) {
        let now = tokio::time::Instant::now();
        self.each_signal(|signal| signal.wake_silent(silence, now));
    }

    fn each_signal(&self, request: impl Fn(&Signal)) {
        lock(&self.nodes).nodes.values().filter_map(|node| node.signal.as_deref()).for_each(request);
    }

    /// Returns the revision of the layers.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.read(Layers::revision)
    }

    /// Returns true if the Node exists and is served.
    #[must_use]
    pub fn knows(&self, node: &str) -> bool {
        lock(&self.nodes).nodes.get(node).is_some_and(|node| node.subscription.is_some())
    }

    /// The node's open stream.
    pub(crate) fn signal(&self, node: &str) -> Option<Arc<Signal>> {
        lock(&self.nodes).nodes.get(node)?.signal.clone()
    }

    pub(crate) fn ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    pub(crate) fn propagation(&self) -> &Arc<Propagation> {
        &self.propagation
    }

    pub(crate) fn metrics(&self) -> &StreamMetrics {
        &self.metrics
    }

    /// Time since the API server last responded on every watch.
    pub(crate) fn upstream_age(&self) -> Option<Duration> {
        (self.upstream)()
    }

    pub(crate) fn resume_token(&self, revision: u64) -> Resume {
        Resume { instance: self.instance.to_vec(), revision }
    }

    /// Returns the revision of a resume token that this process issued.
    pub(crate) fn resumable(&self, resume: Option<&Resume>) -> Option<u64> {
        resume.filter(|resume| resume.instance == self.instance).map(|resume| resume.revision)
    }

    pub(crate) fn subscription(&self, node: &str) -> Option<Subscription> {
        lock(&self.nodes).nodes.get(node)?.subscription.clone()
    }

    pub(crate) fn read<T>(&self, look: impl FnOnce(&Layers) -> T) -> T {
        look(&read(&self.layers))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Layers) -> T) -> T {
        change(&mut write(&self.layers))
    }

    /// Plans the next update of a node. Compresses a snapshot first if one is missing; never returns `Compress`.
    pub(crate) async fn plan(
        self: &Arc<Self>,
        subscription: &Subscription,
        from: Option<&Cursor>,
    ) -> Planned {
        let planned = self.read(|layers| layers.plan(subscription, from));
        if !matches!(planned, Planned::Compress(_)) {
            return planned;
        }
        let _one = self.compressing.lock().await;
        loop {
            match self.read(|layers| layers.plan(subscription, from)) {
                Planned::Compress(raw) => {
                    if let Ok(snapshot) = tokio::task::spawn_blocking(move || raw.compress()).await {
                        self.read(|layers| layers.keep(snapshot));
                    }
                }
                planned => return planned,
            }
        }
    }

    /// Returns the high-water marks from which a new session of the node starts.
    pub(crate) fn floor(&self, node: &str) -> Floor {
        let mut floor = self.floors.get(node);
        if let Some(known) = lock(&self.nodes).nodes.get(node).and_then(|node| node.observation.as_ref()) {
            floor.session = floor.session.max(known.session);
            floor.generation = floor.generation.max(known.sent).max(known.applied);
        }
        floor
    }

    /// Registers a new stream of the node and ends the previous one. Returns `None` if the Node does not exist.
    pub(crate) fn open(
        &self,
        node: &Arc<str>,
        floor: &mut Floor,
        health_checks: HealthCheckPlacement,
    ) -> Option<(u64, Arc<Signal>)> {
        let mut nodes = lock(&self.nodes);
        let entry = nodes.nodes.get_mut(node)?;
        entry.subscription.as_mut()?.health_checks = health_checks;
        let known = entry.observation.get_or_insert_default();
        known.session = known.session.max(floor.session) + 1;
        floor.session = known.session;
        let signal = Arc::new(Signal::default());
        // Under the lock: a later change finds this signal.
        signal.release_held(self.floors.get(node).release_held_before);
        if let Some(old) = entry.signal.replace(signal.clone()) {
            known.note_loss();
            old.end(GoAwayReason::Superseded);
        }
        self.unfollow(entry);
        self.drains.opened(node, floor.session);
        Some((floor.session, signal))
    }

    /// Records the position that a node reached and the update that delivered it, if any, and changes the node's
    /// observation.
    pub(crate) fn reached(
        &self,
        node: &Arc<str>,
        session: u64,
        cursor: &Cursor,
        delivery: Option<Delivery>,
        change: impl FnOnce(&mut Observation) -> News,
    ) {
        let mut nodes = lock(&self.nodes);
        let Some(entry) = nodes.nodes.get_mut(node) else { return };
        let Some(news) = observe(entry, session, change) else { return };
        entry.cursor = Some(cursor.clone());
        let settings = entry.subscription.as_ref().map(|subscription| &subscription.settings);
        // An update that was planned before the node got other settings does not deliver them.
        let revision = match settings {
            Some(settings) if *settings != cursor.subscription().settings => {
                cursor.revision().min(entry.assigned_at.saturating_sub(1))
            }
            _ => cursor.revision(),
        };
        match entry.slot {
            Some(slot) => self.propagation.reached(slot, revision, delivery),
            // The first view of a stream is no latency: from here on it is.
            None => entry.slot = Some(self.propagation.join(node.clone(), revision)),
        }
        self.mark(&mut nodes, node, news);
    }

    /// A node refused an update that leads to a revision of the layers.
    pub(crate) fn refused(&self, node: &Arc<str>, session: u64, revision: u64, reason: &'static str) {
        let nodes = lock(&self.nodes);
        let Some(entry) = nodes.nodes.get(node) else { return };
        if let Some(slot) =
            entry.slot.filter(|_| entry.observation.as_ref().is_some_and(|known| known.session == session))
        {
            self.propagation.refused(slot, revision, reason);
        }
    }

    fn unfollow(&self, entry: &mut Node) {
        if let Some(slot) = entry.slot.take() {
            self.propagation.leave(slot);
        }
    }

    /// Returns the position that a node acknowledged last to this process.
    pub(crate) fn last_place(&self, node: &str) -> Option<Cursor> {
        lock(&self.nodes).nodes.get(node)?.cursor.clone()
    }

    /// Records the end of a stream. `lost` is false if this controller ended it.
    pub(crate) fn close(&self, node: &Arc<str>, session: u64, lost: bool) {
        let mut nodes = lock(&self.nodes);
        let Some(entry) = nodes.nodes.get_mut(node) else { return };
        let Some(known) = entry.observation.as_mut().filter(|known| known.session == session) else { return };
        known.note_end();
        if lost {
            known.note_loss();
        }
        entry.signal = None;
        self.unfollow(entry);
        self.drains.closed(node, session);
        if entry.subscription.is_none() {
            nodes.nodes.remove(node);
        }
        self.mark(&mut nodes, node, News::Transition);
    }
}

impl Nodes {
    fn assign(&mut self, name: &Arc<str>, record: &NodeRecord, builtin: &SettingsName) {
        let zone: Option<Arc<str>> = (!record.zone.is_empty()).then(|| record.zone.as_str().into());
        self.leave_zone(name);
        let settings = self.assigned.get(name).unwrap_or(builtin).clone();
        if let Some(zone) = &zone {
            self.zones.entry(zone.clone()).or_default().insert(name.clone());
        }
        let node = self.nodes.entry(name.clone()).or_default();
        let health_checks = node.subscription.as_ref().map(|subscription| subscription.health_checks);
        let health_checks = health_checks.unwrap_or_default();
        node.subscription = Some(Subscription { node: name.clone(), zone, settings, health_checks });
        node.facts = record.into();
    }

    fn unassign(&mut self, name: &Arc<str>) {
        self.leave_zone(name);
        self.assigned.remove(name);
        self.localities.forget(name);
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.subscription = None;
        node.cursor = None;
        match &node.signal {
            Some(signal) => signal.end(GoAwayReason::NodeDeleted),
            None => {
                self.nodes.remove(name);
            }
        }
    }

    fn leave_zone(&mut self, name: &Arc<str>) {
        let subscription = self.nodes.get(name).and_then(|node| node.subscription.as_ref());
        let Some(zone) = subscription.and_then(|subscription| subscription.zone.clone()) else { return };
        if let Some(members) = self.zones.get_mut(&zone) {
            members.remove(name);
            if members.is_empty() {
                self.zones.remove(&zone);
            }
        }
    }

    /// Returns the nodes that are assigned a revision.
    fn having(&self, name: &SettingsName) -> Vec<Arc<str>> {
        let has = |node: &Node| {
            let subscription = node.subscription.as_ref();
            subscription.is_some_and(|subscription| subscription.settings == *name)
        };
        self.nodes.iter().filter(|(_, node)| has(node)).map(|(name, _)| name.clone()).collect()
    }

    fn has_settings(&self, name: &SettingsName) -> bool {
        !self.having(name).is_empty()
    }

    /// Wakes the sessions of the touched layers.
    fn wake(&self, applied: &Applied) -> ChangedNodes {
        let mut changed = ChangedNodes::default();
        let mut wake = |name: &Arc<str>| match self.nodes.get(name) {
            Some(Node { signal: Some(signal), slot, .. }) => {
                signal.changed();
                changed.followed.extend(*slot);
                if applied.moves.is_some() {
                    changed.open.push(name.clone());
                }
            }
            Some(Node { observation: Some(_), .. }) => changed.idle.push(name.clone()),
            _ => {}
        };
        let shared = |id: &LayerId| matches!(id, LayerId::Cluster | LayerId::HealthChecks);
        if applied.touched.iter().any(shared) {
            self.nodes.keys().for_each(wake);
            return changed;
        }
        for id in &applied.touched {
            match id {
                LayerId::Node(node) => wake(node),
                LayerId::Zone(zone) => self.zones.get(zone).into_iter().flatten().for_each(&mut wake),
                LayerId::Settings(profile, revision) => {
                    let has = |node: &Node| {
                        let settings = node.subscription.as_ref().map(|subscription| &subscription.settings);
                        settings.is_some_and(|(name, number)| name == profile && number == revision)
                    };
                    self.nodes.iter().filter(|(_, node)| has(node)).for_each(|(name, _)| wake(name));
                }
                LayerId::Cluster | LayerId::HealthChecks => {}
            }
        }
        changed
    }
}

/// Returns name and record if these are changes of a node's layer that contain its record.
fn node_record((id, changes): (&LayerId, &Vec<Change>)) -> Option<(Arc<str>, NodeRecord)> {
    let LayerId::Node(name) = id else { return None };
    let record = changes.iter().rev().find_map(|change| match &change.change {
        Some(Op::Node(record)) => Some(record),
        _ => None,
    })?;
    Some((name.clone(), record.clone()))
}
