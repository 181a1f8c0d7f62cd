//! The items of one layer in a compact form, and what a change does to them.
//!
//! Invariants: the digest and the buckets' digests always are those of the items; a change that does nothing
//! or cannot hold (a member added twice) is dropped here and never reaches an agent.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use switchtower_proto::digest::{BUCKETS, Digest, ItemRef, bucket, item_hash};
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{
    Bucket, Change, Cidr, Endpoint, Family, Frontend, HealthCheck, HealthCheckKey, LayerKind, LocalEndpoint,
    NodeRecord, PoolKey, PoolPatch, ServicePort, Settings,
};

/// Maximum number of endpoints in one pool patch: a patch stays far below the size of a part.
const PATCH: usize = 8_192;

/// Encoded key or message.
type Encoded = Box<[u8]>;

#[derive(Debug, Clone)]
struct Pool {
    bucket: u16,
    /// Bytes per member: address and port, big-endian, sorted.
    stride: u8,
    members: Vec<u8>,
}

/// Items of one layer.
#[derive(Debug, Clone)]
pub(super) struct Items {
    kind: LayerKind,
    frontends: BTreeMap<Encoded, (u16, Encoded)>,
    pools: BTreeMap<Encoded, Pool>,
    local_endpoints: BTreeSet<LocalEndpoint>,
    health_checks: BTreeMap<HealthCheckKey, HealthCheck>,
    service_cidrs: BTreeSet<Cidr>,
    node: Option<NodeRecord>,
    settings: Option<Settings>,
    buckets: BTreeMap<u16, Digest>,
    digest: Digest,
    /// Digest of the health checks as items of a NODE layer.
    checks_in_node: Digest,
    /// Roughly what a snapshot takes.
    size: usize,
}

impl Items {
    pub(super) fn new(kind: LayerKind) -> Self {
        Self {
            kind,
            frontends: BTreeMap::new(),
            pools: BTreeMap::new(),
            local_endpoints: BTreeSet::new(),
            health_checks: BTreeMap::new(),
            service_cidrs: BTreeSet::new(),
            node: None,
            settings: None,
            buckets: BTreeMap::new(),
            digest: Digest::default(),
            checks_in_node: Digest::default(),
            size: 0,
        }
    }

    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// Bytes that a snapshot takes, roughly.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Digest of the health checks as items of a NODE layer, for agents that take them there.
    pub(super) fn checks_in_node(&self) -> Digest {
        self.checks_in_node
    }

    pub(super) fn health_checks(&self) -> impl ExactSizeIterator<Item = (&HealthCheckKey, &HealthCheck)> {
        self.health_checks.iter()
    }

    pub(super) fn health_check(&self, key: &HealthCheckKey) -> Option<&HealthCheck> {
        self.health_checks.get(key)
    }

    fn add(&mut self, bucket: u16, size: usize, item: ItemRef<'_>) {
        let hash = item_hash(self.kind, item);
        self.digest.0 = self.digest.0.wrapping_add(hash);
        let digest = self.buckets.entry(bucket).or_default();
        digest.0 = digest.0.wrapping_add(hash);
        self.size += size;
    }

    fn take(&mut self, bucket: u16, size: usize, item: ItemRef<'_>) {
        let hash = item_hash(self.kind, item);
        self.digest.0 = self.digest.0.wrapping_sub(hash);
        let digest = self.buckets.entry(bucket).or_default();
        digest.0 = digest.0.wrapping_sub(hash);
        if *digest == Digest::default() {
            self.buckets.remove(&bucket);
        }
        self.size = self.size.saturating_sub(size);
    }

