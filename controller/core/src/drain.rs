//! The drain gate: when does no node send new connections to a pod any more? Pure: time is an argument.
//!
//! A pod is drained once its endpoints are in no pool, and every node has acknowledged the revision of the layers in which
//! the last of them left its last pool. Nodes without a stream are waited for during [`GRACE`] and then excluded.
//!
//! Invariants:
//! * A query, the change of an endpoint and an acknowledgement cost O(log n) and the ports of one address; a publication
//!   costs one step for each node that it wakes.
//! * Only an acknowledgement proves that a kernel holds a revision; the position with which an agent resumes does not.
//! * Everything is bounded: [`QUERIES`] wait at a time, `REMEMBERED` drained endpoints are remembered.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::model::ObjectKey;

pub mod host_pods;
#[cfg(test)]
mod tests;

/// Time after which a node without a stream is no longer waited for.
pub const GRACE: Duration = Duration::from_secs(10);
/// Time after the start in which an unknown address counts as one that was drained just before the start.
pub const YOUNG: Duration = Duration::from_secs(60);
/// Maximum number of waiting queries.
pub const QUERIES: usize = 65_536;
/// Maximum number of endpoints that left their last pool and are remembered.
const REMEMBERED: usize = 65_536;
/// Maximum number of nodes that an answer names.
const NAMES: usize = 16;

/// Address, protocol and port of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Socket {
    /// Address.
    pub address: IpAddr,
    /// IANA protocol number.
    pub protocol: i32,
    /// Port.
    pub port: u16,
}

impl Socket {
    /// Returns the range of all endpoints with an address.
    fn all(address: IpAddr) -> std::ops::RangeInclusive<Self> {
        let first = Self { address, protocol: i32::MIN, port: 0 };
        first..=Self { address, protocol: i32::MAX, port: u16::MAX }
    }
}

/// Change of the number of pools that contain an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Move {
    /// Change of the number.
    pub change: i64,
    /// The Service of the last pool that it left.
    pub left: Option<Arc<ObjectKey>>,
}

/// Changes of the number of pools that contain an endpoint.
pub type Moves = BTreeMap<Socket, Move>;

/// Endpoints that a query waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// All endpoints with an address: a pod with an address of its own.
    Address(IpAddr),
    /// Endpoints of a pod that shares the address of its node. May be empty.
    Sockets(Vec<Socket>),
}

/// The publication that removed an endpoint from its last pool.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removal {
    /// Revision of the layers.
    pub revision: u64,
    /// The Service of that pool.
    pub service: Option<Arc<ObjectKey>>,
}

/// Number of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueryId(u64);

/// Time since an arbitrary moment of the process.
pub type Instant = Duration;

/// Outcome of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// No node sends new connections to the address, except the missing ones.
    Drained,
    /// Still in a pool at the timeout.
    StillMember,
    /// In no pool, but not acknowledged by all nodes at the timeout.
    NotAcknowledged,
    /// In no pool now, and in none that is remembered.
    NotAnEndpoint,
    /// Too many queries wait.
    Overloaded,
}

/// Names of nodes with their total number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// The first names.
    pub names: Vec<Arc<str>>,
    /// Number of nodes.
    pub total: usize,
}

impl Names {
    fn of<'a>(nodes: impl Iterator<Item = &'a Arc<str>>) -> Self {
        let mut found = Self::default();
        for node in nodes {
            if found.total < NAMES {
                found.names.push(node.clone());
            }
            found.total += 1;
        }
        found
    }

    /// Returns the names as messages contain them.
    #[must_use]
    pub fn to_strings(&self) -> Vec<String> {
        self.names.iter().map(ToString::to_string).collect()
    }
}

/// Answer to a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Outcome.
    pub verdict: Verdict,
    /// With [`Verdict::Drained`] the last node that the query waited for, otherwise the nodes that have not acknowledged.
    pub waited_for: Names,
    /// Nodes without a stream, which were not waited for.
    pub missing: Names,
    /// Removal of the last endpoint; `None`: there is an endpoint, or there was none that is remembered.
    pub removal: Option<Removal>,
}

/// Answers to queries that have waited.
pub type Answers = Vec<(QueryId, Answer)>;

/// Presence of a node's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// It has acknowledged a revision in its stream.
    Connected,
    /// Without an acknowledgement in an open stream, since this time.
    Away(Instant),
    /// Away for longer than [`GRACE`]: not waited for.
    Missing,
}

#[derive(Debug)]
struct Node {
    session: u64,
    presence: Presence,
    /// Revision that its kernel holds.
    held: u64,
    /// Last revision that woke its stream.
    owed: u64,
    /// First revision that it may not hold; its key in [`Gate::pending`].
    pending: Option<u64>,
}

