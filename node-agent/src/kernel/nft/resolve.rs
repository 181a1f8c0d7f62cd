//! Resolves the targets of frontends from elements that were read, without IO.
//!
//! Follows the kernel's own lookups: `frontends` gives a value, whose code is a verdict or selects a chain; the slots
//! of its pool refer to backends, and these have addresses. A reference to an absent element is a broken target: the
//! kernel drops such a packet.

use std::collections::BTreeSet;

use switchtower_proto::v1::{
    Cidr, Endpoint, Family, FrontendKey, KernelFrontend, KernelMasquerade, KernelTarget, KernelVerdict,
};

use super::dump::TableDump;
use super::element::{Data, Element, Key, LIST_SHIFT};
use super::layout::{
    CODE_DROP, CODE_MASK, CODE_REFUSE, CODE_RESTRICTED, CODE_SPLIT, Masquerade, POOL_MASK, Pick,
};
use super::numbering::Numbering;
use super::pool_role::PoolRole;

/// Maximum lookups until a verdict or a pick: `restricted`, then `split`, then the pick.
const STEPS: usize = 3;

/// Returns all frontends of a table, sorted by key.
pub(super) fn frontends<const N: usize>(dump: &TableDump<N>) -> Vec<KernelFrontend> {
    let mut keys: Vec<Key<N>> = dump
        .elements
        .keys()
        .filter_map(|element| match element {
            Element::Frontend(key) => Some(*key),
            _ => None,
        })
        .collect();
    keys.sort_unstable_by_key(|key| (key.address, key.protocol, key.port));
    keys.iter().map(|key| frontend(dump, key)).collect()
}

fn frontend<const N: usize>(dump: &TableDump<N>, key: &Key<N>) -> KernelFrontend {
    let list = source_list(dump, key);
    KernelFrontend {
        key: Some(FrontendKey {
            family: if N == 4 { Family::Ipv4 } else { Family::Ipv6 }.into(),
            address: key.address.to_vec(),
            protocol: key.protocol.into(),
            port: key.port.into(),
        }),
        outside: Some(target(dump, key, Element::Outside)),
        inside: Some(target(dump, key, Element::Inside)),
        restricted: list.is_some(),
        allowed: list.map(|list| allowed(dump, list)).unwrap_or_default(),
    }
}

/// Returns the list of allowed sources of a frontend; `None` if it is not restricted.
pub(super) fn source_list<const N: usize>(dump: &TableDump<N>, key: &Key<N>) -> Option<u32> {
    let value = value(dump, &Element::Frontend(*key))?;
    (code(value) == CODE_RESTRICTED).then_some(value >> LIST_SHIFT)
}

fn allowed<const N: usize>(dump: &TableDump<N>, list: u32) -> Vec<Cidr> {
    let ranges = dump.elements.keys().filter_map(|element| match element {
        Element::Source(of, range) if *of == list => Some(range),
        _ => None,
    });
    let cidr =
        |address: [u8; N], prefix: u8| Cidr { address: address.to_vec(), prefix_length: prefix.into() };
    let sorted: BTreeSet<Cidr> = ranges.map(|range| cidr(range.address, range.prefix)).collect();
    sorted.into_iter().collect()
}

/// Returns the dispatch code of a value.
pub(super) fn code(value: u32) -> u32 {
    value & CODE_MASK
}

fn value<const N: usize>(dump: &TableDump<N>, element: &Element<N>) -> Option<u32> {
    match dump.elements.get(element) {
        Some(Data::Value(value)) => Some(*value),
        _ => None,
    }
}

/// Follows the lookups from a frontend to its target on one side, as far as `dump` has the elements. `side` is the map
/// that `split` selects.
pub(super) fn next_element<const N: usize>(
    dump: &TableDump<N>,
    key: &Key<N>,
    side: fn(Key<N>) -> Element<N>,
) -> Lookup<N> {
    let mut at = Element::Frontend(*key);
    for _ in 0..STEPS {
        let Some(value) = value(dump, &at) else { return Lookup::Missing(at) };
        at = match code(value) {
            CODE_RESTRICTED => Element::Guarded(*key),
            CODE_SPLIT => side(*key),
            _ => return Lookup::Value(value),
        };
    }
    Lookup::Missing(at)
}

