//! Rollouts over a fleet of 1,000 nodes that join, leave, fail, are relabelled, and over a controller that dies at
//! every point of a decision. Seeded; what must hold is checked after every decision.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::fixtures;
use crate::rollout::profile::settled;
use crate::rollout::*;

const NODES: usize = 1_000;
const STEPS: usize = 250;
const PROFILE: &str = "default";

struct World {
    random: StdRng,
    now: Time,
    fleet: Vec<FleetNode>,
    rollouts: Vec<Rollout>,
    /// Revisions that break a node that takes them.
    bad: Vec<u64>,
    joined: usize,
    seen: HashSet<State>,
}

fn revision(number: u64) -> Revision {
    if number == 0 { Revision::builtin() } else { Revision { profile: PROFILE.into(), number } }
}

fn strategy(random: &mut StdRng) -> Strategy {
    let canaries = Step {
        selector: Some(fixtures::labelled("canary")),
        manual: random.random(),
        ..fixtures::step(Quantity::Number(random.random_range(1..10)))
    };
    let steps = fixtures::walk(canaries, 25, [20, 5]);
    Strategy { max_unavailable: Quantity::Percent(random.random_range(5..30)), ..fixtures::strategy(steps) }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: Time(1_000_000_000),
            fleet: Vec::new(),
            rollouts: Vec::new(),
            bad: Vec::new(),
            joined: 0,
            seen: HashSet::new(),
        };
        for _ in 0..NODES {
            world.join();
        }
        world.change_profile(false);
        world
    }

    fn stable(&self) -> Revision {
        let complete = self.rollouts.iter().filter(|rollout| rollout.progress.state == State::Complete);
        complete.map(|rollout| rollout.target.clone()).max().unwrap_or_else(Revision::builtin)
    }

    fn join(&mut self) {
        self.joined += 1;
        let mut labels =
            BTreeMap::from([("zone".to_owned(), format!("z{}", self.random.random_range(0..5)))]);
        if self.random.random_ratio(1, 50) {
            labels.insert("canary".to_owned(), String::new());
        }
        let connected =
            Observed { since: self.now, acknowledged: Some(Revision::builtin()), ..Observed::default() };
        let absent = self.random.random_ratio(1, 40);
        let agent = if absent { Agent::Absent } else { Agent::connected(connected) };
        let mut node = fixtures::joined(&format!("n{}", self.joined), labels, agent);
        node.profile = self.random.random_ratio(19, 20).then(|| PROFILE.into());
        self.fleet.push(node);
    }

    fn change_profile(&mut self, bad: bool) {
        let number = self.rollouts.len() as u64 + 1;
        if bad {
            self.bad.push(number);
        }
        let stable = self.stable();
        for rollout in &mut self.rollouts {
            rollout.superseded = true;
        }
        let strategy = strategy(&mut self.random);
        self.rollouts.push(fixtures::rollout(revision(number), stable, strategy));
    }

    /// Events of nodes and actions of people between two decisions.
    fn happen(&mut self, calm: bool) {
        self.now.0 += self.random.random_range(0..8_000);
        if !calm && self.random.random_ratio(1, 60) {
            self.now.0 -= 3_600_000;
        }
        let at = self.random.random_range(0..self.fleet.len());
        match self.random.random_range(0..12) {
            _ if calm => {}
            0 => self.join(),
            1 if self.fleet.len() > NODES / 2 => drop(self.fleet.remove(at)),
            2 => self.fleet[at].agent = Agent::Disconnected,
            3 => self.fleet[at].labels = Arc::default(),
            4 => self.fleet[at].profile = None,
            _ => {}
        }
        for _ in 0..20 {
            let at = self.random.random_range(0..self.fleet.len());
            if matches!(self.fleet[at].agent, Agent::Disconnected | Agent::Unknown) {
                self.connect(at);
            }
        }
        let manual = self.random.random_ratio(1, 20) || calm;
        if let Some(rollout) = self.rollouts.last_mut() {
            rollout.approved_steps = rollout.approved_steps.max(if manual { 3 } else { 0 });
            rollout.paused = !calm && self.random.random_ratio(1, 30);
        }
        self.agents_act();
    }

    fn connect(&mut self, at: usize) {
        self.fleet[at].agent = fixtures::connected(self.now);
    }

    /// Agents take what their rows name, sooner or later.
    fn agents_act(&mut self) {
        let bad = self.bad.clone();
        for node in &mut self.fleet {
            let wanted =
                node.assigned.as_ref().map_or_else(Revision::builtin, |known| known.revision.clone());
            let Agent::Connected(observed) = &mut node.agent else { continue };
            if observed.acknowledged.as_ref() == Some(&wanted) || self.random.random_ratio(1, 3) {
                continue;
            }
            let broken = bad.contains(&wanted.number);
            fixtures::take(observed, wanted, broken);
        }
    }

    /// Every rollout is decided from what is stored, and carried out up to a point at which the controller may die.
    fn decide(&mut self, dies: bool) {
        for at in 0..self.rollouts.len() {
            let named = |node: &FleetNode| {
                node.assigned.as_ref().is_some_and(|known| known.revision == self.rollouts[at].target)
            };
            let over = self.rollouts[at].progress.state.is_final();
            if over && !self.fleet.iter().any(named) {
                continue;
            }
            let decision = decide(&self.rollouts[at], &self.fleet, self.now);
            if self.random.random_ratio(1, 10) {
                assert_eq!(decision, decide(&self.rollouts[at], &self.fleet, self.now), "equal inputs");
            }
            self.check(at, &decision);
            self.seen.insert(decision.progress.state);
            if dies && self.random.random_ratio(1, 4) {
                continue; // Before anything is stored.
            }
            self.rollouts[at].progress = decision.progress;
            let some_only = dies && self.random.random_ratio(1, 4);
            for (name, revision) in decision.moves {
                if some_only && self.random.random() {
                    continue; // Before this node's row is written.
                }
                if let Some(node) = self.fleet.iter_mut().find(|node| node.name == name) {
                    node.assigned = Some(fixtures::assignment(revision, self.now));
                }
            }
        }
        let stable = self.stable();
        let active = self.rollouts.iter().any(|rollout| !rollout.progress.state.is_final());
        for node in &mut self.fleet {
            let winner = node.profile.as_ref().map(|profile| (&**profile, &stable, active));
            if let Some(revision) = settled(node.assigned.as_ref(), winner, true) {
                node.assigned = Some(fixtures::assignment(revision, self.now));
            }
        }
    }

    fn check(&self, at: usize, decision: &Decision) {
        let rollout = &self.rollouts[at];
        let target = &rollout.target;
        let (before, after) = (&rollout.progress, &decision.progress);
        let is_touched =
            |node: &FleetNode| node.assigned.as_ref().is_some_and(|known| known.revision == *target);
        let one_step = before.steps_done..=before.steps_done + 1;
        assert!(one_step.contains(&after.steps_done), "a step at a time, and none back");
        assert!(!before.state.is_final() || before.state == after.state, "an end is final");

        let touches: Vec<&FleetNode> =
            self.fleet.iter().filter(|node| decision.moves.get(&node.name) == Some(target)).collect();
        for (name, revision) in &decision.moves {
            assert!(revision == target || *revision == rollout.stable, "{name} to {revision}");
        }
        let mine = || self.fleet.iter().filter(|node| node.profile.is_some());
        let connected = |node: &FleetNode| matches!(node.agent, Agent::Connected(_));
        let holds = |node: &FleetNode| match &node.agent {
            Agent::Connected(seen) => seen.acknowledged.as_ref() == Some(target) && seen.in_force.is_none(),
            _ => false,
        };
        if !touches.is_empty() {
            assert_eq!(after.state, State::Progressing);
            assert!(!rollout.paused && !rollout.abort && !rollout.superseded);
            let well = |node: &&FleetNode| health(node, self.now) == Health::Healthy;
            assert!(touches.iter().all(well), "only healthy nodes are touched");
            assert!(touches.iter().all(|node| node.profile.is_some() && !is_touched(node)));
            let eligible = mine().filter(|node| connected(node) || is_touched(node)).count();
            let out_of_order = mine()
                .filter(|node| if is_touched(node) { !holds(node) } else { connected(node) && !well(node) })
                .count();
            let allowed = rollout.strategy.max_unavailable.of(eligible).max(1);
            assert!(
                out_of_order + touches.len() <= allowed,
                "{out_of_order} + {} > {allowed}",
                touches.len()
            );
            let step = &rollout.strategy.steps[before.steps_done];
            let members: Vec<_> = mine()
                .filter(|node| step.selector.as_ref().is_none_or(|selector| selector.matches(&node.labels)))
                .filter(|node| connected(node) || is_touched(node))
                .collect();
            let touched = members.iter().filter(|node| is_touched(node)).count();
            assert!(
                touched + touches.len() <= step.nodes.of(members.len()),
                "not more than the step's share"
            );
        }
        if after.steps_done > before.steps_done {
            assert!(mine().any(holds), "a step is passed with a node that holds the target");
            assert!(mine().filter(|node| connected(node) && is_touched(node)).all(holds));
        }
        if after.state == State::Complete && before.state != State::Complete {
            assert!(!self.bad.contains(&target.number), "a bad revision never becomes stable");
            assert!(
                mine().filter(|node| connected(node)).all(holds),
                "complete: every node at hand holds it"
            );
        }
        if matches!(after.state, State::Failed | State::Aborted) && before.state == State::RollingBack {
            assert!(!self.fleet.iter().any(is_touched), "no node is left behind");
        }
    }
}

