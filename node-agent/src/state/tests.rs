//! Properties of the view: incremental equals full, refused leaves no trace, memory stays bounded.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use prost::Message as _;
use switchtower_proto::digest::{Digest, ItemRef};
use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{Target, *};

use super::merge::Flow;
use super::*;

mod counts;

/// The merged view as plain sets, built from changes by the rules of [`KernelChange`] and nothing else.
#[derive(Debug, Default, Clone, PartialEq)]
struct Model {
    frontends: BTreeMap<FrontendKey, Frontend>,
    pools: BTreeMap<PoolKey, BTreeSet<Endpoint>>,
    local: BTreeSet<LocalEndpoint>,
    cidrs: BTreeSet<Cidr>,
    node: NodeRecord,
    settings: Settings,
}

impl Model {
    fn apply(&mut self, changes: &[KernelChange]) {
        for change in changes {
            match change.clone() {
                KernelChange::Frontend(frontend) => {
                    self.frontends.insert(frontend.key.clone().unwrap(), frontend);
                }
                KernelChange::FrontendRemoved(key) => assert!(self.frontends.remove(&key).is_some()),
                KernelChange::Pool { key, added, removed } => {
                    let pool = self.pools.entry(key).or_default();
                    removed
                        .iter()
                        .for_each(|endpoint| assert!(pool.remove(endpoint), "removes an absent member"));
                    added
                        .into_iter()
                        .for_each(|endpoint| assert!(pool.insert(endpoint), "adds a present member"));
                }
                KernelChange::PoolRemoved(key) => assert!(self.pools.remove(&key).is_some()),
                KernelChange::LocalEndpoint(endpoint) => assert!(self.local.insert(endpoint)),
                KernelChange::LocalEndpointRemoved(endpoint) => assert!(self.local.remove(&endpoint)),
                KernelChange::ServiceCidr(cidr) => assert!(self.cidrs.insert(cidr)),
                KernelChange::ServiceCidrRemoved(cidr) => assert!(self.cidrs.remove(&cidr)),
                KernelChange::Node(node) => self.node = node,
                KernelChange::Settings(settings) => self.settings = settings,
                KernelChange::HostAddresses(_) | KernelChange::Controllers(_) => {
                    unreachable!("the view has no item of the node")
                }
            }
        }
    }

    fn of(state: &State) -> Self {
        let mut model = Model::default();
        model.apply(&state.view());
        model
    }
}

fn full_digest(state: &State) -> Digest {
    let mut digest = Digest::default();
    let result: Result<(), ()> = state.export(&mut |layer, change| {
        match change.change.unwrap() {
            Kind::Frontend(frontend) => digest.add(layer, ItemRef::Frontend(&frontend)),
            Kind::Pool(PoolPatch { key, added, .. }) => {
                let key = key.unwrap();
                digest.add(layer, ItemRef::Pool(&key));
                added.iter().for_each(|endpoint| digest.add(layer, ItemRef::member(&key, endpoint)));
            }
            Kind::Node(node) => digest.add(layer, ItemRef::Node(&node)),
            Kind::LocalEndpoint(endpoint) => digest.add(layer, ItemRef::LocalEndpoint(&endpoint)),
            Kind::HealthCheck(check) => digest.add(layer, ItemRef::HealthCheck(&check)),
            Kind::ServiceCidr(cidr) => digest.add(layer, ItemRef::ServiceCidr(&cidr)),
            Kind::Settings(settings) => digest.add(layer, ItemRef::Settings(&settings)),
            other => panic!("an export only adds, this is {other:?}"),
        }
        Ok(())
    });
    result.unwrap();
    digest
}

fn service_port(number: u8) -> ServicePort {
    let protocol = if number.is_multiple_of(2) { Protocol::Tcp } else { Protocol::Udp } as i32;
    ServicePort { namespace: "default".into(), name: format!("s{number}"), port: String::new(), protocol }
}

fn pool_key(number: u8, role: Role) -> PoolKey {
    PoolKey { service_port: Some(service_port(number)), family: Family::Ipv4 as i32, role: role as i32 }
}

fn endpoint(number: u8) -> Endpoint {
    Endpoint { address: vec![10, 0, 0, number], port: 8080 }
}

