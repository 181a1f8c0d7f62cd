//! Results of rounds of probes, and their comparison. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use switchtower_proto::address_bytes;
use switchtower_proto::v1::ProbeResult;

/// Result of one probe at one address in one round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// The probe's name.
    pub probe: String,
    /// Destination; `None` if there is none.
    pub address: Option<SocketAddr>,
    /// Outcome.
    pub outcome: ProbeOutcome,
}

/// Outcome of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// Connected, and answered if the probe requests an answer.
    Passed {
        /// Sources that each backend saw; empty unless the probe compares sources.
        seen: Seen,
    },
    /// No connection, or no valid answer.
    Failed {
        /// The error number; 0 if there is none.
        errno: i32,
        /// Description of the failure.
        detail: String,
    },
    /// No destination, whatever the settings; neither a success nor a failure.
    Absent {
        /// Reason.
        detail: String,
    },
}

/// Sources by the name of the backend that saw them.
pub type Seen = BTreeMap<String, BTreeSet<IpAddr>>;

impl Measured {
    fn seen(&self) -> Option<&Seen> {
        match &self.outcome {
            ProbeOutcome::Passed { seen } => Some(seen),
            ProbeOutcome::Failed { .. } | ProbeOutcome::Absent { .. } => None,
        }
    }

    fn same_place(&self, other: &Measured) -> bool {
        (&self.probe, self.address) == (&other.probe, other.address)
    }
}

/// Returns an old and a new source of a backend that saw no common source before and after.
fn changed_source(before: &Seen, after: &Seen) -> Option<(IpAddr, IpAddr)> {
    before.iter().find_map(|(backend, old)| {
        let new = after.get(backend)?;
        if !old.is_disjoint(new) {
            return None;
        }
        Some((*old.first()?, *new.first()?))
    })
}

/// Returns whether a probe that passed before fails after, or its source changed.
fn failed(before: &Measured, after: &Measured) -> bool {
    match (before.seen(), &after.outcome) {
        (Some(_), ProbeOutcome::Failed { .. }) => true,
        (Some(old), ProbeOutcome::Passed { seen }) => changed_source(old, seen).is_some(),
        _ => false,
    }
}

/// Returns whether any result counts against the settings under trial.
pub(super) fn any_failed(before: &[Measured], after: &[Measured]) -> bool {
    after.iter().any(|after| before.iter().any(|before| before.same_place(after) && failed(before, after)))
}

/// Returns the results for the controller: one per probe and address of the baseline, then later ones.
pub(super) fn results(
    before: &[Measured],
    after: &[Measured],
    again: Option<&[Measured]>,
) -> Vec<ProbeResult> {
    let find = |all: &[Measured], place: &Measured| all.iter().find(|one| one.same_place(place)).cloned();
    let later = after.iter().filter(|after| find(before, after).is_none());
    before
        .iter()
        .map(|place| {
            let after = find(after, place);
            let again = again.and_then(|again| find(again, place));
            result(place, Some(place), after.as_ref(), again.as_ref())
        })
        .chain(later.map(|place| result(place, None, Some(place), None)))
        .collect()
}

fn result(
    place: &Measured,
    before: Option<&Measured>,
    after: Option<&Measured>,
    again: Option<&Measured>,
) -> ProbeResult {
    let passed = |measured: Option<&Measured>| measured.is_some_and(|measured| measured.seen().is_some());
    let failed = before.zip(after).is_some_and(|(before, after)| failed(before, after));
    let (old, new) = (before.and_then(Measured::seen), after.and_then(Measured::seen));
    let sources = old.zip(new).and_then(|(old, new)| changed_source(old, new));
    let first = |seen: Option<&Seen>| seen?.values().next()?.first().copied();
    let (source_before, source_after) = match sources {
        Some((old, new)) => (Some(old), Some(new)),
        None => (first(old), first(new)),
    };
    let (errno, detail) = explain(before, after, sources);
    ProbeResult {
        probe: place.probe.clone(),
        address: place.address.map(|address| address.to_string()).unwrap_or_default(),
        ok_before: passed(before),
        ok_after: passed(after),
        failed,
        ok_again: passed(again),
        errno,
        detail,
        source_before: source_before.map(address_bytes).unwrap_or_default(),
        source_after: source_after.map(address_bytes).unwrap_or_default(),
    }
}

/// Describes the latest failure.
fn explain(
    before: Option<&Measured>,
    after: Option<&Measured>,
    sources: Option<(IpAddr, IpAddr)>,
) -> (i32, String) {
    if let Some((old, new)) = sources {
        return (0, format!("a backend that saw {old} sees {new}"));
    }
    match after.or(before).map(|measured| &measured.outcome) {
        Some(ProbeOutcome::Failed { errno, detail }) => (*errno, detail.clone()),
        Some(ProbeOutcome::Absent { detail }) => (0, detail.clone()),
        Some(ProbeOutcome::Passed { .. }) | None => (0, String::new()),
    }
}
