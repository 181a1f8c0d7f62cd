//! Sends probes through both worlds and compares what came back.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;

use super::case::Case;
use super::plan::Probe;
use super::world::{Side, World};
use crate::probe::{self, Outcome};

/// Refusals of TCP over IPv6 reach the client with its second packet, after a second.
const PATIENCE: Duration = Duration::from_millis(1400);
/// Probes for the set of backends; where the sets differ, more are sent before it counts.
const TRIES: usize = 24;
const MORE: usize = 120;
/// Probes under way at once in each world.
const CONCURRENCY: usize = 64;

/// Both worlds' answers to one probe.
#[derive(Debug, Clone)]
pub struct Difference {
    /// What was sent.
    pub probe: Probe,
    /// What kube-proxy made of it.
    pub kube_proxy: BTreeSet<String>,
    /// What Switchtower made of it.
    pub switchtower: BTreeSet<String>,
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
}

/// The disagreement for people: the differences, and the case to replay.
pub fn report(found: &Disagreement) -> String {
    let mut text = format!("{} disagrees after {} steps:\n", found.case.name, found.after);
    for Difference { probe, kube_proxy, switchtower } in &found.differences {
        let Probe { origin, transport, to, what, .. } = probe;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {what}: {transport:?} from {origin:?} to {to}");
        let _ = writeln!(text, "    kube-proxy:  {}", join(kube_proxy));
        let _ = writeln!(text, "    switchtower: {}", join(switchtower));
    }
    text
}

fn join(outcomes: &BTreeSet<String>) -> String {
    outcomes.iter().cloned().collect::<Vec<_>>().join(" | ")
}

pub(super) fn differences(world: &World, probes: &[Probe]) -> Result<Vec<Difference>> {
    let (ours, theirs) = std::thread::scope(|scope| {
        let ours = scope.spawn(|| all(world, Side::Switchtower, probes, TRIES));
        let theirs = scope.spawn(|| all(world, Side::KubeProxy, probes, TRIES));
        (ours.join(), theirs.join())
    });
    let panicked = |_| anyhow::anyhow!("a probing thread panicked");
    let (ours, theirs) = (ours.map_err(panicked)??, theirs.map_err(panicked)??);
    let mut differences = Vec::new();
    for ((probe, mut switchtower), mut kube_proxy) in probes.iter().zip(ours).zip(theirs) {
        if agree(probe, &switchtower, &kube_proxy) {
            continue;
        }
        // Chance, a first packet that crossed a commit, or a real difference?
        switchtower = send(world, Side::Switchtower, probe, MORE)?;
        kube_proxy = send(world, Side::KubeProxy, probe, MORE)?;
        if !agree(probe, &switchtower, &kube_proxy) {
            differences.push(Difference { probe: probe.clone(), kube_proxy, switchtower });
        }
    }
    Ok(differences)
}

/// With affinity only the kind of answer can be compared: which pod it is, is up to chance, and with the pod the
/// address with which the node masquerades.
fn agree(probe: &Probe, ours: &BTreeSet<String>, theirs: &BTreeSet<String>) -> bool {
    if !probe.sticky {
        return ours == theirs;
    }
    let answered = |outcomes: &BTreeSet<String>| -> BTreeSet<String> {
        let word = |text: &String| if text.contains(" sees ") { "answered".to_owned() } else { text.clone() };
        outcomes.iter().map(word).collect()
    };
    ours.len() == theirs.len() && answered(ours) == answered(theirs)
}

fn all(world: &World, side: Side, probes: &[Probe], tries: usize) -> Result<Vec<BTreeSet<String>>> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(vec![BTreeSet::new(); probes.len()]);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..CONCURRENCY)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(probe) = probes.get(index) else { return Ok(()) };
                        let outcomes = send(world, side, probe, tries)?;
                        if let Ok(mut answers) = answers.lock() {
                            answers[index] = outcomes;
                        }
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| anyhow::anyhow!("a probing thread panicked"))?)
    })?;
    Ok(answers.into_inner().unwrap_or_default())
}

/// Sends a probe once, and often if somebody answers: the set of all that came back.
fn send(world: &World, side: Side, probe: &Probe, tries: usize) -> Result<BTreeSet<String>> {
    let from = world.namespace(side, probe.origin);
    from.run(|| -> Result<BTreeSet<String>> {
        let mut seen = BTreeSet::new();
        for attempt in 0..tries {
            let outcome = probe::once(probe.transport, probe.to, PATIENCE)?;
            let answered = matches!(outcome, Outcome::Reply { .. });
            seen.insert(world.describe(side, probe, &outcome));
            // Without an answer there is nothing to spread; a second look only where it matters.
            if !answered && (tries == TRIES || attempt >= 1) {
                break;
            }
        }
        Ok(seen)
    })?
}
