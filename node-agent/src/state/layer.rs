//! A layer as received, and an overlay of changes that are not applied yet.
//!
//! The cost of an [`Overlay`] follows the changes. It is checked against the layer below while it is built, and either
//! folds into the layer or is dropped: a layer is never partly changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use switchtower_proto::digest::{Digest, ItemRef};
use switchtower_proto::v1::{
    Change, Cidr, HealthCheck, HealthCheckKey, LayerKind, LocalEndpoint, NodeRecord, PoolKey, PoolPatch,
    Settings, change::Change as Kind,
};

use super::RefusedUpdate;
use super::pack::{
    FrontendId, Interner, Malformed, Members, PackedEndpoint, PackedFrontend, PoolId, PoolRole,
    check_address, check_cidr, check_name, check_port, pack_pool,
};
use super::settings::check_settings;

/// A layer's items, compact.
pub(super) struct Layer {
    pub(super) kind: LayerKind,
    pub(super) digest: Digest,
    /// Number of items; a pool and each of its members count as one each.
    pub(super) items: usize,
    pub(super) frontends: HashMap<FrontendId, PackedFrontend>,
    pub(super) pools: HashMap<PoolId, Members>,
    pub(super) node: Option<Box<NodeRecord>>,
    pub(super) local_endpoints: BTreeSet<LocalEndpoint>,
    pub(super) health_checks: BTreeMap<HealthCheckKey, HealthCheck>,
    pub(super) service_cidrs: BTreeSet<Cidr>,
    pub(super) settings: Option<Box<Settings>>,
}

impl Layer {
    pub(super) fn new(kind: LayerKind) -> Self {
        Layer {
            kind,
            digest: Digest::default(),
            items: 0,
            frontends: HashMap::new(),
            pools: HashMap::new(),
            node: None,
            local_endpoints: BTreeSet::new(),
            health_checks: BTreeMap::new(),
            service_cidrs: BTreeSet::new(),
            settings: None,
        }
    }

    /// Calls `each` for every item as the change that would add it, pools with all their members.
    pub(super) fn export<E>(
        &self,
        ports: &Interner,
        each: &mut dyn FnMut(Change) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut item = |kind: Kind| each(Change { change: Some(kind) });
        for (id, frontend) in &self.frontends {
            item(Kind::Frontend(frontend.unpack(id, ports)))?;
        }
        for (id, members) in &self.pools {
            let key = ports.key(*id);
            let mut members = members.iter().map(|member| member.unpack()).peekable();
            loop {
                let added: Vec<_> = members.by_ref().take(50_000).collect();
                item(Kind::Pool(PoolPatch { key: Some(key.clone()), added, removed: Vec::new() }))?;
                if members.peek().is_none() {
                    break;
                }
            }
        }
        self.node.iter().try_for_each(|node| item(Kind::Node(node.as_ref().clone())))?;
        self.local_endpoints.iter().try_for_each(|endpoint| item(Kind::LocalEndpoint(endpoint.clone())))?;
        self.health_checks.values().try_for_each(|check| item(Kind::HealthCheck(check.clone())))?;
        self.service_cidrs.iter().try_for_each(|cidr| item(Kind::ServiceCidr(cidr.clone())))?;
        self.settings.iter().try_for_each(|settings| item(Kind::Settings(settings.as_ref().clone())))
    }

    /// Counts the service ports that this layer refers to in or out.
    pub(super) fn count_references(&self, mut count: impl FnMut(u32)) {
        self.frontends.values().for_each(|frontend| count(frontend.port));
        self.pools.keys().for_each(|pool| count(pool.port));
    }
}

/// Staged pool.
#[derive(Default)]
pub(super) struct StagedPool {
    pub(super) exists: bool,
    /// Discards the members of the layer below.
    pub(super) cleared: bool,
    pub(super) added: BTreeSet<PackedEndpoint>,
    pub(super) removed: BTreeSet<PackedEndpoint>,
}

/// Changes of one layer that are checked but not applied.
#[derive(Default)]
pub(super) struct Overlay {
    digest: Digest,
    items: isize,
    pub(super) frontends: HashMap<FrontendId, Option<PackedFrontend>>,
    pub(super) pools: HashMap<PoolId, StagedPool>,
    pub(super) node: Option<NodeRecord>,
    pub(super) local_endpoints: BTreeMap<LocalEndpoint, bool>,
    pub(super) health_checks: BTreeMap<HealthCheckKey, Option<HealthCheck>>,
    pub(super) service_cidrs: BTreeMap<Cidr, bool>,
    pub(super) settings: Option<Settings>,
}

