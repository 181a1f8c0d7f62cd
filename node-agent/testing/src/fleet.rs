//! A synthetic view of one node, and the updates with which a controller sends it.

use prost::Message as _;
use switchtower_proto::digest::{Digest, ItemRef};
use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::*;

/// A service port by number; every fourth is UDP.
pub fn service_port(number: u32) -> ServicePort {
    let protocol = if number % 4 == 3 { Protocol::Udp } else { Protocol::Tcp } as i32;
    ServicePort {
        namespace: format!("namespace-{}", number % 50),
        name: format!("service-{number}"),
        port: "http".into(),
        protocol,
    }
}

/// A pool's key by number.
pub fn pool_key(number: u32) -> PoolKey {
    PoolKey {
        service_port: Some(service_port(number)),
        family: Family::Ipv4 as i32,
        role: Role::Cluster as i32,
    }
}

/// The `index`-th endpoint of service `number`.
pub fn endpoint(number: u32, index: u32) -> Endpoint {
    let [_, a, b, c] = (number * 8 + index + 1).to_be_bytes();
    Endpoint { address: vec![10, a, b, c], port: 8080 }
}

/// A ClusterIP frontend by number.
pub fn frontend(number: u32) -> Frontend {
    let target = Some(Target { role: Role::Cluster as i32, when_empty: Verdict::Reject as i32 });
    let [_, _, high, low] = number.to_be_bytes();
    Frontend {
        key: Some(FrontendKey {
            family: Family::Ipv4 as i32,
            address: vec![10, 96, high, low],
            protocol: service_port(number).protocol,
            port: 80,
        }),
        kind: FrontendKind::ClusterIp as i32,
        service_port: Some(service_port(number)),
        outside: target,
        inside: target,
        affinity_seconds: 0,
        source_ranges: Vec::new(),
    }
}

/// The controller's built-in settings.
pub fn settings() -> Settings {
    Settings {
        profile: "builtin".into(),
        local_detection: LocalDetection::NodeCidr as i32,
        masquerade_mark: 0x4000,
        ..Settings::default()
    }
}

/// Revision 2 of a profile, on trial with one probe of service 0's ClusterIP and the built-in settings as fallback.
pub fn settings_on_trial(window_milliseconds: u32) -> Settings {
    let probe = Probe {
        name: "first".into(),
        namespace: "namespace-0".into(),
        service: "service-0".into(),
        port: "http".into(),
        kind: ProbeKind::ClusterIp as i32,
        timeout_milliseconds: 500,
        ..Probe::default()
    };
    let fallback = Some(Box::new(settings()));
    let trial = Trial { probes: vec![probe], window_milliseconds, fallback };
    Settings {
        profile: "default".into(),
        revision: 2,
        masquerade_all: true,
        trial: Some(Box::new(trial)),
        ..settings()
    }
}

/// A probe of Service 0 with a timeout of 500 ms.
pub fn probe(kind: ProbeKind, port: &str) -> Probe {
    Probe {
        name: format!("{kind:?} {port}"),
        namespace: "namespace-0".into(),
        service: "service-0".into(),
        port: port.into(),
        kind: kind as i32,
        timeout_milliseconds: 500,
        ..Probe::default()
    }
}

/// The node's own record.
pub fn node_record() -> NodeRecord {
    NodeRecord {
        name: "node-1".into(),
        addresses: vec![vec![192, 0, 2, 1]],
        pod_cidrs: vec![Cidr { address: vec![10, 244, 1, 0], prefix_length: 24 }],
        eligible: true,
        zone: "a".into(),
    }
}

/// State of a controller for one node: layers as changes, with their digest.
#[derive(Clone, Default)]
pub struct Fleet {
    /// Digests of the layers.
    pub digest: Digest,
    cluster: Vec<Kind>,
    node: Vec<Kind>,
    settings: Vec<Kind>,
    /// Generation of the view.
    pub generation: u64,
}

