//! Which node has acknowledged what.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::nodes::NodeSet;
use super::record::{Milestone, NodeAck, Record, RefusedUpdate};
use super::{Delivery, Publication, TraceContext, UnixNanoseconds};

/// Bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Maximum number of revisions that wait for nodes. The oldest is given up for a new one.
    pub open: usize,
    /// Maximum number of settled revisions that are remembered.
    pub settled: usize,
    /// A node that takes longer from send to acknowledgement is always kept. Nanoseconds.
    pub slow: u64,
    /// Time after publication at which an unsettled revision is reported as it is, in nanoseconds.
    pub patience: u64,
    /// The share of the other nodes that is kept, 0 to 1.
    pub share: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { open: 512, settled: 512, slow: 1_000_000_000, patience: 30_000_000_000, share: 0.01 }
    }
}

/// A followed node's place; valid from [`Tracker::join`] to [`Tracker::leave`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(usize);

/// Result of a step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepResult {
    /// Per change that a node acknowledged: from its receipt, in nanoseconds, and its trace.
    pub acknowledged: Vec<(u64, TraceContext)>,
    /// Per change and milestone reached: from its receipt, in nanoseconds, and its trace.
    pub milestones: Vec<(Milestone, u64, TraceContext)>,
    /// Latest revision that half of its nodes hold since this step.
    pub half: Option<u64>,
    /// Nodes that left before they acknowledged a revision.
    pub excluded: u64,
    /// Revisions given up because too many wait.
    pub given_up: u64,
    /// Revisions of which there is nothing more to wait for, each once: settled, given up, or older than
    /// [`Limits::patience`].
    pub concluded: Vec<Record>,
}

#[derive(Debug, Clone)]
struct Followed {
    name: Arc<str>,
    revision: u64,
}

/// Follows changes through the fleet.
#[derive(Debug, Default)]
pub struct Tracker {
    limits: Limits,
    nodes: Vec<Option<Followed>>,
    free: Vec<usize>,
    open: BTreeMap<u64, Record>,
    settled: VecDeque<Record>,
}

impl Tracker {
    /// Nothing is followed yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Follows a node from the revision on that it holds.
    pub fn join(&mut self, name: Arc<str>, revision: u64) -> Slot {
        let followed = Some(Followed { name, revision });
        match self.free.pop() {
            Some(slot) => {
                self.nodes[slot] = followed;
                Slot(slot)
            }
            None => {
                self.nodes.push(followed);
                Slot(self.nodes.len() - 1)
            }
        }
    }

    /// A new revision concerns these nodes.
    pub fn publish(&mut self, revision: u64, publication: Publication, nodes: &[Slot]) -> StepResult {
        let mut outcome = StepResult::default();
        if publication.changes.is_empty() {
            return outcome;
        }
        self.conclude_overdue(publication.published, &mut outcome);
        let mut waiting = NodeSet::default();
        for slot in nodes {
            waiting.insert(slot.0);
        }
        self.open.insert(revision, Record::new(revision, publication, waiting));
        if nodes.is_empty() {
            self.settle(revision, &mut outcome);
        }
        while self.open.len() > self.limits.open {
            let Some((_, mut oldest)) = self.open.pop_first() else { break };
            oldest.give_up();
            outcome.given_up += 1;
            self.retire(oldest, &mut outcome);
        }
        outcome
    }

    /// A node holds a revision, and with it all before.
    pub fn reached(
        &mut self,
        slot: Slot,
        revision: u64,
        now: UnixNanoseconds,
        delivery: Option<Delivery>,
    ) -> StepResult {
        let mut outcome = StepResult::default();
        let Some(node) = self.nodes.get_mut(slot.0).and_then(Option::as_mut) else { return outcome };
        let (name, from) = (node.name.clone(), node.revision);
        node.revision = revision.max(from);
        let covered = self.waiting_for(slot, from, revision);
        let Some(carrier) = self.carrier(&covered) else { return outcome };
        let took = delivery.map_or(0, |delivery| delivery.acknowledged.saturating_sub(delivery.started));
        let slow = took > self.limits.slow;
        for revision in covered {
            let Some(record) = self.open.get_mut(&revision) else { continue };
            record.waiting.remove(slot.0);
            record.troubled |= slow;
            let refused = record.refusals.iter().any(|refusal| refusal.node == name);
            let keep = slow || refused || is_sampled(&name, carrier, self.limits.share);
            let ack = NodeAck { node: name.clone(), at: now, delivery, carrier };
            let milestones = record.acknowledge(ack, keep);
            let changes = &record.publication.changes;
            let since = |received: u64| now.saturating_sub(received);
            outcome.acknowledged.extend(changes.iter().map(|change| (since(change.received), change.trace)));
            note_milestones(record, &milestones, &mut outcome);
            if record.is_settled() {
                self.settle(revision, &mut outcome);
            }
        }
        outcome
    }

    /// A node refused an update that led to this revision.
    pub fn refused(&mut self, slot: Slot, revision: u64, now: UnixNanoseconds, reason: &'static str) {
        let Some(node) = self.nodes.get(slot.0).and_then(Option::as_ref) else { return };
        let (name, from) = (node.name.clone(), node.revision);
        for revision in self.waiting_for(slot, from, revision) {
            if let Some(record) = self.open.get_mut(&revision) {
                record.refuse(RefusedUpdate { node: name.clone(), at: now, reason });
            }
        }
    }