#[derive(Debug)]
struct Query {
    target: Target,
    /// State of endpoints that are not remembered.
    unknown: Option<u64>,
    /// Revision in which the last endpoint left its last pool; `None`: one is in a pool.
    gone: Option<u64>,
}

impl Query {
    /// Addresses whose changes concern the query.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        match &self.target {
            Target::Address(address) => BTreeSet::from([*address]),
            Target::Sockets(sockets) => sockets.iter().map(|socket| socket.address).collect(),
        }
    }
}

/// State of the endpoints of a query.
enum State {
    /// At least one is in a pool.
    Member,
    /// None is in a pool; the last left in this publication.
    Gone(Removal),
    /// None is in a pool, and none is remembered.
    Unknown,
}

/// Endpoints, nodes and waiting queries.
#[derive(Debug, Default)]
pub struct Gate {
    /// Number of pools that contain the endpoint.
    members: BTreeMap<Socket, i64>,
    /// Publication in which the endpoint left its last pool.
    gone: BTreeMap<Socket, Removal>,
    /// Keys of `gone` in order of their revisions, with outdated entries.
    gone_order: VecDeque<(u64, Socket)>,
    revision: u64,
    young_until: Instant,
    nodes: HashMap<Arc<str>, Node>,
    /// Nodes by the first revision that they may not hold.
    pending: BTreeSet<(u64, Arc<str>)>,
    missing: BTreeSet<Arc<str>>,
    /// Nodes that other replicas serve.
    elsewhere: HashSet<Arc<str>>,
    /// Nodes that are away, in order of time, with outdated entries.
    away: VecDeque<(Instant, Arc<str>)>,
    queries: HashMap<QueryId, Query>,
    by_address: BTreeSet<(IpAddr, QueryId)>,
    /// Queries whose endpoints are in no pool, by revision.
    by_revision: BTreeSet<(u64, QueryId)>,
    last_query: u64,
}

impl Gate {
    /// Creates a gate at a revision of the layers, from the number of pools of each endpoint.
    #[must_use]
    pub fn new(members: Moves, revision: u64, now: Instant) -> Self {
        let members = members.into_iter().map(|(socket, pools)| (socket, pools.change));
        let members = members.filter(|(_, count)| *count > 0).collect();
        Self { members, revision, young_until: now + YOUNG, ..Self::default() }
    }

    /// Waits for a node that has no stream yet, from now on.
    pub fn expect(&mut self, node: &Arc<str>, now: Instant) {
        let entry = self.nodes.entry(node.clone()).or_insert(Node {
            session: 0,
            presence: Presence::Missing,
            held: 0,
            owed: 0,
            pending: None,
        });
        if entry.presence == Presence::Connected {
            return;
        }
        entry.presence = Presence::Away(now);
        self.missing.remove(node);
        self.away.push_back((now, node.clone()));
        self.set_pending(node, Some(0));
    }

    /// Streams are accepted from now on: waits for every node that has none.
    pub fn restart(&mut self, now: Instant) {
        self.young_until = now + YOUNG;
        let names: Vec<_> = self.nodes.keys().cloned().collect();
        names.iter().for_each(|node| self.expect(node, now));
    }

    /// A node has a new stream, which replaces an earlier one.
    pub fn opened(&mut self, node: &Arc<str>, session: u64, now: Instant) {
        match self.nodes.get_mut(node) {
            Some(entry) => {
                entry.session = session;
                if entry.presence == Presence::Missing {
                    // It may come from another replica, which no longer waits for it.
                    self.expect(node, now);
                } else {
                    self.leave(node, now);
                }
            }
            // A node that is new has no old rules.
            None => {
                let presence = Presence::Missing;
                self.nodes.insert(node.clone(), Node { session, presence, held: 0, owed: 0, pending: None });
            }
        }
    }

    /// A node's stream ended.
    pub fn closed(&mut self, node: &Arc<str>, session: u64, now: Instant) {
        if self.nodes.get(node).is_some_and(|entry| entry.session == session) {
            self.leave(node, now);
        }
    }

    fn leave(&mut self, node: &Arc<str>, now: Instant) {
        let Some(entry) = self.nodes.get_mut(node) else { return };
        if entry.presence != Presence::Connected {
            return;
        }
        entry.presence = Presence::Away(now);
        let first = entry.pending.unwrap_or(entry.held + 1);
        self.away.push_back((now, node.clone()));
        self.set_pending(node, Some(first));
    }

