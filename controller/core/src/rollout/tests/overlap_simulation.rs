//! Three profiles that overlap, swap their precedence and are edited, deleted and created again on the way, over nodes
//! that come, go, fail and change their labels, with a clock that jumps, rows that are written late or by others, and a
//! controller that dies. Seeded.
//!
//! Invariants: a revision that breaks nodes never gets further than a rollout's own steps, a node that a rollout
//! touched returns to what it had itself, no number is used twice, and finally every node has the settings of its
//! profile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::fixtures::{self, assignment, connected, joined, labelled, step, take, walk};
use crate::rollout::profile::{
    Past, Profile, fallback, next_revision, origin, returns_to, settled, stable, superseded, winner,
};
use crate::rollout::*;

const NODES: usize = 120;
const STEPS: usize = 600;
const NAMES: [&str; 3] = ["base", "edge", "spot"];

struct Item {
    past: Past,
    rollout: Rollout,
}

/// A node's row, and what the test itself knows of it.
#[derive(Clone, Default)]
struct Row {
    stored: Option<Assignment>,
    /// Revision that the node returns to, and the profile's UID, for the latest assignment, stored or not.
    had: Option<(Revision, Arc<str>)>,
    had_stored: Option<(Revision, Arc<str>)>,
}

struct World {
    random: StdRng,
    now: Time,
    fleet: Vec<FleetNode>,
    /// In the order of the fleet.
    rows: Vec<Row>,
    profiles: Vec<Profile>,
    items: Vec<Item>,
    /// Hashes of settings that break the nodes that take them.
    bad: BTreeSet<String>,
    /// Names, UIDs and hashes that were given out.
    counter: u64,
    used: BTreeSet<Revision>,
    /// Number of nodes that returned to another revision than the rollout's stable one.
    own_ways: usize,
}

