//! Faults in a fleet under continuous traffic: connections that are lost, staleness of kernels, and what rows report.
//!
//! Two replicas, three nodes, and links that can be cut. Faults are injected one after another, those of single nodes on
//! all nodes at once, and end when all kernels hold the current state. A seed determines their order and what they concern.

#![allow(clippy::print_stderr, reason = "progress")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use crate::lab::wait;
use crate::scene::{Scene, cluster_ip};
use crate::switchtower::{Fleet, FleetNode};

mod fault;
mod staleness;
pub mod table;
mod traffic;

pub use fault::{Extent, Fault};
use fault::{Injection, Scope};
use staleness::{Changes, Observer, Sight};
use traffic::Traffic;

/// Time for all kernels and rows to agree after a fault.
const CONVERGED: Duration = Duration::from_secs(90);
/// Age from which a stream leaves a stale replica.
const STAY: Duration = Duration::from_secs(60);
/// Interval between changes of the endpoints that probers use.
const CHURN: Duration = Duration::from_millis(500);
/// The pods that connections come from, in the order of their nodes.
const CLIENTS: [&str; 3] = ["a2", "b1", "c2"];

/// Outcome of one injection.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub fault: Fault,
    pub tried: u64,
    pub lost: u64,
    /// Longest time for which a kernel lacked a change.
    pub stale: Duration,
    /// Longest time for which a kernel lacked a change while its row said that the node is ready. Agents that are not
    /// obliged to leave a stale replica yet do not count.
    pub untrue: Duration,
    /// Time from the repair until all kernels and rows agreed.
    pub converged: Duration,
    /// States and reasons in rows, other than Synced.
    pub said: BTreeSet<String>,
}

/// What the threads beside the injection do.
#[derive(Debug, Default)]
struct Phase {
    /// Nothing in the API changes, so that kernels and rows can agree.
    quiet: AtomicBool,
    over: AtomicBool,
}

impl Phase {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Calls `change` at an interval until the end, except in quiet times.
    fn repeat(&self, every: Duration, mut change: impl FnMut() -> Result<()>) -> Result<()> {
        while !self.is_over() {
            if !self.quiet.load(Ordering::Relaxed) {
                change()?;
            }
            std::thread::sleep(every);
        }
        Ok(())
    }
}

/// Injects every fault of `extent`, `rounds` times.
///
/// # Errors
/// The fleet does not agree after a fault, or the laboratory fails. The message names the fault.
pub fn run(fleet: &'static Fleet, seed: u64, rounds: u64, extent: Extent) -> Result<Vec<Outcome>> {
    let scene = Scene::of(fleet, "chaos");
    let services = ["steady", "churning"].map(|name| {
        let service = scene.service(name, &json!({}));
        scene.endpoints(name, &["a1", "b1", "c1"]);
        cluster_ip(&service, false)
    });
    fleet.settled(CONVERGED)?;
    let (phase, changes) = (Phase::default(), Changes::default());
    let nodes: Vec<Node> = CLIENTS.iter().map(|_| Node::default()).collect();
    std::thread::scope(|scope| {
        let mut workers =
            vec![scope.spawn(|| changes.make(&scene, &phase)), scope.spawn(|| churn(&scene, &phase))];
        for ((known, client), node) in nodes.iter().zip(CLIENTS).zip(fleet.nodes()) {
            let (from, phase, services): (_, _, &[SocketAddr]) = (scene.pod(client), &phase, &services);
            workers.push(scope.spawn(move || known.traffic.probe(from, services, phase)));
            let (scene, changes) = (&scene, &changes);
            workers.push(scope.spawn(move || known.observer.observe(scene, node, changes, phase)));
        }
        let outcomes = Laboratory { fleet, phase: &phase, nodes: &nodes }.inject_all(seed, rounds, extent);
        phase.over.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        outcomes
    })
}

/// What is known of a node.
#[derive(Debug, Default)]
struct Node {
    /// Of a prober on it.
    traffic: Traffic,
    observer: Observer,
}

/// A node before a fault.
#[derive(Debug, Clone, Copy)]
struct Before {
    tried: u64,
    lost: u64,
    /// Its stream is old enough to leave a stale replica.
    may_leave: bool,
}

/// What happened on a node during a fault.
#[derive(Debug, Clone)]
struct Observed {
    tried: u64,
    lost: u64,
    may_leave: bool,
    sight: Sight,
}

struct Laboratory<'a> {
    fleet: &'a Fleet,
    phase: &'a Phase,
    nodes: &'a [Node],
}

