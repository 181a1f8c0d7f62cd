//! Merge of the layers: for each (service port, family, role) the whole pool of the most specific layer that has it,
//! NODE before ZONE before CLUSTER. All other items exist in one layer only.

use std::collections::BTreeSet;

use switchtower_proto::v1::{Endpoint, HealthCheckKey, LayerKind};

use super::layer::{Layer, StagedLayer, staged_members};
use super::pack::{
    FrontendId, Interner, IpFamily, Members, PackedEndpoint, PackedFrontend, PoolId, PoolRole, PortId,
};
use super::{Applied, KINDS, State, position};
use crate::kernel::change::KernelChange;
use crate::kernel::conntrack::Families;

/// Work for the conntrack reconciler after an update.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UdpChanges {
    /// A UDP pool or frontend of this family changed.
    pub(crate) ipv4: bool,
    /// The same for IPv6.
    pub(crate) ipv6: bool,
    /// Removed UDP frontends with an address: all their flows are stale.
    pub(crate) gone: BTreeSet<FrontendId>,
}

impl UdpChanges {
    /// Everything changed.
    pub(crate) fn all() -> Self {
        UdpChanges { ipv4: true, ipv6: true, gone: BTreeSet::new() }
    }

    /// Returns whether nothing changed.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        !self.ipv4 && !self.ipv6
    }

    /// Takes the changes of these families out.
    pub(crate) fn take(&mut self, families: Families) -> Self {
        let taken = |id: &FrontendId| match id.family {
            IpFamily::V4 => families.ipv4,
            IpFamily::V6 => families.ipv6,
        };
        let (gone, left) = std::mem::take(&mut self.gone).into_iter().partition(taken);
        self.gone = left;
        let taken = Self { ipv4: self.ipv4 && families.ipv4, ipv6: self.ipv6 && families.ipv6, gone };
        (self.ipv4, self.ipv6) = (self.ipv4 && !families.ipv4, self.ipv6 && !families.ipv6);
        taken
    }

    /// Adds a change or the removal of a frontend.
    pub(super) fn frontend(&mut self, id: &FrontendId, removed: bool) {
        if id.protocol == UDP {
            self.mark(id.family);
            if removed && !id.any {
                self.gone.insert(*id);
            }
        }
    }

    pub(super) fn mark(&mut self, family: IpFamily) {
        match family {
            IpFamily::V4 => self.ipv4 = true,
            IpFamily::V6 => self.ipv6 = true,
        }
    }

    /// Adds the changes of a later update.
    pub(crate) fn merge(&mut self, later: UdpChanges) {
        self.ipv4 |= later.ipv4;
        self.ipv6 |= later.ipv6;
        self.gone.extend(later.gone);
    }
}

/// Lookup order of a pool.
pub(super) const SPECIFIC_FIRST: [LayerKind; 3] = [LayerKind::Node, LayerKind::Zone, LayerKind::Cluster];

fn after<'a>(base: &'a Layer, staged: &'a StagedLayer) -> After<'a> {
    After { base, staged }
}

/// Layer after the update.
struct After<'a> {
    base: &'a Layer,
    staged: &'a StagedLayer,
}

impl After<'_> {
    fn has_pool(&self, id: &PoolId) -> bool {
        match self.staged {
            StagedLayer::Unchanged => self.base.pools.contains_key(id),
            StagedLayer::Changed(overlay) => match overlay.pools.get(id) {
                Some(pool) => pool.exists,
                None => self.base.pools.contains_key(id),
            },
            StagedLayer::Replaced(layer) => layer.pools.contains_key(id),
        }
    }

    fn len(&self, id: &PoolId) -> usize {
        let base = self.base.pools.get(id).map_or(0, Members::len);
        match self.staged {
            StagedLayer::Unchanged => base,
            StagedLayer::Changed(overlay) => match overlay.pools.get(id) {
                Some(pool) if pool.cleared => pool.added.len(),
                Some(pool) => base + pool.added.len() - pool.removed.len(),
                None => base,
            },
            StagedLayer::Replaced(layer) => layer.pools.get(id).map_or(0, Members::len),
        }
    }

    fn members(&self, id: &PoolId) -> Vec<PackedEndpoint> {
        let all =
            |members: Option<&Members>| members.map(|members| members.iter().collect()).unwrap_or_default();
        match self.staged {
            StagedLayer::Unchanged => all(self.base.pools.get(id)),
            StagedLayer::Changed(overlay) => match overlay.pools.get(id) {
                Some(pool) => staged_members(self.base.pools.get(id), pool),
                None => all(self.base.pools.get(id)),
            },
            StagedLayer::Replaced(layer) => all(layer.pools.get(id)),
        }
    }
}

