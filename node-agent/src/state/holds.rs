//! Removals held back by the delete budget.
//!
//! The layers stay exactly as received. A held item is one that the desired view no longer has and the kernel keeps: a
//! pool with the members that it had last, or a frontend. An update that exceeds the budget is held as a whole: all its
//! pools that would become empty and all its frontends that would vanish. Everything else in it is applied.
//!
//! A held item is released
//! * by the operator (`ReleaseHeld`);
//! * when the desired view has it again;
//! * when an address of it appears in a pool, or at a frontend, of another Service, because it may have a new owner;
//! * when the rest of its service port is removed within the budget.

mod stored;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use switchtower_proto::v1::{HealthCheck, HealthCheckKey, LayerKind, LocalEndpoint};

use super::budget::Budget;
use super::layer::Layer;
use super::merge::{Difference, FrontendStep, PoolStep, SPECIFIC_FIRST, UdpChanges};
use super::pack::{FrontendId, Interner, IpFamily, PackedEndpoint, PackedFrontend, PoolId, PoolRole, PortId};
use super::{KINDS, position};
use crate::kernel::change::KernelChange;
pub use stored::{HeldItem, StoredHolds};

/// Pool that keeps its last members.
pub(super) struct HeldPool {
    members: BTreeSet<PackedEndpoint>,
    /// Generation that would have removed it.
    since: u64,
}

/// Frontend that the view no longer has.
pub(super) struct HeldFrontend {
    pub(super) frontend: PackedFrontend,
    /// Generation that would have removed it.
    since: u64,
}

/// Effect of a release.
#[derive(Debug, Default)]
pub struct Released {
    /// Removals for the kernel.
    pub changes: Vec<KernelChange>,
    /// Work for the conntrack reconciler.
    pub(crate) udp: UdpChanges,
    /// Health checks answer differently.
    pub(crate) health_checks: bool,
}

/// An update at the moment of its application.
pub(super) struct Arriving<'a> {
    pub(super) before: &'a [Layer; KINDS.len()],
    pub(super) to: u64,
    /// There was no view before.
    pub(super) first: bool,
    pub(super) now: Instant,
}

/// Candidates for a release, noted before an update is applied.
#[derive(Default)]
pub(super) struct Traces {
    /// Addresses that appeared in pools.
    endpoints: Vec<(Vec<u8>, PortId)>,
    /// Frontends that appeared.
    frontends: Vec<(FrontendId, PortId)>,
    /// Service ports that lost a frontend.
    ports: BTreeSet<PortId>,
}

/// The held items and the budget that decides on them.
#[derive(Default)]
pub(super) struct Holds {
    /// Of the desired view: further removals after a hold are held, too.
    desired: Budget,
    /// Of what is present, with held items: one that returns and is removed again is no new item.
    present: Budget,
    pub(super) pools: BTreeMap<PoolId, HeldPool>,
    pub(super) frontends: BTreeMap<FrontendId, HeldFrontend>,
    /// Local endpoints of held pools (hairpin), which the view no longer has.
    pub(super) local_endpoints: BTreeSet<LocalEndpoint>,
    /// Health checks of Services with held items, as they were.
    health_checks: BTreeMap<HealthCheckKey, HealthCheck>,
    /// Held pools by the address of a member.
    addresses: HashMap<Vec<u8>, BTreeSet<PoolId>>,
    /// Removals of generations below this are not held.
    release_before: u64,
    /// Sum of the hashes of the held items' descriptions.
    digest: u128,
    /// An item was dropped, and its local endpoints and health check may still be held.
    dropped: bool,
}

impl Holds {
    /// Number of held pools and frontends.
    pub(super) fn len(&self) -> usize {
        self.pools.len() + self.frontends.len()
    }

    /// Returns whether [`Holds::settle`] would change nothing.
    pub(super) fn is_settled(&self) -> bool {
        self.is_empty() && !self.dropped
    }

    fn is_empty(&self) -> bool {
        self.pools.is_empty() && self.frontends.is_empty()
    }

    /// Sum of the hashes of all held items.
    pub(super) fn digest(&self) -> u128 {
        self.digest
    }