impl Overlay {
    pub(super) fn digest(&self, base: &Layer) -> Digest {
        base.digest.plus(self.digest)
    }

    pub(super) fn items(&self, base: &Layer) -> usize {
        base.items.saturating_add_signed(self.items)
    }

    fn add(&mut self, layer: LayerKind, item: ItemRef<'_>) {
        self.digest.add(layer, item);
        self.items += 1;
    }

    fn subtract(&mut self, layer: LayerKind, item: ItemRef<'_>) {
        self.digest.remove(layer, item);
        self.items -= 1;
    }

    /// Checks one change against the layer below and earlier changes, and adds it.
    pub(super) fn apply(
        &mut self,
        base: &Layer,
        change: &Change,
        ports: &mut Interner,
    ) -> Result<(), RefusedUpdate> {
        let Some(kind) = &change.change else {
            return Err(RefusedUpdate::unknown_feature(
                "a change is of a kind that this agent does not know".into(),
            ));
        };
        check_place(base.kind, kind)?;
        match kind {
            Kind::Frontend(frontend) => {
                let (id, packed) = PackedFrontend::pack(frontend, ports)?;
                self.replace_frontend(base, id, ports);
                self.add(base.kind, ItemRef::Frontend(frontend));
                self.frontends.insert(id, Some(packed));
            }
            Kind::FrontendRemoved(key) => self.replace_frontend(base, FrontendId::pack(key)?, ports),
            Kind::Pool(patch) => self.patch_pool(base, patch, ports)?,
            Kind::PoolRemoved(key) => self.remove_pool(base, key, ports)?,
            Kind::Node(node) => self.replace_node(base, node)?,
            Kind::LocalEndpoint(endpoint) => {
                check_address(&endpoint.address)?;
                check_port(endpoint.protocol, endpoint.port)?;
                self.set_local_endpoint(base, endpoint, true);
            }
            Kind::LocalEndpointRemoved(endpoint) => self.set_local_endpoint(base, endpoint, false),
            Kind::HealthCheck(check) => {
                let Some(key) = &check.key else { return Err(missing("a health check's key")) };
                check_name(&key.namespace)?;
                check_name(&key.name)?;
                check_port(switchtower_proto::v1::Protocol::Tcp as i32, check.port)?;
                self.set_health_check(base, key, Some(check));
            }
            Kind::HealthCheckRemoved(key) => self.set_health_check(base, key, None),
            Kind::ServiceCidr(cidr) => {
                check_cidr(cidr)?;
                self.set_service_cidr(base, cidr, true);
            }
            Kind::ServiceCidrRemoved(cidr) => self.set_service_cidr(base, cidr, false),
            Kind::Settings(settings) => self.replace_settings(base, settings)?,
        }
        Ok(())
    }

    /// Removes a frontend, if it exists.
    fn replace_frontend(&mut self, base: &Layer, id: FrontendId, ports: &Interner) {
        let before = match self.frontends.get(&id) {
            Some(staged) => staged.clone(),
            None => base.frontends.get(&id).cloned(),
        };
        if let Some(before) = before {
            self.subtract(base.kind, ItemRef::Frontend(&before.unpack(&id, ports)));
            self.frontends.insert(id, None);
        }
    }

    fn pool(&mut self, base: &Layer, id: PoolId) -> &mut StagedPool {
        let exists = base.pools.contains_key(&id);
        self.pools.entry(id).or_insert_with(|| StagedPool { exists, ..StagedPool::default() })
    }

    fn patch_pool(
        &mut self,
        base: &Layer,
        patch: &PoolPatch,
        ports: &mut Interner,
    ) -> Result<(), RefusedUpdate> {
        let PoolPatch { key, added, removed } = patch;
        let Some(key) = key else { return Err(missing("a pool's key")) };
        let id = pack_pool(key, ports)?;
        let below = base.pools.get(&id);
        let pool = self.pool(base, id);
        let created = !std::mem::replace(&mut pool.exists, true);
        if created {
            pool.cleared = true;
        }
        let mut digest = Digest::default();
        for endpoint in removed {
            let packed = PackedEndpoint::pack(id.family, endpoint)?;
            let in_base = !pool.cleared && below.is_some_and(|below| below.contains(&packed));
            let present = pool.added.remove(&packed) || (in_base && pool.removed.insert(packed));
            if !present {
                return Err(Malformed(format!("{} has no such member to remove", describe(key))).into());
            }
            digest.remove(base.kind, ItemRef::member(key, endpoint));
        }
        for endpoint in added {
            let packed = PackedEndpoint::pack(id.family, endpoint)?;
            let in_base = !pool.cleared && below.is_some_and(|below| below.contains(&packed));
            let absent = if in_base { pool.removed.remove(&packed) } else { pool.added.insert(packed) };
            if !absent {
                return Err(Malformed(format!("{} has that member already", describe(key))).into());
            }
            digest.add(base.kind, ItemRef::member(key, endpoint));
        }
        self.digest = self.digest.plus(digest);
        self.items += added.len() as isize - removed.len() as isize;
        if created {
            self.add(base.kind, ItemRef::Pool(key));
        }
        Ok(())
    }

