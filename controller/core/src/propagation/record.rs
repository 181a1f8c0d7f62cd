//! State of the changes that were compiled together.

use std::collections::VecDeque;
use std::sync::Arc;

use super::nodes::NodeSet;
use super::{Delivery, Publication, TraceContext, UnixNanoseconds};

/// Nodes that acknowledged last and are remembered, per revision.
const SLOWEST: usize = 8;
/// Other nodes that are remembered, per revision.
const KEPT: usize = 24;
/// Refusals that are remembered, per revision.
const REFUSALS: usize = 16;

/// A share of the nodes that a change concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    /// Half of them.
    Half,
    /// 99 percent.
    Most,
    /// All.
    All,
}

impl Milestone {
    /// From the first to be reached to the last.
    pub const ASCENDING: [Self; 3] = [Self::Half, Self::Most, Self::All];

    /// Returns the number of nodes required, out of `nodes`.
    fn share(self, nodes: u32) -> u32 {
        match self {
            Self::Half => nodes.div_ceil(2),
            Self::Most => nodes - nodes / 100,
            Self::All => nodes,
        }
    }
}

/// One node's acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAck {
    /// The node.
    pub node: Arc<str>,
    /// Time at which the node held the revision.
    pub at: UnixNanoseconds,
    /// The update that brought it; `None` if the node had everything without one.
    pub delivery: Option<Delivery>,
    /// Root span of the change whose trace has the update. One update carries many changes.
    pub carrier: TraceContext,
}

/// An update with this revision that a node refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedUpdate {
    /// The node.
    pub node: Arc<str>,
    /// Time of the rejection.
    pub at: UnixNanoseconds,
    /// Machine-readable reason in CamelCase.
    pub reason: &'static str,
}

/// The changes of one revision, and which nodes hold them. Times are of the controller's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The layers' revision.
    pub revision: u64,
    /// Changes compiled, with times.
    pub publication: Publication,
    /// Nodes that it concerned and that were followed when it was published.
    pub eligible: u32,
    /// Those that hold it.
    pub acknowledged: u32,
    /// Those whose stream ended before they acknowledged.
    pub excluded: u32,
    /// Those that were not waited for any longer.
    pub given_up: u32,
    /// The nodes that acknowledged last, in that order, at most 8.
    pub slowest: VecDeque<NodeAck>,
    /// The first node, the sampled ones, and those that took long or had refused it before; at most 24.
    pub kept: Vec<NodeAck>,
    /// At most 16.
    pub refusals: Vec<RefusedUpdate>,
    /// Some node took longer than [`super::Limits::slow`], refused it, or was lost.
    pub troubled: bool,
    reached: [Option<UnixNanoseconds>; 3],
    last: UnixNanoseconds,
    pub(super) waiting: NodeSet,
    pub(super) reported: bool,
}

impl Record {
    pub(super) fn new(revision: u64, publication: Publication, waiting: NodeSet) -> Self {
        Self {
            revision,
            publication,
            eligible: u32::try_from(waiting.len()).unwrap_or(u32::MAX),
            acknowledged: 0,
            excluded: 0,
            given_up: 0,
            slowest: VecDeque::new(),
            kept: Vec::new(),
            refusals: Vec::new(),
            troubled: false,
            reached: [None; 3],
            last: 0,
            waiting,
            reported: false,
        }
    }

    /// Returns the time at which a share of the nodes held it; `None` if not yet, or without nodes.
    #[must_use]
    pub fn reached(&self, milestone: Milestone) -> Option<UnixNanoseconds> {
        self.reached[milestone as usize]
    }

    /// No node has to acknowledge it any more.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.waiting.len() == 0
    }

    /// Number of nodes that have yet to acknowledge it.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    /// Counts an acknowledgement; returns the milestones that it reached.
    pub(super) fn acknowledge(&mut self, ack: NodeAck, keep: bool) -> Vec<Milestone> {
        self.acknowledged += 1;
        self.last = self.last.max(ack.at);
        if (keep || self.acknowledged == 1) && self.kept.len() < KEPT {
            self.kept.push(ack.clone());
        }
        if self.slowest.len() == SLOWEST {
            self.slowest.pop_front();
        }
        self.slowest.push_back(ack);
        self.advance()
    }

    /// A node has left; the others may be all there are.
    pub(super) fn exclude(&mut self) -> Vec<Milestone> {
        self.excluded += 1;
        self.troubled = true;
        self.advance()
    }

    pub(super) fn refuse(&mut self, refusal: RefusedUpdate) {
        self.troubled = true;
        if self.refusals.len() < REFUSALS {
            self.refusals.push(refusal);
        }
    }

    /// Waits no longer. Slots are given to other nodes later, so the set is cleared.
    pub(super) fn give_up(&mut self) {
        self.given_up = self.outstanding();
        self.troubled |= self.given_up > 0;
        self.waiting = NodeSet::default();
    }

    fn advance(&mut self) -> Vec<Milestone> {
        let nodes = self.eligible - self.excluded;
        let mut reached = Vec::new();
        for milestone in Milestone::ASCENDING {
            let slot = &mut self.reached[milestone as usize];
            if slot.is_none() && self.acknowledged > 0 && self.acknowledged >= milestone.share(nodes) {
                *slot = Some(self.last);
                reached.push(milestone);
            }
        }
        reached
    }
}
