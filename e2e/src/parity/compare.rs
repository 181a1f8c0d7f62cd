//! Sends probes through both worlds and compares the answers.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;

use super::case::Case;
use super::probes::{ORIGINS, Origin, Probe};
use super::world::{OWN, Side, World};
use crate::probe::ProbeResult;
use crate::probe::volley::{Shot, volley};

/// Timeout of the first attempt. Refusals are immediate and answers take milliseconds; if a busy machine is slower,
/// the worlds differ and a second attempt with [`TIMEOUT`] follows.
const FIRST_TIMEOUT: Duration = Duration::from_millis(350);
/// Timeout of a second attempt.
pub(super) const TIMEOUT: Duration = Duration::from_millis(2500);
/// Probes for each backend of a set plus one: with `k` backends, the last one is missed with a probability below 2 %,
/// and then a second attempt finds it.
const TRIES_PER_BACKEND: usize = 4;
/// Probes of a second attempt.
const MORE: usize = 120;
/// The first probes of a second attempt, which show whether any backend answers.
const FIRST: usize = 16;
/// Maximum number of shots in one volley.
const VOLLEY: usize = 256;

/// All answers to one kind of packet, formatted so that both worlds' answers compare equal.
pub type Answers = BTreeSet<String>;

/// The answers of both worlds to one probe.
#[derive(Debug, Clone)]
pub struct Difference {
    /// Description of the probe.
    pub what: String,
    pub kube_proxy: Answers,
    pub switchtower: Answers,
}

#[derive(Debug, Clone)]
pub struct Disagreement {
    pub case: Case,
    /// Number of steps of the case that were applied.
    pub after: usize,
    pub differences: Vec<Difference>,
    /// Rulesets of node n1 at that moment: kube-proxy's, Switchtower's.
    pub rulesets: [String; 2],
}

/// A probe with the answers that both proxies agree on.
#[derive(Debug, Clone)]
pub struct Agreed {
    pub probe: Probe,
    pub answers: Answers,
}

/// Results of the probes of one state.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub(super) agreed: Vec<Agreed>,
    pub(super) differences: Vec<Difference>,
    /// Results of kube-proxy that differed only once; Switchtower's were the same each time.
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
        if !agree(probe, &switchtower, &kube_proxy) || ambiguous(&switchtower) || ambiguous(&kube_proxy) {
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

/// Both answers and silence: on a busy machine an answer is late, in both worlds at the same time.
fn ambiguous(answers: &Answers) -> bool {
    answers.len() > 1 && answers.contains(&ProbeResult::Silence.to_string())
}

/// With affinity, only the kind of answer can be compared: the choice of the pod is random, and so is whether the pod
/// is the client itself.
fn agree(probe: &Probe, ours: &Answers, theirs: &Answers) -> bool {
    if !probe.sticky {
        return ours == theirs;
    }
    let kinds = |answers: &Answers| -> Answers {
        let kind = |text: &String| match text.split_once(" sees ") {
            // The host may masquerade with its own address, and a pod may have reached itself.
            Some(_) if matches!(probe.origin, Origin::EndpointPod | Origin::Host) => "answered".to_owned(),
            Some((_, source)) => format!("answered, sees {}", if source == OWN { OWN } else { "another" }),
            None => text.clone(),
        };
        answers.iter().map(kind).collect()
    };
    ours.len() == theirs.len() && kinds(ours) == kinds(theirs)
}

/// Sends all probes, those of each origin on a thread in its namespace.
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

/// Sends the probes of one origin: each once, then repeats those with answers until the set of backends is known.
fn from(world: &World, side: Side, origin: Origin, probes: &[Probe]) -> Result<Vec<(usize, Answers)>> {
    let mine: Vec<usize> = (0..probes.len()).filter(|index| probes[*index].origin == origin).collect();
    let mut seen: Vec<(usize, Answers)> = mine.iter().map(|index| (*index, Answers::new())).collect();
    let mut tries = vec![0; mine.len()];
    let mut answered = vec![false; mine.len()];
    let mut due: Vec<usize> = (0..mine.len()).collect();
    while !due.is_empty() {
        for chunk in due.chunks(VOLLEY) {
            let shots: Vec<_> = chunk.iter().map(|at| world.shot(side, &probes[mine[*at]])).collect();
            for (at, outcome) in chunk.iter().zip(volley(&shots, FIRST_TIMEOUT)?) {
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
    // kube-proxy may send simultaneous first packets of one client to different backends, and remembers all of them.
    // Affinity applies to consecutive ones.
    for at in (0..mine.len()).filter(|at| answered[*at] && probes[mine[*at]].sticky) {
        seen[at].1 = one_by_one(world, side, &probes[mine[at]], TRIES_PER_BACKEND, FIRST_TIMEOUT)?;
    }
    Ok(seen)
}

fn one_by_one(world: &World, side: Side, probe: &Probe, tries: usize, timeout: Duration) -> Result<Answers> {
    let mut seen = Answers::new();
    for _ in 0..tries {
        let outcomes = volley(&[world.shot(side, probe)], timeout)?;
        seen.extend(outcomes.iter().map(|outcome| world.describe(side, probe, outcome)));
    }
    Ok(seen)
}

/// A second attempt at one probe, with the longer timeout.
fn again(world: &World, side: Side, probe: &Probe) -> Result<Answers> {
    world.namespace(side, probe.origin).run(|| {
        // One of several backends may be silent, for example a pod that reaches itself and has no node name in its
        // slice.
        let first = if probe.sticky { 1 } else { FIRST };
        let shots: Vec<Shot> = (0..first).map(|_| world.shot(side, probe)).collect();
        let first = volley(&shots, TIMEOUT)?;
        let mut seen: Answers = first.iter().map(|outcome| world.describe(side, probe, outcome)).collect();
        if !first.iter().any(|outcome| matches!(outcome, ProbeResult::Reply { .. })) {
            // Without an answer there are no backends to find. The kernel may lose an ICMP error (its one socket for
            // them is busy); no rule alternates between refusing and dropping.
            seen.extend(one_by_one(world, side, probe, 2, TIMEOUT)?);
            if seen.contains(&ProbeResult::Refused.to_string()) {
                seen.remove(&ProbeResult::Silence.to_string());
            }
        } else if probe.sticky {
            seen.extend(one_by_one(world, side, probe, MORE, TIMEOUT)?);
        } else {
            let shots: Vec<Shot> = (0..MORE).map(|_| world.shot(side, probe)).collect();
            let outcomes = volley(&shots, TIMEOUT)?;
            seen.extend(outcomes.iter().map(|outcome| world.describe(side, probe, outcome)));
        }
        Ok(seen)
    })?
}