    /// Descriptions of the held items, with the generation that would have removed each.
    pub(super) fn describe<'a>(&'a self, ports: &'a Interner) -> impl Iterator<Item = (String, u64)> + 'a {
        let frontends = self.frontends.iter();
        let frontends =
            frontends.map(|(id, held)| (describe_frontend(id, held.frontend.port, ports), held.since));
        frontends.chain(self.pools.iter().map(|(id, held)| (describe_pool(id, ports), held.since)))
    }

    /// Returns the held pools as additions.
    pub(super) fn held_pools<'a>(&'a self, ports: &'a Interner) -> impl Iterator<Item = KernelChange> + 'a {
        self.pools.iter().map(|(id, held)| KernelChange::Pool {
            key: ports.key(*id),
            added: held.members.iter().map(PackedEndpoint::unpack).collect(),
            removed: Vec::new(),
        })
    }

    /// Returns the held frontends as additions.
    pub(super) fn held_frontends<'a>(
        &'a self,
        ports: &'a Interner,
    ) -> impl Iterator<Item = KernelChange> + 'a {
        self.frontends.iter().map(|(id, held)| KernelChange::Frontend(held.frontend.unpack(id, ports)))
    }

    /// Returns whether a held pool of the service port has the endpoint.
    pub(super) fn serves(&self, port: PortId, family: IpFamily, endpoint: &PackedEndpoint) -> bool {
        [PoolRole::Cluster, PoolRole::Local].iter().any(|role| {
            let held = self.pools.get(&PoolId { port, family, role: *role });
            held.is_some_and(|held| held.members.contains(endpoint))
        })
    }

    /// Returns the health checks in force, given the desired ones of the NODE layer and of all nodes.
    pub(super) fn health_checks<'a>(
        &'a self,
        own: &'a BTreeMap<HealthCheckKey, HealthCheck>,
        shared: &'a BTreeMap<HealthCheckKey, HealthCheck>,
    ) -> impl Iterator<Item = HealthCheck> + 'a {
        let desired = own.iter().chain(shared.iter().filter(|(key, _)| !own.contains_key(*key)));
        let present = desired.map(|(key, check)| match self.health_checks.get(key) {
            Some(held) if is_empty(check) => HealthCheck { port: check.port, ..held.clone() },
            _ => check.clone(),
        });
        let is_gone = |key: &HealthCheckKey| !own.contains_key(key) && !shared.contains_key(key);
        let gone = self.health_checks.iter().filter(move |(key, _)| is_gone(key));
        present.chain(gone.map(|(_, held)| held.clone()))
    }

    /// Decides which removals of an update are held, and takes them out of `difference`. Returns their number, and
    /// the candidates for [`Holds::settle`].
    pub(super) fn intercept(
        &mut self,
        difference: &mut Difference,
        arriving: &Arriving<'_>,
        ports: &mut Interner,
    ) -> (usize, Traces) {
        let (added, removed) = tally(difference);
        let held = self.len();
        if !self.is_empty() {
            self.returned(difference, ports);
        }
        let returned = held - self.len();
        let over = if arriving.first {
            self.desired.start(added);
            self.present.start(added);
            false
        } else {
            let desired = self.desired.note(added, removed, arriving.now);
            self.present.note(added.saturating_sub(returned), removed, arriving.now) || desired
        };
        let before = self.len();
        if over && arriving.to >= self.release_before {
            self.hold(difference, arriving, ports);
            self.present.keep(self.len() - before);
        }
        let traces = if self.is_empty() { Traces::default() } else { traces(difference) };
        (self.len() - before, traces)
    }

    /// Ends holds of items that the desired view has again.
    fn returned(&mut self, difference: &mut Difference, ports: &mut Interner) {
        difference.pools.retain_mut(|step| {
            if !self.pools.contains_key(&step.id) {
                return true;
            }
            if step.after == 0 {
                return false;
            }
            let held = self.drop_pool(&step.id, ports);
            let KernelChange::Pool { added, removed, .. } = &mut step.change else { return true };
            let held: BTreeSet<_> = held.iter().map(PackedEndpoint::unpack).collect();
            removed.extend(held.iter().filter(|endpoint| !added.contains(endpoint)).cloned());
            added.retain(|endpoint| !held.contains(endpoint));
            !added.is_empty() || !removed.is_empty()
        });
        for step in &difference.frontends {
            self.drop_frontend(&step.id, ports);
        }
        difference.local_endpoints.retain(|change| match change {
            KernelChange::LocalEndpoint(endpoint) => !self.local_endpoints.remove(endpoint),
            _ => true,
        });
    }

    fn hold(&mut self, difference: &mut Difference, arriving: &Arriving<'_>, ports: &mut Interner) {
        let mut services = BTreeSet::new();
        let since = arriving.to;
        difference.pools.retain(|step| {
            if !is_emptied(step) {
                return true;
            }
            let places = SPECIFIC_FIRST.iter().filter_map(|kind| position(*kind));
            let members = places.filter_map(|at| arriving.before[at].pools.get(&step.id)).next();
            let members = members.map(|members| members.iter().collect()).unwrap_or_default();
            services.insert(service(step.id.port, ports));
            self.insert_pool(step.id, HeldPool { members, since }, ports);
            false
        });
        difference.frontends.retain_mut(|step| {
            if !step.is_removal() {
                return true;
            }
            let Some(frontend) = step.before.take() else { return true };
            services.insert(service(frontend.port, ports));
            self.insert_frontend(step.id, HeldFrontend { frontend, since }, ports);
            false
        });
        difference.local_endpoints.retain(|change| match change {
            KernelChange::LocalEndpointRemoved(endpoint)
                if self.addresses.contains_key(&endpoint.address) =>
            {
                self.local_endpoints.insert(endpoint.clone());
                false
            }
            _ => true,
        });
        let own = position(LayerKind::Node).map(|at| &arriving.before[at].health_checks);
        for (key, check) in own.into_iter().flatten() {
            let is_held = services.contains(&(key.namespace.clone(), key.name.clone()));
            if is_held && difference.health_checks.contains(key) && !is_empty(check) {
                self.health_checks.insert(key.clone(), check.clone());
            }
        }
    }

    /// Releases what an applied update made obsolete.
    pub(super) fn settle(
        &mut self,
        traces: Traces,
        layers: &[Layer; KINDS.len()],
        ports: &mut Interner,
    ) -> Released {
        let mut pools = BTreeSet::new();
        let mut released = Released::default();
        for (address, port) in traces.endpoints {
            let Some(holding) = self.addresses.get(&address).cloned() else { continue };
            let owner = service(port, ports);
            if holding.iter().any(|id| service(id.port, ports) == owner) {
                continue;
            }
            for id in holding {
                self.release_address(&id, &address, layers, ports, &mut released);
            }
        }
        let mut frontends = BTreeSet::new();
        for (id, port) in traces.frontends.into_iter().filter(|(id, _)| !id.any) {
            let first = FrontendId { protocol: 0, port: 0, ..id };
            let last = FrontendId { protocol: u8::MAX, port: u16::MAX, ..id };
            let at_address = self.frontends.range(first..=last);
            let others =
                at_address.filter(|(_, held)| service(held.frontend.port, ports) != service(port, ports));
            frontends.extend(others.map(|(held, _)| *held));
        }
        for port in traces.ports {
            let first = PoolId { port, family: IpFamily::V4, role: PoolRole::Cluster };
            let last = PoolId { port, family: IpFamily::V6, role: PoolRole::Serving };
            let held: Vec<PoolId> = self.pools.range(first..=last).map(|(id, _)| *id).collect();
            if ports.references(port) == held.len() {
                pools.extend(held);
            }
        }
        self.release(&pools, &frontends, layers, ports, released)
    }

    /// Releases the removals of generations below `before`, now and in the future.
    pub(super) fn release_before(
        &mut self,
        before: u64,
        layers: &[Layer; KINDS.len()],
        ports: &mut Interner,
    ) -> Released {
        self.release_before = before;
        let pools = self.pools.iter().filter(|(_, held)| held.since < before);
        let pools = pools.map(|(id, _)| *id).collect();
        let frontends = self.frontends.iter().filter(|(_, held)| held.since < before);
        let frontends = frontends.map(|(id, _)| *id).collect();
        self.release(&pools, &frontends, layers, ports, Released::default())
    }

    fn release(
        &mut self,
        pools: &BTreeSet<PoolId>,
        frontends: &BTreeSet<FrontendId>,
        layers: &[Layer; KINDS.len()],
        ports: &mut Interner,
        mut released: Released,
    ) -> Released {
        let before = self.len();
        for id in frontends {
            if self.drop_frontend(id, ports) {
                released.changes.push(KernelChange::FrontendRemoved(id.unpack()));
                released.udp.frontend(id, true);
            }
        }
        for id in pools {
            let members = self.drop_pool(id, ports);
            released.changes.push(removal(id, &members, layers, ports));
            released.udp.mark(id.family);
        }
        self.present.release(before - self.len());
        self.drop_dependents(layers, ports, &mut released);
        released
    }

    fn release_address(
        &mut self,
        id: &PoolId,
        address: &[u8],
        layers: &[Layer; KINDS.len()],
        ports: &mut Interner,
        released: &mut Released,
    ) {
        let Some(since) = self.pools.get(id).map(|held| held.since) else { return };
        let members = self.drop_pool(id, ports);
        let (gone, members): (BTreeSet<_>, BTreeSet<_>) =
            members.into_iter().partition(|member| member.address() == address);
        released.udp.mark(id.family);
        if members.is_empty() {
            self.present.release(1);
            released.changes.push(removal(id, &gone, layers, ports));
            return;
        }
        self.insert_pool(*id, HeldPool { members, since }, ports);
        let removed = gone.iter().map(PackedEndpoint::unpack).collect();
        released.changes.push(KernelChange::Pool { key: ports.key(*id), added: Vec::new(), removed });
    }

    /// Drops local endpoints and health checks without a held item.
    fn drop_dependents(&mut self, layers: &[Layer; KINDS.len()], ports: &Interner, released: &mut Released) {
        if !std::mem::take(&mut self.dropped) {
            return;
        }
        let own = position(LayerKind::Node).map(|at| &layers[at].local_endpoints);
        let addresses = &self.addresses;
        self.local_endpoints.retain(|endpoint| {
            let kept = addresses.contains_key(&endpoint.address);
            if !kept && own.is_none_or(|own| !own.contains(endpoint)) {
                released.changes.push(KernelChange::LocalEndpointRemoved(endpoint.clone()));
            }
            kept
        });
        if self.health_checks.is_empty() {
            return;
        }
        let held = self.pools.keys().map(|id| id.port);
        let held = held.chain(self.frontends.values().map(|held| held.frontend.port));
        let services: BTreeSet<_> = held.map(|port| service(port, ports)).collect();
        let before = self.health_checks.len();
        self.health_checks.retain(|key, _| services.contains(&(key.namespace.clone(), key.name.clone())));
        released.health_checks = self.health_checks.len() < before;
    }

    fn insert_pool(&mut self, id: PoolId, held: HeldPool, ports: &mut Interner) {
        ports.retain(id.port);
        self.digest = self.digest.wrapping_add(hash(&describe_pool(&id, ports)));
        for member in &held.members {
            self.addresses.entry(member.address().to_vec()).or_default().insert(id);
        }
        self.pools.insert(id, held);
    }

    fn insert_frontend(&mut self, id: FrontendId, held: HeldFrontend, ports: &mut Interner) {
        ports.retain(held.frontend.port);
        self.digest = self.digest.wrapping_add(hash(&describe_frontend(&id, held.frontend.port, ports)));
        self.frontends.insert(id, held);
    }

    /// Forgets a held pool and returns its members.
    fn drop_pool(&mut self, id: &PoolId, ports: &mut Interner) -> BTreeSet<PackedEndpoint> {
        let Some(held) = self.pools.remove(id) else { return BTreeSet::new() };
        self.dropped = true;
        for member in &held.members {
            if let Some(pools) = self.addresses.get_mut(member.address()) {
                pools.remove(id);
                if pools.is_empty() {
                    self.addresses.remove(member.address());
                }
            }
        }
        self.digest = self.digest.wrapping_sub(hash(&describe_pool(id, ports)));
        ports.release(id.port);
        held.members
    }

    /// Forgets a held frontend; returns whether it was held.
    fn drop_frontend(&mut self, id: &FrontendId, ports: &mut Interner) -> bool {
        let Some(held) = self.frontends.remove(id) else { return false };
        self.dropped = true;
        let port = held.frontend.port;
        self.digest = self.digest.wrapping_sub(hash(&describe_frontend(id, port, ports)));
        ports.release(port);
        true
    }
}

