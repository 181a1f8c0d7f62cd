//! Deletes rollouts and releases finalizers that are no longer needed.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::ResourceExt as _;
use switchtower_core::rollout::profile::Past;
use switchtower_crds::{ProxyProfile, ProxyRollout};

use super::facts::Facts;
use super::{FINALIZER, Rollouts, convert, is_deleting, requests};

/// Number of unneeded finished rollouts that are kept per profile as history.
const HISTORY: usize = 10;

impl Rollouts {
    pub(super) async fn clean(&mut self, facts: &Facts) {
        let mut spare: BTreeMap<Arc<str>, Vec<(u64, ProxyRollout)>> = BTreeMap::new();
        for object in self.rollouts.iter() {
            // Rollouts that were created by hand are not ours to delete.
            let Some(past) = convert::past(object) else { continue };
            if !is_needed(&past, facts) {
                spare
                    .entry(past.target.profile.clone())
                    .or_default()
                    .push((past.target.number, object.clone()));
            }
        }
        for rollouts in spare.values_mut() {
            rollouts.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
            for (at, (_, object)) in rollouts.iter().enumerate() {
                self.release(object, at >= HISTORY).await;
            }
        }
        let leaving: Vec<ProxyProfile> =
            self.profiles.iter().filter(|object| is_deleting(object)).cloned().collect();
        for object in leaving {
            let name = object.name_any();
            if self.may_request(&name)
                && facts.holders(&name) == 0
                && !facts.active(&name)
                && object.finalizers().iter().any(|known| known == FINALIZER)
            {
                let released = requests::set_finalizer(&self.profile_api, &object, false).await;
                self.handle_result(&name, released.map(drop));
            }
        }
    }

    /// Deletes a rollout that is too old, or releases one that is being deleted.
    async fn release(&mut self, object: &ProxyRollout, too_old: bool) {
        if !self.may_request(&object.name_any()) {
            return;
        }
        let deleting = object.metadata.deletion_timestamp.is_some();
        let kept = object.finalizers().iter().any(|known| known == FINALIZER);
        if too_old && !deleting {
            let deleted = requests::delete(&self.rollout_api, object).await;
            self.handle_result(&object.name_any(), deleted);
        } else if deleting && kept {
            let released = requests::set_finalizer(&self.rollout_api, object, false).await;
            self.handle_result(&object.name_any(), released.map(drop));
        }
    }

    fn handle_result(&mut self, object: &str, result: Result<(), kube::Error>) {
        match result {
            Err(error) if !requests::is_race(&error) => self.request_failed(object, &error),
            _ => {}
        }
    }
}

/// Returns true if the settings or the result of a rollout still matter: it is active, a row names it, its profile
/// returns to it, or it records that the profile's present revision was tried.
fn is_needed(past: &Past, facts: &Facts) -> bool {
    let profile = facts.profile(&past.target.profile).filter(|profile| profile.uid == past.owner);
    let latest = profile.is_some()
        && !facts
            .past
            .iter()
            .any(|other| other.owner == past.owner && other.target.number > past.target.number);
    let stable =
        facts.profile(&past.target.profile).is_some() && facts.stable(&past.target.profile) == past.target;
    let leaving = profile.is_some_and(|profile| profile.deleting) && facts.holders(&past.target.profile) == 0;
    // Nodes may have returned to a revision whose own rollout was deleted.
    let described_here =
        facts.named(&past.fallback) && !facts.past.iter().any(|other| other.target == past.fallback);
    let had = facts.named(&past.target) || facts.remembered(&past.target);
    !past.state.is_final() || had || described_here || ((latest || stable) && !leaving)
}
