//! A model agent that applies what is planned always ends with the same items and the same digest.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use prost::Message as _;
use switchtower_proto::digest::ItemRef;
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{
    Bucket, Buckets, Endpoint, Family, Frontend, FrontendKey, HealthCheck, HealthCheckKey, LocalEndpoint,
    NodeRecord, PoolKey, PoolPatch, Role, Segment, ServicePort, Settings, Target,
};

use super::*;

/// A small generator of numbers that are the same each time (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn service(number: u64) -> ServicePort {
    ServicePort { namespace: "default".into(), name: format!("s{number}"), port: "http".into(), protocol: 6 }
}

fn pool_key(number: u64) -> PoolKey {
    PoolKey { service_port: Some(service(number)), family: Family::Ipv4 as i32, role: Role::Cluster as i32 }
}

fn endpoint(number: u64) -> Endpoint {
    Endpoint { address: vec![10, 0, (number >> 8) as u8, number as u8], port: 8080 }
}

fn frontend(number: u64, affinity_seconds: u32) -> Frontend {
    let target = Some(Target { role: Role::Cluster as i32, when_empty: 1 });
    Frontend {
        key: Some(FrontendKey { family: 4, address: vec![10, 96, 0, number as u8], protocol: 6, port: 80 }),
        kind: 1,
        service_port: Some(service(number)),
        outside: target,
        inside: target,
        affinity_seconds,
        source_ranges: Vec::new(),
    }
}

fn health_check_key(number: u64) -> HealthCheckKey {
    HealthCheckKey { namespace: "default".into(), name: format!("s{number}") }
}

fn placement(number: u64) -> HealthCheckPlacement {
    if number == 0 { HealthCheckPlacement::Shared } else { HealthCheckPlacement::Node }
}

fn change(op: Op) -> Change {
    Change { change: Some(op) }
}

/// One layer as an agent keeps it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Copy {
    frontends: BTreeMap<FrontendKey, Frontend>,
    pools: BTreeMap<PoolKey, BTreeSet<Endpoint>>,
    local: BTreeSet<LocalEndpoint>,
    node: Option<NodeRecord>,
    settings: Option<Settings>,
    checks: BTreeMap<HealthCheckKey, HealthCheck>,
}

impl Copy {
    /// Applies strictly: what the protocol calls an error fails the test.
    fn apply(&mut self, change: Change) {
        match change.change.expect("a change without content") {
            Op::Frontend(frontend) => {
                self.frontends.insert(frontend.key.clone().expect("key"), frontend);
            }
            Op::FrontendRemoved(key) => {
                self.frontends.remove(&key).expect("removal of an absent frontend");
            }
            Op::Pool(patch) => {
                let pool = self.pools.entry(patch.key.expect("key")).or_default();
                for gone in patch.removed {
                    assert!(pool.remove(&gone), "removal of an absent endpoint");
                }
                for new in patch.added {
                    assert!(pool.insert(new), "a present endpoint was added");
                }
            }
            Op::PoolRemoved(key) => {
                self.pools.remove(&key).expect("removal of an absent pool");
            }
            Op::LocalEndpoint(new) => assert!(self.local.insert(new)),
            Op::LocalEndpointRemoved(gone) => assert!(self.local.remove(&gone)),
            Op::Node(node) => self.node = Some(node),
            Op::Settings(settings) => self.settings = Some(settings),
            Op::HealthCheck(check) => drop(self.checks.insert(check.key.clone().expect("key"), check)),
            Op::HealthCheckRemoved(key) => {
                self.checks.remove(&key).expect("removal of an absent health check");
            }
            other => panic!("not made by this test: {other:?}"),
        }
    }

