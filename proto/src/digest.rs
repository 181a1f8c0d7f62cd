//! The digest of a view: a sum of item hashes that both sides keep up to date in O(change).
//!
//! The canonical encoding is specified in `fleet.proto` and fixed for schema version 1: it does not depend
//! on protobuf's own encoding, which is not canonical, nor on the toolchain. Golden vectors are in
//! `tests/golden/digest.json`. The digest finds bugs and staleness; it is not a MAC.

use crate::v1::{
    Cidr, ConntrackSettings, Endpoint, Frontend, FrontendKey, HealthCheck, HealthCheckKey, LayerKind,
    LocalEndpoint, NodeRecord, PoolKey, Probe, ServicePort, Settings, Target, Trial,
};

/// One item of a view, borrowed. The variants' order is that of `Item` in the .proto.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ItemRef<'a> {
    /// A frontend.
    Frontend(&'a Frontend),
    /// A pool's existence.
    Pool(&'a PoolKey),
    /// A pool's member: address (4 or 16 bytes) and port.
    Member(&'a PoolKey, &'a [u8], u32),
    /// The facts of the Node object.
    Node(&'a NodeRecord),
    /// A local endpoint.
    LocalEndpoint(&'a LocalEndpoint),
    /// A health check node port.
    HealthCheck(&'a HealthCheck),
    /// A ServiceCIDR.
    ServiceCidr(&'a Cidr),
    /// Settings.
    Settings(&'a Settings),
}

/// The digest of a set of items: the wrapping sum of their hashes.
///
/// Addition, never XOR: an item added twice by mistake must not cancel itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord, Hash)]
pub struct Digest(pub u128);

impl Digest {
    /// Adds an item.
    pub fn add(&mut self, layer: LayerKind, item: ItemRef<'_>) {
        self.0 = self.0.wrapping_add(item_hash(layer, item));
    }

    /// Takes out an item that was added before.
    pub fn remove(&mut self, layer: LayerKind, item: ItemRef<'_>) {
        self.0 = self.0.wrapping_sub(item_hash(layer, item));
    }

    /// The digest of both sets together.
    #[must_use]
    pub fn plus(self, other: Digest) -> Digest {
        Digest(self.0.wrapping_add(other.0))
    }

    /// As on the wire: 16 bytes, little-endian.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From the wire; `None` unless it is 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Digest> {
        Some(Digest(u128::from_le_bytes(bytes.try_into().ok()?)))
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The hash of one item in one layer.
pub fn item_hash(layer: LayerKind, item: ItemRef<'_>) -> u128 {
    let mut encoder = Encoder(blake3::Hasher::new());
    // Both are below 256 by the .proto; the cast keeps the one byte that the encoding has for each.
    encoder.bytes_raw(&[layer as u8]);
    encoder.item(item);
    let mut hash = [0; 16];
    hash.copy_from_slice(&encoder.0.finalize().as_bytes()[..16]);
    u128::from_le_bytes(hash)
}

/// The bucket of a Service's items in a snapshot, 0..1024 (see `Bucket` in the .proto).
pub fn bucket(namespace: &str, name: &str) -> u32 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(namespace.as_bytes()).update(b"/").update(name.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    (u64::from_le_bytes(first) % u64::from(BUCKETS)) as u32
}

/// Byte before `Settings.drain_gate_port`: the number of the field.
const DRAIN_GATE_MARK: u8 = 13;

/// Byte before `Settings.mode`: the number of the field.
const MODE_MARK: u8 = 14;

/// Number of buckets of a layer's snapshot.
pub const BUCKETS: u32 = 1024;

/// Writes the canonical encoding into the hasher. Each message's method destructures it whole, so that a new
/// field cannot be forgotten here.
struct Encoder(blake3::Hasher);

impl Encoder {
    fn bytes_raw(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn uint(&mut self, value: impl Into<u64>) {
        self.0.update(&value.into().to_le_bytes());
    }

    /// Enums are open in protobuf: an unknown number is hashed as it is.
    fn enumeration(&mut self, value: i32) {
        self.0.update(&(value as u32 as u64).to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u32).to_le_bytes());
        self.0.update(bytes);
    }

    fn message<T>(&mut self, message: Option<&T>, fields: impl FnOnce(&mut Self, &T)) {
        match message {
            None => self.bytes_raw(&[0]),
            Some(message) => {
                self.bytes_raw(&[1]);
                fields(self, message);
            }
        }
    }

    fn repeated<T>(&mut self, elements: &[T], fields: impl Fn(&mut Self, &T)) {
        self.bytes_raw(&(elements.len() as u32).to_le_bytes());
        for element in elements {
            fields(self, element);
        }
    }

    fn item(&mut self, item: ItemRef<'_>) {
        match item {
            ItemRef::Frontend(frontend) => {
                self.bytes_raw(&[1]);
                self.frontend(frontend);
            }
            ItemRef::Pool(key) => {
                self.bytes_raw(&[2]);
                self.pool_key(key);
            }
            ItemRef::Member(key, address, port) => {
                self.bytes_raw(&[3]);
                self.message(Some(key), Self::pool_key);
                self.bytes_raw(&[1]);
                self.bytes(address);
                self.uint(port);
            }
            ItemRef::Node(node) => {
                self.bytes_raw(&[4]);
                self.node(node);
            }
            ItemRef::LocalEndpoint(endpoint) => {
                self.bytes_raw(&[5]);
                self.local_endpoint(endpoint);
            }
            ItemRef::HealthCheck(check) => {
                self.bytes_raw(&[6]);
                self.health_check(check);
            }
            ItemRef::ServiceCidr(cidr) => {
                self.bytes_raw(&[7]);
                self.cidr(cidr);
            }
            ItemRef::Settings(settings) => {
                self.bytes_raw(&[8]);
                self.settings(settings);
            }
        }
    }

    fn service_port(&mut self, service_port: &ServicePort) {
        let ServicePort { namespace, name, port, protocol } = service_port;
        self.bytes(namespace.as_bytes());
        self.bytes(name.as_bytes());
        self.bytes(port.as_bytes());
        self.enumeration(*protocol);
    }

    fn pool_key(&mut self, key: &PoolKey) {
        let PoolKey { service_port, family, role } = key;
        self.message(service_port.as_ref(), Self::service_port);
        self.enumeration(*family);
        self.enumeration(*role);
    }

    fn cidr(&mut self, cidr: &Cidr) {
        let Cidr { address, prefix_length } = cidr;
        self.bytes(address);
        self.uint(*prefix_length);
    }

    fn frontend_key(&mut self, key: &FrontendKey) {
        let FrontendKey { family, address, protocol, port } = key;
        self.enumeration(*family);
        self.bytes(address);
        self.enumeration(*protocol);
        self.uint(*port);
    }

    fn target(&mut self, target: &Target) {
        let Target { role, when_empty } = target;
        self.enumeration(*role);
        self.enumeration(*when_empty);
    }

    fn frontend(&mut self, frontend: &Frontend) {
        let Frontend { key, kind, service_port, outside, inside, affinity_seconds, source_ranges } = frontend;
        self.message(key.as_ref(), Self::frontend_key);
        self.enumeration(*kind);
        self.message(service_port.as_ref(), Self::service_port);
        self.message(outside.as_ref(), Self::target);
        self.message(inside.as_ref(), Self::target);
        self.uint(*affinity_seconds);
        self.repeated(source_ranges, Self::cidr);
    }

    fn node(&mut self, node: &NodeRecord) {
        let NodeRecord { name, addresses, pod_cidrs, eligible, zone } = node;
        self.bytes(name.as_bytes());
        self.repeated(addresses, |encoder, address| encoder.bytes(address));
        self.repeated(pod_cidrs, Self::cidr);
        self.uint(*eligible);
        self.bytes(zone.as_bytes());
    }

    fn local_endpoint(&mut self, endpoint: &LocalEndpoint) {
        let LocalEndpoint { address, protocol, port } = endpoint;
        self.bytes(address);
        self.enumeration(*protocol);
        self.uint(*port);
    }

    fn health_check(&mut self, check: &HealthCheck) {
        let HealthCheck { key, port, ready_ipv4, ready_ipv6 } = check;
        self.message(key.as_ref(), |encoder, HealthCheckKey { namespace, name }| {
            encoder.bytes(namespace.as_bytes());
            encoder.bytes(name.as_bytes());
        });
        self.uint(*port);
        self.uint(*ready_ipv4);
        self.uint(*ready_ipv6);
    }

    fn conntrack(&mut self, conntrack: &ConntrackSettings) {
        let ConntrackSettings {
            max_per_core,
            min,
            tcp_established_timeout_seconds,
            tcp_close_wait_timeout_seconds,
            tcp_be_liberal,
            udp_timeout_seconds,
            udp_stream_timeout_seconds,
        } = conntrack;
        self.uint(*max_per_core);
        self.uint(*min);
        self.uint(*tcp_established_timeout_seconds);
        self.uint(*tcp_close_wait_timeout_seconds);
        self.uint(*tcp_be_liberal);
        self.uint(*udp_timeout_seconds);
        self.uint(*udp_stream_timeout_seconds);
    }

    fn settings(&mut self, settings: &Settings) {
        let Settings {
            profile,
            revision,
            local_detection,
            cluster_cidrs,
            interface,
            masquerade_all,
            masquerade_mark,
            node_port_addresses,
            conntrack,
            minimum_interval_milliseconds,
            log_level,
            trial,
            drain_gate_port,
            mode,
        } = settings;
        self.bytes(profile.as_bytes());
        self.uint(*revision);
        self.enumeration(*local_detection);
        self.repeated(cluster_cidrs, Self::cidr);
        self.bytes(interface.as_bytes());
        self.uint(*masquerade_all);
        self.uint(*masquerade_mark);
        self.repeated(node_port_addresses, Self::cidr);
        self.message(conntrack.as_ref(), Self::conntrack);
        self.uint(*minimum_interval_milliseconds);
        self.bytes(log_level.as_bytes());
        if *drain_gate_port != 0 {
            // The next byte is 0 or 1 without it: the presence of `trial`.
            self.bytes_raw(&[DRAIN_GATE_MARK]);
            self.uint(*drain_gate_port);
        }
        if *mode != 0 {
            self.bytes_raw(&[MODE_MARK]);
            self.enumeration(*mode);
        }
        self.message(trial.as_deref(), Self::trial);
    }

    fn trial(&mut self, trial: &Trial) {
        let Trial { probes, window_milliseconds, fallback } = trial;
        self.repeated(probes, Self::probe);
        self.uint(*window_milliseconds);
        self.message(fallback.as_deref(), Self::settings);
    }

    fn probe(&mut self, probe: &Probe) {
        let Probe { name, namespace, service, port, kind, timeout_milliseconds, compare_source, http_path } =
            probe;
        for text in [name, namespace, service, port] {
            self.bytes(text.as_bytes());
        }
        self.enumeration(*kind);
        self.uint(*timeout_milliseconds);
        self.uint(*compare_source);
        self.bytes(http_path.as_bytes());
    }
}

impl<'a> ItemRef<'a> {
    /// A member from its message.
    pub fn member(pool: &'a PoolKey, endpoint: &'a Endpoint) -> Self {
        ItemRef::Member(pool, &endpoint.address, endpoint.port)
    }
}
