//! The scheduler: faults, deliveries and time, all drawn from the seed, and the properties.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::agent::{Agent, FromAgent, Sync, ToAgent};
use crate::budget::Budget;
use crate::cluster::Cluster;
use crate::controller::{Controller, Row};
use crate::history::History;

/// Events of a run before the faults end.
const EVENTS: usize = 300;
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
}

impl Counts {
    fn all(&mut self) -> [&mut u64; 12] {
        let Self { commits, refused, lost, duplicates, killed, rebooted, controllers, .. } = self;
        let first = [commits, refused, lost, duplicates, killed, rebooted, controllers];
        let Self { restores, jumps, mistakes, held, released, .. } = self;
        let [a, b, c, d, e, f, g] = first;
        [a, b, c, d, e, f, g, restores, jumps, mistakes, held, released]
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
    commits: u64,
    budget: Budget,
}

pub struct World {
    /// Prints every event.
    verbose: bool,
    random: StdRng,
    base: Instant,
    now: Duration,
    cluster: Cluster,
    controller: Controller,
    processes: u64,
    nodes: Vec<Node>,
    connections: Vec<Connection>,
    history: History,
    counts: Counts,
}

impl World {
    pub fn new(seed: u64, verbose: bool) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let nodes = random.random_range(2..6);
        // Only a large cluster can exceed the delete budget.
        let services = if random.random_ratio(1, 4) { random.random_range(60..80) } else { 12 };
        let cluster = Cluster::new(nodes, services, &mut random);
        let controller = Controller::new(1, &cluster.objects, Default::default());
        let new = |_| Node {
            agent: Agent::new(),
            row: Row::default(),
            connection: None,
            commits: 0,
            budget: Budget::default(),
        };
        Self {
            verbose,
            random,
            base: Instant::now(),
            now: Duration::ZERO,
            cluster,
            controller,
            processes: 1,
            nodes: (0..nodes).map(new).collect(),
            connections: Vec::new(),
            history: History::default(),
            counts: Counts::default(),
        }
    }

    pub fn run(mut self) -> Counts {
        for _ in 0..EVENTS {
            self.now += Duration::from_millis(self.random.random_range(0..400));
            let node = self.random.random_range(0..self.nodes.len());
            match self.random.random_range(0..1_000) {
                0..120 => self.cluster.change(&mut self.random),
                120..220 => self.controller.compile(&self.cluster.objects),
                220..860 => self.work(node),
                860..890 => self.nodes[node].agent.save(),
                890..920 => self.controller.write_row(node, &mut self.nodes[node].row),
                other => self.fault(other, node),
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

    fn fault(&mut self, number: u32, node: usize) {
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
                self.nodes[node].agent.restart(now);
                self.counts.killed += 1;
            }
            960..963 => {
                self.lose(node);
                let kept = self.nodes[node].agent.reboot(now);
                self.history.forget_above(node, kept.max(self.nodes[node].row.generation));
                self.counts.rebooted += 1;
            }
            963..967 => self.restart_controller(),
            967..970 => {
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
                self.controller.assigned.insert(node, revision);
            }
            _ => self.release(),
        }
    }

    /// The operator releases what the controller reports as held by a node.
    fn release(&mut self) {
        let applied = self.controller.sessions.iter().map(|(node, session)| (*node, session.applied));
        let holding =
            applied.filter_map(|(node, applied)| Some((node, applied?))).find(|(_, (_, held))| *held > 0);
        if let Some((node, (generation, _))) = holding {
            self.counts.released += 1;
            let row = &mut self.nodes[node].row;
            row.release_held_before = row.release_held_before.max(generation + 1);
        }
    }

    fn restart_controller(&mut self) {
        self.processes += 1;
        let assigned = self.controller.assigned.clone();
        self.controller = Controller::new(self.processes, &self.cluster.objects, assigned);
        (0..self.nodes.len()).for_each(|node| self.lose(node));
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
        let connection = Connection { node, session: None, to_agent: VecDeque::new(), to_controller };
        self.nodes[node].connection = Some(self.connections.len());
        self.connections.push(connection);
    }

    /// Lets one part of the node's path make progress.
    fn work(&mut self, node: usize) {
        if self.nodes[node].connection.is_none() {
            return self.connect(node);
        }
        match self.random.random_range(0..10) {
            0..2 => self.advance(node),
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

    fn advance(&mut self, node: usize) {
        let messages = self.controller.advance(node, &self.nodes[node].row, &mut self.history);
        let Some(session) = self.controller.sessions.get(&node) else { return };
        let number = session.number;
        let open = self.connections.iter_mut().find(|one| one.node == node && one.session == Some(number));
        if let Some(connection) = open {
            connection.to_agent.extend(messages);
        }
    }

    fn deliver_to_controller(&mut self, at: usize) {
        let Some(message) = self.connections[at].to_controller.pop_front() else { return };
        let node = self.connections[at].node;
        self.log(|| format!("node {node} sends {message:?}"));
        if let FromAgent::Hello { kernel, view } = message {
            let row = &self.nodes[node].row;
            let (number, welcome) = self.controller.open(node, row, kernel, view.as_ref());
            self.connections[at].session = Some(number);
            self.connections[at].to_agent.push_back(welcome);
            // The controller ends the superseded stream.
            let current = self.nodes[node].connection.filter(|current| *current != at);
            if current.is_some_and(|current| self.connections[current].session.is_some()) {
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
            self.controller.receive(node, &message, &mut self.history);
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
        let Node { agent, row, connection, commits, budget } = &mut self.nodes[node];
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
        let content = agent.kernel.content();
        let surplus = content.surplus(self.history.desired(node, stamp));
        let (items, held) = (content.len(), agent.state.held());
        assert_eq!(surplus, Some(held), "node {node} differs from generation {} beyond its holds", stamp.0);
        self.log(|| format!("node {node} commits {stamp:?}: {items} items, {held} held"));
    }

    /// Ends all faults; everything becomes equal, except for holds until they are released.
    fn heal(&mut self) {
        self.controller.compile(&self.cluster.objects);
        for release in [false, true] {
            for node in 0..self.nodes.len() {
                self.nodes[node].agent.kernel.refuses = false;
                if release {
                    self.nodes[node].row.release_held_before = u64::MAX;
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
        let Some(at) = self.nodes[node].connection else { return };
        self.deliver_to_controller(at);
        self.advance(node);
        for _ in 0..16 {
            self.deliver_to_agent(node);
            self.check(node);
        }
        self.nodes[node].agent.wake();
        self.check(node);
    }

    fn equal(&self, node: usize, released: bool) {
        let (content, digest) = self.controller.head(node);
        let agent = &self.nodes[node].agent;
        assert_eq!(agent.sync, Sync::Idle, "node {node} has no pending work");
        assert_eq!(agent.state.digest(), digest, "node {node} has the current view");
        let held = agent.kernel.content().surplus(&content);
        assert_eq!(held, Some(agent.state.held()), "node {node} holds the current view");
        let (generation, acknowledged) = self.controller.sessions[&node].applied.unwrap_or_default();
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
