//! One round: what follows from what there is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ObjectMeta;
use kube::{Resource as _, ResourceExt as _};
use switchtower_core::rollout::handover::{self, Handover};
use switchtower_core::rollout::profile::{
    Profile, fallback, lies_ahead, next_revision, origin, settled, stable, superseded,
};
use switchtower_core::rollout::{Assignment, Decision, Health, Revision, Rollout, Time, decide, health};
use switchtower_crds::{
    self as api, ProxyProfile, ProxyRollout, ProxyRolloutSpec, ProxyRolloutStatus, ProxySettings,
    RolloutFallback,
};
use switchtower_proto::v1::Settings;
use switchtower_telemetry::{span, spans};
use tokio::time::Instant;
use tracing::Instrument as _;

use super::facts::Facts;
use super::{FINALIZER, RETRY, Refused, Rollouts, convert, requests, settings};
use crate::fleet::{SettingsAssignment, SettingsName};
use crate::propagation::new_trace;

/// A revision that is to have a ProxyRollout.
struct NewRevision {
    number: u64,
    hash: String,
    /// It hands the nodes of a deleted profile over to this one.
    handover: Option<Revision>,
}

/// Nodes to be given another revision.
type Moves = BTreeMap<Arc<str>, Revision>;

impl Rollouts {
    /// Looks at everything and does what is to be done.
    pub(super) async fn round(&mut self) {
        if !self.under_way() {
            self.clock.set();
        }
        // First of all, nodes are told what their rows name: no request may delay that.
        self.serve();
        let mut facts = self.facts();
        if self.create_revisions(&facts).await {
            facts = self.facts();
        }
        let mut moves = self.decide(&mut facts).await;
        // Settings before the rows that name them, also of the rollouts that are new.
        self.serve();
        settle(&facts, &mut moves);
        // What nodes get together is one trace.
        let mut traces: BTreeMap<Revision, u128> = BTreeMap::new();
        let wanted = facts.fleet.iter().filter_map(|node| {
            let revision = moves.get(&node.name)?;
            let trace = *traces.entry(revision.clone()).or_insert_with(|| new_trace().trace);
            let previous = origin(node.assigned.as_ref(), revision, &facts.past);
            Some((node.name.clone(), convert::assignment(revision, trace, previous.as_ref(), facts.now)))
        });
        self.assignments.want(wanted.collect());
        self.write_profiles(&facts).await;
        self.clean(&facts).await;
        self.metrics.show(self.rollouts.iter());
    }

    /// Makes a ProxyRollout of what profiles say anew. True: there is one more.
    async fn create_revisions(&mut self, facts: &Facts) -> bool {
        let mut created = false;
        self.refused.retain(|name, _| facts.profile(name).is_some());
        for profile in &facts.profiles {
            let name = profile.name.to_string();
            let highest = facts.highest(&profile.name);
            let revision = next_revision(profile, &facts.past, highest).map(|number| NewRevision {
                number,
                hash: profile.hash.clone(),
                handover: None,
            });
            let handover = || {
                let Handover { to, number, hash } =
                    handover::next(profile, &facts.profiles, &facts.past, &facts.fleet, highest)?;
                Some(NewRevision { number, hash, handover: Some(to) })
            };
            let Some(revision) = revision.or_else(handover) else {
                self.refused.remove(&name);
                continue;
            };
            let refused = self.refused.get(&name).is_some_and(|refused| refused.again_at > Instant::now());
            if refused || !self.may_ask(&name) {
                continue;
            }
            let number = revision.number;
            let span = span!(
                "switchtower.rollout.create",
                switchtower.profile = name,
                switchtower.profile.revision = convert::api_number(number)
            );
            let made = self.create_revision(profile, revision, facts).instrument(span.clone()).await;
            let Err(error) = made else {
                self.refused.remove(&name);
                created = true;
                continue;
            };
            spans::failed(&span, &error);
            if requests::is_race(&error) {
                tracing::debug!(%error, profile = name, "not created yet; the watch will tell");
            } else if let Some(message) = requests::refusal(&error) {
                let known = self.refused.get(&name).is_some_and(|known| known.message == message);
                if !known {
                    tracing::error!(
                        profile = name,
                        message,
                        "the API server refuses the profile's ProxyRollout"
                    );
                }
                self.refused.insert(name, Refused { message, again_at: Instant::now() + RETRY });
            } else {
                self.request_failed(&name, &error);
            }
        }
        created
    }