    /// Applies a change and appends its effective part to `out`. Returns false if it was malformed: it then has no effect.
    pub(super) fn apply(&mut self, change: Change, out: &mut Vec<Change>) -> bool {
        let Some(op) = change.change else { return false };
        match op {
            Op::Frontend(frontend) => return self.frontend(frontend, out),
            Op::FrontendRemoved(key) => {
                if self.take_frontend(&encoded(&key)) {
                    push(out, Op::FrontendRemoved(key));
                }
            }
            Op::Pool(patch) => return self.patch(patch, out),
            Op::PoolRemoved(key) => {
                if self.take_pool(&key) {
                    push(out, Op::PoolRemoved(key));
                }
            }
            Op::Node(node) => {
                if self.node.as_ref() == Some(&node) {
                    return true;
                }
                if let Some(old) = self.node.take() {
                    self.take(0, old.encoded_len(), ItemRef::Node(&old));
                }
                self.add(0, node.encoded_len(), ItemRef::Node(&node));
                self.node = Some(node.clone());
                push(out, Op::Node(node));
            }
            Op::Settings(settings) => {
                if self.settings.as_ref() == Some(&settings) {
                    return true;
                }
                if let Some(old) = self.settings.take() {
                    self.take(0, old.encoded_len(), ItemRef::Settings(&old));
                }
                self.add(0, settings.encoded_len(), ItemRef::Settings(&settings));
                self.settings = Some(settings.clone());
                push(out, Op::Settings(settings));
            }
            other => self.small(other, out),
        }
        true
    }

    /// Items that are sets or have a key of their own.
    fn small(&mut self, op: Op, out: &mut Vec<Change>) {
        match op {
            Op::LocalEndpoint(endpoint) if self.local_endpoints.insert(endpoint.clone()) => {
                self.add(0, endpoint.encoded_len(), ItemRef::LocalEndpoint(&endpoint));
                push(out, Op::LocalEndpoint(endpoint));
            }
            Op::LocalEndpointRemoved(endpoint) if self.local_endpoints.remove(&endpoint) => {
                self.take(0, endpoint.encoded_len(), ItemRef::LocalEndpoint(&endpoint));
                push(out, Op::LocalEndpointRemoved(endpoint));
            }
            Op::ServiceCidr(cidr) if self.service_cidrs.insert(cidr.clone()) => {
                self.add(0, cidr.encoded_len(), ItemRef::ServiceCidr(&cidr));
                push(out, Op::ServiceCidr(cidr));
            }
            Op::ServiceCidrRemoved(cidr) if self.service_cidrs.remove(&cidr) => {
                self.take(0, cidr.encoded_len(), ItemRef::ServiceCidr(&cidr));
                push(out, Op::ServiceCidrRemoved(cidr));
            }
            Op::HealthCheck(check) => {
                let Some(key) = check.key.clone() else { return };
                if self.health_checks.get(&key) == Some(&check) {
                    return;
                }
                let bucket = bucket16(&key.namespace, &key.name);
                if let Some(old) = self.health_checks.insert(key, check.clone()) {
                    self.take(bucket, old.encoded_len(), ItemRef::HealthCheck(&old));
                    self.checks_in_node.remove(LayerKind::Node, ItemRef::HealthCheck(&old));
                }
                self.checks_in_node.add(LayerKind::Node, ItemRef::HealthCheck(&check));
                self.add(bucket, check.encoded_len(), ItemRef::HealthCheck(&check));
                push(out, Op::HealthCheck(check));
            }
            Op::HealthCheckRemoved(key) => {
                let Some(old) = self.health_checks.remove(&key) else { return };
                let bucket = bucket16(&key.namespace, &key.name);
                self.take(bucket, old.encoded_len(), ItemRef::HealthCheck(&old));
                self.checks_in_node.remove(LayerKind::Node, ItemRef::HealthCheck(&old));
                push(out, Op::HealthCheckRemoved(key));
            }
            _ => {}
        }
    }

    fn frontend(&mut self, frontend: Frontend, out: &mut Vec<Change>) -> bool {
        let (Some(key), Some(service)) = (&frontend.key, &frontend.service_port) else { return false };
        let (key, value) = (encoded(key), encoded(&frontend));
        if self.frontends.get(&key).is_some_and(|(_, known)| *known == value) {
            return true;
        }
        self.take_frontend(&key);
        let bucket = bucket_of(service);
        self.add(bucket, value.len(), ItemRef::Frontend(&frontend));
        self.frontends.insert(key, (bucket, value));
        push(out, Op::Frontend(frontend));
        true
    }

    fn take_frontend(&mut self, key: &[u8]) -> bool {
        let Some((bucket, value)) = self.frontends.remove(key) else { return false };
        // It was encoded by this module.
        if let Ok(old) = Frontend::decode(&*value) {
            self.take(bucket, value.len(), ItemRef::Frontend(&old));
        }
        true
    }

