//! Inputs of a round: profiles, rollouts and the fleet at one moment.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use switchtower_admin_api::NodeReason;
use switchtower_core::rollout::handover;
use switchtower_core::rollout::profile::{Past, Profile, next_revision, returns_to, stable, winner};
use switchtower_core::rollout::{
    Agent, FleetNode, Observed, Revision, State, Time, Trial, TrialPhase as Phase, UpdateRefusal,
};
use switchtower_proto::v1::{TrialPhase, TrialStatus};

use super::clock::Clock;
use super::{Rollouts, convert};
use crate::status::Observation;
use crate::status::row::DISCONNECT_GRACE;

/// Inputs of a round.
pub(super) struct Facts {
    pub(super) now: Time,
    pub(super) profiles: Vec<Profile>,
    pub(super) past: Vec<Past>,
    pub(super) fleet: Vec<FleetNode>,
    /// Number of nodes of each profile.
    pub(super) nodes: BTreeMap<Arc<str>, usize>,
    /// For each profile, the number of selected nodes that belong to another profile, and one such profile.
    pub(super) lost: BTreeMap<Arc<str>, (usize, Arc<str>)>,
}

impl Facts {
    pub(super) fn stable(&self, profile: &str) -> Revision {
        stable(profile, &self.past)
    }

    pub(super) fn profile(&self, name: &str) -> Option<&Profile> {
        self.profiles.iter().find(|profile| &*profile.name == name)
    }

    /// Returns true if a rollout of the profile is active.
    pub(super) fn active(&self, profile: &str) -> bool {
        self.past.iter().any(|past| &*past.target.profile == profile && !past.state.is_final())
    }

    /// Returns true if no rollout exists yet for the profile's present spec.
    pub(super) fn lacks_rollout(&self, profile: &Profile) -> bool {
        next_revision(profile, &self.past, 0).is_some()
    }

    /// Returns true if the rollout of the revision is active.
    pub(super) fn is_under_way(&self, revision: &Revision) -> bool {
        self.past.iter().any(|past| past.target == *revision && !past.state.is_final())
    }

    /// Returns true if a node has the revision assigned or requested.
    pub(super) fn named(&self, revision: &Revision) -> bool {
        self.fleet.iter().any(|node| names(node).any(|known| known == revision))
    }

    /// Returns true if a node returns to the revision when its rollout fails.
    pub(super) fn remembered(&self, revision: &Revision) -> bool {
        let of = |node: &FleetNode| node.assigned.as_ref()?.previous.as_ref().map(|known| known == revision);
        self.fleet.iter().any(|node| of(node) == Some(true))
    }

    /// Returns the number of nodes with any revision of a profile.
    pub(super) fn holders(&self, profile: &str) -> usize {
        let holds = |node: &&FleetNode| names(node).any(|known| &*known.profile == profile);
        self.fleet.iter().filter(holds).count()
    }

    /// Returns the highest assigned revision of a profile.
    pub(super) fn highest(&self, profile: &str) -> u64 {
        let named = self.fleet.iter().filter_map(|node| node.assigned.as_ref());
        let named = named.filter(|known| &*known.revision.profile == profile);
        named.map(|known| known.revision.number).max().unwrap_or(0)
    }

    /// Records a stored decision.
    pub(super) fn set_state(&mut self, revision: &Revision, state: State) {
        for past in self.past.iter_mut().filter(|past| past.target == *revision) {
            past.state = state;
        }
    }
}

/// Returns the requested and the stored revision of a node.
fn names(node: &FleetNode) -> impl Iterator<Item = &Revision> {
    node.assigned.as_ref().map(|known| &known.revision).into_iter().chain(&node.still)
}

