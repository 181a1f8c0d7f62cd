//! Sends probes through both worlds and compares what came back.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;

use super::case::Case;
use super::probes::{ORIGINS, Origin, Probe};
use super::world::{OWN, Side, World};
use crate::probe::Outcome;
use crate::probe::volley::{Shot, volley};

/// How long the first round waits. A refusal comes at once and an answer within milliseconds; where a busy
/// machine is slower, the worlds differ and are looked at again with [`PATIENCE`].
const HASTE: Duration = Duration::from_millis(350);
/// How long a second look waits.
pub(super) const PATIENCE: Duration = Duration::from_millis(2500);
/// Probes for each backend of a set, and one more: with `k` backends the last one is missed with a probability
/// below 2 %, and then the second look finds it.
const TRIES_PER_BACKEND: usize = 4;
/// Probes of a second look.
const MORE: usize = 120;
/// Of these the first, which tell whether anybody answers.
const FIRST: usize = 16;
/// Shots of one volley.
const VOLLEY: usize = 256;

/// What came back to one kind of packet: all answers, in words that are the same in both worlds.
pub type Answers = BTreeSet<String>;

/// Both worlds' answers to one probe.
#[derive(Debug, Clone)]
pub struct Difference {
    /// What was sent, for people.
    pub what: String,
    /// What kube-proxy made of it.
    pub kube_proxy: Answers,
    /// What Switchtower made of it.
    pub switchtower: Answers,
}

/// A case in which the proxies disagree.
#[derive(Debug, Clone)]
pub struct Disagreement {
    /// The case.
    pub case: Case,
    /// After how many of its steps.
    pub after: usize,
    /// In what.
    pub differences: Vec<Difference>,
    /// Both rulesets of node n1 at that moment: kube-proxy's, Switchtower's.
    pub rulesets: [String; 2],
}

/// A probe and what Switchtower made of it; kube-proxy agrees.
#[derive(Debug, Clone)]
pub struct Agreed {
    /// What was sent.
    pub probe: Probe,
    /// What came back.
    pub answers: Answers,
}

/// What the probes of one state showed.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub(super) agreed: Vec<Agreed>,
    pub(super) differences: Vec<Difference>,
    /// What kube-proxy did otherwise once, and not again; Switchtower did the same each time.
    pub(super) wavered: Vec<Difference>,
}

pub(super) fn compare(world: &World, probes: &[Probe]) -> Result<Compared> {
    let (ours, theirs) = std::thread::scope(|scope| {
        let ours = scope.spawn(|| all(world, Side::Switchtower, probes));
        let theirs = scope.spawn(|| all(world, Side::KubeProxy, probes));
        (ours.join(), theirs.join())
    });
    let panicked = |_| anyhow::anyhow!("a probing thread panicked");
    let (ours, theirs) = (ours.map_err(panicked)??, theirs.map_err(panicked)??);
    let mut compared = Compared::default();
    for ((probe, mut switchtower), mut kube_proxy) in probes.iter().zip(ours).zip(theirs) {
        if !agree(probe, &switchtower, &kube_proxy) || doubtful(&switchtower) || doubtful(&kube_proxy) {
            // Chance, a busy machine, or a real difference?
            switchtower = again(world, Side::Switchtower, probe)?;
            kube_proxy = again(world, Side::KubeProxy, probe)?;
        }
        if !agree(probe, &switchtower, &kube_proxy) {
            let seen = Difference { what: probe.to_string(), kube_proxy, switchtower: switchtower.clone() };
            let (ours, theirs) =
                (again(world, Side::Switchtower, probe)?, again(world, Side::KubeProxy, probe)?);
            if !agree(probe, &ours, &switchtower) || !agree(probe, &ours, &theirs) {
                compared.differences.push(seen);
                continue;
            }
            compared.wavered.push(seen);
        }
        compared.agreed.push(Agreed { probe: probe.clone(), answers: switchtower });
    }
    Ok(compared)
}

/// Answered, and not: on a busy machine an answer comes late, in both worlds at the same time.
fn doubtful(answers: &Answers) -> bool {
    answers.len() > 1 && answers.contains(&Outcome::Silence.to_string())
}

/// With affinity only the kind of answer can be compared: which pod it is, is up to chance, and with the pod
/// whether it is the client itself.
fn agree(probe: &Probe, ours: &Answers, theirs: &Answers) -> bool {
    if !probe.sticky {
        return ours == theirs;
    }
    let kinds = |answers: &Answers| -> Answers {
        let kind = |text: &String| match text.split_once(" sees ") {
            // The node's own address may be what it masquerades with, and a pod may have reached itself.
            Some(_) if matches!(probe.origin, Origin::EndpointPod | Origin::Host) => "answered".to_owned(),
            Some((_, source)) => format!("answered, sees {}", if source == OWN { OWN } else { "another" }),
            None => text.clone(),
        };
        answers.iter().map(kind).collect()
    };
    ours.len() == theirs.len() && kinds(ours) == kinds(theirs)
}

