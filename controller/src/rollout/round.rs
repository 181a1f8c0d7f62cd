//! One round of decisions.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ObjectMeta;
use kube::{Resource as _, ResourceExt as _};
use switchtower_admin_api::{ConditionType, RolloutReason};
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
use super::{DESCRIBED_WITHIN, FINALIZER, RETRY, Refused, Rollouts, convert, requests, settings};
use crate::fleet::{SettingsAssignment, SettingsName};
use crate::propagation::new_trace;

/// A revision that needs a ProxyRollout.
struct NewRevision {
    number: u64,
    hash: String,
    /// Revision that takes over the nodes of a deleted profile.
    handover: Option<Revision>,
}

/// New revisions by node.
type Moves = BTreeMap<Arc<str>, Revision>;

impl Rollouts {
    /// Decides about all profiles and rollouts and carries the decisions out.
    pub(super) async fn round(&mut self) {
        if !self.under_way() {
            self.clock.set();
        }
        // Serve the assigned settings first: no request may delay them.
        let began = Instant::now();
        self.serve();
        self.others.refresh().await;
        let mut facts = self.facts();
        self.reading = began.elapsed();
        if self.create_revisions(&facts).await {
            facts = self.facts();
        }
        let mut moves = self.decide(&mut facts).await;
        // Publish the settings of new rollouts before rows name them.
        self.serve();
        settle(&facts, &mut moves);
        // All moves of a round to one revision share a trace.
        let mut traces: BTreeMap<Revision, u128> = BTreeMap::new();
        let requested = facts.fleet.iter().filter_map(|node| {
            let revision = moves.get(&node.name)?;
            let trace = *traces.entry(revision.clone()).or_insert_with(|| new_trace().trace);
            let previous = origin(node.assigned.as_ref(), revision, &facts.past);
            Some((node.name.clone(), convert::assignment(revision, trace, previous.as_ref(), facts.now)))
        });
        self.assignments.request(requested.collect());
        self.write_profiles(&facts).await;
        self.clean(&facts).await;
        self.metrics.publish(self.rollouts.iter());
    }

