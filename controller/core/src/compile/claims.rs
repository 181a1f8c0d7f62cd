//! Arbitrates addresses, protocols and ports that several Services claim.
//!
//! The kind of address decides first, so that an older Service cannot capture a later Service's ClusterIP by
//! an externalIP; then age, namespace and name, UID. The loser takes over when the winner goes.
//!
//! An external address that is a Node's address also competes with node ports of the same number: there the node
//! port wins. No Service gets an address and port of the control plane ([`Reserved`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use switchtower_proto::v1::{Frontend, FrontendKey, FrontendKind, Protocol};

use super::emit::Emitter;
use super::reserved::{ControlPlane, Owner, Reserved};
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

/// Why a claimant does not get what it claims.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cause {
    /// This Service comes first.
    Service(ObjectKey),
    /// The control plane needs it.
    Reserved(Owner),
}

/// Losers with a reported conflict, and the cause.
#[derive(Debug)]
struct ReportedConflict {
    cause: Cause,
    losers: BTreeSet<ObjectKey>,
}

/// The claim that wins a key.
enum Claim<'a> {
    Served(&'a Rank, &'a Frontend),
    /// A node port of this Service covers it.
    NodePort(&'a ObjectKey),
    Reserved(Owner),
}

#[derive(Debug, Default)]
pub(super) struct Claims {
    claimants: BTreeMap<FrontendKey, BTreeMap<Rank, Frontend>>,
    /// Published frontends of the keys that changed since the last settlement.
    touched: BTreeMap<FrontendKey, Option<Frontend>>,
    reported: BTreeMap<FrontendKey, ReportedConflict>,
    reserved: Reserved,
    /// Keys that are claimed as external addresses, by address.
    external: BTreeMap<IpAddr, BTreeSet<FrontendKey>>,
    /// Those of them at Nodes' addresses, by the key of the node port of the same number.
    on_nodes: BTreeMap<FrontendKey, BTreeSet<FrontendKey>>,
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
            self.index(frontend_key);
        }
    }

    /// Replaces the reserved endpoints of a part of the control plane.
    pub(super) fn reserve(&mut self, part: ControlPlane, endpoints: BTreeSet<SocketAddr>) {
        let changed: Vec<_> =
            self.reserved.endpoints(part).symmetric_difference(&endpoints).copied().collect();
        for endpoint in changed {
            let key = FrontendKey {
                family: wire::family(endpoint.ip()).into(),
                address: wire::octets(endpoint.ip()),
                protocol: Protocol::Tcp.into(),
                port: endpoint.port().into(),
            };
            self.touch(&node_port(&key));
            self.touch(&key);
        }
        self.reserved.set_endpoints(part, endpoints);
    }

    /// Takes note of a Node's addresses before and after a change.
    pub(super) fn nodes_changed(&mut self, old: &[IpAddr], new: &[IpAddr]) {
        let differing = old.iter().filter(|address| !new.contains(address));
        let differing: Vec<_> =
            differing.chain(new.iter().filter(|address| !old.contains(address))).collect();
        for address in &differing {
            let family = wire::family(**address);
            for port in self.reserved.node_ports(family) {
                let (family, protocol) = (family.into(), Protocol::Tcp.into());
                self.touch(&FrontendKey { family, address: Vec::new(), protocol, port: port.into() });
            }
            for key in self.external.get(*address).cloned().unwrap_or_default() {
                self.touch(&key);
            }
        }
        for address in old.iter().filter(|address| !new.contains(address)) {
            self.reserved.remove_node(*address);
        }
        for address in new.iter().filter(|address| !old.contains(address)) {
            self.reserved.add_node(*address);
        }
        for address in differing {
            for key in self.external.get(address).cloned().unwrap_or_default() {
                self.index(&key);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn touched(&self) -> usize {
        self.touched.len()
    }

    fn winning_claim(&self, key: &FrontendKey) -> Option<Claim<'_>> {
        let claimants = self.claimants.get(key)?;
        let (rank, frontend) = claimants.first_key_value()?;
        if frontend.kind() == FrontendKind::ClusterIp {
            return Some(Claim::Served(rank, frontend));
        }
        if let Some(owner) = self.reserved.owner(key) {
            return Some(Claim::Reserved(owner));
        }
        let Some(other) = self.node_port_at(key) else { return Some(Claim::Served(rank, frontend)) };
        // The owner of the node port may claim the address too: then both lead to it.
        let own = claimants.iter().find(|(rank, _)| rank.service == *other);
        Some(own.map_or(Claim::NodePort(other), |(rank, frontend)| Claim::Served(rank, frontend)))
    }

    /// The Service whose node port is served at an external address, which then is a Node's.
    fn node_port_at(&self, key: &FrontendKey) -> Option<&ObjectKey> {
        wire::address(&key.address).filter(|address| self.reserved.is_node(*address))?;
        let node_port = node_port(key);
        let (rank, _) = self.claimants.get(&node_port)?.first_key_value()?;
        self.reserved.owner(&node_port).is_none().then_some(&rank.service)
    }

    fn winner(&self, key: &FrontendKey) -> Option<&Frontend> {
        match self.winning_claim(key)? {
            Claim::Served(_, frontend) => Some(frontend),
            Claim::NodePort(_) | Claim::Reserved(_) => None,
        }
    }

    /// Remembers what was published for a key whose claims change, and for what depends on them.
    fn touch(&mut self, key: &FrontendKey) {
        let covered = self.on_nodes.get(key).into_iter().flatten();
        for key in std::iter::once(key).chain(covered).cloned().collect::<Vec<_>>() {
            if !self.touched.contains_key(&key) {
                let published = self.winner(&key).cloned();
                self.touched.insert(key, published);
            }
        }
    }

    fn withdraw(&mut self, key: &FrontendKey, service: &ObjectKey) {
        if let Some(claimants) = self.claimants.get_mut(key) {
            claimants.retain(|rank, _| rank.service != *service);
            if claimants.is_empty() {
                self.claimants.remove(key);
            }
            self.index(key);
        }
    }

    /// Keeps the indexes of external addresses.
    fn index(&mut self, key: &FrontendKey) {
        let Some(address) = wire::address(&key.address) else { return };
        let claimants = self.claimants.get(key).into_iter().flatten();
        let external = claimants.into_iter().any(|(_, frontend)| frontend.kind() != FrontendKind::ClusterIp);
        keep(&mut self.external, address, key, external);
        keep(&mut self.on_nodes, node_port(key), key, external && self.reserved.is_node(address));
    }

    /// Publishes the winners of the keys that changed, and reports conflicts to the losers.
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
        let (cause, winner) = match self.winning_claim(key) {
            None => {
                self.reported.remove(key);
                return;
            }
            Some(Claim::Served(rank, _)) => (Cause::Service(rank.service.clone()), Some(&rank.service)),
            Some(Claim::NodePort(service)) => (Cause::Service(service.clone()), None),
            Some(Claim::Reserved(owner)) => (Cause::Reserved(owner), None),
        };
        let claimants = self.claimants.get(key).into_iter().flatten().map(|(rank, _)| &rank.service);
        let losers: BTreeSet<_> = claimants.filter(|service| Some(*service) != winner).cloned().collect();
        // A loser to another winner gets a new Event: the previous one names the wrong Service.
        let reported = self.reported.remove(key).filter(|reported| reported.cause == cause);
        let reported = reported.map(|reported| reported.losers).unwrap_or_default();
        for loser in losers.difference(&reported) {
            let (reason, message) = explain(key, &cause);
            emitter.problem(Problem { object: ProblemObject::Service(loser.clone()), reason, message });
        }
        if !losers.is_empty() {
            self.reported.insert(key.clone(), ReportedConflict { cause, losers });
        }
    }
}

/// Adds or removes one member of an index.
fn keep<K: Ord>(index: &mut BTreeMap<K, BTreeSet<FrontendKey>>, at: K, key: &FrontendKey, present: bool) {
    if present {
        index.entry(at).or_default().insert(key.clone());
    } else if let Some(keys) = index.get_mut(&at) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(&at);
        }
    }
}

/// The key of the node port with the family, protocol and port of `key`.
fn node_port(key: &FrontendKey) -> FrontendKey {
    FrontendKey { address: Vec::new(), ..key.clone() }
}

fn explain(key: &FrontendKey, cause: &Cause) -> (ProblemReason, String) {
    let what = describe(key);
    match cause {
        Cause::Service(ObjectKey { namespace, name }) => (
            ProblemReason::AddressConflict,
            format!(
                "{what} is already used by Service {namespace}/{name}, which comes first; this Service takes over \
                 when that one gives it up"
            ),
        ),
        Cause::Reserved(owner) => (
            ProblemReason::ControlPlaneAddress,
            format!(
                "{what} belongs to {owner} and is not served for this Service, or nodes would lose their control \
                 plane; use another address or port. The rest of the Service is served"
            ),
        ),
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