/// Pools and frontends that an update may have changed.
fn touched(
    before: &[Layer; KINDS.len()],
    staged: &[StagedLayer; KINDS.len()],
) -> (BTreeSet<PoolId>, BTreeSet<FrontendId>) {
    let (mut pools, mut frontends) = (BTreeSet::new(), BTreeSet::new());
    for (base, staged) in before.iter().zip(staged) {
        match staged {
            StagedLayer::Unchanged => {}
            StagedLayer::Changed(overlay) => {
                pools.extend(overlay.pools.keys());
                frontends.extend(overlay.frontends.keys());
            }
            StagedLayer::Replaced(layer) => {
                pools.extend(base.pools.keys().chain(layer.pools.keys()));
                frontends.extend(base.frontends.keys().chain(layer.frontends.keys()));
            }
        }
    }
    (pools, frontends)
}

/// Change of a merged pool.
pub(super) struct PoolStep {
    pub(super) id: PoolId,
    /// Number of members before and after.
    pub(super) before: usize,
    pub(super) after: usize,
    pub(super) change: KernelChange,
}

/// Change of a frontend.
pub(super) struct FrontendStep {
    pub(super) id: FrontendId,
    pub(super) before: Option<PackedFrontend>,
    /// Service port afterwards.
    pub(super) after: Option<PortId>,
    pub(super) change: KernelChange,
}

impl FrontendStep {
    pub(super) fn is_removal(&self) -> bool {
        matches!(self.change, KernelChange::FrontendRemoved(_))
    }
}

/// Difference of two merged views.
#[derive(Default)]
pub(super) struct Difference {
    facts: Vec<KernelChange>,
    /// Of the roles CLUSTER and LOCAL.
    pub(super) pools: Vec<PoolStep>,
    pub(super) frontends: Vec<FrontendStep>,
    pub(super) local_endpoints: Vec<KernelChange>,
    /// Health checks whose content changed.
    pub(super) health_checks: BTreeSet<HealthCheckKey>,
    udp: UdpChanges,
}

impl Difference {
    /// Returns the changes, ordered so that each step refers to existing items only: facts, new or changed pools,
    /// removed frontends, new frontends, removed pools, local endpoints.
    pub(super) fn into_applied(self) -> Applied {
        let mut applied = Applied {
            changes: self.facts,
            udp: self.udp,
            health_checks: !self.health_checks.is_empty(),
            ..Applied::default()
        };
        let is_removed = |step: &PoolStep| matches!(step.change, KernelChange::PoolRemoved(_));
        let (removed, changed): (Vec<_>, Vec<_>) = self.pools.into_iter().partition(is_removed);
        applied.changes.extend(changed.into_iter().map(|step| step.change));
        for step in &self.frontends {
            applied.udp.frontend(&step.id, step.is_removal());
        }
        let (gone, kept): (Vec<_>, Vec<_>) = self.frontends.into_iter().partition(FrontendStep::is_removal);
        applied.changes.extend(gone.into_iter().chain(kept).map(|step| step.change));
        applied.changes.extend(removed.into_iter().map(|step| step.change));
        applied.changes.extend(self.local_endpoints);
        applied
    }
}

