//! Properties of the mirror, without a kernel.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;
use switchtower_proto::v1::{
    Cidr, Endpoint, Family, Frontend, FrontendKey, FrontendKind, NodeRecord, PoolKey, Protocol, Role,
    ServicePort, Settings, Target, Verdict,
};

use super::Mirror;
use crate::kernel::change::KernelChange;
use crate::kernel::nft::dump::TableDump;
use crate::kernel::nft::element::LIST_SHIFT;
use crate::kernel::nft::element::{Data, Element};
use crate::kernel::nft::encode::{self, Structure};
use crate::kernel::nft::hint;
use crate::kernel::nft::layout::RuleConfig;
use crate::kernel::nft::layout::{CODE_MASK, CODE_RESTRICTED, POOL_MASK, Pick};
use crate::kernel::nft::plan::{NODE_PORT_ADDRESSES, Plan};
use crate::kernel::nft::pool_role::ROLE_BIT;

type Model = HashMap<Element<4>, Data<4>>;

/// Applies the recorded changes to a model of the kernel, as strictly as the kernel does.
fn take(mirror: &mut Mirror<4>, model: &mut Model) {
    let changes: Vec<_> = mirror.changes.0.drain().collect();
    for (element, (before, _)) in &changes {
        if before.is_some() {
            assert_eq!(model.remove(element), *before, "a removal of {element:?} must find what it expects");
        }
    }
    for (element, (_, after)) in changes {
        if let Some(data) = after {
            assert_eq!(model.insert(element, data), None, "an addition of {element:?} finds it absent");
        }
    }
}

fn service_port(service: u8) -> ServicePort {
    let name = format!("s{service}");
    ServicePort { namespace: "n".to_owned(), name, port: String::new(), protocol: Protocol::Tcp as i32 }
}

fn pool_key(service: u8, local: bool) -> PoolKey {
    let role = if local { Role::Local } else { Role::Cluster };
    PoolKey { service_port: Some(service_port(service)), family: Family::Ipv4 as i32, role: role as i32 }
}

fn endpoint(number: u8) -> Endpoint {
    Endpoint { address: vec![10, 244, 0, number], port: 80 }
}

fn frontend_key(number: u8) -> FrontendKey {
    let address = if number < 8 { vec![10, 96, 0, number] } else { Vec::new() };
    FrontendKey {
        family: Family::Ipv4 as i32,
        address,
        protocol: Protocol::Tcp as i32,
        port: 80 + u32::from(number % 3),
    }
}

fn frontend(number: u8, service: u8, kind: u8, affinity: bool) -> Frontend {
    let target = |local: bool, drop: bool| {
        let role = if local { Role::Local } else { Role::Cluster };
        let when_empty = if drop { Verdict::Drop } else { Verdict::Reject };
        Some(Target { role: role as i32, when_empty: when_empty as i32 })
    };
    let local = kind & 1 != 0;
    let kind = match kind >> 1 {
        0 => FrontendKind::ClusterIp,
        1 => FrontendKind::LoadBalancer,
        _ => FrontendKind::ExternalIp,
    };
    Frontend {
        key: Some(frontend_key(number)),
        kind: kind as i32,
        service_port: Some(service_port(service)),
        outside: target(local, local),
        inside: target(local && kind == FrontendKind::ClusterIp, false),
        affinity_seconds: if affinity { 10 } else { 0 },
        // Few lists, so that frontends share them.
        source_ranges: (0..number % 3).map(|range| cidr(range + service % 2)).collect(),
    }
}

fn cidr(number: u8) -> Cidr {
    Cidr { address: vec![192, 0, number, 0], prefix_length: 24 }
}