    fn digest(&self, kind: LayerKind) -> Digest {
        let mut digest = Digest::default();
        self.frontends.values().for_each(|frontend| digest.add(kind, ItemRef::Frontend(frontend)));
        for (key, members) in &self.pools {
            digest.add(kind, ItemRef::Pool(key));
            members.iter().for_each(|member| digest.add(kind, ItemRef::member(key, member)));
        }
        self.local.iter().for_each(|local| digest.add(kind, ItemRef::LocalEndpoint(local)));
        self.node.iter().for_each(|node| digest.add(kind, ItemRef::Node(node)));
        self.settings.iter().for_each(|settings| digest.add(kind, ItemRef::Settings(settings)));
        self.checks.values().for_each(|check| digest.add(kind, ItemRef::HealthCheck(check)));
        digest
    }
}

/// An agent: its copies, and what it can be resumed from.
#[derive(Debug, Clone, Default)]
struct Agent {
    layers: [Copy; KINDS.len()],
    cursor: Option<Cursor>,
}

impl Agent {
    fn digest(&self) -> Digest {
        let layers = self.layers.iter().zip(KINDS);
        layers.fold(Digest::default(), |sum, (layer, kind)| sum.plus(layer.digest(kind)))
    }

    fn take(&mut self, plan: Plan) {
        let mut replaced = [plan.whole; KINDS.len()];
        if plan.whole {
            self.layers = Default::default();
        }
        for part in plan.parts {
            let at = KINDS.iter().position(|kind| *kind as i32 == part.layer).expect("a known layer");
            assert!(part.payload.len() <= 1 << 20, "a part of {} bytes", part.payload.len());
            let payload = match part.kind() {
                PartKind::SnapshotDeflate => {
                    let mut raw = Vec::new();
                    flate2::read::DeflateDecoder::new(&part.payload[..]).read_to_end(&mut raw).unwrap();
                    raw
                }
                _ => part.payload.to_vec(),
            };
            if part.kind() == PartKind::Delta {
                let segment = Segment::decode(&*payload).unwrap();
                segment.changes.into_iter().for_each(|change| self.layers[at].apply(change));
                continue;
            }
            if !std::mem::replace(&mut replaced[at], true) {
                self.layers[at] = Copy::default();
            }
            for Bucket { changes, .. } in Buckets::decode(&*payload).unwrap().buckets {
                changes.into_iter().for_each(|change| self.layers[at].apply(change));
            }
        }
        assert_eq!(self.digest(), plan.after.digest());
        self.cursor = Some(plan.after);
    }
}

/// Plans and compresses until there is an answer.
fn plan(layers: &Layers, subscription: &Subscription, from: Option<&Cursor>) -> Option<Plan> {
    loop {
        match layers.plan(subscription, from) {
            Planned::Nothing(_) => return None,
            Planned::Update(plan) => return Some(*plan),
            Planned::Compress(raw) => layers.keep(raw.compress()),
        }
    }
}

/// The truth, kept apart from the layers.
#[derive(Default)]
struct Truth(BTreeMap<LayerId, Copy>);

