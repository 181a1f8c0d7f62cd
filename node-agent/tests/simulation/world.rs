//! The scheduler: faults, deliveries and time, all drawn from the seed, and the properties.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::agent::{Agent, FromAgent, HelloView, Sync, ToAgent};
use crate::budget::Budget;
use crate::cluster::Cluster;
use crate::controller::{Controller, Row};
use crate::history::History;

/// Events of a run before the faults end; in a large fleet, this many for each node.
const EVENTS: usize = 300;
const EVENTS_PER_NODE: usize = 30;
/// Maximum number of rounds until everything is equal after the last fault.
const ROUNDS: usize = 60;
/// Numbers of faults and outcomes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    commits: u64,
    refused: u64,
    lost: u64,
    duplicates: u64,
    killed: u64,
    rebooted: u64,
    controllers: u64,
    restores: u64,
    jumps: u64,
    mistakes: u64,
    held: u64,
    released: u64,
    stalls: u64,
    sent_away: u64,
    superseded: u64,
    moves: u64,
}

impl Counts {
    fn all(&mut self) -> [&mut u64; 16] {
        let Self { commits, refused, lost, duplicates, killed, rebooted, controllers, .. } = self;
        let first = [commits, refused, lost, duplicates, killed, rebooted, controllers];
        let Self { restores, jumps, mistakes, held, released, stalls, sent_away, superseded, moves, .. } =
            self;
        let [a, b, c, d, e, f, g] = first;
        let [h, i, j, k, l] = [restores, jumps, mistakes, held, released];
        [a, b, c, d, e, f, g, h, i, j, k, l, stalls, sent_away, superseded, moves]
    }

    pub fn add(&mut self, more: &Counts) {
        let mut more = *more;
        for (sum, one) in self.all().into_iter().zip(more.all()) {
            *sum += *one;
        }
    }

    pub fn least(mut self) -> u64 {
        self.all().into_iter().map(|count| *count).min().unwrap_or_default()
    }
}

/// A TCP connection: messages arrive in order or not at all.
struct Connection {
    node: usize,
    replica: usize,
    /// Session at the controller, once it took the Hello.
    session: Option<u64>,
    to_agent: VecDeque<ToAgent>,
    to_controller: VecDeque<FromAgent>,
}

struct Node {
    agent: Agent,
    row: Row,
    /// Position of the agent's connection.
    connection: Option<usize>,
    /// The replica of the last session.
    replica: Option<usize>,
    commits: u64,
    /// Stamp of the last commit.
    stamp: Option<(u64, u128)>,
    budget: Budget,
    /// Version of the objects that the kernel holds.
    seen: u64,
}

pub struct World {
    /// Prints every event.
    verbose: bool,
    random: StdRng,
    base: Instant,
    now: Duration,
    cluster: Cluster,
    replicas: Vec<Controller>,
    processes: u64,
    nodes: Vec<Node>,
    connections: Vec<Connection>,
    history: History,
    counts: Counts,
}

