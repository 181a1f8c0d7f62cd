//! The fleet as one rollout sees it: members, their health, and counts.

use std::collections::BTreeMap;

use super::judge::{Judgement, outcome};
use super::{
    Acknowledgements, Excluded, FailedNode, FleetNode, Health, Revision, Rollout, Step, Time, health,
};

/// Fewer unhealthy nodes than this never freeze a rollout: one broken node must not hold up a small cluster.
const FREEZE_MINIMUM: usize = 2;

/// A node as this rollout sees it.
pub(super) struct Member<'a> {
    pub(super) node: &'a FleetNode,
    /// It belongs to the profile.
    pub(super) mine: bool,
    pub(super) health: Health,
    /// Of a touched node.
    pub(super) outcome: Option<Judgement>,
}

impl Member<'_> {
    pub(super) fn reachable(&self) -> bool {
        !matches!(self.health, Health::Absent | Health::Disconnected)
    }

    /// It can take part, or already does.
    pub(super) fn eligible(&self) -> bool {
        self.mine && (self.reachable() || self.outcome.is_some())
    }

    pub(super) fn updated(&self) -> bool {
        self.outcome == Some(Judgement::Updated)
    }

    pub(super) fn is_of(&self, step: &Step) -> bool {
        self.eligible() && step.selector.as_ref().is_none_or(|selector| selector.matches(&self.node.labels))
    }

    /// Returns true if the node is out of order, because of the rollout or for another reason. An untouched node without
    /// an agent is excluded, so that one dead node does not stop everything.
    pub(super) fn unavailable(&self) -> bool {
        match &self.outcome {
            Some(outcome) => *outcome != Judgement::Updated,
            None => self.health == Health::Unhealthy,
        }
    }
}

/// The fleet as this rollout sees it.
pub(super) struct Survey<'a> {
    pub(super) members: Vec<Member<'a>>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(rollout: &Rollout, fleet: &'a [FleetNode], now: Time) -> Self {
        let member = |node: &'a FleetNode| {
            let assigned = node.assigned.as_ref().filter(|assigned| assigned.revision == rollout.target);
            Member {
                node,
                mine: node.profile.as_ref() == Some(&rollout.target.profile),
                health: health(node, now),
                outcome: assigned.map(|assigned| outcome(node, assigned, &rollout.strategy, now)),
            }
        };
        Self { members: fleet.iter().map(member).collect() }
    }

    pub(super) fn count(&self, which: impl Fn(&Member<'a>) -> bool) -> usize {
        self.members.iter().filter(|member| which(member)).count()
    }

    pub(super) fn touched(&self) -> usize {
        self.count(|member| member.outcome.is_some())
    }

    pub(super) fn updated(&self) -> usize {
        self.count(|member| member.mine && member.updated())
    }

    pub(super) fn eligible(&self) -> usize {
        self.count(Member::eligible)
    }

    pub(super) fn excluded(&self) -> Vec<Excluded> {
        let left_out = self.members.iter().filter(|member| member.mine && !member.reachable());
        let mut excluded: Vec<_> = left_out
            .map(|member| Excluded {
                node: member.node.name.clone(),
                reason: if member.health == Health::Absent { "NoAgent" } else { "Disconnected" },
            })
            .collect();
        excluded.sort_by(|one, other| one.node.cmp(&other.node));
        excluded
    }

    /// Returns acknowledgement times of the target, as far as they are known.
    pub(super) fn acknowledgements(&self, target: &Revision) -> Option<Acknowledgements> {
        let took = self.members.iter().filter_map(|member| match &member.node.agent {
            super::Agent::Connected(observed) if observed.acknowledged.as_ref() == Some(target) => {
                Some((observed.took?, &member.node.name))
            }
            _ => None,
        });
        let mut took: Vec<_> = took.collect();
        took.sort_unstable();
        let (slowest, node) = took.last()?;
        Some(Acknowledgements {
            nodes: took.len(),
            median: took[(took.len() - 1) / 2].0,
            slowest: *slowest,
            slowest_node: (*node).clone(),
        })
    }

    /// Nodes that failed. `canaries`: the step that is under way, if its nodes are canaries; their loss is a failure.
    pub(super) fn failures(&self, canaries: Option<&Step>) -> Vec<FailedNode> {
        let failed = self.members.iter().filter_map(|member| match &member.outcome {
            Some(Judgement::Failed(failure)) => Some(failure.clone()),
            Some(Judgement::Lost(failure)) if canaries.is_some_and(|step| member.is_of(step)) => {
                Some(failure.clone())
            }
            _ => None,
        });
        let mut failures: Vec<_> = failed.collect();
        failures.sort_by(|one, other| one.node.cmp(&other.node));
        failures
    }

    /// Unhealthy and all untouched nodes of the whole fleet, if that is more than a rollout may ignore.
    pub(super) fn too_much_elsewhere(&self, percent: u8) -> Option<(usize, usize)> {
        let untouched = |member: &Member<'a>| member.outcome.is_none() && member.health != Health::Absent;
        let all = self.count(untouched);
        let unhealthy = self.count(|member| {
            untouched(member) && matches!(member.health, Health::Unhealthy | Health::Disconnected)
        });
        let too_much = unhealthy >= FREEZE_MINIMUM && unhealthy * 100 > usize::from(percent) * all;
        too_much.then_some((unhealthy, all))
    }

    /// Returns the revisions assigned to nodes of the profile.
    pub(super) fn assigned(&self) -> Vec<Revision> {
        let mine = self.members.iter().filter(|member| member.mine);
        mine.filter_map(|member| Some(member.node.assigned.as_ref()?.revision.clone())).collect()
    }

    /// Every touched node gets what it had of another profile, or else the stable revision.
    pub(super) fn returned(&self, stable: &Revision) -> BTreeMap<std::sync::Arc<str>, Revision> {
        let touched = self.members.iter().filter(|member| member.outcome.is_some());
        let own = |node: &FleetNode| node.assigned.as_ref().and_then(|assigned| assigned.previous.clone());
        touched
            .map(|member| (member.node.name.clone(), own(member.node).unwrap_or_else(|| stable.clone())))
            .collect()
    }

    /// Returns nodes whose row still names the revision of an earlier, unfinished rollout of the profile, which is about to
    /// return them. No rollout returns a revision that no object describes any more.
    pub(super) fn others_under_way(&self, rollout: &Rollout) -> Vec<&'a FleetNode> {
        let own = rollout.stable.profile == rollout.target.profile;
        let proved = if own { rollout.stable.number } else { 0 };
        let is_under_way = |node: &&FleetNode| {
            !node.unknown
                && node.assigned.as_ref().is_some_and(|assigned| {
                    assigned.revision.profile == rollout.target.profile
                        && assigned.revision.number > proved
                        && assigned.revision != rollout.target
                })
        };
        self.members.iter().map(|member| member.node).filter(is_under_way).collect()
    }

    /// A row that still names the target, or a connected node that still has it in its kernel, although its row may
    /// not name it any more.
    pub(super) fn holds(&self, target: &Revision) -> bool {
        self.members.iter().any(|member| {
            let in_kernel = match &member.node.agent {
                super::Agent::Connected(observed) => {
                    observed.in_force.as_ref().or(observed.acknowledged.as_ref()) == Some(target)
                }
                _ => false,
            };
            in_kernel || member.node.still.as_ref() == Some(target)
        })
    }
}