    /// Makes the ProxyRollout of a new revision, with its number or the next one whose name is free.
    async fn create_revision(
        &mut self,
        profile: &Profile,
        mut new: NewRevision,
        facts: &Facts,
    ) -> Result<(), kube::Error> {
        let Some(object) = self.profiles.get(&profile.name).cloned() else { return Ok(()) };
        let object = self.keep_profile(object).await?;
        let revision = |number| Revision { profile: profile.name.clone(), number };
        // Somebody may have made one of that name by hand.
        while self.rollouts.get(&rollout_name(&revision(new.number))).is_some() {
            new.number += 1;
        }
        let known = fallback(profile, &facts.past, &facts.fleet);
        let fallback = RolloutFallback {
            profile: known.profile.to_string(),
            revision: convert::api_number(known.number),
            settings: self.settings_of(&known).cloned().unwrap_or_default(),
        };
        let mut rollout = new_rollout(&object, &new, fallback);
        if let Some(to) = &new.handover {
            rollout.spec.settings = self.settings_of(to).cloned().unwrap_or_default();
        }
        let rollout = requests::create(&self.rollout_api, &rollout).await?;
        match &new.handover {
            None => {
                tracing::info!(rollout = rollout.name_any(), profile = %profile.name, "a profile has a new revision");
            }
            Some(to) => tracing::info!(
                rollout = rollout.name_any(), profile = %profile.name, %to,
                "the profile is being deleted; its nodes are handed over"
            ),
        }
        self.rollouts.put(rollout);
        Ok(())
    }

    /// A profile with a rollout stays until no node has its settings.
    async fn keep_profile(&mut self, object: ProxyProfile) -> Result<ProxyProfile, kube::Error> {
        if object.finalizers().iter().any(|known| known == FINALIZER) {
            return Ok(object);
        }
        let object = requests::set_finalizer(&self.profile_api, &object, true).await?;
        self.profiles.put(object.clone());
        Ok(object)
    }

    /// Decides about every rollout that is under way or has nodes, stores the decisions, and returns what follows.
    async fn decide(&mut self, facts: &mut Facts) -> Moves {
        let mut moves = Moves::new();
        let names: Vec<String> = self.rollouts.iter().map(ProxyRollout::name_any).collect();
        for name in names {
            let Some(object) = self.rollouts.get(&name).cloned() else { continue };
            let Some(past) = convert::past(&object) else {
                self.ignore(object, facts.now).await;
                continue;
            };
            // The counts of one that is over are right, and no row is to be returned.
            let counted = object.status.as_ref().map_or(0, |status| status.progress.touched_nodes);
            if past.state.is_final() && counted == 0 && !facts.named(&past.target) {
                continue;
            }
            if !self.may_ask(&name) {
                continue;
            }
            let superseded = superseded(&past, &facts.past, &facts.profiles);
            let stable = facts.stable(&past.target.profile);
            let rollout = convert::rollout(&object, stable, superseded, facts.now);
            let decision = decide(&rollout, &facts.fleet, facts.now);
            if self.store(object, &rollout, &decision, facts.now).await {
                facts.set_state(&rollout.target, decision.progress.state);
                moves.extend(decision.moves);
            }
        }
        moves
    }

    /// Stores a decision and tells people. False: nothing may follow from it.
    async fn store(
        &mut self,
        object: ProxyRollout,
        rollout: &Rollout,
        decision: &Decision,
        now: Time,
    ) -> bool {
        let status = convert::status(&object, rollout, decision, now);
        if object.status.as_ref() == Some(&status) {
            return true;
        }
        let span = span!(
            "switchtower.rollout.decide",
            switchtower.rollout = rollout_name(&rollout.target),
            switchtower.rollout.state = &*status.state,
            switchtower.nodes.moved = i64::try_from(decision.moves.len()).unwrap_or(i64::MAX),
        );
        if !self.write_status(object, status).instrument(span.clone()).await {
            spans::failed(&span, &"the decision could not be stored; the next round decides anew");
            return false;
        }
        self.metrics.decided(&rollout.progress, &decision.progress, decision.status.touched);
        if let Some(object) = self.rollouts.get(&rollout_name(&rollout.target)) {
            for transition in &decision.transitions {
                self.announcer.announce(object, transition);
            }
        }
        true
    }

    async fn write_status(&mut self, mut object: ProxyRollout, status: ProxyRolloutStatus) -> bool {
        object.status = Some(status);
        match requests::write_status(&self.rollout_api, &object).await {
            Ok(object) => {
                self.rollouts.put(object);
                true
            }
            Err(error) => {
                // The next round decides on what somebody else wrote.
                if !requests::is_race(&error) {
                    self.request_failed(&object.name_any(), &error);
                }
                false
            }
        }
    }

