//! Handover of the nodes of a profile that is being deleted.
//!
//! They go to the profile that selects them without it, or to the built-in settings, by a rollout of the deleted
//! profile itself: a *handover*, a last revision of it whose settings are those that the nodes get afterwards. So its
//! strategy and its gates apply, other profiles' nodes are not touched, and nodes that fail return to what they had.
//! When a handover is complete, its nodes are assigned the revision with the same settings, which changes nothing on them.
//!
//! Nodes of different destinations are handed over one destination after another. If the next profile has an
//! active rollout, that rollout takes the nodes.

use std::collections::BTreeMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::profile::{Past, Profile, destination, unused_number};
use super::{Agent, Assignment, FleetNode, Revision, State};

/// A handover that is to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    /// Revision that the nodes get afterwards; the handover has its settings.
    pub to: Revision,
    /// The number of the deleted profile's revision that carries them.
    pub number: u64,
    /// Hash of the destination and of what the profile says: a failed handover is retried only if one of them
    /// changes.
    pub hash: String,
}

/// The deleted profile that a node still belongs to, because a handover of it is under way there.
#[must_use]
pub fn keeper(
    assigned: Option<&Assignment>,
    winner: Option<&str>,
    profiles: &[Profile],
    rollouts: &[Past],
) -> Option<Arc<str>> {
    let name = &assigned?.revision.profile;
    let profile = profiles.iter().find(|profile| profile.name == *name && profile.deleting)?;
    let to = destination(winner, profiles, rollouts);
    let here =
        |past: &Past| is_of(past, profile) && !past.state.is_final() && past.handover.as_ref() == Some(&to);
    rollouts.iter().any(here).then(|| profile.name.clone())
}

/// The next handover of a profile that is being deleted; `None`: one is under way, or no node is left for one.
/// `highest`: the highest number that any row names of this profile.
#[must_use]
pub fn next(
    profile: &Profile,
    profiles: &[Profile],
    rollouts: &[Past],
    fleet: &[FleetNode],
    highest: u64,
) -> Option<Handover> {
    if !profile.deleting || is_active(&profile.name, rollouts) {
        return None;
    }
    let mut nodes: BTreeMap<Revision, usize> = BTreeMap::new();
    for node in fleet.iter().filter(|node| is_held(node, profile) && is_reachable(node)) {
        let winner = node.profile.as_deref();
        let to = destination(winner, profiles, rollouts);
        let given = node.assigned.as_ref().is_some_and(|assigned| {
            rollouts.iter().any(|past| past.target == assigned.revision && is_done(past, profile, &to))
        });
        if !given && !winner.is_some_and(|winner| is_active(winner, rollouts)) {
            *nodes.entry(to).or_default() += 1;
        }
    }
    nodes.retain(|to, _| !was_tried(profile, to, rollouts));
    let (to, _) = nodes.into_iter().max_by_key(|(_, nodes)| *nodes)?;
    let number = unused_number(profile, rollouts, highest);
    Some(Handover { number, hash: hash(&to, profile), to })
}

/// Returns the revision for the row of a node of a deleted profile whose handover is over; `None` leaves the row alone.
///
/// Unreachable nodes are included: they follow when they return, as with a rollout that they missed.
#[must_use]
pub fn handed_over(
    node: &FleetNode,
    profiles: &[Profile],
    rollouts: &[Past],
    fleet: &[FleetNode],
) -> Option<Revision> {
    let revision = &node.assigned.as_ref()?.revision;
    let profile = profiles.iter().find(|profile| profile.name == revision.profile && profile.deleting)?;
    let to = destination(node.profile.as_deref(), profiles, rollouts);
    let done = |past: &Past| past.target == *revision && is_done(past, profile, &to);
    if rollouts.iter().any(done) {
        return Some(to);
    }
    let away = matches!(node.agent, Agent::Absent | Agent::Disconnected);
    if !away || is_active(&profile.name, rollouts) || was_tried(profile, &to, rollouts) {
        return None;
    }
    if node.profile.as_ref().is_some_and(|winner| is_active(winner, rollouts)) {
        return None;
    }
    let others = fleet.iter().filter(|other| is_held(other, profile) && is_reachable(other));
    let mut others = others.map(|other| destination(other.profile.as_deref(), profiles, rollouts));
    others.all(|other| other != to).then_some(to)
}

/// Returns the revision for the row of a node whose profile is gone and whose revision no object describes any more: no
/// rollout reaches it. Move only [`orphans_at_once`] of them together.
#[must_use]
pub fn orphaned(node: &FleetNode, profiles: &[Profile], rollouts: &[Past]) -> Option<Revision> {
    let revision = &node.assigned.as_ref().filter(|_| node.unknown)?.revision;
    let winner = node.profile.as_deref();
    let cared_for = profiles.iter().any(|profile| profile.name == revision.profile)
        || winner.is_some_and(|winner| is_active(winner, rollouts));
    (!cared_for).then(|| destination(winner, profiles, rollouts))
}