/// A change that is valid after any other: pools ignore what they have and lack.
fn change() -> impl Strategy<Value = KernelChange> {
    let node = |address: u8| {
        KernelChange::Node(NodeRecord { addresses: vec![vec![10, 96, 0, address]], ..NodeRecord::default() })
    };
    let numbers = prop::collection::vec(1..60u8, 0..25);
    prop_oneof![
        6 => (0..5u8, any::<bool>(), numbers.clone(), numbers).prop_map(|(service, local, mut added, removed)| {
            added.sort_unstable();
            added.dedup();
            added.retain(|number| !removed.contains(number));
            KernelChange::Pool {
                key: pool_key(service, local),
                added: added.into_iter().map(endpoint).collect(),
                removed: removed.into_iter().map(endpoint).collect(),
            }
        }),
        1 => (0..5u8, any::<bool>()).prop_map(|(service, local)| KernelChange::PoolRemoved(pool_key(service, local))),
        4 => (0..11u8, 0..5u8, 0..6u8, any::<bool>())
            .prop_map(|(number, service, kind, affinity)| KernelChange::Frontend(frontend(number, service, kind, affinity))),
        2 => (0..11u8).prop_map(|number| KernelChange::FrontendRemoved(frontend_key(number))),
        1 => (0..8u8).prop_map(node),
    ]
}

/// Addresses that a packet to each frontend could reach: independent of numbers and order.
fn meaning(model: &Model) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::new();
    for (element, data) in model {
        let reached = match (element, data) {
            (
                Element::Frontend(_) | Element::Inside(_) | Element::Outside(_) | Element::Guarded(_),
                Data::Value(value),
            ) => reached(model, *value),
            (Element::Slot { .. } | Element::Backend(_) | Element::StickyCluster(_), _)
            | (Element::StickyLocal(_) | Element::StickyPool(_), _)
            | (Element::SourceList(_) | Element::Source(..), _) => continue,
            _ => Vec::new(),
        };
        all.insert(format!("{element:?}"), reached);
    }
    all
}

/// The endpoints that a value leads to; every lookup on the way must hit.
fn reached(model: &Model, value: u32) -> Vec<String> {
    let list = value >> LIST_SHIFT;
    if value & CODE_MASK == CODE_RESTRICTED {
        assert!(model.contains_key(&Element::SourceList(list)), "no list {list}");
        let source = |element: &Element<4>| match element {
            Element::Source(of, range) if *of == list => Some(format!("{range:?}")),
            _ => None,
        };
        let mut sources: Vec<String> = model.keys().filter_map(source).collect();
        sources.sort();
        return sources;
    }
    let Some(pick) = Pick::of(value) else { return vec![format!("code {}", value & CODE_MASK)] };
    let pool = value & POOL_MASK;
    let endpoint = |id: u32| {
        let backend = if pick.affinity == 0 {
            Element::Backend(id)
        } else {
            assert_eq!(id >> 16 & 0x7fff, value >> 16, "the id names its service port");
            if value & ROLE_BIT != 0 { Element::StickyLocal(id) } else { Element::StickyCluster(id) }
        };
        format!("{:?}", model.get(&backend).unwrap_or_else(|| panic!("no backend {id:#x}")))
    };
    let (least, most) = pick.slots();
    let slots = |index| match model.get(&Element::Slot { pool, index }) {
        Some(Data::Value(id)) => Some(endpoint(*id)),
        None => None,
        other => panic!("slot {index} of {value:#x}: {other:?}"),
    };
    let mut endpoints: Vec<String> = (0..most).map_while(slots).collect();
    assert!(endpoints.len() as u32 >= least, "{value:#x} has too few slots");
    assert_eq!(slots(endpoints.len() as u32), None, "a slot that no chain of the size picks");
    if pick.affinity > 0 {
        let Some(Data::Value(own)) = model.get(&Element::StickyPool(pool)) else { panic!("{value:#x}") };
        let own_pick = Pick::of(*own).unwrap();
        assert_eq!((own & POOL_MASK, own_pick.class), (pool, pick.class), "finds its pool again");
    }
    endpoints.push(format!("{:?} {:?}", pick.masquerade, pick.affinity));
    endpoints.sort();
    endpoints.dedup();
    endpoints
}