fn strategy(random: &mut StdRng) -> Strategy {
    let canaries = Step {
        selector: random.random_bool(0.3).then(|| labelled("canary")),
        manual: random.random_bool(0.3),
        ..step(Quantity::Number(2))
    };
    Strategy {
        max_unavailable: Quantity::Percent(random.random_range(5..40)),
        freeze_percent: 30,
        ..fixtures::strategy(walk(canaries, 40, [10, 3]))
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: Time(1_000_000_000),
            fleet: Vec::new(),
            rows: vec![Row::default(); NODES],
            profiles: Vec::new(),
            items: Vec::new(),
            bad: BTreeSet::new(),
            counter: 0,
            used: BTreeSet::new(),
            own_ways: 0,
        };
        for index in 0..NODES {
            let mut labels = BTreeMap::from([("zone".to_owned(), format!("z{}", index % 3))]);
            for (label, each) in [("edge", 3), ("spot", 4), ("canary", 10)] {
                if index % each == 0 {
                    labels.insert(label.to_owned(), String::new());
                }
            }
            let seen = Observed { acknowledged: Some(Revision::builtin()), ..Observed::default() };
            world.fleet.push(joined(&format!("n{index}"), labels, Agent::connected(seen)));
        }
        world.create("base");
        world
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn create(&mut self, name: &str) {
        let (uid, hash) = (self.next(), self.next());
        self.profiles.push(Profile {
            name: name.into(),
            uid: format!("uid-{uid}").into(),
            priority: NAMES.iter().position(|known| *known == name).map_or(0, |at| at as i32),
            created: self.now,
            selector: if name == "base" { Selector::default() } else { labelled(name) },
            hash: format!("hash-{hash}"),
            deleting: false,
        });
    }

    fn edit(&mut self, name: &str, bad: bool) {
        let hash = format!("hash-{}", self.next());
        if bad {
            self.bad.insert(hash.clone());
        }
        if let Some(profile) = self.profiles.iter_mut().find(|known| &*known.name == name && !known.deleting)
        {
            profile.hash = hash;
        }
    }

    fn breaks(&self, revision: &Revision) -> bool {
        self.items.iter().any(|item| item.past.target == *revision && self.bad.contains(&item.past.hash))
    }

    /// Actions of people, nodes and clocks between two rounds.
    fn happen(&mut self) {
        self.now.0 += self.random.random_range(0..6_000);
        let one = NAMES[self.random.random_range(0..3)];
        match self.random.random_range(0..70) {
            0 => self.now.0 -= 3_600_000,
            1 => self.now.0 += 3_600_000,
            2..=4 => {
                let bad = self.random.random();
                self.edit(one, bad);
            }
            5 if one != "base" => {
                let leaving = self.profiles.iter_mut().filter(|profile| &*profile.name == one);
                leaving.for_each(|profile| profile.deleting = true);
            }
            6..=8 if !self.profiles.iter().any(|profile| &*profile.name == one) => self.create(one),
            9..=12 => self.act_on_a_rollout(),
            13 => self.change_precedence(),
            14 if one != "base" => self.change_selector(one),
            15..=26 => self.relabel(),
            27..=34 => {
                let at = self.random.random_range(0..NODES);
                let gone = [Agent::Absent, Agent::Disconnected, Agent::Unknown];
                self.fleet[at].agent = gone[self.random.random_range(0..3)].clone();
            }
            35 => {
                // Leaves and joins at once, under its name.
                let (at, uid) = (self.random.random_range(0..NODES), self.next());
                self.fleet[at].uid = format!("uid-{uid}").into();
                (self.fleet[at].assigned, self.fleet[at].still) = (None, None);
                self.fleet[at].agent = Agent::Absent;
                self.rows[at] = Row::default();
            }
            36 => self.restart(),
            _ => {}
        }
        self.return_of(5);
    }

    /// Aborts, also what is rolling back; approves too early, pauses, resumes.
    fn act_on_a_rollout(&mut self) {
        let mut under_way: Vec<_> =
            self.items.iter_mut().filter(|item| !item.past.state.is_final()).collect();
        let Some(at) = (0..under_way.len()).collect::<Vec<_>>().choose(&mut self.random).copied() else {
            return;
        };
        let rollout = &mut under_way[at].rollout;
        match self.random.random_range(0..6) {
            0 => rollout.abort = true,
            1 | 2 => rollout.approved_steps = self.random.random_range(rollout.approved_steps..=3),
            3 => rollout.paused = true,
            _ => rollout.paused = false,
        }
    }

    fn change_precedence(&mut self) {
        let priorities: Vec<i32> = self.profiles.iter().rev().map(|profile| profile.priority).collect();
        for (profile, priority) in self.profiles.iter_mut().zip(priorities) {
            profile.priority = priority;
        }
    }

    /// A new selector is a new revision.
    fn change_selector(&mut self, name: &str) {
        let label = ["edge", "spot", "canary"][self.random.random_range(0..3)];
        let profile = self.profiles.iter_mut().find(|known| &*known.name == name && !known.deleting);
        if let Some(profile) = profile {
            profile.selector = labelled(label);
            self.edit(name, false);
        }
    }

    fn relabel(&mut self) {
        let at = self.random.random_range(0..NODES);
        let label = ["edge", "spot", "canary"][self.random.random_range(0..3)];
        let labels = Arc::make_mut(&mut self.fleet[at].labels);
        if labels.remove(label).is_none() {
            labels.insert(label.to_owned(), String::new());
        }
    }

    /// A new controller knows what is stored, and of the agents nothing for a moment.
    fn restart(&mut self) {
        for at in 0..NODES {
            self.forget_wish(at);
            self.fleet[at].agent = Agent::Unknown;
        }
        self.round(true);
        self.return_of(NODES);
    }

    fn forget_wish(&mut self, at: usize) {
        let row = &mut self.rows[at];
        row.had.clone_from(&row.had_stored);
        self.fleet[at].assigned.clone_from(&row.stored);
        self.fleet[at].still = None;
    }

    /// Some agents come back, and those that are there do what their rows say, sooner or later.
    fn return_of(&mut self, agents: usize) {
        let since = self.now;
        let mut away = self.fleet.iter_mut().filter(|node| !matches!(node.agent, Agent::Connected(_)));
        for node in away.by_ref().take(agents) {
            node.agent = connected(since);
        }
        for at in 0..NODES {
            let stored = self.rows[at].stored.as_ref();
            let wanted = stored.map_or_else(Revision::builtin, |known| known.revision.clone());
            let broken = self.breaks(&wanted);
            let late = self.random.random_ratio(1, 4);
            let Agent::Connected(seen) = &mut self.fleet[at].agent else { continue };
            if !late && seen.acknowledged.as_ref() != Some(&wanted) {
                take(seen, wanted, broken);
            }
        }
    }

    fn pasts(&self) -> Vec<Past> {
        self.items.iter().map(|item| item.past.clone()).collect()
    }

    fn create_revisions(&mut self) {
        for profile in self.profiles.clone() {
            let pasts = self.pasts();
            let named = self.fleet.iter().filter_map(|node| node.assigned.as_ref());
            let named = named.filter(|known| known.revision.profile == profile.name);
            let highest = named.map(|known| known.revision.number).max().unwrap_or(0);
            let revision =
                next_revision(&profile, &pasts, highest).map(|number| (number, profile.hash.clone(), None));
            let handover = || {
                let next = handover::next(&profile, &self.profiles, &pasts, &self.fleet, highest)?;
                Some((next.number, next.hash, Some(next.to)))
            };
            let Some((number, hash, handover)) = revision.or_else(handover) else { continue };
            let target = Revision { profile: profile.name.clone(), number };
            assert!(self.used.insert(target.clone()), "{target} was used before");
            let fallback = fallback(&profile, &pasts, &self.fleet);
            assert!(!self.breaks(&fallback), "{target} would return to {fallback}, which breaks nodes");
            let past = Past {
                owner: profile.uid.clone(),
                target: target.clone(),
                hash,
                fallback: fallback.clone(),
                handover: handover.clone(),
                state: State::Pending,
            };
            let mut strategy = strategy(&mut self.random);
            if handover.is_some() {
                strategy.steps.iter_mut().for_each(|step| (step.selector, step.manual) = (None, false));
            }
            let rollout = Rollout { handover, ..fixtures::rollout(target, fallback, strategy) };
            self.items.push(Item { past, rollout });
        }
    }

    /// One round of the controller, which may die in it.
    fn round(&mut self, dies: bool) {
        let pasts = self.pasts();
        for node in &mut self.fleet {
            let won = winner(&self.profiles, &node.labels).0.map(|profile| profile.name.clone());
            let keeper = handover::keeper(node.assigned.as_ref(), won.as_deref(), &self.profiles, &pasts);
            node.profile = keeper.or(won);
            if let Some(assigned) = &mut node.assigned {
                let previous = assigned.previous.take();
                assigned.previous =
                    previous.and_then(|known| returns_to(&assigned.revision, known, &self.profiles, &pasts));
            }
        }
        self.create_revisions();
        let mut moves: BTreeMap<Arc<str>, Revision> = BTreeMap::new();
        for at in 0..self.items.len() {
            let pasts = self.pasts();
            let past = &pasts[at];
            let item = &mut self.items[at];
            item.rollout.stable = stable(&past.target.profile, &pasts);
            item.rollout.superseded = superseded(past, &pasts, &self.profiles);
            let decision = decide(&item.rollout, &self.fleet, self.now);
            self.check(at, &decision);
            if dies && self.random.random_ratio(1, 6) {
                continue;
            }
            let item = &mut self.items[at];
            item.past.state = decision.progress.state;
            item.rollout.progress = decision.progress;
            moves.extend(decision.moves);
        }
        self.settle(&mut moves);
        self.want(&moves);
        self.write(dies);
        self.let_go();
    }

    fn check(&mut self, at: usize, decision: &Decision) {
        let item = &self.items[at];
        let target = &item.rollout.target;
        let rows = || self.fleet.iter().zip(&self.rows);
        for (node, row) in rows() {
            let Some(revision) = decision.moves.get(&node.name) else { continue };
            if revision == target {
                let mine = node.profile.as_ref() == Some(&target.profile);
                assert!(mine && !item.rollout.superseded, "{} is not of {revision}", node.name);
                continue;
            }
            let there = |(known, owner): &&(Revision, Arc<str>)| {
                let kept = |profile: &Profile| profile.uid == *owner && !profile.deleting;
                known.is_builtin() || self.profiles.iter().any(kept)
            };
            let own = row.had.as_ref().filter(there).map(|(known, _)| known);
            assert_eq!(revision, own.unwrap_or(&item.rollout.stable), "{} of {target}", node.name);
            assert!(!self.breaks(revision), "{} would return to {revision}, which breaks nodes", node.name);
            self.own_ways += usize::from(*revision != item.rollout.stable);
        }
        let (before, after) = (item.past.state, decision.progress.state);
        if after == State::Complete {
            assert!(!self.bad.contains(&item.past.hash), "{target} breaks nodes");
        }
        if before == State::RollingBack && after.is_final() && !item.rollout.superseded {
            let named = |row: &Row| row.stored.as_ref().is_some_and(|known| known.revision == *target);
            assert!(!self.rows.iter().any(named), "a row still names {target}");
        }
    }

    fn settle(&self, moves: &mut BTreeMap<Arc<str>, Revision>) {
        let pasts = self.pasts();
        let deleting =
            |name: &Arc<str>| self.profiles.iter().any(|profile| profile.name == *name && profile.deleting);
        for node in self.fleet.iter().filter(|node| !node.profile.as_ref().is_some_and(deleting)) {
            let settings = node.profile.as_ref().map(|name| {
                let active = pasts.iter().any(|past| past.target.profile == *name && !past.state.is_final());
                (name.clone(), stable(name, &pasts), active)
            });
            let winner = settings.as_ref().map(|(name, stable, active)| (&**name, stable, *active));
            let settled = settled(node.assigned.as_ref(), winner, !self.profiles.is_empty());
            let handed_over = || handover::handed_over(node, &self.profiles, &pasts, &self.fleet);
            if let Some(revision) = settled.or_else(handed_over) {
                let broken = self.breaks(&revision);
                assert!(!broken, "{} would be given {revision}, which breaks nodes", node.name);
                moves.entry(node.name.clone()).or_insert(revision);
            }
        }
    }

    /// Notes what rows are to say, and what the test expects of a return.
    fn want(&mut self, moves: &BTreeMap<Arc<str>, Revision>) {
        let pasts = self.pasts();
        let complete = |revision: &Revision| {
            pasts.iter().find(|past| past.target == *revision && past.state == State::Complete)
        };
        let with_owner = |revision: Revision| {
            let owner = complete(&revision).map(|past| past.owner.clone()).unwrap_or_default();
            (revision, owner)
        };
        for (node, row) in self.fleet.iter_mut().zip(&mut self.rows) {
            let Some(revision) = moves.get(&node.name) else { continue };
            let previous = origin(node.assigned.as_ref(), revision, &pasts);
            let is_touched = pasts.iter().any(|past| past.target == *revision && !past.state.is_final());
            row.had = match node.assigned.as_ref().map(|known| &known.revision) {
                _ if !is_touched => None,
                None => Some(with_owner(Revision::builtin())),
                Some(known) if known.profile == revision.profile => None,
                Some(known) if known.is_builtin() || complete(known).is_some() => {
                    Some(with_owner(known.clone()))
                }
                Some(known) => {
                    let kept = row.had.take().filter(|_| {
                        node.assigned.as_ref().is_some_and(|assigned| assigned.previous.is_some())
                    });
                    kept.or_else(|| Some(with_owner(stable(&known.profile, &pasts))))
                }
            };
            let stored = row.stored.as_ref().map(|known| known.revision.clone());
            node.still = stored.filter(|stored| stored != revision);
            node.assigned = Some(Assignment { previous, ..assignment(revision.clone(), self.now) });
        }
    }

    /// Rows are written at once, later, or by another writer first.
    fn write(&mut self, late: bool) {
        for at in 0..NODES {
            match if late { self.random.random_range(0..20) } else { 0 } {
                0..=13 => {
                    self.rows[at].stored.clone_from(&self.fleet[at].assigned);
                    let row = &mut self.rows[at];
                    row.had_stored.clone_from(&row.had);
                    self.fleet[at].still = None;
                }
                14 => self.forget_wish(at),
                _ => {}
            }
        }
    }

    /// Deleted profiles go without any other rollout; an aborted handover is retried.
    fn deletions_end(&mut self, seed: u64) {
        for one in ["edge", "spot"] {
            let hash = format!("hash-{}", self.next());
            let mut leaving = self.profiles.iter_mut().filter(|profile| &*profile.name == one);
            leaving.by_ref().for_each(|profile| (profile.deleting, profile.hash) = (true, hash.clone()));
        }
        for _ in 0..300 {
            self.now.0 += 5_000;
            self.return_of(NODES);
            for item in &mut self.items {
                (item.rollout.approved_steps, item.rollout.paused) = (3, false);
            }
            self.round(false);
        }
        let left: Vec<_> = self.profiles.iter().map(|profile| &*profile.name).collect();
        assert_eq!(left, ["base"], "seed {seed}: a deleted profile stays");
    }

    /// Profiles that are deleted and that no node needs go.
    fn let_go(&mut self) {
        let (fleet, items) = (&self.fleet, &self.items);
        self.profiles.retain(|profile| {
            let of = |revision: &Revision| revision.profile == profile.name;
            let held = fleet.iter().any(|node| {
                let assigned = node.assigned.as_ref().map(|known| &known.revision);
                assigned.into_iter().chain(&node.still).any(of)
            });
            let active = items.iter().any(|item| of(&item.past.target) && !item.past.state.is_final());
            !profile.deleting || held || active
        });
    }
}