impl Truth {
    fn random_change(&mut self, random: &mut Random, id: &LayerId) -> Change {
        let layer = self.0.entry(id.clone()).or_default();
        let number = random.below(8);
        let op = match (id, random.below(10)) {
            (LayerId::Cluster, 0..=2) => Op::Frontend(frontend(number, random.below(3) as u32)),
            (LayerId::Cluster, 3) => match layer.frontends.keys().next().cloned() {
                Some(key) => Op::FrontendRemoved(key),
                None => Op::Frontend(frontend(number, 0)),
            },
            (LayerId::Node(_), 0..=1) => {
                let local = LocalEndpoint { address: vec![10, 1, 0, number as u8], protocol: 6, port: 80 };
                if layer.local.contains(&local) {
                    Op::LocalEndpointRemoved(local)
                } else {
                    Op::LocalEndpoint(local)
                }
            }
            (LayerId::HealthChecks, _) | (LayerId::Node(_), 2..=3) => {
                let key = health_check_key(number);
                let present = layer.checks.contains_key(&key);
                match random.below(3) {
                    0 if present => Op::HealthCheckRemoved(key),
                    _ => {
                        let ready_ipv4 =
                            if *id == LayerId::HealthChecks { 0 } else { 1 + random.below(3) as u32 };
                        let port = 30_000 + random.below(3) as u32;
                        Op::HealthCheck(HealthCheck { key: Some(key), port, ready_ipv4, ready_ipv6: 0 })
                    }
                }
            }
            (LayerId::Settings(..), _) => {
                Op::Settings(Settings { revision: random.below(3), ..Settings::default() })
            }
            (_, 4) => match layer.pools.keys().nth(number as usize % layer.pools.len().max(1)).cloned() {
                Some(key) => Op::PoolRemoved(key),
                None => Op::Pool(PoolPatch { key: Some(pool_key(number)), ..PoolPatch::default() }),
            },
            _ => {
                let members = layer.pools.get(&pool_key(number)).cloned().unwrap_or_default();
                let picked: BTreeSet<Endpoint> =
                    (0..random.below(6)).map(|_| endpoint(random.below(16))).collect();
                let (removed, added) = picked.into_iter().partition(|endpoint| members.contains(endpoint));
                Op::Pool(PoolPatch { key: Some(pool_key(number)), added, removed })
            }
        };
        layer.apply(change(op.clone()));
        change(op)
    }

    fn view(&self, subscription: &Subscription) -> [Copy; KINDS.len()] {
        let shared = self.0.get(&LayerId::HealthChecks).map(|layer| &layer.checks);
        subscription.layers().map(|id| {
            let mut layer = id.as_ref().and_then(|id| self.0.get(id)).cloned().unwrap_or_default();
            if matches!(id, Some(LayerId::Node(_)))
                && subscription.health_checks == HealthCheckPlacement::Node
            {
                for (key, check) in shared.into_iter().flatten() {
                    layer.checks.entry(key.clone()).or_insert_with(|| check.clone());
                }
            }
            layer
        })
    }
}

fn add(pools: &mut Moves, moves: Option<Moves>) {
    for (socket, moved) in moves.expect("tracked") {
        pools.entry(socket).or_default().change += moved.change;
    }
    pools.retain(|_, pools| pools.change != 0);
}