fn run(seed: u64) -> HashSet<State> {
    let mut world = World::new(seed);
    for step in 0..STEPS {
        world.happen(false);
        world.decide(true);
        if world.random.random_ratio(1, 40) {
            let bad = *[true, false].choose(&mut world.random).unwrap();
            world.change_profile(bad);
        }
        if world.random.random_ratio(1, 80) {
            world.rollouts.last_mut().unwrap().abort = true;
        }
        // A new controller knows nothing of the agents for a moment.
        if step % 50 == 49 {
            world.fleet.iter_mut().for_each(|node| node.agent = Agent::Unknown);
            world.decide(false);
            (0..world.fleet.len()).for_each(|at| world.connect(at));
        }
    }
    // Finally a good change succeeds on every node.
    world.change_profile(false);
    for _ in 0..400 {
        world.happen(true);
        world.decide(false);
        if world.rollouts.last().unwrap().progress.state == State::Complete {
            break;
        }
    }
    world.decide(false);
    let last = world.rollouts.last().unwrap();
    assert_eq!(last.progress.state, State::Complete, "seed {seed}: {:?}", last.progress);
    for node in world.fleet.iter().filter(|node| matches!(node.agent, Agent::Connected(_))) {
        let assigned = node.assigned.as_ref().map(|assigned| &assigned.revision);
        assert!(node.profile.is_none() || assigned == Some(&last.target), "seed {seed}: {node:?}");
    }
    world.seen
}

#[test]
fn thousand_nodes_join_leave_and_fail() {
    let seen: HashSet<State> = (1..=4).flat_map(run).collect();
    let missing: Vec<_> = State::ALL.iter().copied().filter(|state| !seen.contains(state)).collect();
    assert_eq!(missing, [], "states that the simulation never came to");
}
