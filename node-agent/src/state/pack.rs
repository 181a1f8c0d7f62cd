//! Compact forms of items: 6 or 18 bytes per endpoint, about 50 per frontend, and one copy of a service port's name.
//!
//! Packing validates: malformed items never enter the view, so unpacking cannot fail.

use std::collections::HashMap;
use std::sync::Arc;

use switchtower_proto::v1::{
    Cidr, Endpoint, Family, Frontend, FrontendKey, FrontendKind, PoolKey, Protocol, Role, ServicePort,
    Target, Verdict,
};

/// Maximum length of a namespace, name or port name: Kubernetes' limit for names.
const NAME_LIMIT: usize = 253;
/// Maximum number of source ranges of one frontend.
const SOURCE_RANGE_LIMIT: usize = 10_000;

/// Violation of the protocol in a message, with its description.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) String);

fn malformed<T>(what: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(what.into()))
}

/// IP family in one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    fn parse(number: i32) -> Result<Self, Malformed> {
        match Family::try_from(number) {
            Ok(Family::Ipv4) => Ok(IpFamily::V4),
            Ok(Family::Ipv6) => Ok(IpFamily::V6),
            _ => malformed(format!("family {number} is unknown")),
        }
    }

    fn proto(self) -> i32 {
        match self {
            IpFamily::V4 => Family::Ipv4 as i32,
            IpFamily::V6 => Family::Ipv6 as i32,
        }
    }

    fn address_length(self) -> usize {
        match self {
            IpFamily::V4 => 4,
            IpFamily::V6 => 16,
        }
    }
}

/// Number of a service port in the [`Interner`].
pub(crate) type PortId = u32;

/// A pool's key, packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PoolId {
    pub(crate) port: PortId,
    pub(crate) family: IpFamily,
    pub(crate) role: PoolRole,
}

/// [`Role`] without its unspecified value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum PoolRole {
    Cluster,
    Local,
    Serving,
}

impl PoolRole {
    fn parse(number: i32) -> Result<Self, Malformed> {
        match Role::try_from(number) {
            Ok(Role::Cluster) => Ok(PoolRole::Cluster),
            Ok(Role::Local) => Ok(PoolRole::Local),
            Ok(Role::Serving) => Ok(PoolRole::Serving),
            _ => malformed(format!("role {number} is unknown")),
        }
    }

    /// Returns `None` for an unknown role.
    pub(crate) fn try_from_proto(number: i32) -> Option<Self> {
        PoolRole::parse(number).ok()
    }

    fn proto(self) -> i32 {
        match self {
            PoolRole::Cluster => Role::Cluster as i32,
            PoolRole::Local => Role::Local as i32,
            PoolRole::Serving => Role::Serving as i32,
        }
    }
}

/// An endpoint: address and port in network order, 6 or 18 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PackedEndpoint {
    length: u8,
    bytes: [u8; 18],
}

impl PackedEndpoint {
    /// Packs the endpoint of a pool of `family`.
    pub(crate) fn pack(family: IpFamily, endpoint: &Endpoint) -> Result<Self, Malformed> {
        let Endpoint { address, port } = endpoint;
        let length = family.address_length();
        if address.len() != length {
            return malformed(format!("an endpoint's address has {} bytes, {length} are due", address.len()));
        }
        let port = port_number(*port)?;
        let mut bytes = [0; 18];
        bytes[..length].copy_from_slice(address);
        bytes[length..length + 2].copy_from_slice(&port.to_be_bytes());
        Ok(PackedEndpoint { length: length as u8 + 2, bytes })
    }

    fn from_slice(slice: &[u8]) -> Self {
        let mut bytes = [0; 18];
        bytes[..slice.len()].copy_from_slice(slice);
        PackedEndpoint { length: slice.len() as u8, bytes }
    }