fn frontend(number: u8, affinity_seconds: u32) -> Frontend {
    let target = Some(Target { role: Role::Cluster as i32, when_empty: Verdict::Reject as i32 });
    Frontend {
        key: Some(FrontendKey {
            family: Family::Ipv4 as i32,
            address: vec![10, 96, 0, number],
            protocol: service_port(number).protocol,
            port: 80,
        }),
        kind: FrontendKind::ClusterIp as i32,
        service_port: Some(service_port(number)),
        outside: target,
        inside: target,
        affinity_seconds,
        source_ranges: Vec::new(),
    }
}

/// One step on a layer, made legal against what the layer holds when it is played.
#[derive(Debug, Clone)]
enum Step {
    Frontend(u8, u32),
    FrontendRemoved(u8),
    Toggle(LayerKind, u8, Role, Vec<u8>),
    PoolRemoved(LayerKind, u8, Role),
    Local(u8),
    Cidr(u8),
    Node(bool),
    Settings(u64),
    Check(LayerKind, u8, u32),
    Snapshot(LayerKind),
}

fn step() -> impl Strategy<Value = Step> {
    let place = prop_oneof![
        Just((LayerKind::Cluster, Role::Cluster)),
        Just((LayerKind::Cluster, Role::Serving)),
        Just((LayerKind::Zone, Role::Cluster)),
        Just((LayerKind::Node, Role::Cluster)),
        Just((LayerKind::Node, Role::Local)),
    ];
    let members = proptest::collection::vec(0_u8..8, 0..6);
    prop_oneof![
        2 => (0_u8..5, 0_u32..3).prop_map(|(number, affinity)| Step::Frontend(number, affinity)),
        1 => (0_u8..5).prop_map(Step::FrontendRemoved),
        8 => (place.clone(), 0_u8..5, members)
            .prop_map(|((layer, role), number, members)| Step::Toggle(layer, number, role, members)),
        2 => (place, 0_u8..5).prop_map(|((layer, role), number)| Step::PoolRemoved(layer, number, role)),
        1 => (0_u8..4).prop_map(Step::Local),
        1 => (0_u8..3).prop_map(Step::Cidr),
        1 => any::<bool>().prop_map(Step::Node),
        1 => (0_u64..3).prop_map(Step::Settings),
        1 => (0_u8..3, 0_u32..3).prop_map(|(number, ready)| Step::Check(LayerKind::Node, number, ready)),
        1 => (0_u8..3, 0_u32..3).prop_map(|(number, ready)| Step::Check(LayerKind::HealthChecks, number, ready)),
        1 => proptest::sample::select(vec![LayerKind::Zone, LayerKind::Node, LayerKind::Cluster, LayerKind::HealthChecks])
            .prop_map(Step::Snapshot),
    ]
}

/// The sender's side: plain layers, from which parts and digests follow.
#[derive(Default, Clone)]
struct Sender {
    pools: BTreeMap<(i32, PoolKey), BTreeSet<Endpoint>>,
    frontends: BTreeMap<FrontendKey, Frontend>,
    local: BTreeSet<LocalEndpoint>,
    cidrs: BTreeSet<Cidr>,
    checks: BTreeMap<(i32, HealthCheckKey), HealthCheck>,
    node: Option<NodeRecord>,
    settings: Option<Settings>,
}