    /// A node is no longer followed: its stream ended.
    pub fn leave(&mut self, slot: Slot) -> StepResult {
        let mut outcome = StepResult::default();
        let Some(node) = self.nodes.get_mut(slot.0).and_then(Option::take) else { return outcome };
        self.free.push(slot.0);
        for revision in self.waiting_for(slot, node.revision, u64::MAX) {
            let Some(record) = self.open.get_mut(&revision) else { continue };
            record.waiting.remove(slot.0);
            outcome.excluded += 1;
            let milestones = record.exclude();
            note_milestones(record, &milestones, &mut outcome);
            if record.is_settled() {
                self.settle(revision, &mut outcome);
            }
        }
        outcome
    }

    /// Reports revisions that have waited long enough. They stay open.
    pub fn overdue(&mut self, now: UnixNanoseconds) -> StepResult {
        let mut outcome = StepResult::default();
        self.conclude_overdue(now, &mut outcome);
        outcome
    }

    /// Next time at which [`Tracker::overdue`] has something to report.
    #[must_use]
    pub fn next_overdue(&self) -> Option<UnixNanoseconds> {
        let first = self.open.values().find(|record| !record.reported)?;
        Some(first.publication.published.saturating_add(self.limits.patience))
    }

    /// Records, latest revision first.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        // Open and settled revisions are interleaved; both are in order, but for those that settled late.
        let mut all: Vec<&Record> = self.open.values().chain(&self.settled).collect();
        all.sort_unstable_by_key(|record| std::cmp::Reverse(record.revision));
        all.into_iter()
    }

    /// Returns the record of a revision, if it is remembered.
    pub(super) fn record(&self, revision: u64) -> Option<&Record> {
        let settled = || self.settled.iter().rev().find(|record| record.revision == revision);
        self.open.get(&revision).or_else(settled)
    }

    /// Nodes that have yet to acknowledge a record of this tracker.
    pub fn waiting<'a>(&'a self, record: &'a Record) -> impl Iterator<Item = &'a Arc<str>> {
        record.waiting.iter().filter_map(|slot| Some(&self.nodes.get(slot)?.as_ref()?.name))
    }

    /// The revision that every followed node holds at least; `None`: no node is followed.
    #[must_use]
    pub fn held_by_all(&self) -> Option<u64> {
        self.nodes.iter().flatten().map(|node| node.revision).min()
    }

    /// Open revisions in (`from`, `to`] that wait for the node, oldest first.
    fn waiting_for(&self, slot: Slot, from: u64, to: u64) -> Vec<u64> {
        if from >= to {
            return Vec::new();
        }
        let range = self.open.range((Bound::Excluded(from), Bound::Included(to)));
        range.filter(|(_, record)| record.waiting.contains(slot.0)).map(|(revision, _)| *revision).collect()
    }

    /// The change whose trace has an update: the oldest that is sampled, else the oldest.
    fn carrier(&self, covered: &[u64]) -> Option<TraceContext> {
        let records = covered.iter().filter_map(|revision| self.open.get(revision));
        let mut changes = records.flat_map(|record| &record.publication.changes);
        let first = changes.next()?;
        let chosen = if first.trace.sampled {
            first
        } else {
            changes.find(|change| change.trace.sampled).unwrap_or(first)
        };
        Some(chosen.trace)
    }

    fn settle(&mut self, revision: u64, outcome: &mut StepResult) {
        if let Some(record) = self.open.remove(&revision) {
            self.retire(record, outcome);
        }
    }

    fn retire(&mut self, mut record: Record, outcome: &mut StepResult) {
        if !std::mem::replace(&mut record.reported, true) {
            outcome.concluded.push(record.clone());
        }
        if self.settled.len() == self.limits.settled {
            self.settled.pop_front();
        }
        self.settled.push_back(record);
    }

    fn conclude_overdue(&mut self, now: UnixNanoseconds, outcome: &mut StepResult) {
        for record in self.open.values_mut() {
            if record.publication.published.saturating_add(self.limits.patience) > now {
                break;
            }
            if !std::mem::replace(&mut record.reported, true) {
                record.troubled = true;
                outcome.concluded.push(record.clone());
            }
        }
    }
}

fn note_milestones(record: &Record, milestones: &[Milestone], outcome: &mut StepResult) {
    if milestones.contains(&Milestone::Half) {
        outcome.half = outcome.half.max(Some(record.revision));
    }
    for milestone in milestones {
        let at = record.reached(*milestone).unwrap_or_default();
        let changes = record.publication.changes.iter();
        let reached = changes.map(|change| (*milestone, at.saturating_sub(change.received), change.trace));
        outcome.milestones.extend(reached);
    }
}

/// The same nodes for all updates of a trace, others for other traces.
fn is_sampled(node: &str, trace: TraceContext, share: f64) -> bool {
    // FNV-1a, then a mix of the trace: spread evenly is all that it has to be.
    let hash = node.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mixed = (hash ^ trace.trace as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 11) as f64) < share * (1_u64 << 53) as f64
}