    /// Packs an address and a port of a conntrack entry.
    pub(crate) fn from_parts(address: std::net::IpAddr, port: u16) -> Self {
        let mut bytes = [0; 18];
        let length = match address {
            std::net::IpAddr::V4(address) => {
                bytes[..4].copy_from_slice(&address.octets());
                4
            }
            std::net::IpAddr::V6(address) => {
                bytes[..16].copy_from_slice(&address.octets());
                16
            }
        };
        bytes[length..length + 2].copy_from_slice(&port.to_be_bytes());
        PackedEndpoint { length: length as u8 + 2, bytes }
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    pub(crate) fn address(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length) - 2]
    }

    pub(crate) fn port(&self) -> u32 {
        let at = usize::from(self.length) - 2;
        u32::from(u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]))
    }

    pub(crate) fn unpack(&self) -> Endpoint {
        Endpoint { address: self.address().to_vec(), port: self.port() }
    }
}

/// A pool's members, sorted, end to end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Members {
    stride: u8,
    bytes: Vec<u8>,
}

impl Members {
    pub(crate) fn new(family: IpFamily) -> Self {
        Members { stride: family.address_length() as u8 + 2, bytes: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() / usize::from(self.stride.max(1))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = PackedEndpoint> + '_ {
        self.bytes.chunks_exact(usize::from(self.stride.max(1))).map(PackedEndpoint::from_slice)
    }

    fn find(&self, endpoint: &PackedEndpoint) -> Result<usize, usize> {
        let stride = usize::from(self.stride.max(1));
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.bytes[middle * stride..(middle + 1) * stride].cmp(endpoint.as_slice()) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok(middle),
            }
        }
        Err(low)
    }

    pub(crate) fn contains(&self, endpoint: &PackedEndpoint) -> bool {
        self.find(endpoint).is_ok()
    }

    pub(crate) fn insert(&mut self, endpoint: &PackedEndpoint) {
        if let Err(at) = self.find(endpoint) {
            let at = at * usize::from(self.stride);
            if self.bytes.len() < 512 {
                self.bytes.reserve_exact(usize::from(self.stride));
            }
            self.bytes.splice(at..at, endpoint.as_slice().iter().copied());
        }
    }

    pub(crate) fn remove(&mut self, endpoint: &PackedEndpoint) {
        if let Ok(at) = self.find(endpoint) {
            let (at, stride) = (at * usize::from(self.stride), usize::from(self.stride));
            self.bytes.drain(at..at + stride);
            if self.bytes.capacity() > 64 && self.bytes.len() * 4 < self.bytes.capacity() {
                self.bytes.shrink_to_fit();
            }
        }
    }

    /// Adds members in one merge, so that a pool of n members costs O(n log n).
    pub(crate) fn extend(&mut self, endpoints: &std::collections::BTreeSet<PackedEndpoint>) {
        if endpoints.len() <= 4 {
            endpoints.iter().for_each(|endpoint| self.insert(endpoint));
            return;
        }
        let mut all: Vec<PackedEndpoint> = self.iter().collect();
        all.extend(endpoints.iter().copied());
        all.sort_unstable();
        all.dedup();
        self.bytes = Vec::with_capacity(all.len() * usize::from(self.stride));
        all.iter().for_each(|endpoint| self.bytes.extend_from_slice(endpoint.as_slice()));
    }
}

/// A frontend's key, packed. `address` is all zero and `any` set for a NodePort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FrontendId {
    pub(crate) family: IpFamily,
    pub(crate) any: bool,
    pub(crate) address: [u8; 16],
    pub(crate) protocol: u8,
    pub(crate) port: u16,
}

impl FrontendId {
    pub(crate) fn pack(key: &FrontendKey) -> Result<Self, Malformed> {
        let FrontendKey { family, address, protocol, port } = key;
        let family = IpFamily::parse(*family)?;
        if !address.is_empty() && address.len() != family.address_length() {
            return malformed(format!(
                "a frontend's address has {} bytes, {} are due",
                address.len(),
                family.address_length()
            ));
        }
        let mut bytes = [0; 16];
        bytes[..address.len()].copy_from_slice(address);
        Ok(FrontendId {
            family,
            any: address.is_empty(),
            address: bytes,
            protocol: protocol_number(*protocol)?,
            port: port_number(*port)?,
        })
    }