/// Returns the difference of the merged views.
pub(super) fn difference(
    before: &[Layer; KINDS.len()],
    staged: &[StagedLayer; KINDS.len()],
    ports: &Interner,
) -> Difference {
    let mut difference = Difference::default();
    let (pools, frontends) = touched(before, staged);
    facts(before, staged, &mut difference.facts);
    for id in pools {
        let Some(step) = pool_difference(before, staged, &id, ports) else { continue };
        if id.role != PoolRole::Serving {
            difference.pools.push(step);
        } else if can_make_flows_stale(&step.change, before, &id) {
            difference.udp.mark(id.family);
        }
    }
    frontend_difference(before, staged, frontends, ports, &mut difference.frontends);
    node_items(before, staged, &mut difference);
    difference
}

/// Flows become stale when an endpoint is removed, and when the first one is added, because flows of NodePorts without
/// endpoints are kept. Further endpoints do not affect existing flows.
fn can_make_flows_stale(change: &KernelChange, before: &[Layer; KINDS.len()], id: &PoolId) -> bool {
    match change {
        KernelChange::Pool { removed, .. } if removed.is_empty() => {
            let members = position(LayerKind::Cluster).and_then(|at| before[at].pools.get(id));
            members.is_none_or(|members| members.len() == 0)
        }
        _ => true,
    }
}

fn pool_difference(
    before: &[Layer; KINDS.len()],
    staged: &[StagedLayer; KINDS.len()],
    id: &PoolId,
    ports: &Interner,
) -> Option<PoolStep> {
    let places = || SPECIFIC_FIRST.iter().filter_map(|kind| position(*kind));
    let old = places().find(|at| before[*at].pools.contains_key(id));
    let new = places().find(|at| after(&before[*at], &staged[*at]).has_pool(id));
    let key = ports.key(*id);
    let length = old.and_then(|at| before[at].pools.get(id)).map_or(0, Members::len);
    let step = |after: usize, change| Some(PoolStep { id: *id, before: length, after, change });
    let (old, new) = match (old, new) {
        (None, None) => return None,
        (Some(_), None) => return step(0, KernelChange::PoolRemoved(key)),
        (None, Some(new)) => {
            let added = unpack(&after(&before[new], &staged[new]).members(id));
            return step(added.len(), KernelChange::Pool { key, added, removed: Vec::new() });
        }
        (Some(old), Some(new)) => (old, new),
    };
    let (added, removed) = match &staged[new] {
        StagedLayer::Unchanged if old == new => return None,
        StagedLayer::Changed(overlay) if old == new => match overlay.pools.get(id) {
            None => return None,
            // The overlay has the net effect, without a walk over the pool's other members.
            Some(pool) if !pool.cleared => {
                (pool.added.iter().copied().collect(), pool.removed.iter().copied().collect())
            }
            Some(_) => members_difference(&before[old], &after(&before[new], &staged[new]), id),
        },
        _ => members_difference(&before[old], &after(&before[new], &staged[new]), id),
    };
    if added.is_empty() && removed.is_empty() {
        return None;
    }
    let length = after(&before[new], &staged[new]).len(id);
    step(length, KernelChange::Pool { key, added: unpack(&added), removed: unpack(&removed) })
}

/// Returns added and removed members, both sorted.
fn members_difference(
    old: &Layer,
    new: &After<'_>,
    id: &PoolId,
) -> (Vec<PackedEndpoint>, Vec<PackedEndpoint>) {
    let old: Vec<PackedEndpoint> =
        old.pools.get(id).map(|members| members.iter().collect()).unwrap_or_default();
    let new = new.members(id);
    let missing_in = |from: &[PackedEndpoint], other: &[PackedEndpoint]| -> Vec<PackedEndpoint> {
        from.iter().filter(|endpoint| other.binary_search(endpoint).is_err()).copied().collect()
    };
    (missing_in(&new, &old), missing_in(&old, &new))
}

fn unpack(members: &[PackedEndpoint]) -> Vec<Endpoint> {
    members.iter().map(PackedEndpoint::unpack).collect()
}