    /// Creates the ProxyRollouts of new revisions. Returns true if it created one.
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
            let refused = self.refused.get(&name).is_some_and(|refused| refused.retry_at > Instant::now());
            if refused || !self.may_request(&name) {
                continue;
            }
            let number = revision.number;
            let span = span!(
                "switchtower.rollout.create",
                switchtower.profile = name,
                switchtower.profile.revision = convert::api_number(number)
            );
            let result = self.create_revision(profile, revision, facts).instrument(span.clone()).await;
            let Err(error) = result else {
                self.refused.remove(&name);
                created = true;
                continue;
            };
            spans::failed(&span, &error);
            if requests::is_race(&error) {
                tracing::debug!(%error, profile = name, "the ProxyRollout was not created because of a conflicting change; waiting for the watch");
            } else if let Some(message) = requests::refusal(&error) {
                let known = self.refused.get(&name).is_some_and(|known| known.message == message);
                if !known {
                    tracing::error!(
                        profile = name,
                        message,
                        "the API server refuses the profile's ProxyRollout"
                    );
                }
                self.refused.insert(name, Refused { message, retry_at: Instant::now() + RETRY });
            } else {
                self.request_failed(&name, &error);
            }
        }
        created
    }

    /// Creates the ProxyRollout of a new revision, with its number or the next one whose name is free.
    async fn create_revision(
        &mut self,
        profile: &Profile,
        mut new: NewRevision,
        facts: &Facts,
    ) -> Result<(), kube::Error> {
        let Some(object) = self.profiles.get(&profile.name).cloned() else { return Ok(()) };
        let object = self.keep_profile(object).await?;
        let revision = |number| Revision { profile: profile.name.clone(), number };
        // A user may have created an object of that name.
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
                tracing::info!(rollout = rollout.name_any(), profile = %profile.name, "created a rollout for the new revision of a profile");
            }
            Some(to) => tracing::info!(
                rollout = rollout.name_any(), profile = %profile.name, %to,
                "created a rollout that hands over the nodes of a deleted profile"
            ),
        }
        self.rollouts.put(rollout);
        Ok(())
    }

    /// Adds the finalizer, which keeps a profile until no node has its settings.
    async fn keep_profile(&mut self, object: ProxyProfile) -> Result<ProxyProfile, kube::Error> {
        if object.finalizers().iter().any(|known| known == FINALIZER) {
            return Ok(object);
        }
        let object = requests::set_finalizer(&self.profile_api, &object, true).await?;
        self.profiles.put(object.clone());
        Ok(object)
    }

    /// Decides about every rollout that is active or has nodes, stores the decisions, and returns the moves.
    async fn decide(&mut self, facts: &mut Facts) -> Moves {
        let mut moves = Moves::new();
        let names: Vec<String> = self.rollouts.iter().map(ProxyRollout::name_any).collect();
        for name in names {
            let Some(object) = self.rollouts.get(&name).cloned() else { continue };
            let Some(past) = convert::past(&object) else {
                self.ignore(object, facts.now).await;
                continue;
            };
            // A finished rollout without nodes needs neither new counts nor moves.
            let counted = object.status.as_ref().map_or(0, |status| status.progress.touched_nodes);
            if past.state.is_final() && counted == 0 && !facts.named(&past.target) {
                continue;
            }
            if !self.may_request(&name) {
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

    /// Stores a decision and reports its transitions. Returns true if the decision is stored: only then may its moves be
    /// carried out.
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
            spans::failed(&span, &"the decision could not be stored; the next round decides again");
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
                // The next round decides on the object that another client wrote.
                if !requests::is_race(&error) {
                    self.request_failed(&object.name_any(), &error);
                }
                false
            }
        }
    }

    /// Reports that a rollout that was created by hand is ignored.
    async fn ignore(&mut self, object: ProxyRollout, now: Time) {
        let message =
            "the controller did not create this object and ignores it; change a ProxyProfile instead";
        let condition = |kind, holds| switchtower_core::rollout::Condition {
            kind,
            holds,
            reason: RolloutReason::NotOwned.as_str(),
            message: message.to_owned(),
        };
        let previous = object.status.clone().unwrap_or_default();
        let conditions = [
            condition(ConditionType::Ready, false),
            condition(ConditionType::Reconciling, false),
            condition(ConditionType::Stalled, true),
        ];
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

    /// Returns the settings of a revision, from its rollout or from the fallback of another one.
    fn settings_of(&self, revision: &Revision) -> Option<&ProxySettings> {
        let owned = || self.rollouts.iter().filter(|object| convert::owner(object).is_some());
        let rollout = owned().find(|object| convert::target(&object.spec) == *revision);
        rollout.map(|object| &object.spec.settings).or_else(|| {
            let other = owned().find(|object| convert::fallback(&object.spec) == *revision);
            other.map(|object| &object.spec.fallback.settings)
        })
    }

    /// Returns the settings of all revisions that a rollout describes.
    fn described_settings(&self) -> BTreeMap<SettingsName, Settings> {
        let base = self.fleet.builtin_settings();
        let mut named: BTreeMap<SettingsName, Settings> = BTreeMap::new();
        for object in self.rollouts.iter() {
            let Some(past) = convert::past(object) else { continue };
            let content = match past.state {
                // Completed revisions need no trial.
                switchtower_core::rollout::State::Complete => {
                    settings::settings(base, &past.target, &object.spec.settings)
                }
                _ => settings::on_trial(base, &past.target, &object.spec),
            };
            named.insert((past.target.profile.clone(), past.target.number), content);
        }
        // Nodes can return to a revision whose rollout was deleted.
        for object in self.rollouts.iter().filter(|object| convert::owner(object).is_some()) {
            let fallback = convert::fallback(&object.spec);
            if !fallback.is_builtin() {
                let content = || settings::settings(base, &fallback, &object.spec.fallback.settings);
                named.entry((fallback.profile.clone(), fallback.number)).or_insert_with(content);
            }
        }
        named
    }

    /// Serves the settings of all assigned and active revisions, and each node its assigned revision.
    pub(super) fn serve(&mut self) {
        let mut named = self.described_settings();
        let stored = self.assignments.stored();
        let rows: Vec<_> = stored.iter().map(|(node, profile)| (node, convert::assigned(profile))).collect();
        // A revision that no object describes any more keeps its last settings.
        for (_, Assignment { revision, .. }) in &rows {
            let name = (revision.profile.clone(), revision.number);
            if let (false, Some(settings)) = (named.contains_key(&name), self.served_settings.get(&name)) {
                named.insert(name, settings.clone());
            }
        }
        let mut assignments = Vec::new();
        let mut served = HashMap::with_capacity(self.nodes.len());
        let mut serve = |node: &Arc<str>, revision: Revision, trace: Option<u128>| {
            let settings = (revision.profile.clone(), revision.number);
            assignments.push(SettingsAssignment { node: node.clone(), settings, trace });
            let known = self.served.get(node).filter(|(known, _)| *known == revision);
            let since = known.map_or_else(Instant::now, |(_, since)| *since);
            served.insert(node.clone(), (revision, since));
        };
        let described = |revision: &Revision| {
            revision.is_builtin() || named.contains_key(&(revision.profile.clone(), revision.number))
        };
        let undescribed =
            rows.iter().map(|(_, assignment)| &assignment.revision).filter(|revision| !described(revision));
        let now = Instant::now();
        let undescribed: HashMap<Revision, Instant> = undescribed
            .map(|revision| (revision.clone(), *self.undescribed.get(revision).unwrap_or(&now)))
            .collect();
        for (node, Assignment { revision, trace, .. }) in &rows {
            let revision = match (undescribed.get(revision), self.served.get(*node)) {
                (None, _) => revision.clone(),
                (Some(since), Some((served, _)))
                    if since.elapsed() < DESCRIBED_WITHIN && described(served) =>
                {
                    served.clone()
                }
                (Some(_), _) => self.instead_of(revision),
            };
            serve(node, revision, u128::from_str_radix(trace, 16).ok());
        }
        let with_row: HashSet<&Arc<str>> = rows.iter().map(|(node, _)| *node).collect();
        for node in self.nodes.keys().filter(|node| !with_row.contains(*node)) {
            serve(node, Revision::builtin(), None);
        }
        self.fleet.set_settings(&named);
        self.fleet.assign_settings(assignments);
        self.fleet.forget_settings(self.served.keys().filter(|node| !served.contains_key(*node)));
        (self.served_settings, self.served, self.undescribed) = (named, served, undescribed);
        self.report_unknown(rows.into_iter().map(|(node, assignment)| (node.clone(), assignment.revision)));
    }

    /// Returns the next time at which a node stops to keep its settings because its revision is not described.
    pub(super) fn undescribed_until(&self, now: Instant) -> Option<Instant> {
        self.undescribed.values().map(|since| *since + DESCRIBED_WITHIN).filter(|until| *until > now).min()
    }

    /// Returns the replacement of an unknown revision: the stable one of its profile.
    fn instead_of(&self, revision: &Revision) -> Revision {
        let past: Vec<_> = self.rollouts.iter().filter_map(convert::past).collect();
        let stable = stable(&revision.profile, &past);
        if self.settings_of(&stable).is_some() { stable } else { Revision::builtin() }
    }

    /// Records assigned revisions that no rollout describes, and logs new ones.
    fn report_unknown(&mut self, rows: impl Iterator<Item = (Arc<str>, Revision)>) {
        let described: HashSet<Revision> = self
            .rollouts
            .iter()
            .filter(|object| convert::owner(object).is_some())
            .flat_map(|object| [convert::target(&object.spec), convert::fallback(&object.spec)])
            .collect();
        let unknown = rows.filter(|(_, revision)| !revision.is_builtin() && !described.contains(revision));
        let awaited = |revision: &Revision| {
            self.undescribed.get(revision).is_some_and(|since| since.elapsed() < DESCRIBED_WITHIN)
        };
        let unknown: HashMap<_, _> = unknown.filter(|(_, revision)| !awaited(revision)).collect();
        for (node, revision) in &unknown {
            if self.unknown.get(node) != Some(revision) {
                let served = self.served.get(node).map(|(served, _)| served.to_string()).unwrap_or_default();
                tracing::error!(
                    %node, %revision, settings = served,
                    "no ProxyRollout describes the revision that is assigned to the node; the node keeps its last \
                     settings or gets the stable ones"
                );
            }
        }
        self.unknown = unknown;
    }
}

/// Adds the moves of nodes about which no rollout decides, and repeats assignments with a time in the future.
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
        // A handover decides about this node in this round; if it ends now, the next round decides.
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
            // No rollout limits these nodes, so limit here how many change at once.
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

/// Returns the name of a revision's ProxyRollout.
pub(super) fn rollout_name(target: &Revision) -> String {
    format!("{}-{}", target.profile, target.number)
}

/// Builds the ProxyRollout of a new revision. Labels and annotations of the profile are not copied: deployment tools
/// claim objects that carry their marks.
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
        change_cause = format!("{name} is being deleted; its nodes move to {to}");
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
