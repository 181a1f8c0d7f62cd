//! Which profile a node belongs to, which revision is stable, and when a rollout begins.
//!
//! Invariants: a node without an assignment gets the stable revision of its profile; a node that holds a revision of
//! another profile keeps it until a rollout moves it, and gets it back if that comes to nothing; revisions of a profile
//! are never numbered twice, also if it is deleted and created again.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Assignment, FleetNode, Revision, Selector, State, Time};

/// A profile as far as it decides about nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: Arc<str>,
    /// Its UID: a profile that was created again has another.
    pub uid: Arc<str>,
    /// The highest one wins.
    pub priority: i32,
    /// Creation time: of equal priorities the oldest wins.
    pub created: Time,
    /// Which nodes it is for.
    pub selector: Selector,
    /// Hash of what makes a revision.
    pub hash: String,
    /// It is being deleted: it wins no node any more.
    pub deleting: bool,
}

/// A rollout as far as it decides about its profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// UID of the profile that owns it.
    pub owner: Arc<str>,
    /// Revision that it rolls out.
    pub target: Revision,
    /// The hash of that.
    pub hash: String,
    /// Revision to which its nodes return while no revision of the profile was complete.
    pub fallback: Revision,
    /// It hands the nodes of a deleted profile over to this revision.
    pub handover: Option<Revision>,
    /// State.
    pub state: State,
}

/// The profile of a node, and another one that selects it too and lost.
pub fn winner<'a>(
    profiles: &'a [Profile],
    labels: &BTreeMap<String, String>,
) -> (Option<&'a Profile>, Vec<&'a Profile>) {
    let mut selecting: Vec<_> =
        profiles.iter().filter(|profile| !profile.deleting && profile.selector.matches(labels)).collect();
    selecting.sort_by(|one, other| {
        other
            .priority
            .cmp(&one.priority)
            .then_with(|| one.created.cmp(&other.created))
            .then_with(|| one.name.cmp(&other.name))
    });
    let mut selecting = selecting.into_iter();
    (selecting.next(), selecting.collect())
}

/// The last revision of a profile that was rolled out completely; before the first what its nodes had without the
/// profile, as its latest rollout says; the built-in settings if there is none.
#[must_use]
pub fn stable(profile: &str, rollouts: &[Past]) -> Revision {
    let own = |past: &&Past| &*past.target.profile == profile && past.handover.is_none();
    let mine = || rollouts.iter().filter(own);
    let complete = mine().filter(|past| past.state == State::Complete).map(|past| &past.target);
    let fallback = || mine().max_by_key(|past| past.target.number).map(|past| &past.fallback);
    let latest = complete.max_by_key(|target| target.number);
    latest.or_else(fallback).cloned().unwrap_or_else(Revision::builtin)
}

/// Returns the revision for nodes of a new rollout that have none of their own to return to ([`returns_to`]): the stable
/// revision of its profile; before there is one, the revision that most of its nodes have, or would return to if that one
/// is not proved itself.
#[must_use]
pub fn fallback(profile: &Profile, rollouts: &[Past], fleet: &[FleetNode]) -> Revision {
    let stable = stable(&profile.name, rollouts);
    if stable.profile == profile.name {
        return stable;
    }
    let mut held: BTreeMap<Revision, usize> = BTreeMap::new();
    for node in fleet.iter().filter(|node| node.profile.as_ref() == Some(&profile.name)) {
        let assigned = node.assigned.as_ref().map(|assigned| &assigned.revision);
        if let Some(revision) = assigned.filter(|revision| revision.profile != profile.name) {
            let proved = is_proved(revision, rollouts);
            let revision = if proved { revision.clone() } else { self::stable(&revision.profile, rollouts) };
            *held.entry(revision).or_default() += 1;
        }
    }
    held.into_iter().max_by_key(|(_, nodes)| *nodes).map_or(stable, |(revision, _)| revision)
}