impl Rollouts {
    pub(super) fn facts(&self) -> Facts {
        let now = self.clock.now();
        let profiles: Vec<Profile> = self.profiles.iter().map(convert::profile).collect();
        let past: Vec<Past> = self.rollouts.iter().filter_map(convert::past).collect();
        let mut agents = self.agents();
        let settled = self.fleet.settled_at().filter(|_| self.others.is_complete());
        let mut facts =
            Facts { now, profiles, past, fleet: Vec::new(), nodes: BTreeMap::new(), lost: BTreeMap::new() };
        facts.fleet.reserve(self.nodes.len());
        for (name, identity) in &self.nodes {
            let (won, lost) = winner(&facts.profiles, &identity.labels);
            let won = won.map(|profile| profile.name.clone());
            if let Some(won) = &won {
                *facts.nodes.entry(won.clone()).or_default() += 1;
                for profile in lost {
                    facts.lost.entry(profile.name.clone()).or_insert_with(|| (0, won.clone())).0 += 1;
                }
            }
            let (assigned, stored) = self.assignments.of(name);
            let served = self.served.get(name);
            let without_session = || (missing(settled.is_some(), stored.had_agent), None);
            let (agent, lost) =
                agents.remove(name).map_or_else(without_session, |known| (known.agent, known.lost));
            let assigned = assigned.as_ref().map(convert::assigned).map(|mut known| {
                let previous = known.previous.take();
                known.previous = previous
                    .and_then(|previous| returns_to(&known.revision, previous, &facts.profiles, &facts.past));
                // Events before the node got the settings are not their effect.
                if let Some((_, at)) = served.filter(|(revision, _)| *revision == known.revision) {
                    known.at = known.at.max(self.clock.at(*at));
                }
                known
            });
            let keeper = handover::keeper(assigned.as_ref(), won.as_deref(), &facts.profiles, &facts.past);
            let still = stored.profile.as_ref().map(|known| convert::assigned(known).revision);
            facts.fleet.push(FleetNode {
                name: name.clone(),
                uid: identity.uid.clone(),
                labels: identity.labels.clone(),
                profile: keeper.or(won),
                pending: assigned
                    .as_ref()
                    .is_some_and(|assigned| served.is_none_or(|(served, _)| *served != assigned.revision)),
                unknown: self.unknown.contains_key(name),
                still: still
                    .filter(|still| assigned.as_ref().is_some_and(|assigned| assigned.revision != *still)),
                assigned,
                lost: match agent {
                    Agent::Connected(_) | Agent::Unknown => None,
                    Agent::Disconnected | Agent::Absent => {
                        lost.or_else(|| settled.map(|at| self.clock.at(at)))
                    }
                },
                agent,
            });
        }
        facts
    }
}

/// An agent, from its latest stream to any replica.
struct KnownAgent {
    session: u64,
    agent: Agent,
    lost: Option<Time>,
}

impl Rollouts {
    fn agents(&self) -> HashMap<Arc<str>, KnownAgent> {
        let known = |observation: &Observation| KnownAgent {
            session: observation.session,
            agent: agent(observation, &self.clock),
            lost: observation.lost_since.and(observation.moments.lost).map(|at| self.clock.at(at)),
        };
        let mut agents = HashMap::with_capacity(self.nodes.len());
        self.fleet
            .each_observation(|name, observation| drop(agents.insert(name.clone(), known(observation))));
        for (name, observation) in self.others.nodes() {
            if agents.get(name).is_none_or(|here: &KnownAgent| here.session < observation.session) {
                agents.insert(name.clone(), known(observation));
            }
        }
        agents
    }
}

/// Returns the state of an agent without a session. Before the fleet has `settled` it may still connect.
fn missing(settled: bool, had_agent: bool) -> Agent {
    match (settled, had_agent) {
        (false, _) => Agent::Unknown,
        (true, true) => Agent::Disconnected,
        (true, false) => Agent::Absent,
    }
}

fn agent(observation: &Observation, clock: &Clock) -> Agent {
    let moments = &observation.moments;
    if observation.lost_since.is_some() {
        let lately = moments.lost.is_some_and(|lost| lost.elapsed() < DISCONNECT_GRACE);
        return if lately { Agent::Unknown } else { Agent::Disconnected };
    }
    let revision = |profile: &str, number| Revision { profile: profile.into(), number };
    let deviations = observation.deviations.as_ref();
    let settings = deviations.and_then(|deviations| deviations.settings.as_ref());
    Agent::connected(Observed {
        since: moments.connected.map_or(Time(0), |at| clock.at(at)),
        acknowledged: observation.settings.as_ref().map(|(profile, number)| revision(profile, *number)),
        took: observation.settings_took,
        in_force: settings.map(|settings| revision(&settings.profile, settings.revision)),
        refusal: observation.failure.as_ref().map(|failure| UpdateRefusal {
            reason: failure.reason.as_str().to_owned(),
            detail: failure.detail.clone(),
            errno: failure.errno,
            // The stream answers these with a snapshot.
            transient: matches!(failure.reason, NodeReason::FromMismatch | NodeReason::DigestMismatch),
        }),
        refused_items: deviations.map_or(0, |deviations| deviations.refused),
        held_removals: deviations.map_or(0, |deviations| deviations.held),
        trial: observation.trial.as_ref().and_then(trial),
        drift: moments.drifted.map(|at| (clock.at(at), observation.drift_cause)),
        losses: moments.losses.iter().map(|at| clock.at(*at)).collect(),
    })
}

fn trial(status: &TrialStatus) -> Option<Trial> {
    let phase = match status.phase() {
        TrialPhase::Unspecified => return None,
        TrialPhase::Before => Phase::Before,
        TrialPhase::Watching => Phase::Watching,
        TrialPhase::Passed => Phase::Passed,
        TrialPhase::RolledBack => Phase::RolledBack,
    };
    let failed = status.results.iter().find(|result| result.failed);
    let evidence = failed.map(|result| {
        let to = if result.address.is_empty() { String::new() } else { format!(" to {}", result.address) };
        (format!("probe {}{to}: {}", result.probe, result.detail), result.errno)
    });
    let revision = Revision { profile: status.profile.as_str().into(), number: status.revision };
    Some(Trial { revision, phase, evidence })
}