/// The end of the lookups of a frontend.
pub(super) enum Lookup<const N: usize> {
    /// This element is absent, or was not read.
    Missing(Element<N>),
    /// A verdict, or a pool and a pick.
    Value(u32),
}

fn target<const N: usize>(dump: &TableDump<N>, key: &Key<N>, side: fn(Key<N>) -> Element<N>) -> KernelTarget {
    let verdict =
        |verdict: KernelVerdict| KernelTarget { verdict: verdict.into(), ..KernelTarget::default() };
    let Lookup::Value(value) = next_element(dump, key, side) else { return verdict(KernelVerdict::Broken) };
    match code(value) {
        CODE_DROP => return verdict(KernelVerdict::Drop),
        CODE_REFUSE => return verdict(KernelVerdict::Reject),
        _ => {}
    }
    let Some(pick) = Pick::of(value) else { return verdict(KernelVerdict::Broken) };
    let (least, most) = pick.slots();
    let slot = |index: u32| endpoint(dump, &slot(value, index), value);
    // Slots beyond the minimum may be absent, but a present one without its backend is broken.
    let found: Option<BTreeSet<Endpoint>> = (0..most)
        .filter(|index| *index < least || value_of_slot(dump, value, *index).is_some())
        .map(slot)
        .collect();
    let broken = found.is_none();
    KernelTarget {
        verdict: if broken { KernelVerdict::Broken } else { KernelVerdict::Forward }.into(),
        endpoints: found.into_iter().flatten().collect(),
        masquerade: match pick.masquerade {
            Masquerade::Never => KernelMasquerade::Never,
            Masquerade::ClusterIp => KernelMasquerade::ClusterIp,
            Masquerade::Always => KernelMasquerade::Always,
        }
        .into(),
        affinity_seconds: pick.affinity,
        chain: pick.chain(),
    }
}

/// Returns a slot of the pool of a value.
pub(super) fn slot<const N: usize>(value: u32, index: u32) -> Element<N> {
    Element::Slot { pool: value & POOL_MASK, index }
}

fn value_of_slot<const N: usize>(dump: &TableDump<N>, pool: u32, index: u32) -> Option<u32> {
    value(dump, &slot(pool, index))
}

/// Returns the map element with the address of a backend of the pool of a value.
pub(super) fn backend<const N: usize>(id: u32, value: u32) -> Element<N> {
    let sticky = Pick::of(value).is_some_and(|pick| pick.affinity > 0);
    let numbering = if sticky { Numbering::Sticky } else { Numbering::Plain };
    numbering.backend(PoolRole::of_value(value), id)
}

