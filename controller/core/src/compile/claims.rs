//! Who gets an address, protocol and port that several Services claim.
//!
//! The kind of address decides first, so that an older Service cannot capture a later Service's ClusterIP by
//! an externalIP; then age, namespace and name, UID. The loser takes over when the winner goes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use switchtower_proto::v1::{Frontend, FrontendKey, FrontendKind, Protocol};

use super::emit::Emitter;
use crate::compiled::{Problem, ProblemObject, ProblemReason};
use crate::model::{ObjectKey, Service};
use crate::wire;

/// The order of claimants; the least wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    kind: u8,
    created: i64,
    service: ObjectKey,
    uid: Arc<str>,
}

impl Rank {
    fn of(service: &Service, frontend: &Frontend) -> Self {
        let kind = match frontend.kind() {
            FrontendKind::ClusterIp | FrontendKind::NodePort => 0,
            FrontendKind::LoadBalancer => 1,
            FrontendKind::ExternalIp | FrontendKind::Unspecified => 2,
        };
        Rank { kind, created: service.created, service: service.key.clone(), uid: service.uid.clone() }
    }
}

#[derive(Debug)]
struct Told {
    winner: ObjectKey,
    losers: BTreeSet<ObjectKey>,
}

#[derive(Debug, Default)]
pub(super) struct Claims {
    claimants: BTreeMap<FrontendKey, BTreeMap<Rank, Frontend>>,
    /// What was published for the keys that changed since the last settlement.
    touched: BTreeMap<FrontendKey, Option<Frontend>>,
    /// Losers that were told, and of which winner.
    told: BTreeMap<FrontendKey, Told>,
}

impl Claims {
    /// Replaces the claims of one Service.
    pub(super) fn update(
        &mut self,
        service: Option<&Service>,
        key: &ObjectKey,
        old: &BTreeMap<FrontendKey, Frontend>,
        new: &BTreeMap<FrontendKey, Frontend>,
    ) {
        for gone in old.keys().filter(|frontend| !new.contains_key(*frontend)) {
            self.touch(gone);
            self.withdraw(gone, key);
        }
        let Some(service) = service else { return };
        for (frontend_key, frontend) in new {
            let rank = Rank::of(service, frontend);
            let known = self.claimants.get(frontend_key).and_then(|claimants| claimants.get(&rank));
            if known == Some(frontend) {
                continue;
            }
            self.touch(frontend_key);
            self.withdraw(frontend_key, key);
            self.claimants.entry(frontend_key.clone()).or_default().insert(rank, frontend.clone());
        }
    }

    fn winner(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.claimants.get(key)?.values().next()
    }

    fn touch(&mut self, key: &FrontendKey) {
        if !self.touched.contains_key(key) {
            let published = self.winner(key).cloned();
            self.touched.insert(key.clone(), published);
        }
    }

    fn withdraw(&mut self, key: &FrontendKey, service: &ObjectKey) {
        if let Some(claimants) = self.claimants.get_mut(key) {
            claimants.retain(|rank, _| rank.service != *service);
            if claimants.is_empty() {
                self.claimants.remove(key);
            }
        }
    }

    /// Publishes the winners of the keys that changed, and tells the losers.
    pub(super) fn settle(&mut self, emitter: &mut Emitter) {
        for (key, published) in std::mem::take(&mut self.touched) {
            self.tell_losers(&key, emitter);
            match (published, self.winner(&key)) {
                (Some(_), None) => emitter.frontend_removed(key),
                (published, Some(winner)) if published.as_ref() != Some(winner) => {
                    emitter.frontend(winner.clone());
                }
                _ => {}
            }
        }
    }

    fn tell_losers(&mut self, key: &FrontendKey, emitter: &mut Emitter) {
        let empty = BTreeMap::new();
        let mut claimants = self.claimants.get(key).unwrap_or(&empty).keys();
        let Some(winner) = claimants.next() else {
            self.told.remove(key);
            return;
        };
        let losers: BTreeSet<_> = claimants.map(|rank| rank.service.clone()).collect();
        // Who was told of another winner is told again: that Event sends its reader to the wrong Service.
        let told = self.told.remove(key).filter(|told| told.winner == winner.service);
        let told = told.map(|told| told.losers).unwrap_or_default();
        for loser in losers.difference(&told) {
            let message = format!(
                "{} is already used by Service {}/{}, which comes first; this Service takes over when that one \
                 gives it up",
                describe(key),
                winner.service.namespace,
                winner.service.name
            );
            let object = ProblemObject::Service(loser.clone());
            emitter.problem(Problem { object, reason: ProblemReason::AddressConflict, message });
        }
        if !losers.is_empty() {
            self.told.insert(key.clone(), Told { winner: winner.service.clone(), losers });
        }
    }
}

/// "10.96.0.10:80/TCP", "node port 30080/UDP".
fn describe(key: &FrontendKey) -> String {
    let protocol = match key.protocol() {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
        Protocol::Unspecified => "?",
    };
    match wire::address(&key.address) {
        Some(address) => format!("{}/{protocol}", std::net::SocketAddr::new(address, key.port as u16)),
        None => format!("node port {}/{protocol}", key.port),
    }
}