#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn simulate(seed: u64, steps: u64, limits: LogLimits) {
    let mut random = Random(seed);
    let (mut layers, mut truth) = (Layers::new(limits), Truth::default());
    let mut pools = layers.track();
    let zones: [Option<Arc<str>>; 3] = [None, Some("a".into()), Some("b".into())];
    let nodes: Vec<Arc<str>> = (0..4).map(|node| format!("n{node}").into()).collect();
    let mut agents: Vec<(Subscription, Agent)> = nodes
        .iter()
        .map(|node| (Subscription { node: node.clone(), ..self::node(0) }, Agent::default()))
        .collect();
    for _ in 0..steps {
        match random.below(20) {
            0 => agents[random.below(4) as usize].0.zone = zones[random.below(3) as usize].clone(),
            1 => agents[random.below(4) as usize].0.settings.1 = random.below(2),
            // A layer goes: an override that is lost, a node that is deleted and made again.
            2 => {
                let id = match random.below(3) {
                    0 => LayerId::Zone("a".into()),
                    1 => LayerId::Zone("b".into()),
                    _ => LayerId::Node(nodes[random.below(4) as usize].clone()),
                };
                truth.0.remove(&id);
                let applied = layers.apply(BTreeMap::new(), &[id], Vec::new(), Source::default());
                add(&mut pools, applied.moves);
            }
            // An agent starts without state, or resumes with what it has.
            3 => {
                let (subscription, agent) = &mut agents[random.below(4) as usize];
                *agent = Agent::default();
                subscription.health_checks = placement(random.below(2));
            }
            4 => {
                let (subscription, agent) = &mut agents[random.below(4) as usize];
                if random.below(4) == 0 {
                    // The agent was replaced by another version and resumes.
                    subscription.health_checks = placement(random.below(2));
                }
                let revision = agent.cursor.as_ref().map(Cursor::revision);
                let revision = revision.filter(|_| random.below(2) == 0);
                agent.cursor = layers.resume(subscription, revision, agent.digest());
            }
            5..=11 => {
                let (subscription, agent) = &mut agents[random.below(4) as usize];
                if let Some(plan) = plan(&layers, subscription, agent.cursor.as_ref()) {
                    if let Some(cursor) = agent.cursor.as_ref().filter(|_| !plan.whole) {
                        assert_eq!(layers.pending(subscription, cursor).max(1), plan.changes);
                    }
                    agent.take(plan);
                } else if let Some(cursor) = &agent.cursor {
                    assert_eq!(cursor.digest(), layers.head(subscription).digest());
                }
                assert_eq!(agent.layers, truth.view(subscription));
            }
            _ => {
                let mut changes: BTreeMap<LayerId, Vec<Change>> = BTreeMap::new();
                for _ in 0..=random.below(3) {
                    let id = match random.below(10) {
                        0 => LayerId::Zone("a".into()),
                        1 => LayerId::Zone("b".into()),
                        2 | 3 => LayerId::Node(nodes[random.below(4) as usize].clone()),
                        4 => LayerId::Settings("p".into(), random.below(2)),
                        5 => LayerId::HealthChecks,
                        _ => LayerId::Cluster,
                    };
                    let change = truth.random_change(&mut random, &id);
                    changes.entry(id).or_default().push(change);
                }
                let applied = layers.apply(changes, &[], Vec::new(), Source::default());
                assert_eq!(applied.dropped, 0);
                add(&mut pools, applied.moves);
                assert_eq!(pools, layers.track());
            }
        }
    }
}

#[test]
fn whoever_applies_the_plan_has_the_layers() {
    simulate(1, 6_000, LogLimits::default());
}

#[test]
fn also_when_the_logs_forget_quickly() {
    for seed in 0..8 {
        simulate(seed, 1_000, LogLimits { entries: 3, bytes: 1 << 10, node_entries: 16 });
    }
}

fn filled(services: u64) -> Layers {
    let mut layers = Layers::new(LogLimits::default());
    let mut changes = Vec::new();
    for number in 0..services {
        let service_port = ServicePort { name: format!("s{number}"), ..service(0) };
        let address = [&[10, 96], &(number as u16).to_be_bytes()[..]].concat();
        let mut frontend = frontend(0, 0);
        frontend.key = Some(FrontendKey { address, ..frontend.key.unwrap() });
        frontend.service_port = Some(service_port);
        changes.push(change(Op::Frontend(frontend)));
        let added = (0..3).map(|at| endpoint(number * 3 + at)).collect();
        changes.push(change(Op::Pool(PoolPatch { key: Some(pool_key(number)), added, removed: Vec::new() })));
    }
    layers.apply(BTreeMap::from([(LayerId::Cluster, changes)]), &[], Vec::new(), Source::default());
    layers
}

fn toggle(layers: &mut Layers, there: bool) {
    let one = vec![endpoint(60_000)];
    let (added, removed) = if there { (one, Vec::new()) } else { (Vec::new(), one) };
    let patch = PoolPatch { key: Some(pool_key(7)), added, removed };
    let changes = BTreeMap::from([(LayerId::Cluster, vec![change(Op::Pool(patch))])]);
    layers.apply(changes, &[], Vec::new(), Source::default());
}

fn node(number: u64) -> Subscription {
    let health_checks = HealthCheckPlacement::Shared;
    Subscription { node: format!("n{number}").into(), zone: None, settings: ("p".into(), 0), health_checks }
}