    fn remove_pool(
        &mut self,
        base: &Layer,
        key: &PoolKey,
        ports: &mut Interner,
    ) -> Result<(), RefusedUpdate> {
        let id = pack_pool(key, ports)?;
        let below = base.pools.get(&id);
        let pool = self.pool(base, id);
        if !pool.exists {
            return Err(Malformed(format!("{} does not exist and cannot be removed", describe(key))).into());
        }
        let members = staged_members(below, pool);
        *pool = StagedPool { exists: false, cleared: true, ..StagedPool::default() };
        for member in members {
            self.subtract(base.kind, ItemRef::Member(key, member.address(), member.port()));
        }
        self.subtract(base.kind, ItemRef::Pool(key));
        Ok(())
    }

    fn replace_node(&mut self, base: &Layer, node: &NodeRecord) -> Result<(), RefusedUpdate> {
        check_name(&node.name)?;
        check_name(&node.zone)?;
        if node.addresses.len() > 64 || node.pod_cidrs.len() > 64 {
            return Err(RefusedUpdate::over_limit(
                "a node record has more than 64 addresses or pod CIDRs".into(),
            ));
        }
        node.addresses.iter().try_for_each(|address| check_address(address))?;
        node.pod_cidrs.iter().try_for_each(check_cidr)?;
        let before = self.node.take().or_else(|| base.node.as_deref().cloned());
        if let Some(before) = before {
            self.subtract(base.kind, ItemRef::Node(&before));
        }
        self.add(base.kind, ItemRef::Node(node));
        self.node = Some(node.clone());
        Ok(())
    }

    fn set_local_endpoint(&mut self, base: &Layer, endpoint: &LocalEndpoint, present: bool) {
        let staged = self.local_endpoints.get(endpoint).copied();
        if staged.unwrap_or_else(|| base.local_endpoints.contains(endpoint)) == present {
            return;
        }
        let item = ItemRef::LocalEndpoint(endpoint);
        if present {
            self.add(base.kind, item);
        } else {
            self.subtract(base.kind, item);
        }
        self.local_endpoints.insert(endpoint.clone(), present);
    }

    fn set_health_check(&mut self, base: &Layer, key: &HealthCheckKey, check: Option<&HealthCheck>) {
        let before = match self.health_checks.get(key) {
            Some(staged) => staged.clone(),
            None => base.health_checks.get(key).cloned(),
        };
        if let Some(before) = &before {
            self.subtract(base.kind, ItemRef::HealthCheck(before));
        }
        if let Some(check) = check {
            self.add(base.kind, ItemRef::HealthCheck(check));
        }
        if before.is_some() || check.is_some() {
            self.health_checks.insert(key.clone(), check.cloned());
        }
    }

    fn set_service_cidr(&mut self, base: &Layer, cidr: &Cidr, present: bool) {
        let staged = self.service_cidrs.get(cidr).copied();
        if staged.unwrap_or_else(|| base.service_cidrs.contains(cidr)) == present {
            return;
        }
        let item = ItemRef::ServiceCidr(cidr);
        if present {
            self.add(base.kind, item);
        } else {
            self.subtract(base.kind, item);
        }
        self.service_cidrs.insert(cidr.clone(), present);
    }

    fn replace_settings(&mut self, base: &Layer, settings: &Settings) -> Result<(), RefusedUpdate> {
        check_settings(settings)?;
        let before = self.settings.take().or_else(|| base.settings.as_deref().cloned());
        if let Some(before) = before {
            self.subtract(base.kind, ItemRef::Settings(&before));
        }
        self.add(base.kind, ItemRef::Settings(settings));
        self.settings = Some(settings.clone());
        Ok(())
    }