impl World {
    pub fn new(seed: u64, verbose: bool) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let large = random.random_ratio(1, 1_000);
        let nodes = if large { random.random_range(100..200) } else { random.random_range(2..6) };
        // Only a large cluster can exceed the delete budget.
        let services = if random.random_ratio(1, 4) { random.random_range(60..80) } else { 12 };
        let cluster = Cluster::new(nodes, services, &mut random);
        let replicas = random.random_range(1..4);
        let replica = |name| Controller::new(name, name as u64, &cluster, std::iter::empty());
        let new = |_| Node {
            agent: Agent::new(),
            row: Row::default(),
            connection: None,
            replica: None,
            commits: 0,
            stamp: None,
            budget: Budget::default(),
            seen: 0,
        };
        Self {
            verbose,
            random,
            base: Instant::now(),
            now: Duration::ZERO,
            replicas: (0..replicas).map(replica).collect(),
            cluster,
            processes: replicas as u64,
            nodes: (0..nodes).map(new).collect(),
            connections: Vec::new(),
            history: History::default(),
            counts: Counts::default(),
        }
    }

    pub fn run(mut self) -> Counts {
        let slowly = Duration::from_millis(400) * 5 / self.nodes.len().max(5) as u32;
        for _ in 0..EVENTS.max(self.nodes.len() * EVENTS_PER_NODE) {
            self.now += slowly.mul_f64(self.random.random());
            let node = self.random.random_range(0..self.nodes.len());
            let replica = self.random.random_range(0..self.replicas.len());
            match self.random.random_range(0..1_000) {
                0..110 => self.cluster.change(&mut self.random),
                110..220 => self.compile(replica),
                220..830 => self.work(node),
                830..860 => self.nodes[node].agent.save(),
                860..890 => self.write_row(replica, node),
                890..920 => self.watch(replica, node),
                other => self.fault(other, node, replica),
            }
            (0..self.nodes.len()).for_each(|node| self.check(node));
        }
        self.heal();
        self.counts
    }

    fn log(&self, text: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:>12.3?} {}", self.now, text());
        }
    }

    fn instant(&self) -> Instant {
        self.base + self.now
    }

    fn compile(&mut self, replica: usize) {
        if !self.replicas[replica].stalled {
            self.replicas[replica].compile(&self.cluster);
        }
    }

    fn write_row(&mut self, replica: usize, node: usize) {
        if !self.replicas[replica].stalled {
            self.replicas[replica].write_row(node, &mut self.nodes[node].row);
            self.end_superseded(replica, node);
        }
    }

    /// Delivers a row to a replica.
    fn watch(&mut self, replica: usize, node: usize) {
        if !self.replicas[replica].stalled {
            self.replicas[replica].watch(node, &self.nodes[node].row);
            self.end_superseded(replica, node);
        }
    }

    /// Ends the stream of a node that has a later one to another replica.
    fn end_superseded(&mut self, replica: usize, node: usize) {
        if self.replicas[replica].sessions.contains_key(&node) {
            return;
        }
        for at in 0..self.connections.len() {
            let connection = &self.connections[at];
            if connection.node == node && connection.replica == replica && connection.session.is_some() {
                self.counts.superseded += 1;
                self.close(at);
            }
        }
    }

    /// Ends a connection in order: what is in flight is discarded.
    fn close(&mut self, at: usize) {
        let connection = &mut self.connections[at];
        connection.session = None;
        connection.to_agent.clear();
        connection.to_controller.clear();
        let current = &mut self.nodes[connection.node].connection;
        current.take_if(|current| *current == at);
    }

    fn fault(&mut self, number: u32, node: usize, replica: usize) {
        let now = self.instant();
        self.log(|| format!("fault {number} at node {node}"));
        match number {
            920..932 => {
                self.nodes[node].agent.kernel.refuses = self.random.random_ratio(1, 2);
                self.counts.refused += u64::from(self.nodes[node].agent.kernel.refuses);
            }
            932..944 => self.lose(node),
            944..952 => {
                self.counts.duplicates += u64::from(self.nodes[node].connection.is_some());
                self.connect(node);
            }
            952..960 => {
                self.lose(node);
                let agent = &mut self.nodes[node].agent;
                agent.restart(now);
                // The file may be older than the kernel, which has no version.
                self.nodes[node].seen = agent.source();
                self.counts.killed += 1;
            }
            960..963 => {
                self.lose(node);
                // A reboot takes longer than the delivery of a row.
                (0..self.replicas.len()).for_each(|replica| self.watch(replica, node));
                let kept = self.nodes[node].agent.reboot(now);
                self.history.forget_above(node, kept.max(self.nodes[node].row.generation));
                self.nodes[node].seen = 0;
                self.counts.rebooted += 1;
            }
            963..966 => self.restart_replica(replica),
            966..968 => {
                self.replicas[replica].stalled ^= true;
                self.counts.stalls += 1;
                // It reads what has arrived before it serves a new stream.
                (0..self.nodes.len()).for_each(|node| self.watch(replica, node));
            }
            968..970 => {
                self.cluster.restore();
                self.counts.restores += 1;
            }
            970..973 => self.cluster.back_up(),
            973..979 => {
                self.now += Duration::from_secs(self.random.random_range(1..7_200));
                self.counts.jumps += 1;
            }
            979..988 => {
                self.cluster.delete_most(&mut self.random);
                self.counts.mistakes += 1;
            }
            988..992 => {
                let revision = self.random.random_range(0..3);
                let row = &mut self.nodes[node].row;
                (row.assigned, row.version) = (revision, row.version + 1);
                self.history.assigned(node, revision);
            }
            _ => self.release(),
        }
    }

    /// The operator releases what the controller reports as held by a node.
    fn release(&mut self) {
        let sessions = self.replicas.iter().flat_map(|replica| &replica.sessions);
        let mut applied = sessions.filter_map(|(node, session)| Some((*node, session.applied?)));
        if let Some((node, (generation, _))) = applied.find(|(_, (_, held))| *held > 0) {
            self.counts.released += 1;
            let row = &mut self.nodes[node].row;
            row.release_held_before = row.release_held_before.max(generation + 1);
            row.version += 1;
        }
    }

    fn restart_replica(&mut self, replica: usize) {
        self.processes += 1;
        let rows = self.nodes.iter().map(|node| &node.row);
        self.replicas[replica] = Controller::new(replica, self.processes, &self.cluster, rows);
        for at in 0..self.connections.len() {
            if self.connections[at].replica == replica {
                self.close(at);
            }
        }
        self.counts.controllers += 1;
    }

    /// The connection breaks, with everything in flight.
    fn lose(&mut self, node: usize) {
        if self.nodes[node].connection.take().is_some() {
            self.counts.lost += 1;
        }
        for connection in self.connections.iter_mut().filter(|one| one.node == node) {
            connection.session = None;
            connection.to_agent.clear();
            connection.to_controller.clear();
        }
    }

    /// Opens a connection; an earlier one stays half-open at the controller.
    fn connect(&mut self, node: usize) {
        let hello = self.nodes[node].agent.hello();
        let to_controller = VecDeque::from([hello]);
        let replica = self.random.random_range(0..self.replicas.len());
        let connection =
            Connection { node, replica, session: None, to_agent: VecDeque::new(), to_controller };
        self.nodes[node].connection = Some(self.connections.len());
        self.connections.push(connection);
    }

    /// Lets one part of the node's path make progress.
    fn work(&mut self, node: usize) {
        if self.nodes[node].connection.is_none() {
            return self.connect(node);
        }
        match self.random.random_range(0..10) {
            0..2 => (0..self.replicas.len()).for_each(|replica| self.advance(replica, node)),
            2 => self.nodes[node].agent.wake(),
            3..6 => {
                // Half-open connections deliver too.
                let own: Vec<usize> = (0..self.connections.len())
                    .filter(|at| self.connections[*at].node == node)
                    .filter(|at| !self.connections[*at].to_controller.is_empty())
                    .collect();
                if !own.is_empty() {
                    let at = own[self.random.random_range(0..own.len())];
                    self.deliver_to_controller(at);
                }
            }
            _ => {
                for _ in 0..self.random.random_range(1..8) {
                    self.deliver_to_agent(node);
                }
            }
        }
    }

    fn advance(&mut self, replica: usize, node: usize) {
        if self.replicas[replica].stalled {
            return;
        }
        let messages = self.replicas[replica].advance(node, &mut self.history);
        let Some(session) = self.replicas[replica].sessions.get(&node) else { return };
        let own = (node, replica, Some(session.number));
        let open = self.connections.iter_mut().find(|one| (one.node, one.replica, one.session) == own);
        if let Some(connection) = open {
            connection.to_agent.extend(messages);
        }
    }

    /// Returns true if the replica may send a node what it has: everything that the node has seen, or what the API server has
    /// after a restore.
    fn admits(&self, replica: usize, node: usize, view: Option<&HelloView>) -> bool {
        let Some(view) = view else { return true };
        let own = &self.replicas[replica];
        let fresher = self.replicas.iter().any(|other| other.version >= view.source);
        own.covers(node, view) || !fresher && own.version == self.cluster.version
    }

    fn deliver_to_controller(&mut self, at: usize) {
        let (node, replica) = (self.connections[at].node, self.connections[at].replica);
        if self.replicas[replica].stalled {
            return;
        }
        let Some(message) = self.connections[at].to_controller.pop_front() else { return };
        self.log(|| format!("node {node} sends {message:?} to replica {replica}"));
        if let FromAgent::Hello { kernel, view, session } = message {
            if !self.admits(replica, node, view.as_ref()) {
                self.counts.sent_away += 1;
                return self.close(at);
            }
            // An earlier version with the same content goes back in nothing but its number.
            let version = self.replicas[replica].version;
            self.nodes[node].seen = self.nodes[node].seen.min(version);
            let (number, welcome) = self.replicas[replica].open(node, kernel, view.as_ref(), session);
            self.connections[at].session = Some(number);
            self.connections[at].to_agent.push_back(welcome);
            let moved = self.nodes[node].replica.replace(replica).is_some_and(|last| last != replica);
            self.counts.moves += u64::from(moved);
            // The controller ends the superseded stream.
            let superseded = self.nodes[node].connection.filter(|current| *current != at);
            let superseded = superseded.map(|current| &self.connections[current]);
            if superseded.is_some_and(|other| other.session.is_some() && other.replica == replica) {
                self.nodes[node].connection = None;
            }
        } else {
            if let FromAgent::Ack { session, generation, .. } = &message
                && self.connections[at].session == Some(*session)
            {
                let kernel = self.nodes[node].agent.kernel.stamp.map_or(0, |(generation, _)| generation);
                assert!(
                    *generation <= kernel,
                    "node {node} acknowledged {generation}, its kernel has {kernel}"
                );
            }
            self.replicas[replica].receive(node, &message, &mut self.history);
        }
    }

    /// Delivers one message on the agent's current connection.
    fn deliver_to_agent(&mut self, node: usize) {
        let Some(at) = self.nodes[node].connection else { return };
        let Some(message) = self.connections[at].to_agent.pop_front() else { return };
        self.log(|| format!("node {node} receives {message:?}"));
        let now = self.instant();
        self.nodes[node].agent.receive(message, now);
    }

    /// Checks a node after a change of its view, and after a commit.
    fn check(&mut self, node: usize) {
        let now = self.now;
        let Node { agent, row, connection, commits, stamp: last, budget, seen, .. } = &mut self.nodes[node];
        if let Some(at) = connection {
            self.connections[*at].to_controller.append(&mut agent.outgoing());
        }
        if budget.changes != agent.changes {
            self.counts.held += u64::from(agent.state.held() > budget.held);
            budget.check(node, agent, row, now);
        }
        if std::mem::replace(commits, agent.commits) == agent.commits {
            return;
        }
        self.counts.commits += 1;
        let stamp = agent.kernel.stamp.unwrap();
        // The end of holds commits the same version again.
        if last.replace(stamp) != Some(stamp) {
            let source = agent.source();
            let comparable = self.counts.restores == 0;
            assert!(source >= *seen || !comparable, "node {node} went back from version {seen} to {source}");
            *seen = source;
        }
        let settings = agent.kernel.settings.unwrap_or_default();
        assert!(
            self.history.was_assigned(node, settings),
            "node {node} was never assigned settings {settings}"
        );
        let surplus = agent.kernel.surplus(self.history.desired(node, stamp));
        let (items, held) = (agent.kernel.len(), agent.state.held());
        assert_eq!(surplus, Some(held), "node {node} differs from generation {} beyond its holds", stamp.0);
        self.log(|| format!("node {node} commits {stamp:?}: {items} items, {held} held"));
    }

    /// Ends all faults; everything becomes equal, except for holds until they are released.
    fn heal(&mut self) {
        for replica in 0..self.replicas.len() {
            self.replicas[replica].stalled = false;
            self.compile(replica);
        }
        for release in [false, true] {
            for node in 0..self.nodes.len() {
                self.nodes[node].agent.kernel.refuses = false;
                if release {
                    let row = &mut self.nodes[node].row;
                    (row.release_held_before, row.version) = (u64::MAX, row.version + 1);
                }
            }
            for _ in 0..ROUNDS {
                (0..self.nodes.len()).for_each(|node| self.round(node));
            }
            for node in 0..self.nodes.len() {
                self.equal(node, release);
            }
        }
    }

    fn round(&mut self, node: usize) {
        if self.nodes[node].connection.is_none() {
            self.connect(node);
        }
        for replica in 0..self.replicas.len() {
            self.write_row(replica, node);
            self.watch(replica, node);
        }
        let Some(at) = self.nodes[node].connection else { return };
        self.deliver_to_controller(at);
        self.advance(self.connections[at].replica, node);
        for _ in 0..16 {
            self.deliver_to_agent(node);
            self.check(node);
        }
        self.nodes[node].agent.wake();
        self.check(node);
    }

    fn equal(&self, node: usize, released: bool) {
        let (content, digest) = self.replicas[0].head(node);
        for replica in &self.replicas {
            assert_eq!(
                replica.head(node),
                (content.clone(), digest),
                "the replicas compile the same for node {node}"
            );
        }
        let agent = &self.nodes[node].agent;
        assert_eq!(agent.sync, Sync::Idle, "node {node} has no pending work");
        assert_eq!(agent.state.digest(), digest, "node {node} has the current view");
        let held = agent.kernel.surplus(&content);
        assert_eq!(held, Some(agent.state.held()), "node {node} holds the current view");
        let replica = self.nodes[node].connection.map(|at| self.connections[at].replica);
        let replica = &self.replicas[replica.unwrap_or_else(|| panic!("node {node} is not connected"))];
        let serving: Vec<usize> = (0..self.replicas.len())
            .filter(|replica| self.replicas[*replica].sessions.contains_key(&node))
            .collect();
        let row = &self.nodes[node].row;
        assert_eq!(serving, [row.claimant], "one replica serves node {node}, and the row names it");
        assert_eq!(
            replica.sessions[&node].number, row.session,
            "the row of node {node} names the agent's stream"
        );
        let (generation, acknowledged) = replica.sessions[&node].applied.unwrap_or_default();
        let stamp = agent.kernel.stamp.unwrap_or_default();
        if acknowledged > 0 || generation > 0 {
            assert_eq!(
                (generation, acknowledged),
                (stamp.0, agent.state.held()),
                "node {node} reports the truth"
            );
        }
        assert!(!released || held == Some(0), "node {node} released everything");
    }
}