fn endpoint<const N: usize>(dump: &TableDump<N>, slot: &Element<N>, pool: u32) -> Option<Endpoint> {
    let id = value(dump, slot)?;
    match dump.elements.get(&backend(id, pool))? {
        Data::Endpoint(address, port) => Some(Endpoint { address: address.to_vec(), port: (*port).into() }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::element::Range;

    const KEY: Key<4> = Key { address: [10, 96, 0, 1], port: 80, protocol: 6 };
    const POOL: u32 = 1 << 13;

    /// Returns a value of the pool with this number of members.
    fn of(members: u32) -> u32 {
        POOL | Pick::new(Masquerade::ClusterIp, 0, members).code()
    }

    fn dump(elements: &[(Element<4>, Data<4>)]) -> TableDump<4> {
        TableDump { elements: elements.iter().copied().collect(), ..TableDump::default() }
    }

    /// Two backends in three slots.
    fn pool() -> Vec<(Element<4>, Data<4>)> {
        let slot = |index, id| (Element::Slot { pool: POOL, index }, Data::Value(id));
        let backend = |id, last| (Element::Backend(id), Data::Endpoint([10, 244, 0, last], 8080));
        vec![slot(0, 1), slot(1, 2), slot(2, 1), backend(1, 9), backend(2, 5)]
    }

    fn one(elements: &[(Element<4>, Data<4>)]) -> KernelFrontend {
        let mut all = pool();
        all.extend(elements);
        let mut found = frontends(&dump(&all));
        assert_eq!(found.len(), 1);
        found.remove(0)
    }

    fn verdicts(frontend: &KernelFrontend) -> (KernelVerdict, KernelVerdict) {
        let verdict = |target: &Option<KernelTarget>| target.as_ref().unwrap().verdict();
        (verdict(&frontend.outside), verdict(&frontend.inside))
    }

    #[test]
    fn pool_resolved_to_each_endpoint_once() {
        let found = one(&[(Element::Frontend(KEY), Data::Value(of(3)))]);
        let target = found.outside.clone().unwrap();
        assert_eq!(found.outside, found.inside);
        assert_eq!(target.verdict(), KernelVerdict::Forward);
        let last: Vec<u8> = target.endpoints.iter().map(|endpoint| endpoint.address[3]).collect();
        assert_eq!(last, [5, 9]);
        assert_eq!((target.chain.as_str(), target.masquerade()), ("size-3", KernelMasquerade::ClusterIp));
    }

    #[test]
    fn large_pool_may_lack_slots_beyond_minimum() {
        let slots = (0..20).flat_map(|index| {
            let backend = (Element::Backend(index), Data::Endpoint([10, 244, 1, index as u8], 80));
            [(Element::Slot { pool: POOL, index }, Data::Value(index)), backend]
        });
        let mut all: Vec<_> = slots.collect();
        all.push((Element::Frontend(KEY), Data::Value(of(20))));
        let endpoints = |all: &[(Element<4>, Data<4>)]| {
            let target = frontends(&dump(all)).remove(0).outside.unwrap();
            (target.verdict(), target.endpoints.len(), target.chain)
        };
        assert_eq!(endpoints(&all), (KernelVerdict::Forward, 20, "size-32".to_owned()));
        all.retain(|(element, _)| !matches!(element, Element::Slot { index: 16, .. }));
        assert_eq!(endpoints(&all).0, KernelVerdict::Broken, "the least is 17 slots");
    }

    #[test]
    fn split_sides_and_allowed_sources_resolved() {
        let range = Range::new(&[192, 0, 2, 0], 24).unwrap();
        let found = one(&[
            (Element::Frontend(KEY), Data::Value(9 << LIST_SHIFT | CODE_RESTRICTED)),
            (Element::Source(8, Range::new(&[10, 0, 0, 0], 8).unwrap()), Data::Present),
            (Element::Guarded(KEY), Data::Value(CODE_SPLIT)),
            (Element::Inside(KEY), Data::Value(of(3))),
            (Element::Outside(KEY), Data::Value(CODE_DROP)),
            (Element::Source(9, range), Data::Present),
        ]);
        assert_eq!(verdicts(&found), (KernelVerdict::Drop, KernelVerdict::Forward));
        assert!(found.restricted);
        assert_eq!(found.allowed, [Cidr { address: vec![192, 0, 2, 0], prefix_length: 24 }]);
    }

    #[test]
    fn refusal_and_missing_elements_resolved() {
        let found = one(&[(Element::Frontend(KEY), Data::Value(CODE_REFUSE))]);
        assert_eq!(verdicts(&found).0, KernelVerdict::Reject);
        for value in [CODE_SPLIT, CODE_RESTRICTED, POOL | 8, of(4), POOL + of(3)] {
            let found = one(&[(Element::Frontend(KEY), Data::Value(value))]);
            assert_eq!(verdicts(&found).0, KernelVerdict::Broken, "{value:#x}");
        }
    }
}