    fn take_pool(&mut self, key: &PoolKey) -> bool {
        let Some(pool) = self.pools.remove(&*encoded(key)) else { return false };
        for member in pool.members.chunks_exact(usize::from(pool.stride)) {
            let (address, port) = split(member);
            self.take(pool.bucket, member.len(), ItemRef::Member(key, address, port));
        }
        self.take(pool.bucket, key.encoded_len(), ItemRef::Pool(key));
        true
    }

    fn patch(&mut self, patch: PoolPatch, out: &mut Vec<Change>) -> bool {
        let PoolPatch { key: Some(key), added, removed } = patch else { return false };
        let Some(service) = &key.service_port else { return false };
        let stride = match Family::try_from(key.family) {
            Ok(Family::Ipv4) => 6,
            Ok(Family::Ipv6) => 18,
            _ => return false,
        };
        let well_formed =
            |endpoint: &Endpoint| endpoint.address.len() + 2 == stride && endpoint.port <= 0xffff;
        if !added.iter().chain(&removed).all(well_formed) {
            return false;
        }
        let name = encoded(&key);
        let new = !self.pools.contains_key(&name);
        let mut pool = self.pools.remove(&name).unwrap_or_else(|| Pool {
            bucket: bucket_of(service),
            stride: stride as u8,
            members: Vec::new(),
        });
        if new {
            self.add(pool.bucket, key.encoded_len(), ItemRef::Pool(&key));
        }
        let stays: BTreeSet<&Endpoint> = added.iter().collect();
        let removed: Vec<Endpoint> =
            removed.into_iter().filter(|gone| !stays.contains(gone) && pool.remove(gone)).collect();
        let added: Vec<Endpoint> = added.into_iter().filter(|endpoint| pool.insert(endpoint)).collect();
        for endpoint in &removed {
            self.take(pool.bucket, stride, ItemRef::member(&key, endpoint));
        }
        for endpoint in &added {
            self.add(pool.bucket, stride, ItemRef::member(&key, endpoint));
        }
        self.pools.insert(name, pool);
        if new || !added.is_empty() || !removed.is_empty() {
            split_patch(&key, added, removed, out);
        }
        true
    }

    /// Returns the endpoints of a pool.
    pub(super) fn endpoints(&self, key: &PoolKey) -> Vec<Endpoint> {
        self.pools.get(&*encoded(key)).map_or_else(Vec::new, Pool::endpoints)
    }

    /// Calls `each` with every pool and its endpoints.
    pub(super) fn each_pool(&self, mut each: impl FnMut(&PoolKey, &[Endpoint])) {
        for (name, pool) in &self.pools {
            if let Ok(key) = PoolKey::decode(&**name) {
                each(&key, &pool.endpoints());
            }
        }
    }

    /// Returns the items as the changes that create them, by bucket. `only` restricts them to one bucket and bucket 0,
    /// which has the items without a Service; other buckets cost one comparison each.
    pub(super) fn changes(&self, only: Option<u16>) -> BTreeMap<u16, Vec<Change>> {
        let wanted = |bucket: u16| only.is_none_or(|only| bucket == only || bucket == 0);
        let mut changes: BTreeMap<u16, Vec<Change>> = BTreeMap::new();
        let mut put =
            |bucket: u16, op: Op| changes.entry(bucket).or_default().push(Change { change: Some(op) });
        if let Some(node) = &self.node {
            put(0, Op::Node(node.clone()));
        }
        if let Some(settings) = &self.settings {
            put(0, Op::Settings(settings.clone()));
        }
        for endpoint in &self.local_endpoints {
            put(0, Op::LocalEndpoint(endpoint.clone()));
        }
        for cidr in &self.service_cidrs {
            put(0, Op::ServiceCidr(cidr.clone()));
        }
        for (key, check) in &self.health_checks {
            put(bucket16(&key.namespace, &key.name), Op::HealthCheck(check.clone()));
        }
        for (bucket, value) in self.frontends.values().filter(|(bucket, _)| wanted(*bucket)) {
            if let Ok(frontend) = Frontend::decode(&**value) {
                put(*bucket, Op::Frontend(frontend));
            }
        }
        let mut patches = Vec::new();
        for (name, pool) in self.pools.iter().filter(|(_, pool)| wanted(pool.bucket)) {
            let Ok(key) = PoolKey::decode(&**name) else { continue };
            split_patch(&key, pool.endpoints(), Vec::new(), &mut patches);
            changes.entry(pool.bucket).or_default().append(&mut patches);
        }
        changes
    }