/// A pool between two parts of a change may have more slots than its frontends pick from, never fewer.
fn leads_somewhere(model: &Model, value: u32) {
    if value & CODE_MASK == CODE_RESTRICTED {
        assert!(model.contains_key(&Element::SourceList(value >> LIST_SHIFT)), "no list of {value:#x}");
    }
    let Some(pick) = Pick::of(value) else { return };
    let (least, most) = pick.slots();
    for index in 0..most {
        match model.get(&Element::Slot { pool: value & POOL_MASK, index }) {
            Some(Data::Value(id)) => {
                let backend = match (pick.affinity, value & ROLE_BIT) {
                    (0, _) => Element::Backend(*id),
                    (_, 0) => Element::StickyCluster(*id),
                    _ => Element::StickyLocal(*id),
                };
                assert!(model.contains_key(&backend), "slot {index} of {value:#x} leads to {backend:?}");
            }
            other => assert!(index >= least, "slot {index} of {value:#x}: {other:?}"),
        }
    }
}

/// The view that a list of changes leads to, as additions.
fn view(changes: &[KernelChange]) -> Vec<KernelChange> {
    let mut pools: BTreeMap<String, (PoolKey, BTreeMap<Vec<u8>, Endpoint>)> = BTreeMap::new();
    let mut frontends: BTreeMap<String, Frontend> = BTreeMap::new();
    let mut node = None;
    for change in changes {
        match change {
            KernelChange::Pool { key, added, removed } => {
                let pool = pools.entry(format!("{key:?}")).or_insert_with(|| (key.clone(), BTreeMap::new()));
                removed.iter().for_each(|endpoint| drop(pool.1.remove(&endpoint.address)));
                pool.1.extend(added.iter().map(|endpoint| (endpoint.address.clone(), endpoint.clone())));
            }
            KernelChange::PoolRemoved(key) => drop(pools.remove(&format!("{key:?}"))),
            KernelChange::Frontend(frontend) => {
                frontends.insert(format!("{:?}", frontend.key), frontend.clone());
            }
            KernelChange::FrontendRemoved(key) => drop(frontends.remove(&format!("{:?}", Some(key)))),
            other => node = Some(other.clone()),
        }
    }
    let pools = pools.into_values().map(|(key, members)| KernelChange::Pool {
        key,
        added: members.into_values().collect(),
        removed: Vec::new(),
    });
    pools.chain(frontends.into_values().map(KernelChange::Frontend)).chain(node).collect()
}

#[test]
fn retried_refusals_not_counted_as_drift() {
    let (mut plan, mut model) = (Plan::new(), Model::new());
    let added = (1..=3).map(endpoint).collect();
    plan.apply(&KernelChange::Pool { key: pool_key(1, false), added, removed: Vec::new() });
    plan.apply(&KernelChange::Frontend(frontend(1, 1, 0, false)));
    plan.settle();
    let whole = plan.v4.elements();
    // The kernel refuses an endpoint and an address.
    let mut backends: Vec<_> =
        whole.keys().filter(|element| matches!(element, Element::Backend(_))).copied().collect();
    backends.sort_unstable();
    let vip = whole.keys().find(|element| matches!(element, Element::Vip(_))).copied().unwrap();
    let refuse = |plan: &mut Plan| {
        plan.v4.refuse(backends[1], libc::EINVAL);
        plan.v4.refuse(vip, libc::ENFILE);
        plan.settle();
    };
    refuse(&mut plan);
    take(&mut plan.v4, &mut model);
    assert_eq!(plan.refusals().len(), 2);
    assert_eq!(model, plan.v4.elements());
    // Compared with a kernel that holds what it took, the retried elements are all that differ.
    let retried = plan.v4.retry_refused();
    assert!(plan.refusals().is_empty());
    let wanted = plan.v4.elements();
    let all: std::collections::BTreeSet<_> = wanted.keys().chain(model.keys()).copied().collect();
    let change = |element: &Element<4>| (model.get(element).copied(), wanted.get(element).copied());
    plan.v4.changes.0 = all.iter().map(|element| (*element, change(element))).collect();
    plan.v4.changes.0.retain(|_, (before, after)| before != after);
    assert!(plan.v4.changes.0.contains_key(&vip));
    assert_eq!(plan.v4.count_of(&retried), plan.v4.changes.0.len());
    take(&mut plan.v4, &mut model);
    assert_eq!(reached(&model, value(&model)).len(), reached(&whole, value(&whole)).len());
}