    /// Returns the key of a destination address, or of the NodePort if `address` is `None`.
    pub(crate) fn of(family: IpFamily, address: Option<std::net::IpAddr>, protocol: u8, port: u16) -> Self {
        let mut bytes = [0; 16];
        match address {
            Some(std::net::IpAddr::V4(address)) => bytes[..4].copy_from_slice(&address.octets()),
            Some(std::net::IpAddr::V6(address)) => bytes = address.octets(),
            None => {}
        }
        FrontendId { family, any: address.is_none(), address: bytes, protocol, port }
    }

    /// Returns the destination in readable form: `10.96.0.10:80`, `:30080` for a NodePort.
    pub(crate) fn destination(&self) -> String {
        let address = match (self.any, self.family) {
            (true, _) => return format!(":{}", self.port),
            (false, IpFamily::V4) => {
                let [a, b, c, d, ..] = self.address;
                std::net::IpAddr::from([a, b, c, d])
            }
            (false, IpFamily::V6) => std::net::IpAddr::from(self.address),
        };
        std::net::SocketAddr::new(address, self.port).to_string()
    }

    pub(crate) fn unpack(&self) -> FrontendKey {
        let address =
            if self.any { Vec::new() } else { self.address[..self.family.address_length()].to_vec() };
        FrontendKey {
            family: self.family.proto(),
            address,
            protocol: i32::from(self.protocol),
            port: u32::from(self.port),
        }
    }
}

/// A frontend without its key.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PackedFrontend {
    kind: u8,
    pub(crate) port: PortId,
    outside: (u8, u8),
    inside: (u8, u8),
    affinity_seconds: u32,
    source_ranges: Option<Box<[Cidr]>>,
}

impl PackedFrontend {
    pub(crate) fn pack(
        frontend: &Frontend,
        ports: &mut Interner,
    ) -> Result<(FrontendId, PackedFrontend), Malformed> {
        let Frontend { key, kind, service_port, outside, inside, affinity_seconds, source_ranges } = frontend;
        let Some(key) = key else { return malformed("a frontend has no key") };
        let id = FrontendId::pack(key)?;
        if !matches!(FrontendKind::try_from(*kind), Ok(kind) if kind != FrontendKind::Unspecified) {
            return malformed(format!("frontend kind {kind} is unknown"));
        }
        if id.any != (*kind == FrontendKind::NodePort as i32) {
            return malformed("a frontend has no address exactly if it is a NodePort");
        }
        if *affinity_seconds > 86_400 {
            return malformed(format!("session affinity of {affinity_seconds} s is above 86400 s"));
        }
        if source_ranges.len() > SOURCE_RANGE_LIMIT {
            return malformed(format!("a frontend has {} source ranges", source_ranges.len()));
        }
        source_ranges.iter().try_for_each(check_cidr)?;
        let (outside, inside) = (target(outside.as_ref())?, target(inside.as_ref())?);
        let Some(service_port) = service_port else { return malformed("a frontend has no service port") };
        let port = ports.intern(service_port)?;
        let source_ranges = (!source_ranges.is_empty()).then(|| source_ranges.clone().into_boxed_slice());
        let kind = *kind as u8;
        let affinity_seconds = *affinity_seconds;
        Ok((id, PackedFrontend { kind, port, outside, inside, affinity_seconds, source_ranges }))
    }

    pub(crate) fn kind(&self) -> FrontendKind {
        FrontendKind::try_from(i32::from(self.kind)).unwrap_or_default()
    }

    /// Returns whether packets from inside or outside are dropped while only other nodes have endpoints.
    pub(crate) fn drops_without_local(&self, inside: bool) -> bool {
        let (role, when_empty) = if inside { self.inside } else { self.outside };
        (i32::from(role), i32::from(when_empty)) == (Role::Local as i32, Verdict::Drop as i32)
    }

    /// Role of the pool that serves pods and host processes of the node.
    pub(crate) fn inside_role(&self) -> PoolRole {
        PoolRole::try_from_proto(i32::from(self.inside.0)).unwrap_or(PoolRole::Cluster)
    }