/// Returns where its rollouts came to, by profile, how many nodes went ways of their own, and how many handovers were
/// complete.
fn run(seed: u64) -> (BTreeSet<(Arc<str>, &'static str)>, usize, usize) {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.happen();
        world.round(true);
    }
    world.deletions_end(seed);
    // Good changes of all remaining profiles, all agents connected, no further events.
    for node in &mut world.fleet {
        Arc::make_mut(&mut node.labels).insert("canary".to_owned(), String::new());
    }
    NAMES.iter().for_each(|name| world.edit(name, false));
    for _ in 0..600 {
        world.now.0 += 5_000;
        world.return_of(NODES);
        for item in &mut world.items {
            (item.rollout.approved_steps, item.rollout.paused) = (3, false);
        }
        world.round(false);
    }
    for node in &world.fleet {
        let winner =
            node.profile.clone().unwrap_or_else(|| panic!("seed {seed}: {} has no profile", node.name));
        let latest = world.items.iter().rev().find(|item| item.past.target.profile == winner).unwrap();
        let assigned = node.assigned.as_ref().map(|known| &known.revision);
        assert_eq!(
            (latest.past.state, assigned),
            (State::Complete, Some(&latest.past.target)),
            "seed {seed}: {}, {:?}",
            node.name,
            latest.rollout.progress
        );
    }
    assert!(!world.profiles.iter().any(|profile| profile.deleting), "seed {seed}: a deleted profile stays");
    let complete = |item: &&Item| item.past.handover.is_some() && item.past.state == State::Complete;
    let handovers = world.items.iter().filter(complete).count();
    let ends = world.items.iter().map(|item| (item.past.target.profile.clone(), item.past.state.as_str()));
    (ends.collect(), world.own_ways, handovers)
}

#[test]
fn overlapping_profiles_change_during_rollouts() {
    let runs: Vec<_> = (1..=4).map(run).collect();
    let handovers: Vec<_> = runs.iter().map(|run| run.2).collect();
    let own_ways: Vec<_> = runs.iter().map(|run| run.1).collect();
    let ends: Vec<_> = runs.into_iter().map(|run| run.0).collect();
    let ends: BTreeSet<_> = ends.into_iter().flatten().collect();
    assert!(handovers.iter().sum::<usize>() >= 3, "{handovers:?} complete handovers");
    for profile in NAMES {
        for end in [State::Complete, State::Failed, State::Aborted, State::Superseded] {
            assert!(
                ends.contains(&(profile.into(), end.as_str())),
                "no rollout of {profile} came to {end:?}"
            );
        }
    }
    assert!(own_ways.iter().sum::<usize>() > 20, "{own_ways:?} nodes returned to what they alone had");
}