#[test]
fn large_snapshot_is_compressed_once_and_shared() {
    let mut layers = filled(5_000);
    let first = plan(&layers, &node(0), None).unwrap();
    toggle(&mut layers, true);
    let Planned::Update(second) = layers.plan(&node(1), None) else { panic!("it was compressed before") };
    assert_eq!(first.parts[0].payload.as_ptr(), second.parts[0].payload.as_ptr());
    assert_eq!(second.parts.last().unwrap().kind(), PartKind::Delta);
    let mut agent = Agent::default();
    agent.take(*second);
}

#[test]
fn snapshot_in_progress_keeps_its_revision() {
    let mut layers = filled(2_000);
    let Planned::Compress(raw) = layers.plan(&node(0), None) else { panic!("nothing is compressed yet") };
    toggle(&mut layers, true);
    layers.keep(raw.compress());
    let Planned::Update(late) = layers.plan(&node(0), None) else { panic!("it was compressed before") };
    let kinds: Vec<_> = late.parts.iter().map(Part::kind).collect();
    assert!(kinds.contains(&PartKind::SnapshotDeflate), "{kinds:?}");
    assert!(kinds.contains(&PartKind::Delta), "what came after it follows: {kinds:?}");
}

#[test]
fn nodes_at_the_same_place_get_the_same_bytes() {
    let mut layers = filled(1_000);
    let places = [0, 1].map(|number| layers.head(&node(number)));
    toggle(&mut layers, true);
    toggle(&mut layers, false);
    let plans = [0, 1].map(|at| plan(&layers, &node(at as u64), Some(&places[at])).unwrap());
    assert_eq!(plans[0].parts[0].payload.as_ptr(), plans[1].parts[0].payload.as_ptr());
    assert_eq!((plans[0].changes, plans[0].parts.len()), (2, 1));
    assert!(plans[0].parts[0].payload.len() < 200);
}

#[test]
fn pool_of_a_large_service_split_into_parts() {
    let mut layers = Layers::new(LogLimits { entries: 16, bytes: 64 << 20, ..LogLimits::default() });
    let members: Vec<Endpoint> = (0..60_000_u32)
        .map(|number| Endpoint { address: [&[0xfd; 12], &number.to_be_bytes()[..]].concat(), port: 8080 })
        .collect();
    let key = PoolKey { family: Family::Ipv6 as i32, ..pool_key(1) };
    let patch = PoolPatch { key: Some(key), added: members, removed: Vec::new() };
    let empty = layers.head(&node(0));
    layers.apply(
        BTreeMap::from([(LayerId::Cluster, vec![change(Op::Pool(patch))])]),
        &[],
        Vec::new(),
        Source::default(),
    );
    for from in [None, Some(&empty)] {
        let mut agent = Agent::default();
        agent.take(plan(&layers, &node(0), from).unwrap());
        assert_eq!(agent.layers[0].pools.values().next().unwrap().len(), 60_000);
    }
}

#[test]
fn malformed_changes_are_dropped() {
    let mut layers = Layers::new(LogLimits::default());
    let bad = vec![
        Change::default(),
        change(Op::Frontend(Frontend::default())),
        change(Op::Pool(PoolPatch { key: Some(PoolKey::default()), ..PoolPatch::default() })),
        change(Op::Pool(PoolPatch {
            key: Some(pool_key(1)),
            added: vec![Endpoint { address: vec![1], port: 80 }],
            removed: Vec::new(),
        })),
    ];
    let applied = layers.apply(BTreeMap::from([(LayerId::Cluster, bad)]), &[], Vec::new(), Source::default());
    assert_eq!((applied.dropped, applied.touched.len()), (4, 0));
    assert_eq!(layers.head(&node(0)).digest(), Digest::default());
}