/// A rollout of it was complete, or it needed none.
fn is_proved(revision: &Revision, rollouts: &[Past]) -> bool {
    let complete = |past: &Past| past.target == *revision && past.state == State::Complete;
    revision.is_builtin() || rollouts.iter().any(complete)
}

/// Returns the revision that a row remembers in addition to its new revision `to`: if an active rollout takes the node
/// out of another profile, the last proved revision that the node had there.
#[must_use]
pub fn origin(assigned: Option<&Assignment>, to: &Revision, rollouts: &[Past]) -> Option<Revision> {
    if !rollouts.iter().any(|past| past.target == *to && !past.state.is_final()) {
        return None;
    }
    let Some(Assignment { revision, previous, .. }) = assigned else { return Some(Revision::builtin()) };
    if revision == to {
        return previous.clone();
    }
    if revision.profile == to.profile {
        return None;
    }
    if is_proved(revision, rollouts) {
        return Some(revision.clone());
    }
    previous.clone().or_else(|| Some(stable(&revision.profile, rollouts)))
}

/// Returns the remembered revision that a node returns to: none once its current revision is proved, or once the profile
/// of the remembered one is deleted or being deleted.
#[must_use]
pub fn returns_to(
    revision: &Revision,
    previous: Revision,
    profiles: &[Profile],
    rollouts: &[Past],
) -> Option<Revision> {
    let is_kept = |past: &Past| {
        let owns = |profile: &Profile| profile.uid == past.owner && !profile.deleting;
        past.target == previous && past.state == State::Complete && profiles.iter().any(owns)
    };
    let there = previous.is_builtin() || rollouts.iter().any(is_kept);
    (there && !is_proved(revision, rollouts)).then_some(previous)
}

/// The number of the rollout that is to be created, if the profile says something new. `highest`: the highest number
/// that any row names of this profile.
#[must_use]
pub fn next_revision(profile: &Profile, rollouts: &[Past], highest: u64) -> Option<u64> {
    if profile.deleting {
        return None;
    }
    let named = |past: &&Past| past.target.profile == profile.name;
    let latest = rollouts
        .iter()
        .filter(named)
        .filter(|past| past.owner == profile.uid)
        .max_by_key(|past| past.target.number);
    if latest.is_some_and(|past| past.hash == profile.hash) {
        return None;
    }
    Some(unused_number(profile, rollouts, highest))
}

/// A number that no revision of the profile has had.
pub(super) fn unused_number(profile: &Profile, rollouts: &[Past], highest: u64) -> u64 {
    let named = rollouts.iter().filter(|past| past.target.profile == profile.name);
    named.map(|past| past.target.number).max().unwrap_or(0).max(highest) + 1
}

/// Returns the revision for nodes of a deleted profile. `winner`: the profile that selects them without it.
pub(super) fn destination(winner: Option<&str>, profiles: &[Profile], rollouts: &[Past]) -> Revision {
    let revision = winner.map_or_else(Revision::builtin, |winner| stable(winner, rollouts));
    let there = |profile: &Profile| profile.name == revision.profile && !profile.deleting;
    if profiles.iter().any(there) { revision } else { Revision::builtin() }
}

/// Returns true if a handover to a revision still leads where nodes would be without the profile.
fn is_destination(to: &Revision, profiles: &[Profile], rollouts: &[Past]) -> bool {
    to.is_builtin() || destination(Some(&to.profile), profiles, rollouts) == *to
}

/// Returns true if a rollout is superseded: to a later one, or with its profile; a handover, because its nodes would go
/// elsewhere now.
#[must_use]
pub fn superseded(past: &Past, rollouts: &[Past], profiles: &[Profile]) -> bool {
    let later = rollouts
        .iter()
        .any(|other| other.target.profile == past.target.profile && other.target.number > past.target.number);
    let owner = profiles.iter().find(|profile| profile.uid == past.owner);
    let stands = owner.is_some_and(|profile| match &past.handover {
        None => !profile.deleting,
        Some(to) => profile.deleting && is_destination(to, profiles, rollouts),
    });
    later || !stands
}