fn frontend_difference(
    before: &[Layer; KINDS.len()],
    staged: &[StagedLayer; KINDS.len()],
    touched: BTreeSet<FrontendId>,
    ports: &Interner,
    steps: &mut Vec<FrontendStep>,
) {
    let Some(at) = position(LayerKind::Cluster) else { return };
    for id in touched {
        let old = before[at].frontends.get(&id);
        let new = match &staged[at] {
            StagedLayer::Unchanged => old,
            StagedLayer::Changed(overlay) => match overlay.frontends.get(&id) {
                Some(staged) => staged.as_ref(),
                None => old,
            },
            StagedLayer::Replaced(layer) => layer.frontends.get(&id),
        };
        if old == new {
            continue;
        }
        let change = match new {
            Some(frontend) => KernelChange::Frontend(frontend.unpack(&id, ports)),
            None => KernelChange::FrontendRemoved(id.unpack()),
        };
        let after = new.map(|frontend| frontend.port);
        steps.push(FrontendStep { id, before: old.cloned(), after, change });
    }
}

const UDP: u8 = 17;

/// Returns changes of the node record and ServiceCIDRs; trials decide on the settings.
fn facts(
    before: &[Layer; KINDS.len()],
    staged: &[StagedLayer; KINDS.len()],
    changes: &mut Vec<KernelChange>,
) {
    for (base, staged) in before.iter().zip(staged) {
        let node = match staged {
            StagedLayer::Unchanged => continue,
            StagedLayer::Changed(overlay) => overlay.node.as_ref().or(base.node.as_deref()),
            StagedLayer::Replaced(layer) => layer.node.as_deref(),
        };
        if node != base.node.as_deref() {
            changes.push(KernelChange::Node(node.cloned().unwrap_or_default()));
        }
        match staged {
            StagedLayer::Unchanged => {}
            StagedLayer::Changed(overlay) => {
                for (cidr, present) in &overlay.service_cidrs {
                    if *present != base.service_cidrs.contains(cidr) {
                        changes.push(match present {
                            true => KernelChange::ServiceCidr(cidr.clone()),
                            false => KernelChange::ServiceCidrRemoved(cidr.clone()),
                        });
                    }
                }
            }
            StagedLayer::Replaced(layer) => {
                let gone = base.service_cidrs.difference(&layer.service_cidrs).cloned();
                changes.extend(gone.map(KernelChange::ServiceCidrRemoved));
                let new = layer.service_cidrs.difference(&base.service_cidrs).cloned();
                changes.extend(new.map(KernelChange::ServiceCidr));
            }
        }
    }
}

/// Adds changes of local endpoints and health checks.
fn node_items(
    before: &[Layer; KINDS.len()],
    staged: &[StagedLayer; KINDS.len()],
    difference: &mut Difference,
) {
    for (base, staged) in before.iter().zip(staged) {
        match staged {
            StagedLayer::Unchanged => {}
            StagedLayer::Changed(overlay) => {
                for (endpoint, present) in &overlay.local_endpoints {
                    if *present != base.local_endpoints.contains(endpoint) {
                        difference.local_endpoints.push(match present {
                            true => KernelChange::LocalEndpoint(endpoint.clone()),
                            false => KernelChange::LocalEndpointRemoved(endpoint.clone()),
                        });
                    }
                }
                let checks = overlay.health_checks.iter();
                let changed = checks.filter(|(key, check)| base.health_checks.get(key) != check.as_ref());
                difference.health_checks.extend(changed.map(|(key, _)| key.clone()));
            }
            StagedLayer::Replaced(layer) => {
                let gone = base.local_endpoints.difference(&layer.local_endpoints).cloned();
                difference.local_endpoints.extend(gone.map(KernelChange::LocalEndpointRemoved));
                let new = layer.local_endpoints.difference(&base.local_endpoints).cloned();
                difference.local_endpoints.extend(new.map(KernelChange::LocalEndpoint));
                let (old, new) = (&base.health_checks, &layer.health_checks);
                let changed = old.keys().chain(new.keys()).filter(|key| old.get(key) != new.get(key));
                difference.health_checks.extend(changed.cloned());
            }
        }
    }
}