/// Number of nodes with revisions without a ProxyRollout that may move now: a tenth of the fleet, less those that are
/// on their way to what they were given.
#[must_use]
pub fn orphans_at_once(fleet: &[FleetNode]) -> usize {
    let on_its_way = |node: &&FleetNode| match (&node.agent, &node.assigned) {
        (Agent::Connected(observed), Some(assigned)) => {
            !node.unknown && observed.acknowledged.as_ref() != Some(&assigned.revision)
        }
        _ => node.pending,
    };
    (fleet.len() / 10).max(1).saturating_sub(fleet.iter().filter(on_its_way).count())
}

fn is_of(past: &Past, profile: &Profile) -> bool {
    past.owner == profile.uid
}

fn is_active(profile: &str, rollouts: &[Past]) -> bool {
    rollouts.iter().any(|past| &*past.target.profile == profile && !past.state.is_final())
}

fn is_held(node: &FleetNode, profile: &Profile) -> bool {
    node.assigned.as_ref().is_some_and(|assigned| assigned.revision.profile == profile.name)
}

/// It is connected, or may be about to.
fn is_reachable(node: &FleetNode) -> bool {
    matches!(node.agent, Agent::Connected(_) | Agent::Unknown)
}

fn is_done(past: &Past, profile: &Profile, to: &Revision) -> bool {
    is_of(past, profile) && past.state == State::Complete && past.handover.as_ref() == Some(to)
}

/// Returns true if an equal handover failed or was aborted: it is not repeated before something changes.
#[must_use]
pub fn was_tried(profile: &Profile, to: &Revision, rollouts: &[Past]) -> bool {
    let hash = hash(to, profile);
    let ended = |past: &Past| matches!(past.state, State::Failed | State::Aborted) && past.hash == hash;
    rollouts.iter().any(|past| is_of(past, profile) && ended(past))
}