#[test]
fn empty_zone_has_no_layer() {
    let mut layers = Layers::new(LogLimits::default());
    let zone = LayerId::Zone("z".into());
    let subscription = Subscription { zone: Some("z".into()), ..node(1) };
    let mut agent = Agent::default();
    for round in 0..3 {
        let patch = PoolPatch { key: Some(pool_key(1)), added: vec![endpoint(round)], removed: Vec::new() };
        for op in [Op::Pool(patch), Op::PoolRemoved(pool_key(1))] {
            let changes = BTreeMap::from([(zone.clone(), vec![change(op)])]);
            let applied = layers.apply(changes, &[], Vec::new(), Source::default());
            assert_eq!(applied.touched, std::slice::from_ref(&zone), "its nodes get the change");
            agent.take(plan(&layers, &subscription, agent.cursor.as_ref()).unwrap());
        }
        assert!(!layers.layers.contains_key(&zone));
    }
    let gone = (0..100).map(|number| LayerId::Zone(format!("z{number}").into()));
    let nothing = gone.map(|id| (id, vec![change(Op::PoolRemoved(pool_key(1)))])).collect();
    layers.apply(nothing, &[], Vec::new(), Source::default());
    assert!(layers.layers.is_empty());
}

/// Applies `rounds` changes for each of `nodes` nodes: an endpoint of the cluster's pool and of the node comes or goes.
fn churn(layers: &mut Layers, nodes: &[Arc<str>], rounds: std::ops::Range<u64>, with_cluster: bool) {
    for round in rounds {
        for (number, node) in (0..).zip(nodes) {
            let local = LocalEndpoint { address: vec![10, 0, 0, 1], port: 8080, protocol: 6 };
            let op = if round % 2 == 0 { Op::LocalEndpoint(local) } else { Op::LocalEndpointRemoved(local) };
            let mut changes = BTreeMap::from([(LayerId::Node(node.clone()), vec![change(op)])]);
            if with_cluster {
                let (added, removed) = (vec![endpoint(number)], Vec::new());
                let (added, removed) = if round % 2 == 0 { (added, removed) } else { (removed, added) };
                let patch = PoolPatch { key: Some(pool_key(1)), added, removed };
                changes.insert(LayerId::Cluster, vec![change(Op::Pool(patch))]);
            }
            layers.apply(changes, &[], Vec::new(), Source::default());
        }
    }
}

#[test]
fn logs_of_node_layers_do_not_grow_with_uptime() {
    let nodes: Vec<Arc<str>> = (0..500).map(|number| format!("node-{number}").into()).collect();
    for with_cluster in [true, false] {
        let limits = LogLimits { node_entries: 4_000, ..LogLimits::default() };
        let mut layers = Layers::new(limits.clone());
        churn(&mut layers, &nodes, 0..20, with_cluster);
        let early = layers.log_entries();
        churn(&mut layers, &nodes, 20..200, with_cluster);
        let late = layers.log_entries();
        assert!(
            late <= early && late <= limits.entries + limits.node_entries,
            "{early}, then {late} entries"
        );
        assert!(layers.logged.len() <= limits.node_entries);
    }
}

#[test]
fn revision_that_touches_many_layers_lists_each_once() {
    let mut layers = Layers::new(LogLimits::default());
    let nodes: Vec<Arc<str>> = (0..3).map(|number| format!("node-{number}").into()).collect();
    churn(&mut layers, &nodes, 0..1, false);
    let local = LocalEndpoint { address: vec![10, 0, 0, 2], port: 8080, protocol: 6 };
    let id = |node: &Arc<str>| LayerId::Node(node.clone());
    let changes =
        nodes.iter().map(|node| (id(node), vec![change(Op::LocalEndpoint(local.clone()))])).collect();
    // Removed and made again in one revision.
    let applied = layers.apply(changes, &[id(&nodes[0])], Vec::new(), Source::default());
    assert_eq!(applied.touched, nodes.iter().map(id).collect::<Vec<_>>());
}