/// All probes, those of each origin on a thread in its namespace.
fn all(world: &World, side: Side, probes: &[Probe]) -> Result<Vec<Answers>> {
    let mut answers = vec![Answers::new(); probes.len()];
    std::thread::scope(|scope| {
        let workers: Vec<_> = ORIGINS
            .into_iter()
            .map(|origin| {
                scope.spawn(move || world.namespace(side, origin).run(|| from(world, side, origin, probes)))
            })
            .collect();
        for worker in workers {
            let found = worker.join().map_err(|_| anyhow::anyhow!("a probing thread panicked"))???;
            for (index, seen) in found {
                answers[index] = seen;
            }
        }
        Ok(answers)
    })
}

/// The probes of one origin: each once, then those that somebody answered until the set of backends is known.
fn from(world: &World, side: Side, origin: Origin, probes: &[Probe]) -> Result<Vec<(usize, Answers)>> {
    let mine: Vec<usize> = (0..probes.len()).filter(|index| probes[*index].origin == origin).collect();
    let mut seen: Vec<(usize, Answers)> = mine.iter().map(|index| (*index, Answers::new())).collect();
    let mut tries = vec![0; mine.len()];
    let mut answered = vec![false; mine.len()];
    let mut due: Vec<usize> = (0..mine.len()).collect();
    while !due.is_empty() {
        for chunk in due.chunks(VOLLEY) {
            let shots: Vec<_> = chunk.iter().map(|at| world.shot(side, &probes[mine[*at]])).collect();
            for (at, outcome) in chunk.iter().zip(volley(&shots, HASTE)?) {
                tries[*at] += 1;
                answered[*at] |= outcome.backend().is_some();
                seen[*at].1.insert(world.describe(side, &probes[mine[*at]], &outcome));
            }
        }
        let missing = |at: usize| {
            let wanted = TRIES_PER_BACKEND * (seen[at].1.len() + 1);
            if answered[at] && !probes[mine[at]].sticky { wanted.saturating_sub(tries[at]) } else { 0 }
        };
        due = (0..mine.len()).flat_map(|at| std::iter::repeat_n(at, missing(at))).collect();
    }
    // First packets of one client at the same time may meet different backends with kube-proxy, which remembers
    // all of them. Affinity is for those that follow each other.
    for at in (0..mine.len()).filter(|at| answered[*at] && probes[mine[*at]].sticky) {
        seen[at].1 = one_by_one(world, side, &probes[mine[at]], TRIES_PER_BACKEND, HASTE)?;
    }
    Ok(seen)
}

fn one_by_one(world: &World, side: Side, probe: &Probe, tries: usize, patience: Duration) -> Result<Answers> {
    let mut seen = Answers::new();
    for _ in 0..tries {
        let outcomes = volley(&[world.shot(side, probe)], patience)?;
        seen.extend(outcomes.iter().map(|outcome| world.describe(side, probe, outcome)));
    }
    Ok(seen)
}

/// A second look at one probe, with patience.
fn again(world: &World, side: Side, probe: &Probe) -> Result<Answers> {
    world.namespace(side, probe.origin).run(|| {
        // One of several backends may be silent, as a pod that meets itself and that no slice names the node of.
        let first = if probe.sticky { 1 } else { FIRST };
        let shots: Vec<Shot> = (0..first).map(|_| world.shot(side, probe)).collect();
        let first = volley(&shots, PATIENCE)?;
        let mut seen: Answers = first.iter().map(|outcome| world.describe(side, probe, outcome)).collect();
        if !first.iter().any(|outcome| matches!(outcome, Outcome::Reply { .. })) {
            // Without an answer there is nothing to spread. The kernel may lose an ICMP error (its one socket for
            // them is taken); no rule refuses now and drops then.
            seen.extend(one_by_one(world, side, probe, 2, PATIENCE)?);
            if seen.contains(&Outcome::Refused.to_string()) {
                seen.remove(&Outcome::Silence.to_string());
            }
        } else if probe.sticky {
            seen.extend(one_by_one(world, side, probe, MORE, PATIENCE)?);
        } else {
            let shots: Vec<Shot> = (0..MORE).map(|_| world.shot(side, probe)).collect();
            let outcomes = volley(&shots, PATIENCE)?;
            seen.extend(outcomes.iter().map(|outcome| world.describe(side, probe, outcome)));
        }
        Ok(seen)
    })?
}