impl Sender {
    fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for ((layer, key), members) in &self.pools {
            let layer = LayerKind::try_from(*layer).unwrap();
            digest.add(layer, ItemRef::Pool(key));
            members.iter().for_each(|member| digest.add(layer, ItemRef::member(key, member)));
        }
        self.frontends.values().for_each(|item| digest.add(LayerKind::Cluster, ItemRef::Frontend(item)));
        self.local.iter().for_each(|item| digest.add(LayerKind::Node, ItemRef::LocalEndpoint(item)));
        self.cidrs.iter().for_each(|item| digest.add(LayerKind::Cluster, ItemRef::ServiceCidr(item)));
        for ((layer, _), check) in &self.checks {
            digest.add(LayerKind::try_from(*layer).unwrap(), ItemRef::HealthCheck(check));
        }
        self.node.iter().for_each(|item| digest.add(LayerKind::Node, ItemRef::Node(item)));
        self.settings.iter().for_each(|item| digest.add(LayerKind::Settings, ItemRef::Settings(item)));
        digest
    }

    /// The health checks that the node serves: those of its own layer take precedence.
    fn served(&self) -> BTreeMap<HealthCheckKey, HealthCheck> {
        let mut served = BTreeMap::new();
        for layer in [LayerKind::HealthChecks, LayerKind::Node] {
            let checks = self.checks.iter().filter(|((at, _), _)| *at == layer as i32);
            served.extend(checks.map(|((_, key), check)| (key.clone(), check.clone())));
        }
        served
    }

    /// Plays a step and returns the part that carries it.
    #[expect(clippy::too_many_lines, reason = "one arm per step")]
    fn play(&mut self, step: &Step) -> Part {
        let delta = |layer, kind| delta(layer, vec![kind]);
        match step {
            Step::Frontend(number, affinity) => {
                let frontend = frontend(*number, *affinity);
                self.frontends.insert(frontend.key.clone().unwrap(), frontend.clone());
                delta(LayerKind::Cluster, Kind::Frontend(frontend))
            }
            Step::FrontendRemoved(number) => {
                let key = frontend(*number, 0).key.unwrap();
                self.frontends.remove(&key);
                delta(LayerKind::Cluster, Kind::FrontendRemoved(key))
            }
            Step::Toggle(layer, number, role, members) => {
                let key = pool_key(*number, *role);
                let pool = self.pools.entry((*layer as i32, key.clone())).or_default();
                let mut patch = PoolPatch { key: Some(key), ..PoolPatch::default() };
                for member in members.iter().collect::<BTreeSet<_>>() {
                    let member = endpoint(*member);
                    if pool.remove(&member) {
                        patch.removed.push(member);
                    } else {
                        pool.insert(member.clone());
                        patch.added.push(member);
                    }
                }
                delta(*layer, Kind::Pool(patch))
            }
            Step::PoolRemoved(layer, number, role) => {
                let key = pool_key(*number, *role);
                match self.pools.remove(&(*layer as i32, key.clone())) {
                    Some(_) => delta(*layer, Kind::PoolRemoved(key)),
                    None => self.play(&Step::Cidr(0)),
                }
            }
            Step::Local(number) => {
                let endpoint = LocalEndpoint { address: vec![10, 1, 0, *number], protocol: 6, port: 80 };
                if self.local.remove(&endpoint) {
                    return delta(LayerKind::Node, Kind::LocalEndpointRemoved(endpoint));
                }
                self.local.insert(endpoint.clone());
                delta(LayerKind::Node, Kind::LocalEndpoint(endpoint))
            }
            Step::Cidr(number) => {
                let cidr = Cidr { address: vec![10, *number, 0, 0], prefix_length: 16 };
                if self.cidrs.remove(&cidr) {
                    return delta(LayerKind::Cluster, Kind::ServiceCidrRemoved(cidr));
                }
                self.cidrs.insert(cidr.clone());
                delta(LayerKind::Cluster, Kind::ServiceCidr(cidr))
            }
            Step::Node(eligible) => {
                let node = NodeRecord { name: "n".into(), eligible: *eligible, ..NodeRecord::default() };
                self.node = Some(node.clone());
                delta(LayerKind::Node, Kind::Node(node))
            }
            Step::Settings(revision) => {
                let settings = Settings { revision: *revision, ..Settings::default() };
                self.settings = Some(settings.clone());
                delta(LayerKind::Settings, Kind::Settings(settings))
            }
            Step::Check(layer, number, ready) => {
                let key = HealthCheckKey { namespace: "default".into(), name: format!("s{number}") };
                if *ready == 0 {
                    self.checks.remove(&(*layer as i32, key.clone()));
                    return delta(*layer, Kind::HealthCheckRemoved(key));
                }
                let check =
                    HealthCheck { key: Some(key.clone()), port: 30_000, ready_ipv4: *ready, ready_ipv6: 1 };
                self.checks.insert((*layer as i32, key), check.clone());
                delta(*layer, Kind::HealthCheck(check))
            }
            Step::Snapshot(layer) => self.snapshot(*layer),
        }
    }

    /// A snapshot of what the layer holds now, compressed.
    fn snapshot(&self, layer: LayerKind) -> Part {
        let mut changes: Vec<Kind> = Vec::new();
        for ((at, key), members) in &self.pools {
            if *at == layer as i32 {
                let added = members.iter().cloned().collect();
                changes.push(Kind::Pool(PoolPatch { key: Some(key.clone()), added, removed: Vec::new() }));
            }
        }
        let checks = self.checks.iter().filter(|((at, _), _)| *at == layer as i32);
        changes.extend(checks.map(|(_, check)| Kind::HealthCheck(check.clone())));
        match layer {
            LayerKind::Cluster => {
                changes.extend(self.frontends.values().cloned().map(Kind::Frontend));
                changes.extend(self.cidrs.iter().cloned().map(Kind::ServiceCidr));
            }
            LayerKind::Node => {
                changes.extend(self.local.iter().cloned().map(Kind::LocalEndpoint));
                changes.extend(self.node.iter().cloned().map(Kind::Node));
            }
            LayerKind::Settings => changes.extend(self.settings.iter().cloned().map(Kind::Settings)),
            _ => {}
        }
        snapshot(layer, changes)
    }

    fn update(&self, from: Option<u64>, to: u64) -> Update {
        Update { from, to, digest: self.digest().to_bytes().to_vec(), ..Update::default() }
    }
}