    /// Applies everything to the layer below.
    pub(super) fn fold_into(mut self, base: &mut Layer, mut references: Option<&mut Interner>) {
        base.digest = self.digest(base);
        base.items = self.items(base);
        let mut count = |id: u32, up: bool| {
            if let Some(ports) = references.as_deref_mut() {
                if up { ports.retain(id) } else { ports.release(id) }
            }
        };
        for (id, frontend) in std::mem::take(&mut self.frontends) {
            if let Some(frontend) = &frontend {
                count(frontend.port, true);
            }
            let before = match frontend {
                Some(frontend) => base.frontends.insert(id, frontend),
                None => base.frontends.remove(&id),
            };
            if let Some(before) = before {
                count(before.port, false);
            }
        }
        for (id, staged) in std::mem::take(&mut self.pools) {
            let existed = base.pools.contains_key(&id);
            if !staged.exists {
                base.pools.remove(&id);
            } else {
                let members = base.pools.entry(id).or_insert_with(|| Members::new(id.family));
                if staged.cleared {
                    *members = Members::new(id.family);
                }
                staged.removed.iter().for_each(|endpoint| members.remove(endpoint));
                members.extend(&staged.added);
            }
            if existed != staged.exists {
                count(id.port, staged.exists);
            }
        }
        self.fold_small_items(base);
    }

    fn fold_small_items(self, base: &mut Layer) {
        if let Some(node) = self.node {
            base.node = Some(Box::new(node));
        }
        for (endpoint, present) in self.local_endpoints {
            if present {
                base.local_endpoints.insert(endpoint);
            } else {
                base.local_endpoints.remove(&endpoint);
            }
        }
        for (key, check) in self.health_checks {
            match check {
                Some(check) => base.health_checks.insert(key, check),
                None => base.health_checks.remove(&key),
            };
        }
        for (cidr, present) in self.service_cidrs {
            if present {
                base.service_cidrs.insert(cidr);
            } else {
                base.service_cidrs.remove(&cidr);
            }
        }
        if let Some(settings) = self.settings {
            base.settings = Some(Box::new(settings));
        }
    }
}

/// A staged pool's members, sorted.
pub(super) fn staged_members(below: Option<&Members>, pool: &StagedPool) -> Vec<PackedEndpoint> {
    let mut members: Vec<PackedEndpoint> = match below {
        Some(below) if !pool.cleared => {
            below.iter().filter(|member| !pool.removed.contains(member)).collect()
        }
        _ => Vec::new(),
    };
    members.extend(pool.added.iter().copied());
    members.sort_unstable();
    members
}

fn missing(what: &str) -> RefusedUpdate {
    Malformed(format!("{what} is missing")).into()
}

fn describe(key: &PoolKey) -> String {
    let port = key.service_port.clone().unwrap_or_default();
    format!("the pool of {}/{}:{}", port.namespace, port.name, port.port)
}

/// Checks that a layer of this kind may contain the item.
fn check_place(layer: LayerKind, kind: &Kind) -> Result<(), RefusedUpdate> {
    let role = |key: Option<&PoolKey>| key.map(|key| key.role).unwrap_or_default();
    let right = match kind {
        Kind::Frontend(_) | Kind::FrontendRemoved(_) | Kind::ServiceCidr(_) | Kind::ServiceCidrRemoved(_) => {
            layer == LayerKind::Cluster
        }
        Kind::Pool(patch) => pool_belongs(layer, role(patch.key.as_ref())),
        Kind::PoolRemoved(key) => pool_belongs(layer, key.role),
        Kind::Node(_) | Kind::LocalEndpoint(_) | Kind::LocalEndpointRemoved(_) => layer == LayerKind::Node,
        Kind::HealthCheck(_) | Kind::HealthCheckRemoved(_) => {
            matches!(layer, LayerKind::HealthChecks | LayerKind::Node)
        }
        Kind::Settings(_) => layer == LayerKind::Settings,
    };
    if right { Ok(()) } else { Err(Malformed(format!("an item does not belong in layer {layer:?}")).into()) }
}

fn pool_belongs(layer: LayerKind, role: i32) -> bool {
    match PoolRole::try_from_proto(role) {
        Some(PoolRole::Cluster) => matches!(layer, LayerKind::Cluster | LayerKind::Zone | LayerKind::Node),
        Some(PoolRole::Local) => layer == LayerKind::Node,
        Some(PoolRole::Serving) => layer == LayerKind::Cluster,
        None => false,
    }
}

/// A layer as it will be.
pub(super) enum StagedLayer {
    Unchanged,
    Changed(Box<Overlay>),
    Replaced(Box<Layer>),
}