impl Laboratory<'_> {
    fn inject_all(&self, seed: u64, rounds: u64, extent: Extent) -> Result<Vec<Outcome>> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut outcomes = Vec::new();
        for _ in 0..rounds {
            for batch in self.batches(extent, &mut random) {
                let names = || batch.iter().map(|(fault, _)| fault.name()).collect::<Vec<_>>().join(", ");
                let batch = self.inject(&batch).with_context(names)?;
                batch.iter().for_each(|outcome| eprintln!("{}", outcome.summary()));
                outcomes.extend(batch);
            }
        }
        Ok(outcomes)
    }

    /// The faults in random order, each with the index of a node, those of single nodes as one for each node.
    fn batches(&self, extent: Extent, random: &mut StdRng) -> Vec<Vec<(Fault, usize)>> {
        let (mut of_nodes, of_fleet): (Vec<_>, Vec<_>) =
            extent.faults().partition(|fault| fault.scope() == Scope::Node);
        of_nodes.shuffle(random);
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        let mut batches: Vec<Vec<(Fault, usize)>> = Vec::new();
        for faults in of_nodes.chunks(self.nodes.len()) {
            order.shuffle(random);
            batches.push(faults.iter().copied().zip(order.iter().copied()).collect());
        }
        for fault in of_fleet {
            batches.push(vec![(fault, random.random_range(0..self.nodes.len()))]);
        }
        batches.shuffle(random);
        batches
    }

    /// Injects faults that concern different parts.
    fn inject(&self, batch: &[(Fault, usize)]) -> Result<Vec<Outcome>> {
        let prepared = batch.iter().map(|(fault, node)| self.prepare(*fault, *node));
        let mut batch = prepared.collect::<Result<Vec<Injection>>>()?;
        let before = self.before();
        self.phase.quiet.store(false, Ordering::Relaxed);
        let began = Instant::now();
        batch.iter().try_for_each(|injection| injection.inject(self.fleet))?;
        batch.sort_by_key(|injection| injection.fault.duration());
        for injection in &batch {
            std::thread::sleep(injection.fault.duration().saturating_sub(began.elapsed()));
            injection.repair(self.fleet)?;
        }
        let repaired = Instant::now();
        self.phase.quiet.store(true, Ordering::Relaxed);
        self.fleet.settled(CONVERGED)?;
        let converged = repaired.elapsed();
        let observed = self.observed(&before);
        let outcomes = batch.iter().map(|injection| {
            let of = match injection.fault.scope() {
                Scope::Node => &observed[injection.node..=injection.node],
                Scope::Fleet => &observed[..],
            };
            Outcome::of(injection.fault, of, converged)
        });
        let outcomes: Vec<_> = outcomes.collect();
        ensure!(outcomes.iter().all(|outcome| outcome.tried > 0), "no connection was tried");
        Ok(outcomes)
    }

    /// Chooses the replica of the node, and waits until its agent may leave it if the fault requires that.
    fn prepare(&self, fault: Fault, node: usize) -> Result<Injection> {
        let of = &self.fleet.nodes()[node];
        let replica = self.fleet.replica_number(of)?;
        if fault.makes_a_replica_stale() {
            let name = &of.net.name;
            wait::until("a stream that may leave its replica", STAY + CONVERGED, || {
                ensure!(may_leave(self.fleet, name), "the stream of {name} is too young");
                Ok(())
            })?;
        }
        Ok(Injection { fault, node, replica })
    }

    fn before(&self) -> Vec<Before> {
        let of = |(known, node): (&Node, &FleetNode)| {
            drop(known.observer.take());
            let (tried, lost) = known.traffic.counts();
            Before { tried, lost, may_leave: may_leave(self.fleet, &node.net.name) }
        };
        self.nodes.iter().zip(self.fleet.nodes()).map(of).collect()
    }

    fn observed(&self, before: &[Before]) -> Vec<Observed> {
        let of = |(known, before): (&Node, &Before)| {
            let ((tried, lost), sight) = (known.traffic.counts(), known.observer.take());
            let (tried, lost) = (tried - before.tried, lost - before.lost);
            Observed { tried, lost, may_leave: before.may_leave, sight }
        };
        self.nodes.iter().zip(before).map(of).collect()
    }
}

impl Outcome {
    fn of(fault: Fault, nodes: &[Observed], converged: Duration) -> Self {
        let obliged = nodes.iter().filter(|node| node.may_leave || !fault.makes_a_replica_stale());
        Self {
            fault,
            tried: nodes.iter().map(|node| node.tried).sum(),
            lost: nodes.iter().map(|node| node.lost).sum(),
            stale: nodes.iter().map(|node| node.sight.stale).max().unwrap_or_default(),
            untrue: obliged.map(|node| node.sight.untrue).max().unwrap_or_default(),
            converged,
            said: nodes.iter().flat_map(|node| node.sight.said.clone()).collect(),
        }
    }

    fn summary(&self) -> String {
        let Self { fault, tried, lost, stale, untrue, converged, said } = self;
        format!(
            "{}: {tried} connections, {lost} lost; stale {stale:.1?}, row ready while stale {untrue:.1?}; agreed after \
             {converged:.1?}; {said:?}",
            fault.name()
        )
    }
}

/// Returns true if the node's stream is old enough to leave a stale replica.
fn may_leave(fleet: &Fleet, node: &str) -> bool {
    let since = fleet.row(node).ok().and_then(|row| row.agent?.since);
    let age = |at: Timestamp| Duration::try_from(Timestamp::now().duration_since(at)).unwrap_or_default();
    since.is_some_and(|since| age(since.0) >= STAY)
}

/// Changes the endpoints of one of the probed Services. All pods serve all the time.
fn churn(scene: &Scene, phase: &Phase) -> Result<()> {
    let mut pods = [["a1", "b1"], ["b1", "c1"], ["a1", "c1"]].iter().cycle();
    phase.repeat(CHURN, || {
        scene.endpoints("churning", pods.next().context("an endless iterator")?);
        Ok(())
    })
}