fn changes(kinds: Vec<Kind>) -> Vec<Change> {
    kinds.into_iter().map(|kind| Change { change: Some(kind) }).collect()
}

fn delta(layer: LayerKind, kinds: Vec<Kind>) -> Part {
    let payload = Segment { changes: changes(kinds) }.encode_to_vec();
    Part { layer: layer as i32, kind: PartKind::Delta as i32, payload: payload.into() }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn snapshot(layer: LayerKind, kinds: Vec<Kind>) -> Part {
    let bucket = Bucket { index: 3, digest: Vec::new(), changes: changes(kinds) };
    let payload = deflate(&Buckets { buckets: vec![bucket] }.encode_to_vec());
    Part { layer: layer as i32, kind: PartKind::SnapshotDeflate as i32, payload: payload.into() }
}

fn play(state: &mut State, update: &Update, parts: &[Part]) -> Result<Applied, RefusedUpdate> {
    state.begin(update)?;
    parts.iter().try_for_each(|part| state.part(part))?;
    state.end(&UpdateEnd { to: update.to }, std::time::Instant::now())
}

/// A restarted agent: the layers and holds as in the snapshot file.
fn restarted(state: &State, update: &Update) -> State {
    let mut again = State::new();
    let mut items = Vec::new();
    let exported: Result<(), ()> = state.export(&mut |layer, change| {
        items.push(Ok((layer, change)));
        Ok(())
    });
    exported.unwrap();
    again.restore(update, &mut items.into_iter(), std::time::Instant::now()).unwrap();
    again.restore_holds(&state.stored_holds()).unwrap();
    again
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn incremental_changes_equal_the_difference_of_full_merges(
        batches in proptest::collection::vec(proptest::collection::vec(step(), 1..8), 1..12),
        reset_at in 0_usize..12,
        minimum in prop_oneof![Just(100_usize), 0_usize..3],
        release_at in 0_usize..12,
        restart_at in 0_usize..12,
    ) {
        let (mut sender, mut state, mut kernel) = (Sender::default(), State::new(), Model::default());
        state.holds.set_minimum(minimum);
        for (number, batch) in batches.iter().enumerate() {
            // All snapshot parts of a layer in one update are one snapshot: each layer is sent once.
            let mut sent = BTreeSet::new();
            let once = |step: &&Step| !matches!(step, Step::Snapshot(layer) if !sent.insert(*layer));
            let mut parts: Vec<Part> = batch.iter().filter(once).map(|step| sender.play(step)).collect();
            let from = (number > 0 && number != reset_at).then_some(number as u64);
            if from.is_none() {
                parts = KINDS
                    .map(|layer| sender.snapshot(layer)).to_vec();
            }
            let update = sender.update(from, number as u64 + 1);
            let applied = play(&mut state, &update, &parts).unwrap();
            kernel.apply(&applied.changes);
            prop_assert_eq!(&kernel, &Model::of(&state));
            if number == restart_at {
                let held = (state.held(), state.held_digest());
                state = restarted(&state, &update);
                state.holds.set_minimum(minimum);
                prop_assert_eq!((state.held(), state.held_digest()), held);
                prop_assert_eq!(&kernel, &Model::of(&state));
            }
            if number == release_at {
                kernel.apply(&state.release_held(number as u64 + 2).changes);
                prop_assert_eq!(&kernel, &Model::of(&state));
                prop_assert_eq!((state.held(), state.held_digest()), (0, 0));
            }
            prop_assert_eq!(state.digest(), sender.digest());
            prop_assert_eq!(state.digest(), full_digest(&state));
            let mut served: Vec<HealthCheck> = state.health_checks().collect();
            served.sort_by(|one, other| one.key.cmp(&other.key));
            let desired: Vec<HealthCheck> = sender.served().into_values().collect();
            prop_assert!(served == desired || state.held() > 0, "{served:?} instead of {desired:?}");
            let endpoints: usize = sender.pools.iter()
                .filter(|((layer, key), _)| *layer == LayerKind::Cluster as i32 && key.role == Role::Cluster as i32)
                .map(|(_, members)| members.len()).sum();
            prop_assert_eq!(state.counts().endpoints, endpoints);
            let items = sender.pools.len() + sender.pools.values().map(BTreeSet::len).sum::<usize>()
                + sender.frontends.len() + sender.local.len() + sender.cidrs.len() + sender.checks.len()
                + usize::from(sender.node.is_some()) + usize::from(sender.settings.is_some());
            prop_assert_eq!(state.counts().items, items);
        }
    }

    #[test]
    fn refused_update_leaves_no_trace(
        good in proptest::collection::vec(step(), 1..10),
        bad in proptest::collection::vec(step(), 1..10),
        cut in 0_usize..64,
    ) {
        let (mut sender, mut state) = (Sender::default(), State::new());
        let good = good.iter().filter(|step| !matches!(step, Step::Snapshot(_)));
        let parts: Vec<Part> = good.map(|step| sender.play(step)).collect();
        play(&mut state, &sender.update(None, 1), &parts).unwrap();
        let (model, digest, counts) = (Model::of(&state), state.digest(), state.counts());

        let mut other = sender;
        let mut parts: Vec<Part> = bad.iter().map(|step| other.play(step)).collect();
        let mut update = other.update(Some(1), 2);
        update.digest[0] ^= 1;
        prop_assert!(play(&mut state, &update, &parts).is_err());
        prop_assert_eq!(&Model::of(&state), &model);

        // A truncated payload is malformed or another content; in no case is anything applied.
        let last = parts.last_mut().unwrap();
        let length = last.payload.len();
        last.payload.truncate(cut.min(length.saturating_sub(1)));
        let update = Update { digest: vec![0xee; 16], ..other.update(Some(1), 2) };
        prop_assert!(play(&mut state, &update, &parts).is_err());
        prop_assert_eq!(&Model::of(&state), &model);
        prop_assert_eq!(state.digest(), digest);
        prop_assert_eq!(state.counts(), counts);
        prop_assert_eq!(state.generation(), 1);
    }

    #[test]
    fn arbitrary_payloads_never_panic(
        payload in proptest::collection::vec(any::<u8>(), 0..200), layer in 0_i32..6, kind in 0_i32..5,
    ) {
        let mut state = State::new();
        let sender = Sender::default();
        state.begin(&sender.update(None, 1)).unwrap();
        let _ = state.part(&Part { layer, kind, payload: payload.into() });
    }
}

fn reason(result: Result<Applied, RefusedUpdate>) -> NackReason {
    result.err().map(|refusal| refusal.reason).unwrap_or_default()
}

#[test]
fn refusals_have_their_own_reasons() {
    let mut state = State::new();
    let mut sender = Sender::default();
    assert_eq!(reason(play(&mut state, &sender.update(Some(1), 2), &[])), NackReason::FromMismatch);
    play(&mut state, &sender.update(None, 7), &[]).unwrap();
    assert_eq!(reason(play(&mut state, &sender.update(Some(6), 8), &[])), NackReason::FromMismatch);
    assert_eq!(reason(play(&mut state, &sender.update(Some(7), 7), &[])), NackReason::Malformed);

    let update = Update { required_features: vec!["telepathy".into()], ..sender.update(Some(7), 8) };
    assert_eq!(reason(play(&mut state, &update, &[])), NackReason::UnknownFeature);
    let part = sender.play(&Step::Frontend(1, 0));
    let stale = Sender::default().update(Some(7), 8);
    assert_eq!(reason(play(&mut state, &stale, &[part])), NackReason::DigestMismatch);

    let big = Part { layer: 1, kind: 1, payload: vec![0; limits::PART + 1].into() };
    assert_eq!(reason(play(&mut state, &sender.update(Some(7), 8), &[big])), NackReason::OverLimit);
    let bomb = Part { layer: 1, kind: 3, payload: deflate(&vec![0; limits::INFLATED + 1]).into() };
    assert_eq!(reason(play(&mut state, &sender.update(Some(7), 8), &[bomb])), NackReason::OverLimit);

    let misplaced = delta(LayerKind::Zone, vec![Kind::Frontend(frontend(0, 0))]);
    assert_eq!(reason(play(&mut state, &sender.update(Some(7), 8), &[misplaced])), NackReason::Malformed);
    let payload = Segment { changes: vec![Change::default()] }.encode_to_vec();
    let unknown = Part { layer: 1, kind: 1, payload: payload.into() };
    assert_eq!(reason(play(&mut state, &sender.update(Some(7), 8), &[unknown])), NackReason::UnknownFeature);
    let absent = PoolPatch {
        key: Some(pool_key(0, Role::Cluster)),
        removed: vec![endpoint(1)],
        ..PoolPatch::default()
    };
    let absent = delta(LayerKind::Cluster, vec![Kind::Pool(absent)]);
    assert_eq!(reason(play(&mut state, &sender.update(Some(7), 8), &[absent])), NackReason::Malformed);
    assert_eq!(state.generation(), 7);
}

#[test]
fn endless_changes_are_refused() {
    let mut state = State::new();
    state.begin(&Sender::default().update(None, 1)).unwrap();
    let empty = Kind::ServiceCidr(Cidr { address: vec![0; 4], prefix_length: 0 });
    let change = Change { change: Some(empty) };
    let payload = Segment { changes: vec![change; 60_000] }.encode_to_vec();
    let part = Part { layer: 2, kind: 1, payload: payload.into() };
    let refused = (0..=limits::CHANGES / 60_000).find_map(|_| state.part(&part).err());
    // ServiceCIDRs do not belong in a ZONE layer: refused at the first change already.
    assert_eq!(refused.map(|refusal| refusal.reason), Some(NackReason::Malformed));

    state.begin(&Sender::default().update(None, 1)).unwrap();
    let part = Part { layer: 2, kind: 1, payload: Vec::new().into() };
    let refused = (0..=limits::PARTS).find_map(|_| state.part(&part).err());
    assert_eq!(refused.map(|refusal| refusal.reason), Some(NackReason::OverLimit));
}

#[test]
fn removed_override_restores_the_default() {
    let (mut sender, mut state) = (Sender::default(), State::new());
    let parts = [
        sender.play(&Step::Toggle(LayerKind::Cluster, 0, Role::Cluster, vec![1, 2, 3])),
        sender.play(&Step::Toggle(LayerKind::Node, 0, Role::Cluster, vec![3])),
    ];
    let applied = play(&mut state, &sender.update(None, 1), &parts).unwrap();
    let key = pool_key(0, Role::Cluster);
    let pool = |added: &[u8], removed: &[u8]| KernelChange::Pool {
        key: key.clone(),
        added: added.iter().map(|number| endpoint(*number)).collect(),
        removed: removed.iter().map(|number| endpoint(*number)).collect(),
    };
    assert_eq!(applied.changes, [pool(&[3], &[])]);

    // Changes under an override are kept, and do not reach the kernel.
    let parts = [sender.play(&Step::Toggle(LayerKind::Cluster, 0, Role::Cluster, vec![1, 4]))];
    let applied = play(&mut state, &sender.update(Some(1), 2), &parts).unwrap();
    assert_eq!(applied.changes, []);

    let parts = [sender.play(&Step::PoolRemoved(LayerKind::Node, 0, Role::Cluster))];
    let applied = play(&mut state, &sender.update(Some(2), 3), &parts).unwrap();
    assert_eq!(applied.changes, [pool(&[2, 4], &[])]);
}

#[test]
fn udp_flows_are_judged_as_kube_proxy_does() {
    let (mut sender, mut state) = (Sender::default(), State::new());
    let node_port = |number: u8, port: u32| {
        let mut frontend = frontend(number, 0);
        frontend.kind = FrontendKind::NodePort as i32;
        frontend.key = Some(FrontendKey { address: Vec::new(), port, ..frontend.key.unwrap() });
        frontend
    };
    for frontend in [node_port(1, 30_001), node_port(3, 30_003)] {
        sender.frontends.insert(frontend.key.clone().unwrap(), frontend);
    }
    sender.play(&Step::Frontend(1, 0));
    sender.play(&Step::Toggle(LayerKind::Cluster, 1, Role::Serving, vec![1]));
    sender.play(&Step::Frontend(3, 0));
    let parts = [sender.snapshot(LayerKind::Cluster)];
    let applied = play(&mut state, &sender.update(None, 1), &parts).unwrap();
    assert!(applied.udp.ipv4 && !applied.udp.ipv6 && applied.udp.gone.is_empty());

    let gone = BTreeSet::new();
    let judge = |destination: &str, backend: &str| {
        state.udp_flow(destination.parse().unwrap(), backend.parse().unwrap(), &gone)
    };
    assert_eq!(judge("10.96.0.1:80", "10.0.0.1:8080"), Flow::Keep);
    assert_eq!(judge("10.96.0.1:80", "10.0.0.2:8080"), Flow::Stale, "a removed endpoint");
    assert_eq!(judge("10.96.0.1:80", "10.0.0.1:8081"), Flow::Stale, "the same endpoint, another port");
    assert_eq!(judge("10.96.0.1:80", "10.96.0.1:80"), Flow::Stale, "never translated");
    assert_eq!(judge("10.96.0.1:81", "10.0.0.2:8080"), Flow::Keep, "not a service's port");
    assert_eq!(judge("10.96.0.3:80", "10.0.0.2:8080"), Flow::Stale, "no serving endpoint");
    assert_eq!(judge("192.0.2.1:30001", "10.0.0.2:8080"), Flow::Stale);
    assert_eq!(judge("192.0.2.1:30001", "10.0.0.1:8080"), Flow::Keep);
    assert_eq!(judge("192.0.2.1:30003", "10.0.0.2:8080"), Flow::Keep, "NodePort flows survive no endpoints");

    let toggle = |number| Step::Toggle(LayerKind::Cluster, 1, Role::Serving, vec![number]);
    let parts = [sender.play(&toggle(2))];
    let applied = play(&mut state, &sender.update(Some(1), 2), &parts).unwrap();
    assert!(applied.udp.is_empty(), "one more endpoint makes no flow stale");
    let parts = [sender.play(&toggle(2))];
    let applied = play(&mut state, &sender.update(Some(2), 3), &parts).unwrap();
    assert!(applied.udp.ipv4, "one endpoint less does");
    let first = Step::Toggle(LayerKind::Cluster, 3, Role::Serving, vec![1]);
    let parts = [sender.play(&first)];
    let applied = play(&mut state, &sender.update(Some(3), 4), &parts).unwrap();
    assert!(applied.udp.ipv4, "so does the first, for flows of NodePorts");

    let parts = [sender.play(&Step::FrontendRemoved(3))];
    let applied = play(&mut state, &sender.update(Some(4), 5), &parts).unwrap();
    let flow = |gone: &BTreeSet<_>| {
        state.udp_flow("10.96.0.3:80".parse().unwrap(), "10.0.0.2:8080".parse().unwrap(), gone)
    };
    assert_eq!(flow(&applied.udp.gone), Flow::Stale, "the Service is gone");
    assert_eq!(flow(&BTreeSet::new()), Flow::Keep, "after the pass no frontend has the address");
}