/// Number of operations, with messages, of a transaction with the pending changes of a table that exists.
fn operations(plan: &Plan) -> usize {
    let mut batch = crate::kernel::nft::batch::Batch::new();
    let structure = Structure { built: true, config: RuleConfig::default(), ..Structure::default() };
    let encoded = encode::family(&mut batch, &plan.v4, &structure, &BTreeMap::new(), usize::MAX);
    encoded.operations as usize
}

#[test]
fn node_port_elements_bounded_by_the_address_limit() {
    let mut plan = Plan::new();
    let all = Cidr { address: vec![10, 0, 0, 0], prefix_length: 8 };
    let settings = Settings { node_port_addresses: vec![all], ..Settings::default() };
    plan.apply(&KernelChange::Settings(settings));
    let own = vec![10, 255, 255, 1];
    plan.apply(&KernelChange::Node(NodeRecord { addresses: vec![own.clone()], ..NodeRecord::default() }));
    let mut addresses: Vec<std::net::IpAddr> =
        (0..5000_u16).map(|number| [10, 9, (number >> 8) as u8, number as u8].into()).collect();
    addresses.push([10, 255, 255, 1].into());
    plan.apply(&KernelChange::HostAddresses(addresses));
    for port in 0..3 {
        plan.apply(&KernelChange::Frontend(Frontend {
            kind: FrontendKind::NodePort as i32,
            ..frontend(8 + port, 1, 0, false)
        }));
    }
    plan.settle();
    let served: std::collections::BTreeSet<[u8; 4]> = plan
        .v4
        .elements()
        .into_keys()
        .filter_map(|element| match element {
            Element::Frontend(key) => Some(key.address),
            _ => None,
        })
        .collect();
    assert_eq!(served.len(), NODE_PORT_ADDRESSES);
    assert!(served.contains(own.as_slice()), "the node's own address comes first");
    let refusals = plan.refusals();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert!(refusals[0].reason.contains("selects 5001 addresses"), "{refusals:?}");
    plan.apply(&KernelChange::HostAddresses(vec![[10, 9, 0, 1].into()]));
    plan.settle();
    assert_eq!(plan.refusals(), vec![]);
}