/// Verdict on a conntrack entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Foreign, or to a serving backend.
    Keep,
    /// To a backend that no longer serves, to none, or to a deleted Service.
    Stale,
}

impl State {
    /// Returns the whole merged view as additions, for [`crate::kernel::dataplane::Dataplane::adopt`].
    pub fn view(&self) -> Vec<KernelChange> {
        let mut changes = Vec::new();
        changes.extend(self.settings().cloned().map(KernelChange::Settings));
        changes.extend(self.node().cloned().map(KernelChange::Node));
        let cluster = self.layer(LayerKind::Cluster);
        changes.extend(cluster.service_cidrs.iter().cloned().map(KernelChange::ServiceCidr));
        for (rank, kind) in SPECIFIC_FIRST.iter().enumerate() {
            for (id, members) in &self.layer(*kind).pools {
                let overridden =
                    SPECIFIC_FIRST[..rank].iter().any(|kind| self.layer(*kind).pools.contains_key(id));
                if id.role == PoolRole::Serving || overridden {
                    continue;
                }
                if members.len() == 0 && self.holds.pools.contains_key(id) {
                    continue;
                }
                let added = members.iter().map(|member| member.unpack()).collect();
                changes.push(KernelChange::Pool { key: self.ports.key(*id), added, removed: Vec::new() });
            }
        }
        changes.extend(self.holds.held_pools(&self.ports));
        for (id, frontend) in &cluster.frontends {
            changes.push(KernelChange::Frontend(frontend.unpack(id, &self.ports)));
        }
        changes.extend(self.holds.held_frontends(&self.ports));
        let local = self.layer(LayerKind::Node).local_endpoints.iter().chain(&self.holds.local_endpoints);
        changes.extend(local.cloned().map(KernelChange::LocalEndpoint));
        changes
    }

    /// Returns whether a UDP conntrack entry is stale, as in kube-proxy: the original destination is one
    /// of our frontends and the reply's source is not a serving endpoint of it. `gone` are frontends that were
    /// removed; a live frontend on the same address and port overrides them. NodePort flows of a service port
    /// without serving endpoints are kept: their match is by port number only and would hit foreign flows.
    pub(crate) fn udp_flow(
        &self,
        destination: std::net::SocketAddr,
        backend: std::net::SocketAddr,
        gone: &BTreeSet<FrontendId>,
    ) -> Flow {
        let family = if destination.is_ipv4() { IpFamily::V4 } else { IpFamily::V6 };
        let cluster = self.layer(LayerKind::Cluster);
        let serving = |id: &FrontendId| -> Option<Option<&Members>> {
            let frontend = cluster.frontends.get(id)?;
            Some(cluster.pools.get(&PoolId { port: frontend.port, family, role: PoolRole::Serving }))
        };
        let backend = PackedEndpoint::from_parts(backend.ip(), backend.port());
        let served = |members: Option<&Members>| members.is_some_and(|members| members.contains(&backend));
        let addressed = FrontendId::of(family, Some(destination.ip()), UDP, destination.port());
        let port = |id: &FrontendId| {
            let desired = cluster.frontends.get(id).map(|frontend| frontend.port);
            desired.or_else(|| self.holds.frontends.get(id).map(|held| held.frontend.port))
        };
        let node_port = FrontendId::of(family, None, UDP, destination.port());
        let ports = [port(&addressed), port(&node_port)];
        if ports.iter().flatten().any(|port| self.holds.serves(*port, family, &backend)) {
            return Flow::Keep;
        }
        if let Some(members) = serving(&addressed) {
            return if served(members) { Flow::Keep } else { Flow::Stale };
        }
        if gone.contains(&addressed) {
            return Flow::Stale;
        }
        match serving(&node_port) {
            Some(Some(members)) if members.len() > 0 && !members.contains(&backend) => Flow::Stale,
            _ => Flow::Keep,
        }
    }
}