fn is_emptied(step: &PoolStep) -> bool {
    step.before > 0 && step.after == 0
}

fn is_empty(check: &HealthCheck) -> bool {
    (check.ready_ipv4, check.ready_ipv6) == (0, 0)
}

/// Returns the numbers of pools and frontends that an update adds to and removes from the desired view.
fn tally(difference: &Difference) -> (usize, usize) {
    let (pools, frontends) = (&difference.pools, &difference.frontends);
    let filled = pools.iter().filter(|step| step.before == 0 && step.after > 0).count();
    let emptied = pools.iter().filter(|step| is_emptied(step)).count();
    let new = frontends.iter().filter(|step| step.before.is_none()).count();
    let gone = frontends.iter().filter(|step| step.is_removal()).count();
    (filled + new, emptied + gone)
}

fn traces(difference: &Difference) -> Traces {
    let mut traces = Traces::default();
    for step in &difference.pools {
        if let KernelChange::Pool { added, .. } = &step.change {
            let appeared = added.iter().map(|endpoint| (endpoint.address.clone(), step.id.port));
            traces.endpoints.extend(appeared);
        }
    }
    for FrontendStep { id, before, after, .. } in &difference.frontends {
        match (before, after) {
            (None, Some(port)) => traces.frontends.push((*id, *port)),
            (Some(before), None) => drop(traces.ports.insert(before.port)),
            _ => {}
        }
    }
    traces
}

