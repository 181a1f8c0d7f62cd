//! Two profiles that overlap and are edited, deleted and created again on the way, over nodes that come, go, fail and
//! change their labels, with a clock that jumps and a controller that dies. Seeded.
//!
//! What must hold: a revision that breaks nodes never gets further than a rollout's own steps, no number is used
//! twice, and in the end everybody has the settings of their profile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::profile::{Past, Profile, fallback, next_revision, settled, stable, superseded, winner};
use super::*;

const NODES: usize = 120;
const STEPS: usize = 600;

struct Item {
    past: Past,
    rollout: Rollout,
}

struct World {
    random: StdRng,
    now: Time,
    fleet: Vec<FleetNode>,
    profiles: Vec<Profile>,
    items: Vec<Item>,
    /// Hashes of settings that break the nodes that take them.
    bad: BTreeSet<String>,
    /// Names, UIDs and hashes that were given out.
    counter: u64,
    used: BTreeSet<Revision>,
}

fn strategy(random: &mut StdRng) -> Strategy {
    let canary = Selector { requirements: vec![Requirement::Exists("canary".to_owned())] };
    let step = |selector, nodes, soak| Step {
        name: String::new(),
        selector,
        nodes,
        spread_by: vec!["zone".to_owned()],
        soak: Duration::from_secs(soak),
        manual: false,
    };
    Strategy {
        steps: vec![
            step(random.random_bool(0.3).then_some(canary), Quantity::Number(2), 10),
            step(None, Quantity::Percent(40), 3),
            step(None, Quantity::Percent(100), 0),
        ],
        max_unavailable: Quantity::Percent(random.random_range(5..40)),
        apply_deadline: Duration::from_secs(60),
        progress_deadline: Duration::from_secs(600),
        maximum_reconnects: 3,
        freeze_percent: 30,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: Time(1_000_000_000),
            fleet: Vec::new(),
            profiles: Vec::new(),
            items: Vec::new(),
            bad: BTreeSet::new(),
            counter: 0,
            used: BTreeSet::new(),
        };
        for index in 0..NODES {
            let mut labels = BTreeMap::from([("zone".to_owned(), format!("z{}", index % 3))]);
            for (label, each) in [("edge", 3), ("canary", 10)] {
                if index % each == 0 {
                    labels.insert(label.to_owned(), String::new());
                }
            }
            let seen = Observed { acknowledged: Some(Revision::builtin()), ..Observed::default() };
            world.fleet.push(FleetNode {
                name: format!("n{index}").into(),
                uid: format!("uid-{index}").into(),
                labels: Arc::new(labels),
                profile: None,
                assigned: None,
                agent: Agent::connected(seen),
            });
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
        let edge = vec![Requirement::Exists("edge".to_owned())];
        self.profiles.push(Profile {
            name: name.into(),
            uid: format!("uid-{uid}").into(),
            priority: i32::from(name == "edge"),
            created: self.now,
            selector: Selector { requirements: if name == "edge" { edge } else { Vec::new() } },
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

    /// What people and nodes do between two rounds.
    fn happen(&mut self) {
        self.now.0 += self.random.random_range(0..6_000);
        match self.random.random_range(0..60) {
            0 => self.now.0 -= 3_600_000,
            1 => self.now.0 += 3_600_000,
            2..=4 => {
                let (name, bad) = (["base", "edge"][self.random.random_range(0..2)], self.random.random());
                self.edit(name, bad);
            }
            5 => {
                let edge = self.profiles.iter_mut().filter(|profile| &*profile.name == "edge");
                edge.for_each(|profile| profile.deleting = true);
            }
            6 | 7 if !self.profiles.iter().any(|profile| &*profile.name == "edge") => self.create("edge"),
            8 => {
                let skip = self.random.random_range(0..2);
                let mut under_way = self.items.iter_mut().filter(|item| !item.past.state.is_final());
                if let Some(item) = under_way.nth(skip) {
                    item.rollout.abort = true;
                }
            }
            9..=20 => {
                let at = self.random.random_range(0..NODES);
                let label = ["edge", "canary"][self.random.random_range(0..2)];
                let mut labels = (*self.fleet[at].labels).clone();
                if labels.remove(label).is_none() {
                    labels.insert(label.to_owned(), String::new());
                }
                self.fleet[at].labels = Arc::new(labels);
            }
            21..=28 => {
                let at = self.random.random_range(0..NODES);
                let gone = [Agent::Absent, Agent::Disconnected, Agent::Unknown];
                self.fleet[at].agent = gone[self.random.random_range(0..3)].clone();
            }
            29 => {
                // Leaves and joins at once, under its name.
                let (at, uid) = (self.random.random_range(0..NODES), self.next());
                self.fleet[at].uid = format!("uid-{uid}").into();
                self.fleet[at].assigned = None;
                self.fleet[at].agent = Agent::Absent;
            }
            _ => {}
        }
        self.return_of(5);
    }

    /// Some agents come back, and those that are there do what they are told, sooner or later.
    fn return_of(&mut self, agents: usize) {
        let since = self.now;
        let mut away = self.fleet.iter_mut().filter(|node| !matches!(node.agent, Agent::Connected(_)));
        for node in away.by_ref().take(agents) {
            node.agent = Agent::connected(Observed { since, ..Observed::default() });
        }
        for at in 0..NODES {
            let assigned = self.fleet[at].assigned.as_ref();
            let wanted = assigned.map_or_else(Revision::builtin, |known| known.revision.clone());
            let broken = self.breaks(&wanted);
            let late = self.random.random_ratio(1, 4);
            let Agent::Connected(seen) = &mut self.fleet[at].agent else { continue };
            if late || seen.acknowledged.as_ref() == Some(&wanted) {
                continue;
            }
            seen.in_force = broken.then(Revision::builtin);
            seen.trial = broken.then(|| Trial {
                revision: wanted.clone(),
                phase: TrialPhase::RolledBack,
                evidence: Some(("probe failed".to_owned(), 111)),
            });
            seen.acknowledged = Some(wanted);
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
            let Some(number) = next_revision(&profile, &pasts, highest) else { continue };
            let target = Revision { profile: profile.name.clone(), number };
            assert!(self.used.insert(target.clone()), "{target} was used before");
            let fallback = fallback(&profile, &pasts, &self.fleet);
            assert!(!self.breaks(&fallback), "{target} would return to {fallback}, which breaks nodes");
            let (hash, owner) = (profile.hash.clone(), profile.uid.clone());
            let past = Past {
                owner,
                target: target.clone(),
                hash,
                fallback: fallback.clone(),
                state: State::Pending,
            };
            let rollout = Rollout {
                uid: format!("{target}").into(),
                target,
                stable: fallback,
                strategy: strategy(&mut self.random),
                paused: false,
                approved_steps: 0,
                abort: false,
                superseded: false,
                progress: Progress::default(),
            };
            self.items.push(Item { past, rollout });
        }
    }

    /// One round of the controller, which may die in it.
    fn round(&mut self, dies: bool) {
        for node in &mut self.fleet {
            node.profile = winner(&self.profiles, &node.labels).0.map(|profile| profile.name.clone());
        }
        self.create_revisions();
        let mut moves: BTreeMap<Arc<str>, Revision> = BTreeMap::new();
        for at in 0..self.items.len() {
            let pasts = self.pasts();
            let past = &pasts[at];
            let profile = self.profiles.iter().find(|profile| profile.name == past.target.profile);
            let item = &mut self.items[at];
            item.rollout.stable = stable(&past.target.profile, &pasts);
            item.rollout.superseded = superseded(past, &pasts, profile);
            let decision = decide(&item.rollout, &self.fleet, self.now);
            for (node, revision) in &decision.moves {
                let touched = *revision == item.rollout.target;
                assert!(touched || *revision == item.rollout.stable, "{node} to {revision}");
                let mine = self
                    .fleet
                    .iter()
                    .any(|known| known.name == *node && known.profile == Some(past.target.profile.clone()));
                assert!(!touched || (mine && !item.rollout.superseded), "{node} is not of {revision}");
            }
            if dies && self.random.random_ratio(1, 6) {
                continue;
            }
            item.past.state = decision.progress.state;
            item.rollout.progress = decision.progress;
            moves.extend(decision.moves);
            let item = &self.items[at];
            let complete = item.past.state == State::Complete;
            assert!(!complete || !self.bad.contains(&item.past.hash), "{} breaks nodes", item.past.target);
        }
        self.settle(&mut moves);
        for node in &mut self.fleet {
            if let Some(revision) = moves.remove(&node.name).filter(|_| !dies || self.random.random_bool(0.7))
            {
                node.assigned = Some(Assignment { revision, at: self.now, trace: String::new() });
            }
        }
        self.let_go();
    }

    fn settle(&self, moves: &mut BTreeMap<Arc<str>, Revision>) {
        let pasts = self.pasts();
        for node in &self.fleet {
            let settings = node.profile.as_ref().map(|name| {
                let active = pasts.iter().any(|past| past.target.profile == *name && !past.state.is_final());
                (name.clone(), stable(name, &pasts), active)
            });
            let winner = settings.as_ref().map(|(name, stable, active)| (&**name, stable, *active));
            if let Some(revision) = settled(node.assigned.as_ref(), winner, !self.profiles.is_empty()) {
                assert!(
                    !self.breaks(&revision),
                    "{} would be given {revision}, which breaks nodes",
                    node.name
                );
                moves.entry(node.name.clone()).or_insert(revision);
            }
        }
    }

    /// Profiles that are deleted and that no node needs go.
    fn let_go(&mut self) {
        let (fleet, items) = (&self.fleet, &self.items);
        self.profiles.retain(|profile| {
            let of = |revision: &Revision| revision.profile == profile.name;
            let held =
                fleet.iter().any(|node| node.assigned.as_ref().is_some_and(|known| of(&known.revision)));
            let active = items.iter().any(|item| of(&item.past.target) && !item.past.state.is_final());
            !profile.deleting || held || active
        });
    }
}

/// Returns where its rollouts came to, by profile.
fn run(seed: u64) -> BTreeSet<(Arc<str>, &'static str)> {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.happen();
        world.round(true);
    }
    // Good changes of all profiles that are left, all agents are there, nobody changes anything any more.
    world.edit("base", false);
    world.edit("edge", false);
    for _ in 0..600 {
        world.now.0 += 5_000;
        world.return_of(NODES);
        world.round(false);
        for node in &mut world.fleet {
            Arc::make_mut(&mut node.labels).insert("canary".to_owned(), String::new());
        }
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
    world.items.iter().map(|item| (item.past.target.profile.clone(), item.past.state.word())).collect()
}

#[test]
fn overlapping_profiles_are_edited_deleted_and_created_again_on_the_way() {
    let ends: BTreeSet<_> = (1..=4).flat_map(run).collect();
    for profile in ["base", "edge"] {
        for end in [State::Complete, State::Failed, State::Aborted, State::Superseded] {
            assert!(ends.contains(&(profile.into(), end.word())), "no rollout of {profile} came to {end:?}");
        }
    }
}