#[test]
fn deleted_node_prevents_no_other_resume() {
    let mut layers = Layers::new(LogLimits::default());
    let mut apply = |changes: Vec<(LayerId, Op)>, removed: &[LayerId]| {
        let changes = changes.into_iter().map(|(id, op)| (id, vec![change(op)])).collect();
        layers.apply(changes, removed, Vec::new(), Source::default()).revision
    };
    let record = |name: &str| Op::Node(NodeRecord { name: name.to_owned(), ..NodeRecord::default() });
    let node = |name: &str| LayerId::Node(name.into());
    let first = vec![
        (LayerId::Cluster, Op::Frontend(frontend(1, 0))),
        (node("a"), record("a")),
        (node("b"), record("b")),
    ];
    let before = apply(first, &[]);
    apply(vec![(LayerId::Cluster, Op::Frontend(frontend(2, 0)))], &[node("b")]);
    let of = |name: &str| Subscription { node: name.into(), zone: Some("z".into()), ..self::node(0) };
    let digest_at = |name: &str| {
        let mut then = Layers::new(LogLimits::default());
        let changes = BTreeMap::from([
            (LayerId::Cluster, vec![change(Op::Frontend(frontend(1, 0)))]),
            (node(name), vec![change(record(name))]),
        ]);
        then.apply(changes, &[], Vec::new(), Source::default());
        then.head(&of(name)).digest()
    };
    assert!(layers.resume(&of("a"), Some(before), digest_at("a")).is_some());
    assert!(layers.resume(&of("b"), Some(before), digest_at("b")).is_none(), "it was removed itself");
}

#[test]
fn older_agent_gets_health_checks_within_its_node_layer() {
    let mut layers = Layers::new(LogLimits::default());
    let check = |number, port, ready_ipv4| {
        let key = Some(health_check_key(number));
        change(Op::HealthCheck(HealthCheck { key, port, ready_ipv4, ready_ipv6: 0 }))
    };
    let apply = |layers: &mut Layers, changes: [(LayerId, Vec<Change>); 2]| {
        layers.apply(BTreeMap::from(changes), &[], Vec::new(), Source::default())
    };
    let own = LayerId::Node("n1".into());
    let shared = vec![check(1, 30_001, 0), check(2, 30_002, 0)];
    apply(&mut layers, [(LayerId::HealthChecks, shared), (own.clone(), vec![check(1, 30_001, 3)])]);
    let older = Subscription { health_checks: HealthCheckPlacement::Node, ..node(1) };
    let mut agent = Agent::default();
    let take = |layers: &Layers, agent: &mut Agent| {
        let plan = plan(layers, &older, agent.cursor.as_ref()).expect("an update");
        assert!(plan.parts.iter().all(|part| part.layer == LayerKind::Node as i32));
        let snapshot = plan.snapshot;
        agent.take(plan);
        let checks = agent.layers[2].checks.values();
        (snapshot, checks.map(|check| (check.port, check.ready_ipv4)).collect::<Vec<_>>())
    };
    assert_eq!(take(&layers, &mut agent).1, [(30_001, 3), (30_002, 0)]);
    // A count alone is a delta; a port is a snapshot of the one layer.
    apply(&mut layers, [(own.clone(), vec![check(1, 30_001, 4)]), (LayerId::Cluster, Vec::new())]);
    assert_eq!(take(&layers, &mut agent), (false, vec![(30_001, 4), (30_002, 0)]));
    let removed = change(Op::HealthCheckRemoved(health_check_key(1)));
    apply(&mut layers, [(own, vec![removed]), (LayerId::HealthChecks, vec![check(3, 30_003, 0)])]);
    assert_eq!(take(&layers, &mut agent), (true, vec![(30_001, 0), (30_002, 0), (30_003, 0)]));
    // The agent is updated: it gets the layer of all nodes, and no item twice.
    let plan = plan(&layers, &node(1), agent.cursor.as_ref()).expect("an update");
    agent.take(plan);
    assert!(agent.layers[2].checks.is_empty());
    assert_eq!(agent.layers[4].checks.len(), 3);
}