    /// A Node was deleted.
    pub fn removed(&mut self, node: &Arc<str>) -> Answers {
        self.set_pending(node, None);
        self.nodes.remove(node);
        self.missing.remove(node);
        self.complete(None)
    }

    /// Other replicas serve these nodes and wait for them.
    pub fn elsewhere(&mut self, nodes: &HashSet<Arc<str>>) -> Answers {
        for node in nodes {
            if let Some(entry) = self.nodes.get_mut(node)
                && matches!(entry.presence, Presence::Away(_))
            {
                entry.presence = Presence::Missing;
                self.set_pending(node, None);
            }
        }
        let missing = self.nodes.iter().filter(|(_, entry)| entry.presence == Presence::Missing);
        self.missing = missing.map(|(name, _)| name).filter(|name| !nodes.contains(*name)).cloned().collect();
        self.elsewhere.clone_from(nodes);
        self.complete(None)
    }

    /// A node acknowledged a revision in its current stream.
    pub fn held(&mut self, node: &Arc<str>, session: u64, revision: u64) -> Answers {
        let Some(entry) = self.nodes.get_mut(node).filter(|entry| entry.session == session) else {
            return Answers::new();
        };
        entry.presence = Presence::Connected;
        entry.held = revision;
        let first = (entry.owed > revision).then_some(revision + 1);
        self.missing.remove(node);
        self.set_pending(node, first);
        self.complete(Some(node))
    }

    /// Excludes nodes that have been away for [`GRACE`].
    pub fn expire(&mut self, now: Instant) -> Answers {
        let mut last = None;
        while let Some((since, node)) = self.away.front()
            && *since + GRACE <= now
        {
            let (since, node) = (*since, node.clone());
            self.away.pop_front();
            if let Some(entry) = self.nodes.get_mut(&node)
                && entry.presence == Presence::Away(since)
            {
                entry.presence = Presence::Missing;
                if !self.elsewhere.contains(&node) {
                    self.missing.insert(node.clone());
                }
                self.set_pending(&node, None);
                last = Some(node);
            }
        }
        self.complete(last.as_ref())
    }