/// Returns the revision for a node's row where no rollout decides; `None`: what it names stays.
///
/// `winner`: name and stable revision of the node's profile, and whether a rollout of it is under way. `profiles`:
/// there is some profile; before the first, rows name nothing.
#[must_use]
pub fn settled(
    assigned: Option<&Assignment>,
    winner: Option<(&str, &Revision, bool)>,
    profiles: bool,
) -> Option<Revision> {
    match (assigned, winner) {
        (None, None) => profiles.then(Revision::builtin),
        // Named by nothing it counts as new until the first revision is stable, and then gets that.
        (None, Some((_, stable, _))) => (!stable.is_builtin()).then(|| stable.clone()),
        // A straggler: it was away when the rollout came through.
        (Some(assigned), Some((profile, stable, active))) => {
            let straggler = &*assigned.revision.profile == profile && assigned.revision != *stable;
            (straggler && !active).then(|| stable.clone())
        }
        (Some(_), None) => None,
    }
}

/// The row's time of assignment lies ahead although rows have whole seconds, rounded up: the clock was set back. Later
/// events of the node would seem to precede the assignment, and no gate would see them.
#[must_use]
pub fn lies_ahead(assigned: &Assignment, now: Time) -> bool {
    assigned.at.0.saturating_sub(now.0) > 2_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: &str, priority: i32, created: i64) -> Profile {
        Profile {
            name: name.into(),
            uid: format!("uid-{name}").into(),
            priority,
            created: Time(created),
            selector: Selector::default(),
            hash: "h1".into(),
            deleting: false,
        }
    }

    fn past(profile: &Profile, number: u64, hash: &str, state: State) -> Past {
        let target = Revision { profile: profile.name.clone(), number };
        Past {
            owner: profile.uid.clone(),
            target,
            hash: hash.into(),
            fallback: Revision::builtin(),
            handover: None,
            state,
        }
    }

    #[test]
    fn of_overlapping_profiles_priority_then_age_then_name_wins() {
        let labels = BTreeMap::new();
        let mut profiles =
            vec![profile("b", 0, 5), profile("c", 0, 4), profile("a", 0, 5), profile("d", 1, 9)];
        for expected in ["d", "c", "a", "b"] {
            let (winner, losers) = winner(&profiles, &labels);
            assert_eq!(&*winner.unwrap().name, expected);
            assert_eq!(losers.len(), profiles.len() - 1);
            profiles.retain(|profile| &*profile.name != expected);
        }
        let mut leaving = profile("x", 9, 0);
        leaving.deleting = true;
        assert_eq!(winner(&[leaving], &labels), (None, vec![]));
    }

    #[test]
    fn new_hash_starts_a_rollout_with_a_higher_number() {
        let mut default = profile("default", 0, 0);
        assert_eq!(next_revision(&default, &[], 0), Some(1));
        let first = past(&default, 1, "h1", State::Failed);
        assert_eq!(
            next_revision(&default, std::slice::from_ref(&first), 1),
            None,
            "a failed one is not retried"
        );
        default.hash = "h2".into();
        assert_eq!(next_revision(&default, std::slice::from_ref(&first), 1), Some(2));
        let second = past(&default, 2, "h2", State::Complete);
        default.hash = "h1".into();
        let both = [first, second];
        assert_eq!(next_revision(&default, &both, 2), Some(3), "the old hash is a new revision");
        default.deleting = true;
        assert_eq!(next_revision(&default, &both, 2), None);
        // Created again under its name.
        default.deleting = false;
        default.uid = "another".into();
        assert_eq!(next_revision(&default, &both, 2), Some(3));
        assert_eq!(next_revision(&default, &[], 7), Some(8), "rows still name what is gone");
    }

    #[test]
    fn stable_is_the_last_complete_revision() {
        let (default, other) = (profile("default", 0, 0), profile("other", 0, 0));
        let rollouts = [
            past(&default, 1, "h", State::Complete),
            past(&default, 3, "h", State::Complete),
            past(&default, 2, "h", State::Complete),
            past(&default, 4, "h", State::Failed),
            past(&other, 9, "h", State::Complete),
        ];
        assert_eq!(stable("default", &rollouts).to_string(), "default@3");
        assert_eq!(stable("none", &rollouts), Revision::builtin());
    }

    #[test]
    fn nodes_return_to_the_most_common_revision() {
        let edge = profile("edge", 1, 0);
        let base = |number| Revision { profile: "base".into(), number };
        let node = |name: &str, profile: &str, revision: Revision| FleetNode {
            name: name.into(),
            uid: name.into(),
            labels: Arc::default(),
            profile: Some(profile.into()),
            assigned: Some(Assignment { revision, at: Time(0), trace: String::new(), previous: None }),
            still: None,
            pending: false,
            unknown: false,
            lost: None,
            agent: crate::rollout::Agent::Unknown,
        };
        let tried = Revision { profile: "edge".into(), number: 1 };
        let mut fleet = vec![
            node("a", "edge", base(3)),
            node("b", "edge", base(4)),
            node("c", "edge", base(4)),
            node("d", "edge", tried.clone()),
            node("e", "edge", tried),
            node("f", "edge", Revision { profile: "edge".into(), number: 1 }),
        ];
        fleet.extend((0..9).map(|index| node(&format!("x{index}"), "base", base(7))));
        let other = profile("base", 0, 0);
        let complete = |number| past(&other, number, "h", State::Complete);
        let proved = [complete(3), complete(4)];
        assert_eq!(fallback(&edge, &proved, &fleet), base(4));
        let on_its_way = [complete(3), past(&other, 4, "h", State::Progressing)];
        assert_eq!(fallback(&edge, &on_its_way, &fleet), base(3), "not proved yet");
        assert_eq!(fallback(&edge, &proved, &[]), Revision::builtin());
        let mut failed = past(&edge, 1, "h", State::Failed);
        failed.fallback = base(4);
        assert_eq!(stable("edge", std::slice::from_ref(&failed)), base(4));
        let rollouts = [failed, past(&edge, 2, "h", State::Complete)];
        assert_eq!(stable("edge", &rollouts).to_string(), "edge@2");
        assert_eq!(fallback(&edge, &rollouts, &fleet).to_string(), "edge@2");
    }

    #[test]
    fn row_keeps_the_proven_revision_of_another_profile() {
        let (base, edge, spot) = (profile("base", 0, 0), profile("edge", 1, 0), profile("spot", 2, 0));
        let of = |profile: &Profile, number| Revision { profile: profile.name.clone(), number };
        let row = |revision: Revision, previous: Option<Revision>| {
            Some(Assignment { revision, at: Time(0), trace: String::new(), previous })
        };
        let rollouts = [
            past(&base, 3, "h", State::Complete),
            past(&base, 4, "h", State::Progressing),
            past(&edge, 1, "h", State::Progressing),
            past(&spot, 1, "h", State::Progressing),
            past(&spot, 9, "h", State::Failed),
        ];
        let had = Some(of(&base, 3));
        let cases = [
            ("a proved one", row(of(&base, 3), None), had.clone()),
            ("one that is tried itself", row(of(&base, 4), None), had.clone()),
            ("one that a node came to on trial", row(of(&edge, 1), had.clone()), had.clone()),
            ("the built-in one", row(Revision::builtin(), None), Some(Revision::builtin())),
            ("none so far", None, Some(Revision::builtin())),
            ("the same again, at another time", row(of(&spot, 1), had.clone()), had.clone()),
            ("an earlier one of its own profile", row(of(&spot, 9), had.clone()), None),
        ];
        for (what, assigned, expected) in cases {
            assert_eq!(origin(assigned.as_ref(), &of(&spot, 1), &rollouts), expected, "{what}");
        }
        let assigned = row(of(&spot, 1), had);
        for back in [of(&base, 3), of(&spot, 9), of(&edge, 8), Revision::builtin()] {
            assert_eq!(origin(assigned.as_ref(), &back, &rollouts), None, "{back} is no trial");
        }
    }

    #[test]
    fn kept_revision_counts_while_its_profile_exists() {
        let (mut base, edge) = (profile("base", 0, 0), profile("edge", 1, 0));
        let (tried, had) =
            (Revision { profile: "edge".into(), number: 1 }, Revision { profile: "base".into(), number: 3 });
        let mut rollouts = [past(&base, 3, "h", State::Complete), past(&edge, 1, "h", State::Progressing)];
        let profiles = |base: &Profile| [base.clone(), edge.clone()];
        assert_eq!(returns_to(&tried, had.clone(), &profiles(&base), &rollouts), Some(had.clone()));
        assert_eq!(returns_to(&tried, had.clone(), &profiles(&base)[1..], &rollouts), None, "gone");
        base.deleting = true;
        assert_eq!(returns_to(&tried, had.clone(), &profiles(&base), &rollouts), None, "going");
        (base.deleting, base.uid) = (false, "another".into());
        assert_eq!(returns_to(&tried, had, &profiles(&base), &rollouts), None, "created again");
        let builtin = Revision::builtin();
        assert_eq!(returns_to(&tried, builtin.clone(), &[], &rollouts), Some(builtin.clone()));
        rollouts[1].state = State::Complete;
        assert_eq!(returns_to(&tried, builtin, &[], &rollouts), None, "it is proved: nothing returns");
    }

    #[test]
    fn rollout_superseded_by_a_later_one_or_deletion() {
        let mut default = profile("default", 0, 0);
        let rollouts = [past(&default, 1, "h1", State::Progressing), past(&default, 2, "h2", State::Pending)];
        assert!(superseded(&rollouts[0], &rollouts, std::slice::from_ref(&default)));
        assert!(!superseded(&rollouts[1], &rollouts, std::slice::from_ref(&default)));
        assert!(superseded(&rollouts[1], &rollouts, &[]));
        default.deleting = true;
        assert!(superseded(&rollouts[1], &rollouts, std::slice::from_ref(&default)));
        (default.deleting, default.uid) = (false, "another".into());
        assert!(superseded(&rollouts[1], &rollouts, &[default]));
    }

    #[test]
    fn time_ahead_comes_from_another_clock() {
        let at = |at| Assignment {
            revision: Revision::builtin(),
            at: Time(at),
            trace: String::new(),
            previous: None,
        };
        assert!(!lies_ahead(&at(5_000), Time(90_000)) && !lies_ahead(&at(91_000), Time(90_001)));
        assert!(lies_ahead(&at(3_690_000), Time(90_000)));
    }

    #[test]
    fn revision_without_a_rollout() {
        let revision = |profile: &str, number| Revision { profile: profile.into(), number };
        let at = |profile: &str, number| {
            Some(Assignment {
                revision: revision(profile, number),
                at: Time(0),
                trace: String::new(),
                previous: None,
            })
        };
        let (builtin, two) = (Revision::builtin(), revision("default", 2));
        let cases = [
            ("no profile anywhere", None, None, false, None),
            ("none for this node", None, None, true, Some(builtin.clone())),
            ("before the first is stable", None, Some((&builtin, true)), true, None),
            ("a new node", None, Some((&two, false)), true, Some(two.clone())),
            ("a new node during a rollout", None, Some((&two, true)), true, Some(two.clone())),
            ("in order", at("default", 2), Some((&two, false)), true, None),
            ("a straggler", at("default", 1), Some((&two, false)), true, Some(two.clone())),
            ("a rollout decides", at("default", 1), Some((&two, true)), true, None),
            ("relabelled from another profile", at("other", 7), Some((&two, false)), true, None),
            ("relabelled from none", at("builtin", 0), Some((&two, false)), true, None),
            ("its profile is gone", at("other", 7), None, true, None),
        ];
        for (what, assigned, winner, profiles, expected) in cases {
            let winner = winner.map(|(stable, active)| ("default", stable, active));
            assert_eq!(settled(assigned.as_ref(), winner, profiles), expected, "{what}");
        }
    }
}