/// SHA-256, 64 hexadecimal digits.
fn hash(to: &Revision, profile: &Profile) -> String {
    let text = format!("handover to {to}\0{}", profile.hash);
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::profile::{self, settled, superseded};
    use super::super::{Selector, Time};
    use super::*;
    use crate::rollout::tests::fixtures::{assignment, connected, joined};

    fn profile(name: &str, deleting: bool) -> Profile {
        Profile {
            name: name.into(),
            uid: format!("uid-{name}").into(),
            priority: 0,
            created: Time(0),
            selector: Selector::default(),
            hash: "h".into(),
            deleting,
        }
    }

    fn past(profile: &Profile, number: u64, state: State) -> Past {
        Past {
            owner: profile.uid.clone(),
            target: Revision { profile: profile.name.clone(), number },
            hash: "h".into(),
            fallback: Revision::builtin(),
            handover: None,
            state,
        }
    }

    fn node(name: &str, winner: Option<&str>, revision: Revision) -> FleetNode {
        FleetNode {
            profile: winner.map(Into::into),
            assigned: Some(assignment(revision, Time(0))),
            ..joined(name, BTreeMap::new(), connected(Time(0)))
        }
    }

    fn handover(profile: &Profile, next: &Handover, state: State) -> Past {
        let Handover { to, number, hash } = next.clone();
        Past { handover: Some(to), hash, ..past(profile, number, state) }
    }

    #[test]
    fn nodes_go_to_the_next_profile_or_to_the_builtin_settings() {
        let (edge, base) = (profile("edge", true), profile("base", false));
        let profiles = [edge.clone(), base.clone()];
        let mut rollouts = vec![past(&edge, 4, State::Complete), past(&base, 2, State::Complete)];
        let edge4 = rollouts[0].target.clone();
        let mut fleet = vec![
            node("a", Some("base"), edge4.clone()),
            node("b", Some("base"), edge4.clone()),
            node("c", None, edge4.clone()),
        ];
        let first = next(&edge, &profiles, &rollouts, &fleet, 4).unwrap();
        assert_eq!((first.to.to_string().as_str(), first.number), ("base@2", 5), "the larger group first");
        rollouts.push(handover(&edge, &first, State::Progressing));
        assert_eq!(next(&edge, &profiles, &rollouts, &fleet, 4), None, "one after another");
        let keeper = |node: &FleetNode, rollouts: &[Past]| {
            keeper(node.assigned.as_ref(), node.profile.as_deref(), &profiles, rollouts)
        };
        assert_eq!(keeper(&fleet[0], &rollouts).as_deref(), Some("edge"));
        assert_eq!(keeper(&fleet[2], &rollouts), None, "of another destination");
        assert!(!superseded(&rollouts[2], &rollouts, &profiles));
        assert_eq!(profile::stable("edge", &rollouts), edge4, "what nodes return to if it fails");
        rollouts[2].state = State::Complete;
        for node in &mut fleet[..2] {
            node.assigned = Some(assignment(rollouts[2].target.clone(), Time(0)));
        }
        assert_eq!(profile::stable("edge", &rollouts), edge4, "a handover is no revision of the profile");
        let given = |at: usize| handed_over(&fleet[at], &profiles, &rollouts, &fleet);
        assert_eq!((given(0), given(2)), (Some(first.to), None));
        let second = next(&edge, &profiles, &rollouts, &fleet, 5).unwrap();
        assert_eq!((second.to, second.number), (Revision::builtin(), 6));
    }

    #[test]
    fn failed_handover_not_retried_without_a_change() {
        let mut edge = profile("edge", true);
        let mut rollouts = vec![past(&edge, 1, State::Complete)];
        let mut fleet = vec![node("a", None, rollouts[0].target.clone())];
        let first = next(&edge, std::slice::from_ref(&edge), &rollouts, &fleet, 1).unwrap();
        rollouts.push(handover(&edge, &first, State::Failed));
        assert_eq!(next(&edge, std::slice::from_ref(&edge), &rollouts, &fleet, 2), None);
        fleet[0].agent = Agent::Disconnected;
        let profiles = [edge.clone()];
        assert_eq!(handed_over(&fleet[0], &profiles, &rollouts, &fleet), None);
        fleet[0].agent = connected(Time(0));
        edge.hash = "changed by a person".into();
        let again = next(&edge, std::slice::from_ref(&edge), &rollouts, &fleet, 2).unwrap();
        assert_eq!(again.number, 3);
    }

    #[test]
    fn rollout_of_the_next_profile_takes_the_nodes() {
        let (edge, base) = (profile("edge", true), profile("base", false));
        let profiles = [edge.clone(), base.clone()];
        let mut rollouts = vec![
            past(&edge, 1, State::Complete),
            past(&base, 1, State::Complete),
            past(&base, 2, State::Progressing),
        ];
        let fleet = [node("a", Some("base"), rollouts[0].target.clone())];
        assert_eq!(next(&edge, &profiles, &rollouts, &fleet, 1), None);
        rollouts[2].state = State::Failed;
        let to_the_stable_one = next(&edge, &profiles, &rollouts, &fleet, 1).unwrap();
        assert_eq!(to_the_stable_one.to, rollouts[1].target);
        // Its destination changes or is deleted too: a new handover begins.
        rollouts.push(handover(&edge, &to_the_stable_one, State::Progressing));
        let leaving = [edge, Profile { deleting: true, ..base.clone() }];
        assert!(superseded(&rollouts[3], &rollouts, &leaving));
        rollouts.push(past(&base, 3, State::Complete));
        assert!(superseded(&rollouts[3], &rollouts, &profiles));
    }

    #[test]
    fn nodes_of_a_forgotten_revision_are_moved_a_few_at_a_time() {
        let base = profile("base", false);
        let rollouts = [past(&base, 1, State::Complete)];
        let forgotten = Revision { profile: "edge".into(), number: 3 };
        let mut fleet: Vec<_> = (0..25)
            .map(|at| FleetNode { unknown: true, ..node(&format!("n{at}"), Some("base"), forgotten.clone()) })
            .collect();
        let to = |fleet: &[FleetNode], profiles: &[Profile]| orphaned(&fleet[0], profiles, &rollouts);
        assert_eq!(to(&fleet, std::slice::from_ref(&base)), Some(rollouts[0].target.clone()));
        assert_eq!(to(&fleet, &[base, profile("edge", false)]), None, "its own profile cares for it");
        assert_eq!(orphans_at_once(&fleet), 2);
        (fleet[0].unknown, fleet[0].assigned) =
            (false, Some(assignment(rollouts[0].target.clone(), Time(0))));
        assert_eq!(orphans_at_once(&fleet), 1);
        let Agent::Connected(seen) = &mut fleet[0].agent else { panic!() };
        seen.acknowledged = Some(rollouts[0].target.clone());
        assert_eq!(orphans_at_once(&fleet), 2);
        assert_eq!(orphans_at_once(&[]), 1);
    }

    #[test]
    fn unreachable_nodes_do_not_block_a_deletion() {
        let edge = profile("edge", true);
        let profiles = [edge.clone()];
        let rollouts = [past(&edge, 1, State::Complete)];
        let mut fleet = vec![node("a", None, rollouts[0].target.clone())];
        fleet.push(FleetNode { agent: Agent::Absent, ..node("b", None, rollouts[0].target.clone()) });
        assert!(next(&edge, &profiles, &rollouts, &fleet, 1).is_some());
        assert_eq!(handed_over(&fleet[1], &profiles, &rollouts, &fleet), None, "the other one goes first");
        fleet.remove(0);
        assert_eq!(next(&edge, &profiles, &rollouts, &fleet, 1), None);
        assert_eq!(handed_over(&fleet[0], &profiles, &rollouts, &fleet), Some(Revision::builtin()));
        // Nothing of that concerns nodes of profiles that stay.
        let stays = [Profile { deleting: false, ..edge }];
        assert_eq!(handed_over(&fleet[0], &stays, &rollouts, &fleet), None);
        assert_eq!(settled(fleet[0].assigned.as_ref(), None, true), None);
    }
}
