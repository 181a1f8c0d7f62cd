//! The digest against golden vectors, and against an encoding written out by hand.
//!
//! The vectors are a contract between versions: a change here means a new schema version.
//! `SWITCHTOWER_UPDATE=1 cargo test -p switchtower-proto --test digest` rewrites them.

use std::collections::BTreeMap;
use std::path::Path;

use switchtower_proto::digest::{Digest, ItemRef, bucket, item_hash};
use switchtower_proto::v1::*;

fn service_port() -> ServicePort {
    ServicePort {
        namespace: "shop".into(),
        name: "cart".into(),
        port: "http".into(),
        protocol: Protocol::Tcp.into(),
    }
}

fn pool(role: Role) -> PoolKey {
    PoolKey { service_port: Some(service_port()), family: Family::Ipv4.into(), role: role.into() }
}

fn frontend() -> Frontend {
    let target = Target { role: Role::Cluster.into(), when_empty: Verdict::Reject.into() };
    Frontend {
        key: Some(FrontendKey {
            family: Family::Ipv4.into(),
            address: vec![10, 96, 0, 10],
            protocol: Protocol::Tcp.into(),
            port: 80,
        }),
        kind: FrontendKind::LoadBalancer.into(),
        service_port: Some(service_port()),
        outside: Some(Target { role: Role::Local.into(), when_empty: Verdict::Drop.into() }),
        inside: Some(target),
        affinity_seconds: 10800,
        source_ranges: vec![Cidr { address: vec![192, 0, 2, 0], prefix_length: 24 }],
    }
}

#[expect(clippy::too_many_lines, reason = "one item of each kind")]
fn vectors() -> BTreeMap<&'static str, String> {
    let node = NodeRecord {
        name: "n1".into(),
        addresses: vec![vec![192, 0, 2, 1], vec![0x20; 16]],
        pod_cidrs: vec![Cidr { address: vec![10, 244, 0, 0], prefix_length: 24 }],
        eligible: true,
        zone: "a".into(),
    };
    let settings = Settings {
        profile: "builtin".into(),
        revision: 0,
        local_detection: LocalDetection::NodeCidr.into(),
        masquerade_mark: 0x4000,
        conntrack: Some(ConntrackSettings { tcp_be_liberal: true, ..Default::default() }),
        ..Default::default()
    };
    let probe = Probe {
        name: "cart".into(),
        namespace: "shop".into(),
        service: "cart".into(),
        port: "http".into(),
        kind: ProbeKind::NodePort.into(),
        timeout_milliseconds: 500,
        compare_source: true,
        http_path: "/clientip".into(),
    };
    let tried = Settings {
        profile: "default".into(),
        revision: 2,
        log_level: "debug".into(),
        trial: Some(Box::new(Trial {
            probes: vec![probe],
            window_milliseconds: 30_000,
            fallback: Some(Box::new(settings.clone())),
        })),
        ..settings.clone()
    };
    let gated = Settings { drain_gate_port: 9910, ..tried.clone() };
    let shadow = Settings { mode: ProxyMode::Shadow.into(), ..tried.clone() };
    let check = HealthCheck {
        key: Some(HealthCheckKey { namespace: "shop".into(), name: "cart".into() }),
        port: 30100,
        ready_ipv4: 2,
        ready_ipv6: 1,
    };
    let local = LocalEndpoint { address: vec![10, 244, 0, 7], protocol: Protocol::Udp.into(), port: 53 };
    let cidr = Cidr { address: vec![10, 96, 0, 0], prefix_length: 16 };
    let (key, bare) = (pool(Role::Cluster), pool(Role::Local));
    let hash = |layer, item| format!("{:032x}", item_hash(layer, item));
    let mut sum = Digest::default();
    sum.add(LayerKind::Cluster, ItemRef::Pool(&key));
    sum.add(LayerKind::Cluster, ItemRef::Member(&key, &[10, 244, 0, 7], 8080));
    BTreeMap::from([
        ("frontend", hash(LayerKind::Cluster, ItemRef::Frontend(&frontend()))),
        ("pool", hash(LayerKind::Cluster, ItemRef::Pool(&key))),
        ("pool in a zone", hash(LayerKind::Zone, ItemRef::Pool(&key))),
        ("local pool in a node", hash(LayerKind::Node, ItemRef::Pool(&bare))),
        ("member", hash(LayerKind::Cluster, ItemRef::Member(&key, &[10, 244, 0, 7], 8080))),
        ("member IPv6", hash(LayerKind::Cluster, ItemRef::Member(&key, &[0xfd; 16], 8080))),
        ("node", hash(LayerKind::Node, ItemRef::Node(&node))),
        ("local endpoint", hash(LayerKind::Node, ItemRef::LocalEndpoint(&local))),
        ("health check", hash(LayerKind::Node, ItemRef::HealthCheck(&check))),
        ("service cidr", hash(LayerKind::Cluster, ItemRef::ServiceCidr(&cidr))),
        ("settings", hash(LayerKind::Settings, ItemRef::Settings(&settings))),
        ("settings on trial", hash(LayerKind::Settings, ItemRef::Settings(&tried))),
        ("settings in mode Shadow", hash(LayerKind::Settings, ItemRef::Settings(&shadow))),
        ("settings with a drain gate", hash(LayerKind::Settings, ItemRef::Settings(&gated))),
        ("digest of pool and member", sum.to_string()),
        ("bucket of shop/cart", bucket("shop", "cart").to_string()),
    ])
}

#[test]
fn golden_vectors_hold() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/digest.json");
    if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
        std::fs::write(&path, serde_json::to_string_pretty(&vectors()).unwrap() + "\n").unwrap();
    }
    let golden: BTreeMap<String, String> =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let computed = vectors().into_iter().map(|(name, hash)| (name.to_owned(), hash)).collect();
    assert_eq!(golden, computed);
}

/// The encoding of one member, byte by byte as the .proto words it.
#[test]
fn member_is_encoded_as_specified() {
    let mut bytes = vec![1, 3]; // CLUSTER, member
    bytes.push(1); // pool is present
    bytes.push(1); // its service port is present
    for text in ["shop", "cart", "http"] {
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
    for number in [6u64, 4, 1] {
        bytes.extend(number.to_le_bytes()); // TCP, IPv4, CLUSTER
    }
    bytes.push(1); // endpoint is present
    bytes.extend(4u32.to_le_bytes());
    bytes.extend([10, 244, 0, 7]);
    bytes.extend(8080u64.to_le_bytes());
    let hash = u128::from_le_bytes(blake3::hash(&bytes).as_bytes()[..16].try_into().unwrap());
    let key = pool(Role::Cluster);
    assert_eq!(hash, item_hash(LayerKind::Cluster, ItemRef::Member(&key, &[10, 244, 0, 7], 8080)));
}

#[test]
fn digest_after_removal_independent_of_order() {
    let (cluster, local) = (pool(Role::Cluster), pool(Role::Local));
    let mut digest = Digest::default();
    digest.add(LayerKind::Cluster, ItemRef::Pool(&cluster));
    let before = digest;
    digest.add(LayerKind::Node, ItemRef::Pool(&local));
    digest.add(LayerKind::Cluster, ItemRef::Member(&cluster, &[10, 0, 0, 1], 1));
    digest.remove(LayerKind::Node, ItemRef::Pool(&local));
    digest.remove(LayerKind::Cluster, ItemRef::Member(&cluster, &[10, 0, 0, 1], 1));
    assert_eq!(before, digest);
    assert_eq!(Some(digest), Digest::from_bytes(&digest.to_bytes()));
}