impl Fleet {
    /// `services` Services with `endpoints` endpoints each.
    pub fn new(services: u32, endpoints: u32) -> Self {
        let mut fleet = Fleet { generation: 1, ..Fleet::default() };
        for number in 0..services {
            let frontend = frontend(number);
            fleet.digest.add(LayerKind::Cluster, ItemRef::Frontend(&frontend));
            fleet.cluster.push(Kind::Frontend(frontend));
            let key = pool_key(number);
            let added: Vec<Endpoint> = (0..endpoints).map(|index| endpoint(number, index)).collect();
            fleet.digest.add(LayerKind::Cluster, ItemRef::Pool(&key));
            added.iter().for_each(|one| fleet.digest.add(LayerKind::Cluster, ItemRef::member(&key, one)));
            fleet.cluster.push(Kind::Pool(PoolPatch { key: Some(key), added, removed: Vec::new() }));
        }
        let (node, settings) = (node_record(), settings());
        fleet.digest.add(LayerKind::Node, ItemRef::Node(&node));
        fleet.digest.add(LayerKind::Settings, ItemRef::Settings(&settings));
        fleet.node.push(Kind::Node(node));
        fleet.settings.push(Kind::Settings(settings));
        fleet
    }

    /// The whole view as an update in parts.
    pub fn snapshot(&self) -> (Update, Vec<Part>) {
        let mut parts = Vec::new();
        for (layer, kinds) in [
            (LayerKind::Cluster, &self.cluster),
            (LayerKind::Node, &self.node),
            (LayerKind::Settings, &self.settings),
        ] {
            for chunk in kinds.chunks(5_000) {
                let changes = chunk.iter().cloned().map(|kind| Change { change: Some(kind) }).collect();
                let buckets = vec![Bucket { index: 1, digest: Vec::new(), changes }];
                let payload = deflate(&Buckets { buckets }.encode_to_vec());
                parts.push(Part {
                    layer: layer as i32,
                    kind: PartKind::SnapshotDeflate as i32,
                    payload: payload.into(),
                });
            }
        }
        (self.update(None), parts)
    }

    fn update(&self, from: Option<u64>) -> Update {
        Update {
            from,
            to: self.generation,
            digest: self.digest.to_bytes().to_vec(),
            source: Some(Source { services: self.generation, ..Source::default() }),
            resume: Some(Resume { instance: b"test".to_vec(), revision: self.generation }),
            ..Update::default()
        }
    }

    /// One endpoint more for a Service, as a delta.
    pub fn add_endpoint(&mut self, number: u32, index: u32) -> (Update, Vec<Part>) {
        let (key, added) = (pool_key(number), endpoint(number, index));
        self.digest.add(LayerKind::Cluster, ItemRef::member(&key, &added));
        let kind = Kind::Pool(PoolPatch { key: Some(key), added: vec![added], removed: Vec::new() });
        self.cluster.push(kind.clone());
        self.delta(LayerKind::Cluster, kind)
    }

    /// Adds or replaces a health check of a layer, as a delta.
    pub fn health_check(
        &mut self,
        layer: LayerKind,
        before: Option<&HealthCheck>,
        check: HealthCheck,
    ) -> (Update, Vec<Part>) {
        if let Some(before) = before {
            self.digest.remove(layer, ItemRef::HealthCheck(before));
        }
        self.digest.add(layer, ItemRef::HealthCheck(&check));
        self.delta(layer, Kind::HealthCheck(check))
    }

    /// Other settings, as a delta.
    pub fn replace_settings(&mut self, after: Settings) -> (Update, Vec<Part>) {
        for before in std::mem::take(&mut self.settings) {
            if let Kind::Settings(before) = before {
                self.digest.remove(LayerKind::Settings, ItemRef::Settings(&before));
            }
        }
        self.digest.add(LayerKind::Settings, ItemRef::Settings(&after));
        self.settings.push(Kind::Settings(after.clone()));
        self.delta(LayerKind::Settings, Kind::Settings(after))
    }