    pub(crate) fn unpack(&self, id: &FrontendId, ports: &Interner) -> Frontend {
        let PackedFrontend { kind, port, outside, inside, affinity_seconds, source_ranges } = self;
        let target =
            |(role, verdict): (u8, u8)| Target { role: i32::from(role), when_empty: i32::from(verdict) };
        Frontend {
            key: Some(id.unpack()),
            kind: i32::from(*kind),
            service_port: Some(ports.get(*port)),
            outside: Some(target(*outside)),
            inside: Some(target(*inside)),
            affinity_seconds: *affinity_seconds,
            source_ranges: source_ranges.as_deref().unwrap_or_default().to_vec(),
        }
    }
}

fn target(target: Option<&Target>) -> Result<(u8, u8), Malformed> {
    let Some(Target { role, when_empty }) = target else { return malformed("a frontend lacks a target") };
    if !matches!(Role::try_from(*role), Ok(Role::Cluster | Role::Local)) {
        return malformed(format!("a target's role is {role}"));
    }
    if !matches!(Verdict::try_from(*when_empty), Ok(Verdict::Reject | Verdict::Drop)) {
        return malformed(format!("a target's verdict is {when_empty}"));
    }
    Ok((*role as u8, *when_empty as u8))
}

fn port_number(port: u32) -> Result<u16, Malformed> {
    match u16::try_from(port) {
        Ok(port) if port != 0 => Ok(port),
        _ => malformed(format!("port {port} is not in 1..65535")),
    }
}

fn protocol_number(protocol: i32) -> Result<u8, Malformed> {
    match Protocol::try_from(protocol) {
        Ok(Protocol::Tcp | Protocol::Udp | Protocol::Sctp) => Ok(protocol as u8),
        _ => malformed(format!("protocol {protocol} is unknown")),
    }
}

/// Checks an address block: length of the address, prefix length, host bits.
pub(crate) fn check_cidr(cidr: &Cidr) -> Result<(), Malformed> {
    let Cidr { address, prefix_length } = cidr;
    if !matches!(address.len(), 4 | 16) || *prefix_length > address.len() as u32 * 8 {
        return malformed(format!("an address block has {} bytes, /{prefix_length}", address.len()));
    }
    let host_bits = address.iter().enumerate().any(|(index, byte)| {
        let kept = prefix_length.saturating_sub(index as u32 * 8).min(8);
        let mask = if kept == 8 { 0 } else { 0xff_u8 >> kept };
        byte & mask != 0
    });
    if host_bits { malformed("an address block has host bits set") } else { Ok(()) }
}

/// Checks an address: 4 or 16 bytes.
pub(crate) fn check_address(address: &[u8]) -> Result<(), Malformed> {
    if matches!(address.len(), 4 | 16) {
        Ok(())
    } else {
        malformed(format!("an address has {} bytes", address.len()))
    }
}

/// Checks a port and a protocol that are not packed.
pub(crate) fn check_port(protocol: i32, port: u32) -> Result<(), Malformed> {
    port_number(port)?;
    protocol_number(protocol).map(|_| ())
}

/// Checks the length of a name.
pub(crate) fn check_name(name: &str) -> Result<(), Malformed> {
    if name.len() > NAME_LIMIT || name.contains('\0') {
        return malformed(format!("a name of {} bytes is longer than {NAME_LIMIT} or has a NUL", name.len()));
    }
    Ok(())
}

struct Interned {
    text: Arc<str>,
    references: u32,
}

/// Service ports by number. A number lives as long as an item of the view refers to it; [`Interner::sweep`] frees those
/// of an abandoned update.
#[derive(Default)]
pub(crate) struct Interner {
    entries: Vec<Option<Interned>>,
    ids: HashMap<Arc<str>, PortId>,
    free: Vec<PortId>,
    /// Numbers that may have lost their last reference, or never had one.
    candidates: Vec<PortId>,
    services: HashMap<u64, u32>,
}