    /// A rollout that somebody made by hand moves nothing.
    async fn ignore(&mut self, object: ProxyRollout, now: Time) {
        let message = "not created by the controller: it moves no node. Change a ProxyProfile instead";
        let condition = |kind, status| switchtower_core::rollout::Condition {
            kind,
            status,
            reason: "NotOwned",
            message: message.to_owned(),
        };
        let previous = object.status.clone().unwrap_or_default();
        let conditions =
            [condition("Ready", "False"), condition("Reconciling", "False"), condition("Stalled", "True")];
        let generation = object.metadata.generation;
        let status = ProxyRolloutStatus {
            observed_generation: generation,
            state: "Ignored".to_owned(),
            conditions: convert::conditions(&conditions, &previous.conditions, generation, now),
            ..ProxyRolloutStatus::default()
        };
        if previous != status {
            self.write_status(object, status).await;
        }
    }

    /// The settings of a revision: of its rollout, or as another one's fallback.
    fn settings_of(&self, revision: &Revision) -> Option<&ProxySettings> {
        let owned = || self.rollouts.iter().filter(|object| convert::owner(object).is_some());
        let rollout = owned().find(|object| convert::target(&object.spec) == *revision);
        rollout.map(|object| &object.spec.settings).or_else(|| {
            let other = owned().find(|object| convert::fallback(&object.spec) == *revision);
            other.map(|object| &object.spec.fallback.settings)
        })
    }

    /// Gives the fleet every revision that a row names or a rollout moves, and every node what its row names.
    pub(super) fn serve(&mut self) {
        let base = self.fleet.builtin_settings();
        let mut named: BTreeMap<SettingsName, Settings> = BTreeMap::new();
        for object in self.rollouts.iter() {
            let Some(past) = convert::past(object) else { continue };
            let content = match past.state {
                // What is proved is in force at once.
                switchtower_core::rollout::State::Complete => {
                    settings::settings(base, &past.target, &object.spec.settings)
                }
                _ => settings::on_trial(base, &past.target, &object.spec),
            };
            named.insert((past.target.profile.clone(), past.target.number), content);
        }
        // Nodes can return to what has no rollout any more.
        for object in self.rollouts.iter().filter(|object| convert::owner(object).is_some()) {
            let fallback = convert::fallback(&object.spec);
            if !fallback.is_builtin() {
                let content = || settings::settings(base, &fallback, &object.spec.fallback.settings);
                named.entry((fallback.profile.clone(), fallback.number)).or_insert_with(content);
            }
        }
        let stored = self.assignments.stored();
        let rows: Vec<_> = stored.iter().map(|(node, profile)| (node, convert::assigned(profile))).collect();
        // A revision that nothing describes any more keeps the settings that it had.
        for (_, Assignment { revision, .. }) in &rows {
            let name = (revision.profile.clone(), revision.number);
            if let (false, Some(settings)) = (named.contains_key(&name), self.served.get(&name)) {
                named.insert(name, settings.clone());
            }
        }
        let mut assignments = Vec::new();
        let mut told = HashMap::with_capacity(self.nodes.len());
        let mut tell = |node: &Arc<str>, revision: Revision, trace: Option<u128>| {
            let settings = (revision.profile.clone(), revision.number);
            assignments.push(SettingsAssignment { node: node.clone(), settings, trace });
            let known = self.told.get(node).filter(|(known, _)| *known == revision);
            let since = known.map_or_else(Instant::now, |(_, since)| *since);
            told.insert(node.clone(), (revision, since));
        };
        for (node, Assignment { revision, trace, .. }) in &rows {
            let known =
                revision.is_builtin() || named.contains_key(&(revision.profile.clone(), revision.number));
            let revision = if known { revision.clone() } else { self.instead_of(revision) };
            tell(node, revision, u128::from_str_radix(trace, 16).ok());
        }
        let with_row: HashSet<&Arc<str>> = rows.iter().map(|(node, _)| *node).collect();
        for node in self.nodes.keys().filter(|node| !with_row.contains(*node)) {
            tell(node, Revision::builtin(), None);
        }
        self.fleet.set_settings(&named);
        self.fleet.assign_settings(assignments);
        (self.served, self.told) = (named, told);
        self.note_unknown(rows.into_iter().map(|(node, assignment)| (node.clone(), assignment.revision)));
    }

    /// What a node gets whose row names a revision of which this process knows nothing: what is stable in its profile.
    fn instead_of(&self, revision: &Revision) -> Revision {
        let past: Vec<_> = self.rollouts.iter().filter_map(convert::past).collect();
        let stable = stable(&revision.profile, &past);
        if self.settings_of(&stable).is_some() { stable } else { Revision::builtin() }
    }