    /// The items as buckets, in their order. Each is at most a few hundred KiB; a larger one comes in several.
    pub(super) fn buckets(&self) -> Vec<Bucket> {
        let changes = self.changes(None);
        let mut out = Vec::new();
        for (index, changes) in changes {
            let digest = self.buckets.get(&index).copied().unwrap_or_default().to_bytes().to_vec();
            for changes in pieces(changes) {
                out.push(Bucket { index: index.into(), digest: digest.clone(), changes });
            }
        }
        out
    }
}

impl Pool {
    fn position(&self, member: &[u8]) -> Result<usize, usize> {
        let stride = usize::from(self.stride);
        let (mut low, mut high) = (0, self.members.len() / stride);
        while low < high {
            let middle = (low + high) / 2;
            match self.members[middle * stride..(middle + 1) * stride].cmp(member) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(middle * stride),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Err(low * stride)
    }

    fn insert(&mut self, endpoint: &Endpoint) -> bool {
        let member = packed(endpoint);
        match self.position(&member) {
            Ok(_) => false,
            Err(at) => {
                self.members.splice(at..at, member);
                true
            }
        }
    }

    fn remove(&mut self, endpoint: &Endpoint) -> bool {
        match self.position(&packed(endpoint)) {
            Ok(at) => {
                self.members.drain(at..at + usize::from(self.stride));
                true
            }
            Err(_) => false,
        }
    }

    fn endpoints(&self) -> Vec<Endpoint> {
        let members = self.members.chunks_exact(usize::from(self.stride));
        members
            .map(|member| {
                let (address, port) = split(member);
                Endpoint { address: address.to_vec(), port }
            })
            .collect()
    }
}

/// Changes of one bucket in pieces that fit a part.
fn pieces(changes: Vec<Change>) -> Vec<Vec<Change>> {
    let (mut out, mut piece, mut size) = (Vec::new(), Vec::new(), 0);
    for change in changes {
        let length = change.encoded_len();
        if size + length > super::PART / 2 && !piece.is_empty() {
            out.push(std::mem::take(&mut piece));
            size = 0;
        }
        size += length + 8;
        piece.push(change);
    }
    out.push(piece);
    out
}

fn split_patch(key: &PoolKey, added: Vec<Endpoint>, removed: Vec<Endpoint>, out: &mut Vec<Change>) {
    let (mut added, mut removed) = (added.into_iter().peekable(), removed.into_iter().peekable());
    loop {
        let removed_now: Vec<Endpoint> = removed.by_ref().take(PATCH).collect();
        let added_now: Vec<Endpoint> = added.by_ref().take(PATCH).collect();
        push(out, Op::Pool(PoolPatch { key: Some(key.clone()), added: added_now, removed: removed_now }));
        if added.peek().is_none() && removed.peek().is_none() {
            return;
        }
    }
}

fn push(out: &mut Vec<Change>, op: Op) {
    out.push(Change { change: Some(op) });
}

fn encoded(message: &impl prost::Message) -> Encoded {
    message.encode_to_vec().into_boxed_slice()
}

fn packed(endpoint: &Endpoint) -> Vec<u8> {
    let mut member = Vec::with_capacity(endpoint.address.len() + 2);
    member.extend_from_slice(&endpoint.address);
    member.extend_from_slice(&(endpoint.port as u16).to_be_bytes());
    member
}

fn split(member: &[u8]) -> (&[u8], u32) {
    let (address, port) = member.split_at(member.len() - 2);
    (address, u32::from(port[0]) << 8 | u32::from(port[1]))
}

fn bucket_of(service: &ServicePort) -> u16 {
    bucket16(&service.namespace, &service.name)
}

/// The bucket of a Service's items.
pub(super) fn bucket16(namespace: &str, name: &str) -> u16 {
    const _: () = assert!(BUCKETS <= 1 << 16);
    bucket(namespace, name) as u16
}