/// Returns the change that makes the kernel hold the desired pool: absent or empty.
fn removal(
    id: &PoolId,
    members: &BTreeSet<PackedEndpoint>,
    layers: &[Layer; KINDS.len()],
    ports: &Interner,
) -> KernelChange {
    let key = ports.key(*id);
    let mut places = SPECIFIC_FIRST.iter().filter_map(|kind| position(*kind));
    if !places.any(|at| layers[at].pools.contains_key(id)) {
        return KernelChange::PoolRemoved(key);
    }
    let removed = members.iter().map(PackedEndpoint::unpack).collect();
    KernelChange::Pool { key, added: Vec::new(), removed }
}

/// Returns namespace and name of a service port's Service.
fn service(port: PortId, ports: &Interner) -> (String, String) {
    let port = ports.get(port);
    (port.namespace, port.name)
}

fn describe_pool(id: &PoolId, ports: &Interner) -> String {
    let port = ports.get(id.port);
    let family = match id.family {
        IpFamily::V4 => "IPv4",
        IpFamily::V6 => "IPv6",
    };
    let colon = if port.port.is_empty() { "" } else { ":" };
    let role = format!("{:?}", id.role).to_lowercase();
    format!("{role} {family} endpoints of {}/{}{colon}{}", port.namespace, port.name, port.port)
}

fn describe_frontend(id: &FrontendId, port: PortId, ports: &Interner) -> String {
    let port = ports.get(port);
    let protocol = switchtower_proto::v1::Protocol::try_from(i32::from(id.protocol)).unwrap_or_default();
    let protocol = protocol.as_str_name().trim_start_matches("PROTOCOL_");
    format!("frontend {}/{protocol} ({}/{})", id.destination(), port.namespace, port.name)
}

fn hash(text: &str) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
    u128::from_le_bytes(first)
}

#[cfg(test)]
impl Holds {
    /// Forgets earlier levels of the view.
    pub(super) fn forget_window(&mut self) {
        self.desired.forget();
        self.present.forget();
    }

    /// Holds every removal of an update that removes more than `minimum` items.
    pub(super) fn set_minimum(&mut self, minimum: usize) {
        self.desired.set_minimum(minimum);
        self.present.set_minimum(minimum);
    }
}