    /// Notes which rows name revisions that no rollout describes, and tells people of new ones.
    fn note_unknown(&mut self, rows: impl Iterator<Item = (Arc<str>, Revision)>) {
        let described: HashSet<Revision> = self
            .rollouts
            .iter()
            .filter(|object| convert::owner(object).is_some())
            .flat_map(|object| [convert::target(&object.spec), convert::fallback(&object.spec)])
            .collect();
        let unknown: HashMap<_, _> =
            rows.filter(|(_, revision)| !revision.is_builtin() && !described.contains(revision)).collect();
        for (node, revision) in &unknown {
            if self.unknown.get(node) != Some(revision) {
                let told = self.told.get(node).map(|(told, _)| told.to_string()).unwrap_or_default();
                tracing::error!(
                    %node, %revision, settings = told,
                    "the node's row names a revision that no ProxyRollout describes; the node keeps the settings it \
                     has had from this controller, or gets the stable ones"
                );
            }
        }
        self.unknown = unknown;
    }
}

/// What rows should name where no rollout decides; and the same once more where only the time is wrong.
fn settle(facts: &Facts, moves: &mut Moves) {
    let profiles = !facts.profiles.is_empty();
    let stable: BTreeMap<Arc<str>, (Revision, bool)> = facts
        .profiles
        .iter()
        .map(|profile| (profile.name.clone(), (facts.stable(&profile.name), facts.active(&profile.name))))
        .collect();
    let mut orphans = handover::orphans_at_once(&facts.fleet);
    let deleting = |name: &Arc<str>| facts.profile(name).is_some_and(|profile| profile.deleting);
    for node in &facts.fleet {
        // A handover has it in this round. What follows if that is over now is decided in the next one.
        if node.profile.as_ref().is_some_and(deleting) {
            continue;
        }
        let winner = node
            .profile
            .as_ref()
            .and_then(|profile| stable.get(profile).map(|(stable, active)| (&**profile, stable, *active)));
        let again = node
            .assigned
            .as_ref()
            .filter(|assigned| lies_ahead(assigned, facts.now) && facts.is_under_way(&assigned.revision));
        let again = again.map(|assigned| assigned.revision.clone());
        let handed_over = handover::handed_over(node, &facts.profiles, &facts.past, &facts.fleet);
        let orphaned = || handover::orphaned(node, &facts.profiles, &facts.past);
        let wanted = settled(node.assigned.as_ref(), winner, profiles).or(handed_over).or_else(orphaned);
        if node.unknown && wanted.is_some() {
            // Nobody rolls anything out here, so that this is what keeps all of them from changing at once.
            if orphans == 0 || health(node, facts.now) != Health::Healthy {
                continue;
            }
            orphans -= 1;
        }
        if let Some(revision) = wanted.or(again) {
            moves.entry(node.name.clone()).or_insert(revision);
        }
    }
}

/// Name of the ProxyRollout of a revision.
pub(super) fn rollout_name(target: &Revision) -> String {
    format!("{}-{}", target.profile, target.number)
}

/// Labels and annotations of the profile are not copied: deployment tools take an object that carries their marks for
/// one of theirs.
fn new_rollout(profile: &ProxyProfile, new: &NewRevision, fallback: RolloutFallback) -> ProxyRollout {
    let name = profile.name_any();
    let owner = OwnerReference {
        api_version: ProxyProfile::api_version(&()).into_owned(),
        kind: ProxyProfile::kind(&()).into_owned(),
        name: name.clone(),
        uid: profile.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: None,
    };
    let mut strategy = profile.spec.strategy.clone().unwrap_or_default();
    if strategy.steps.is_empty() {
        strategy.steps = convert::default_steps();
    }
    let mut change_cause = profile.spec.change_cause.clone().unwrap_or_default();
    if let Some(to) = &new.handover {
        strategy.steps = convert::handover_steps(&strategy.steps);
        change_cause = format!("{name} is being deleted; its nodes go to {to}");
    }
    ProxyRollout {
        metadata: ObjectMeta {
            name: Some(format!("{name}-{}", new.number)),
            owner_references: Some(vec![owner]),
            finalizers: Some(vec![FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: ProxyRolloutSpec {
            profile: name,
            revision: convert::api_number(new.number),
            hash: new.hash.clone(),
            change_cause,
            settings: profile.spec.settings.clone(),
            fallback,
            strategy,
            handover: new.handover.as_ref().map(|to| api::Handover {
                profile: to.profile.to_string(),
                revision: convert::api_number(to.number),
            }),
            ..ProxyRolloutSpec::default()
        },
        status: None,
    }
}
