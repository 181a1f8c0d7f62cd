//! Writes the status of profiles.

use kube::ResourceExt as _;
use switchtower_admin_api::{ConditionType, ProfileReason as Reason};
use switchtower_core::rollout::handover;
use switchtower_core::rollout::profile::{Past, Profile};
use switchtower_core::rollout::{Condition, Revision, State};
use switchtower_crds::{ProxyProfile, ProxyProfileStatus};

use super::facts::Facts;
use super::round::rollout_name;
use super::{Rollouts, convert, requests};

impl Rollouts {
    /// Writes the status of every profile that changed.
    pub(super) async fn write_profiles(&mut self, facts: &Facts) {
        let objects: Vec<ProxyProfile> = self.profiles.iter().cloned().collect();
        for mut object in objects {
            let Some(profile) = facts.profile(&object.name_any()) else { continue };
            let refused = self.refused.get(&object.name_any()).map(|refused| refused.message.as_str());
            // The status of this generation depends on its rollout, which does not exist yet.
            if facts.lacks_rollout(profile) && refused.is_none() {
                continue;
            }
            let status = status(&object, profile, refused, facts);
            if object.status.as_ref() == Some(&status) {
                continue;
            }
            object.status = Some(status);
            match requests::write_status(&self.profile_api, &object).await {
                Ok(object) => drop(self.profiles.put(object)),
                Err(error) if requests::is_race(&error) => {}
                Err(error) => self.request_failed(&object.name_any(), &error),
            }
        }
    }
}

fn status(
    object: &ProxyProfile,
    profile: &Profile,
    refused: Option<&str>,
    facts: &Facts,
) -> ProxyProfileStatus {
    let stable = facts.stable(&profile.name);
    let mine =
        facts.past.iter().filter(|past| past.target.profile == profile.name && past.owner == profile.uid);
    let latest = mine.max_by_key(|past| past.target.number);
    let nodes = facts.nodes.get(&profile.name).copied().unwrap_or(0);
    let conditions = conditions(profile, latest, refused, nodes, facts);
    let previous = object.status.as_ref().map_or(&[][..], |status| &status.conditions);
    let number = |revision: &Revision| Some(convert::api_number(revision.number));
    ProxyProfileStatus {
        observed_generation: object.metadata.generation,
        stable_revision: number(&stable).filter(|_| stable.profile == profile.name),
        stable_name: stable.to_string(),
        target_revision: latest.and_then(|past| number(&past.target)),
        target_name: latest.map(|past| past.target.to_string()).unwrap_or_default(),
        rollout: latest.map(|past| rollout_name(&past.target)),
        nodes: convert::count(nodes),
        conditions: convert::conditions(&conditions, previous, object.metadata.generation, facts.now),
    }
}

fn conditions(
    profile: &Profile,
    latest: Option<&Past>,
    refused: Option<&str>,
    nodes: usize,
    facts: &Facts,
) -> Vec<Condition> {
    let name = latest.map(|past| rollout_name(&past.target)).unwrap_or_default();
    let (reason, message) = match (refused, latest.map(|past| past.state)) {
        _ if profile.deleting => deleting(profile, latest, facts),
        (Some(refused), _) => {
            let message = format!(
                "the API server refuses the ProxyRollout of the present settings; nodes keep their settings: \
                 {refused}"
            );
            (Reason::RolloutRefused, message)
        }
        (None, None) => (Reason::Pending, "the first rollout has not started".to_owned()),
        (None, Some(State::Complete)) => up_to_date(profile, nodes, facts),
        (None, Some(State::Failed)) => (Reason::RolloutFailed, format!("{name} failed; see its conditions")),
        (None, Some(State::Aborted)) => (Reason::RolloutAborted, format!("{name} was aborted")),
        (None, Some(_)) => (Reason::RollingOut, format!("{name} is in progress")),
    };
    let condition = |kind, holds, reason: Reason, message: &str| Condition {
        kind,
        holds,
        reason: reason.as_str(),
        message: message.to_owned(),
    };
    let stalled = matches!(
        reason,
        Reason::RolloutFailed | Reason::RolloutAborted | Reason::RolloutRefused | Reason::HandoverFailed
    );
    let overlapping = match facts.lost.get(&profile.name) {
        Some((count, winner)) => {
            let message = format!(
                "{count} selected nodes belong to {winner} or others: the highest priority wins, then age, then name"
            );
            condition(ConditionType::Overlapping, true, Reason::OtherProfileWins, &message)
        }
        None => condition(
            ConditionType::Overlapping,
            false,
            Reason::NoOverlap,
            "no other profile has precedence on a selected node",
        ),
    };
    vec![
        condition(ConditionType::Ready, reason == Reason::UpToDate, reason, &message),
        condition(ConditionType::Reconciling, !stalled && reason != Reason::UpToDate, reason, &message),
        condition(ConditionType::Stalled, stalled, reason, &message),
        overlapping,
    ]
}

/// Returns reason and message of a complete rollout. Not every node needs to have the revision: a relabelled node keeps
/// its settings until a rollout moves it, and a node without an agent follows when the agent reconnects.
fn up_to_date(profile: &Profile, nodes: usize, facts: &Facts) -> (Reason, String) {
    let stable = facts.stable(&profile.name);
    let mine = facts.fleet.iter().filter(|node| node.profile.as_ref() == Some(&profile.name));
    let have =
        mine.filter(|node| node.assigned.as_ref().is_some_and(|known| known.revision == stable)).count();
    let message = if have == nodes {
        format!("all {nodes} nodes of the profile have {stable}")
    } else {
        format!(
            "{have} of {nodes} nodes of the profile have {stable}; the others keep their settings until the next \
             rollout; change changeCause to start one"
        )
    };
    (Reason::UpToDate, message)
}

/// Returns reason and message of a profile that is being deleted.
fn deleting(profile: &Profile, latest: Option<&Past>, facts: &Facts) -> (Reason, String) {
    let holders = facts.holders(&profile.name);
    let handover = latest.and_then(|past| Some((past, past.handover.as_ref()?)));
    match handover {
        Some((past, to)) if !past.state.is_final() => {
            let name = rollout_name(&past.target);
            (Reason::Deleting, format!("{name} hands its nodes over to {to}; {holders} nodes remain"))
        }
        Some((past, to)) if handover::was_tried(profile, to, &facts.past) && holders > 0 => {
            let message = format!(
                "{} did not hand its {holders} nodes over to {to}; see its conditions. Change changeCause of this \
                 profile to retry, or roll out another profile that selects the nodes",
                rollout_name(&past.target)
            );
            (Reason::HandoverFailed, message)
        }
        _ => {
            let message = format!(
                "waiting until no node has its settings: {holders} nodes remain. A rollout moves them to the profile that \
                 selects them next, or to the built-in settings"
            );
            (Reason::Deleting, message)
        }
    }
}