/// The value of the one frontend.
fn value(model: &Model) -> u32 {
    let mut values = model.iter().filter_map(|(element, data)| match (element, data) {
        (Element::Frontend(_), Data::Value(value)) => Some(*value),
        _ => None,
    });
    values.next().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Applied one by one, batch by batch or all at once: the same meaning; the mirror always says what the
    /// kernel holds; undone, everything is as before.
    #[test]
    fn batched_changes_reach_targets_of_the_view(
        batches in prop::collection::vec(prop::collection::vec(change(), 1..6), 1..25),
    ) {
        let (mut incremental, mut model) = (Plan::new(), Model::new());
        for batch in &batches {
            let undo: Vec<_> = batch.iter().flat_map(|change| incremental.apply(change)).collect();
            incremental.settle();
            // A batch that the kernel refused is undone, and then applied again.
            let before = meaning(&model);
            undo.into_iter().rev().for_each(|undo| incremental.undo(undo));
            incremental.settle();
            take(&mut incremental.v4, &mut model);
            prop_assert_eq!(meaning(&model), before);
            batch.iter().for_each(|change| drop(incremental.apply(change)));
            incremental.settle();
            take(&mut incremental.v4, &mut model);
            prop_assert_eq!(&model, &incremental.v4.elements());
        }
        let (mut whole, mut whole_model) = (Plan::new(), Model::new());
        view(&batches.concat()).iter().for_each(|change| drop(whole.apply(change)));
        whole.settle();
        take(&mut whole.v4, &mut whole_model);
        prop_assert!(incremental.refusals().is_empty());
        prop_assert_eq!(meaning(&model), meaning(&whole_model));
    }

    /// Whatever the affinity timeouts, ranges and sizes of pools: a Service costs operations in proportion to its own
    /// frontends, endpoints and ranges, and none because of other Services.
    #[test]
    fn operations_bounded_by_the_size_of_a_service(
        services in prop::collection::vec((any::<u32>(), 0..400usize, 0..300usize, any::<bool>()), 1..12),
    ) {
        let mut plan = Plan::new();
        for (number, (timeout, endpoints, ranges, local)) in (0..).zip(services) {
            let mut port = frontend(1, number, 2 + u8::from(local), false);
            port.key = Some(FrontendKey { address: vec![10, 97, 0, number], ..frontend_key(1) });
            port.affinity_seconds = timeout;
            port.source_ranges = (0..ranges)
                .map(|range| Cidr { address: vec![172, number, range as u8, (range >> 8) as u8], prefix_length: 32 })
                .collect();
            let added = (0..endpoints)
                .map(|index| Endpoint { address: vec![10, 244, index as u8, (index >> 8) as u8], port: 80 });
            let added: Vec<_> = added.collect();
            for role in [false, true] {
                let key = pool_key(number, role);
                plan.apply(&KernelChange::Pool { key, added: added.clone(), removed: Vec::new() });
            }
            plan.apply(&KernelChange::Frontend(port.clone()));
            plan.settle();
            // Frontend, inside, outside, guarded, refused, VIP and a value per pool; a backend and a slot per endpoint
            // of each pool; a list with its chain and rules.
            let bound = 30 + 4 * endpoints + ranges;
            let used = operations(&plan);
            prop_assert!(used <= bound, "{} operations, {} endpoints, {} ranges", used, endpoints, ranges);
            plan.v4.changes = Default::default();
            // Another timeout changes values only.
            port.affinity_seconds = timeout / 2 + 1;
            if timeout > 0 {
                plan.apply(&KernelChange::Frontend(port));
                plan.settle();
                let used = operations(&plan);
                prop_assert!(used <= 30 + 2 * ranges, "{} operations for another timeout", used);
                plan.v4.changes = Default::default();
            }
        }
    }

    /// However small the transactions that a change is split into, each leaves every frontend with whole targets.
    #[test]
    fn parts_of_split_change_consistent(
        batches in prop::collection::vec(prop::collection::vec(change(), 1..20), 1..6),
        limit in 1..12usize,
    ) {
        let (mut plan, mut model) = (Plan::new(), Model::new());
        for batch in &batches {
            batch.iter().for_each(|change| drop(plan.apply(change)));
            plan.settle();
            plan.v4.split(limit);
            loop {
                take(&mut plan.v4, &mut model);
                for (element, data) in &model {
                    if let (Element::Frontend(_) | Element::Inside(_) | Element::Outside(_) | Element::Guarded(_),
                        Data::Value(value)) = (element, data) {
                        leads_somewhere(&model, *value);
                    }
                }
                if plan.v4.is_last_part() {
                    break;
                }
                plan.v4.next_part();
            }
            prop_assert_eq!(&model, &plan.v4.elements());
        }
    }

    /// A mirror built from the view and a dump's hints is the one that made the dump.
    #[test]
    fn adoption_recovers_every_number(
        batches in prop::collection::vec(prop::collection::vec(change(), 1..6), 1..25),
    ) {
        let (mut incremental, mut model) = (Plan::new(), Model::new());
        for batch in &batches {
            batch.iter().for_each(|change| drop(incremental.apply(change)));
            incremental.settle();
            take(&mut incremental.v4, &mut model);
        }
        let mut adopted = Plan::new();
        let dump = TableDump { elements: model.clone(), ..TableDump::default() };
        hint(&mut adopted.v4, &dump);
        view(&batches.concat()).iter().for_each(|change| drop(adopted.apply(change)));
        adopted.settle();
        let mut found = adopted.v4.elements();
        // What no frontend leads to has no number that a dump could tell.
        let mut known = model.clone();
        let used: std::collections::HashSet<u32> = model
            .iter()
            .filter_map(|(element, data)| match (element, data) {
                (Element::Slot { .. } | Element::StickyPool(_), _) => None,
                (_, Data::Value(value)) => Pick::of(*value).map(|_| value >> 13),
                _ => None,
            })
            .collect();
        for elements in [&mut known, &mut found] {
            elements.retain(|element, _| match element {
                Element::Slot { pool, .. } | Element::StickyPool(pool) => used.contains(&(pool >> 13)),
                Element::Backend(_) | Element::StickyCluster(_) | Element::StickyLocal(_) => false,
                _ => true,
            });
        }
        prop_assert_eq!(known, found);
    }
}