    /// Another record of the node, as a delta.
    pub fn replace_node(&mut self, after: NodeRecord) -> (Update, Vec<Part>) {
        let (before, kept) = self.node.drain(..).partition(|kind| matches!(kind, Kind::Node(_)));
        self.node = kept;
        for before in Vec::<Kind>::into_iter(before) {
            if let Kind::Node(before) = before {
                self.digest.remove(LayerKind::Node, ItemRef::Node(&before));
            }
        }
        self.digest.add(LayerKind::Node, ItemRef::Node(&after));
        self.node.push(Kind::Node(after.clone()));
        self.delta(LayerKind::Node, Kind::Node(after))
    }

    /// One more frontend, as a delta.
    pub fn add_frontend(&mut self, frontend: Frontend) -> (Update, Vec<Part>) {
        self.digest.add(LayerKind::Cluster, ItemRef::Frontend(&frontend));
        self.cluster.push(Kind::Frontend(frontend.clone()));
        self.delta(LayerKind::Cluster, Kind::Frontend(frontend))
    }

    /// One more pool of the CLUSTER layer, as a delta.
    pub fn add_pool(&mut self, key: PoolKey, added: Vec<Endpoint>) -> (Update, Vec<Part>) {
        self.digest.add(LayerKind::Cluster, ItemRef::Pool(&key));
        added.iter().for_each(|one| self.digest.add(LayerKind::Cluster, ItemRef::member(&key, one)));
        let kind = Kind::Pool(PoolPatch { key: Some(key), added, removed: Vec::new() });
        self.cluster.push(kind.clone());
        self.delta(LayerKind::Cluster, kind)
    }

    /// Removes the pools of these Services and, with `frontends`, the Services too, as one delta.
    pub fn remove(&mut self, services: std::ops::Range<u32>, frontends: bool) -> (Update, Vec<Part>) {
        let keys: Vec<_> = services.clone().map(pool_key).collect();
        let gone: Vec<_> = services.map(|number| frontend(number).key).collect();
        let mut removed = Vec::new();
        let mut digest = self.digest;
        self.cluster.retain(|kind| match kind {
            Kind::Pool(PoolPatch { key: Some(key), added, .. }) if keys.contains(key) => {
                added.iter().for_each(|one| digest.remove(LayerKind::Cluster, ItemRef::member(key, one)));
                if !removed.contains(&Kind::PoolRemoved(key.clone())) {
                    digest.remove(LayerKind::Cluster, ItemRef::Pool(key));
                    removed.push(Kind::PoolRemoved(key.clone()));
                }
                false
            }
            Kind::Frontend(frontend) if frontends && gone.contains(&frontend.key) => {
                digest.remove(LayerKind::Cluster, ItemRef::Frontend(frontend));
                removed.extend(frontend.key.clone().map(Kind::FrontendRemoved));
                false
            }
            _ => true,
        });
        self.digest = digest;
        self.deltas(LayerKind::Cluster, removed)
    }

    /// One change as a delta; its hash must have been counted.
    pub fn delta(&mut self, layer: LayerKind, kind: Kind) -> (Update, Vec<Part>) {
        self.deltas(layer, vec![kind])
    }

    fn deltas(&mut self, layer: LayerKind, kinds: Vec<Kind>) -> (Update, Vec<Part>) {
        let from = self.generation;
        self.generation += 1;
        let changes = kinds.into_iter().map(|kind| Change { change: Some(kind) }).collect();
        let payload = Segment { changes }.encode_to_vec();
        let part = Part { layer: layer as i32, kind: PartKind::Delta as i32, payload: payload.into() };
        (self.update(Some(from)), vec![part])
    }
}

/// Compresses the items of a part.
pub fn deflate(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