impl Interner {
    /// Returns the number of a service port, a new one for an unknown port.
    pub(crate) fn intern(&mut self, port: &ServicePort) -> Result<PortId, Malformed> {
        let text = encode(port)?;
        if let Some(id) = self.ids.get(text.as_str()) {
            return Ok(*id);
        }
        let text: Arc<str> = text.into();
        let id = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            (self.entries.len() - 1) as PortId
        });
        self.entries[id as usize] = Some(Interned { text: text.clone(), references: 0 });
        *self.services.entry(service_hash(&text)).or_default() += 1;
        self.ids.insert(text, id);
        self.candidates.push(id);
        Ok(id)
    }

    pub(crate) fn get(&self, id: PortId) -> ServicePort {
        let text = self.entries.get(id as usize).and_then(Option::as_ref).map(|entry| &entry.text);
        text.map(|text| decode(text)).unwrap_or_default()
    }

    /// Namespace, name, port and protocol, each but the last ended by a NUL.
    pub(crate) fn text(&self, id: PortId) -> &str {
        self.entries.get(id as usize).and_then(Option::as_ref).map_or("", |entry| &entry.text)
    }

    pub(crate) fn key(&self, id: PoolId) -> PoolKey {
        let PoolId { port, family, role } = id;
        PoolKey { service_port: Some(self.get(port)), family: family.proto(), role: role.proto() }
    }

    pub(crate) fn retain(&mut self, id: PortId) {
        if let Some(Some(entry)) = self.entries.get_mut(id as usize) {
            entry.references += 1;
        }
    }

    pub(crate) fn release(&mut self, id: PortId) {
        if let Some(Some(entry)) = self.entries.get_mut(id as usize) {
            entry.references = entry.references.saturating_sub(1);
            if entry.references == 0 {
                self.candidates.push(id);
            }
        }
    }

    /// Number of items that refer to the service port.
    pub(crate) fn references(&self, id: PortId) -> usize {
        let entry = self.entries.get(id as usize).and_then(Option::as_ref);
        entry.map_or(0, |entry| entry.references as usize)
    }

    /// Frees unreferenced numbers. The cost follows the numbers interned or released since the last call.
    pub(crate) fn sweep(&mut self) {
        for id in std::mem::take(&mut self.candidates) {
            let Some(slot) = self.entries.get_mut(id as usize) else { continue };
            if slot.as_ref().is_some_and(|entry| entry.references == 0)
                && let Some(entry) = slot.take()
            {
                self.ids.remove(&entry.text);
                self.free.push(id);
                let hash = service_hash(&entry.text);
                if let Some(count) = self.services.get_mut(&hash) {
                    *count -= 1;
                    if *count == 0 {
                        self.services.remove(&hash);
                    }
                }
            }
        }
    }

    /// Number of distinct Services.
    pub(crate) fn services(&self) -> usize {
        self.services.len()
    }
}

/// Separator of the parts; Kubernetes names contain no NUL.
fn encode(port: &ServicePort) -> Result<String, Malformed> {
    let ServicePort { namespace, name, port, protocol } = port;
    for part in [namespace, name, port] {
        check_name(part)?;
    }
    Ok(format!("{namespace}\0{name}\0{port}\0{}", protocol_number(*protocol)?))
}

fn decode(text: &str) -> ServicePort {
    let mut parts = text.split('\0');
    let mut next = || parts.next().unwrap_or_default().to_owned();
    let (namespace, name, port) = (next(), next(), next());
    ServicePort { namespace, name, port, protocol: next().parse().unwrap_or_default() }
}

fn service_hash(text: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    text.split('\0').take(2).for_each(|part| part.hash(&mut hasher));
    hasher.finish()
}

/// Checks and packs a pool's key.
pub(crate) fn pack_pool(key: &PoolKey, ports: &mut Interner) -> Result<PoolId, Malformed> {
    let PoolKey { service_port, family, role } = key;
    let Some(service_port) = service_port else { return malformed("a pool has no service port") };
    let (family, role) = (IpFamily::parse(*family)?, PoolRole::parse(*role)?);
    Ok(PoolId { port: ports.intern(service_port)?, family, role })
}