    /// Returns the time of the next [`Gate::expire`].
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.away.front().map(|(since, _)| *since + GRACE)
    }

    /// A revision of the layers was published: it changes the pools of these endpoints and woke these nodes' streams.
    pub fn published(&mut self, revision: u64, moves: &Moves, woken: &[Arc<str>]) -> Answers {
        self.revision = revision;
        for node in woken {
            let Some(entry) = self.nodes.get_mut(node) else { continue };
            entry.owed = revision;
            let first = entry.presence == Presence::Connected && entry.held < revision;
            if first && entry.pending.is_none() {
                self.set_pending(node, Some(revision));
            }
        }
        let mut addresses = BTreeSet::new();
        for (socket, Move { change, left }) in moves {
            let before = self.members.get(socket).copied().unwrap_or(0);
            let after = (before + change).max(0);
            if after > 0 {
                self.members.insert(*socket, after);
            } else {
                self.members.remove(socket);
            }
            match (before > 0, after > 0) {
                (true, false) => self.left(*socket, Removal { revision, service: left.clone() }),
                (false, true) => {
                    self.gone.remove(socket);
                }
                _ => continue,
            }
            addresses.insert(socket.address);
        }
        for address in addresses {
            self.queries_of(address).into_iter().for_each(|id| self.update(id));
        }
        self.complete(None)
    }

    fn left(&mut self, socket: Socket, removal: Removal) {
        self.gone_order.push_back((removal.revision, socket));
        self.gone.insert(socket, removal);
        while self.gone_order.len() > REMEMBERED {
            let Some((revision, socket)) = self.gone_order.pop_front() else { break };
            if self.gone.get(&socket).is_some_and(|removal| removal.revision == revision) {
                self.gone.remove(&socket);
            }
        }
    }

    fn state(&self, target: &Target) -> State {
        let (member, removal) = match target {
            Target::Address(address) => {
                let all = Socket::all(*address);
                let gone = self.gone.range(all.clone()).map(|(_, removal)| removal);
                let last = gone.max_by_key(|removal| removal.revision);
                (self.members.range(all).next().is_some(), last)
            }
            Target::Sockets(sockets) => {
                let gone = sockets.iter().filter_map(|socket| self.gone.get(socket));
                let last = gone.max_by_key(|removal| removal.revision);
                (sockets.iter().any(|socket| self.members.contains_key(socket)), last)
            }
        };
        match removal {
            _ if member => State::Member,
            Some(removal) => State::Gone(removal.clone()),
            None => State::Unknown,
        }
    }

    fn update(&mut self, id: QueryId) {
        let Some(query) = self.queries.get(&id) else { return };
        let gone = match self.state(&query.target) {
            State::Member => None,
            State::Gone(removal) => Some(removal.revision),
            // More endpoints left than are remembered: the last known state is on the safe side.
            State::Unknown => query.gone.or(query.unknown).or(Some(self.revision)),
        };
        self.wait(id, gone);
    }

    fn queries_of(&self, address: IpAddr) -> Vec<QueryId> {
        let range = (address, QueryId(0))..=(address, QueryId(u64::MAX));
        self.by_address.range(range).map(|(_, id)| *id).collect()
    }

    fn wait(&mut self, id: QueryId, gone: Option<u64>) {
        let Some(query) = self.queries.get_mut(&id) else { return };
        if let Some(old) = std::mem::replace(&mut query.gone, gone) {
            self.by_revision.remove(&(old, id));
        }
        if let Some(revision) = gone {
            self.by_revision.insert((revision, id));
        }
    }

    /// Asks for endpoints. Returns the answer, or the number of the query that waits for one.
    pub fn ask(&mut self, target: Target, now: Instant) -> Result<Answer, QueryId> {
        // They may have left their last pool shortly before this process started.
        let unknown = (now < self.young_until).then_some(self.revision);
        let gone = match self.state(&target) {
            State::Member => None,
            State::Gone(removal) => Some(removal.revision),
            State::Unknown if unknown.is_some() => unknown,
            State::Unknown => return Ok(self.answer(Verdict::NotAnEndpoint, Names::default(), None)),
        };
        if gone.is_some_and(|revision| self.is_held(revision)) {
            return Ok(self.answer(Verdict::Drained, Names::default(), Some(&target)));
        }
        if self.queries.len() >= QUERIES {
            return Ok(self.answer(Verdict::Overloaded, Names::default(), None));
        }
        self.last_query += 1;
        let id = QueryId(self.last_query);
        let query = Query { target, unknown, gone: None };
        self.by_address.extend(query.addresses().into_iter().map(|address| (address, id)));
        self.queries.insert(id, query);
        self.wait(id, gone);
        Err(id)
    }

    /// Ends a query without an answer; returns the state as its answer, or `None` if it was answered before.
    pub fn give_up(&mut self, id: QueryId) -> Option<Answer> {
        let query = self.forget(id)?;
        Some(match query.gone {
            None => self.answer(Verdict::StillMember, Names::default(), None),
            Some(revision) => {
                let waiting = self.pending.iter().take_while(|(first, _)| *first <= revision);
                let names = Names::of(waiting.map(|(_, node)| node));
                self.answer(Verdict::NotAcknowledged, names, Some(&query.target))
            }
        })
    }

    /// Returns the number of waiting queries.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queries.len()
    }

    fn forget(&mut self, id: QueryId) -> Option<Query> {
        let query = self.queries.remove(&id)?;
        for address in query.addresses() {
            self.by_address.remove(&(address, id));
        }
        if let Some(revision) = query.gone {
            self.by_revision.remove(&(revision, id));
        }
        Some(query)
    }

    /// `removed`: endpoints that are in no pool.
    fn answer(&self, verdict: Verdict, waited_for: Names, removed: Option<&Target>) -> Answer {
        let removal = removed.and_then(|target| match self.state(target) {
            State::Gone(removal) => Some(removal),
            State::Member | State::Unknown => None,
        });
        Answer { verdict, waited_for, missing: Names::of(self.missing.iter()), removal }
    }

    /// Returns true if every node that is waited for holds the revision.
    fn is_held(&self, revision: u64) -> bool {
        self.pending.first().is_none_or(|(first, _)| *first > revision)
    }

    fn set_pending(&mut self, node: &Arc<str>, first: Option<u64>) {
        let Some(entry) = self.nodes.get_mut(node) else { return };
        if let Some(old) = std::mem::replace(&mut entry.pending, first) {
            self.pending.remove(&(old, node.clone()));
        }
        if let Some(first) = first {
            self.pending.insert((first, node.clone()));
        }
    }

    /// Answers the queries that no node is waited for any more.
    fn complete(&mut self, last: Option<&Arc<str>>) -> Answers {
        let mut answers = Answers::new();
        while let Some((revision, id)) = self.by_revision.first().copied()
            && self.is_held(revision)
        {
            let Some(query) = self.forget(id) else { break };
            answers
                .push((id, self.answer(Verdict::Drained, Names::of(last.into_iter()), Some(&query.target))));
        }
        answers
    }
}
