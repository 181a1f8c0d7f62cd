//! Splits a large set of changes into transactions, each of which leaves every frontend with complete targets.
//!
//! A transaction blocks other changes of nf_tables in the network namespace, so its size is limited. First come elements
//! that no packet reaches yet (backends, slots, lists of sources), then the frontends that refer to them, last the
//! removal of unreferenced elements; small service ports and lists of sources come before large ones, so that no Service
//! waits for the thousands of elements of another.

use std::collections::{HashMap, HashSet};

use super::Mirror;
use crate::kernel::nft::element::{Changes, Data, Element, Key, LIST_SHIFT};
use crate::kernel::nft::layout::{CODE_MASK, CODE_RESTRICTED, Pick, STICKY_MASK};

type Change<const N: usize> = (Option<Data<N>>, Option<Data<N>>);

/// The order in which elements change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Additions that no packet reaches yet, of small service ports.
    Prepare,
    /// Elements that packets reach, of small service ports and of none.
    Switch,
    PrepareLarge,
    SwitchLarge,
    /// Removal of elements that no packet reaches any more.
    Clear,
}

impl<const N: usize> Mirror<N> {
    /// Leaves the first part in [`Mirror::changes`] and sets the others aside.
    pub(crate) fn split(&mut self, limit: usize) {
        self.rejoin();
        if self.changes.0.len() <= limit {
            return;
        }
        self.later = parts(std::mem::take(&mut self.changes), limit);
        self.later.reverse();
        self.next_part();
    }

    /// Puts the next part into [`Mirror::changes`], which must be done.
    pub(crate) fn next_part(&mut self) {
        self.changes = self.later.pop().unwrap_or_default();
    }

    /// Returns whether this is the last part.
    pub(crate) fn is_last_part(&self) -> bool {
        self.later.is_empty()
    }

    /// Puts everything that is still due into [`Mirror::changes`].
    pub(crate) fn rejoin(&mut self) {
        for part in self.later.drain(..) {
            self.changes.0.extend(part.0);
        }
    }
}

/// Service ports of elements, derived from the changes only.
struct Owners<const N: usize> {
    /// Service-port numbers by backend and by frontend.
    backends: HashMap<u32, u32>,
    frontends: HashMap<Key<N>, u32>,
    /// Elements by service port.
    weights: HashMap<u32, usize>,
    /// Ranges by list of sources.
    lists: HashMap<u32, usize>,
    /// Frontends that a large list of sources restricts.
    restricted: HashSet<Key<N>>,
    /// Pools with slots that are replaced or removed.
    modified: HashSet<u32>,
    /// Addresses at which a small service port has a frontend.
    small: HashSet<[u8; N]>,
    limit: usize,
}

impl<const N: usize> Owners<N> {
    fn of(changes: &Changes<N>, limit: usize) -> Self {
        let mut owners = Owners {
            backends: HashMap::new(),
            frontends: HashMap::new(),
            weights: HashMap::new(),
            lists: HashMap::new(),
            restricted: HashSet::new(),
            modified: HashSet::new(),
            small: HashSet::new(),
            limit,
        };
        let values = |(before, after): &Change<N>| {
            let value = |data: &Option<Data<N>>| match data {
                Some(Data::Value(value)) => Some(*value),
                _ => None,
            };
            [value(before), value(after)].into_iter().flatten().collect::<Vec<u32>>()
        };
        for (element, change) in &changes.0 {
            match element {
                Element::Slot { pool, .. } => {
                    owners.backends.extend(values(change).into_iter().map(|id| (id, pool >> 13)));
                    if change.0.is_some() {
                        owners.modified.insert(*pool);
                    }
                }
                _ => {
                    if let Element::Source(list, _) = element {
                        *owners.lists.entry(*list).or_default() += 1;
                    }
                    let value = values(change).into_iter().rfind(|value| Pick::of(*value).is_some());
                    if let (Some(place), Some(value)) = (place(element), value) {
                        owners.frontends.insert(place, value >> 13);
                    }
                }
            }
        }
        for element in changes.0.keys() {
            if let Some(number) = owners.number(element) {
                *owners.weights.entry(number).or_default() += 1;
            }
        }
        for (element, (_, after)) in &changes.0 {
            let Some(Data::Value(value)) = after else { continue };
            let large = value & CODE_MASK == CODE_RESTRICTED && owners.is_large_list(value >> LIST_SHIFT);
            owners.restricted.extend(place(element).filter(|_| large));
        }
        let addresses = changes.0.keys().filter(|element| !owners.is_large(element)).filter_map(place);
        owners.small = addresses.map(|key| key.address).collect();
        owners
    }

    fn number(&self, element: &Element<N>) -> Option<u32> {
        match element {
            Element::Slot { pool, .. } | Element::StickyPool(pool) => Some(pool >> 13),
            Element::Backend(id) => self.backends.get(id).copied(),
            Element::StickyCluster(id) | Element::StickyLocal(id) => Some((id & STICKY_MASK) >> 13),
            // Large and small service ports may share a list.
            Element::Source(..) | Element::SourceList(_) => None,
            _ => self.frontends.get(&place(element)?).copied(),
        }
    }

    fn weight(&self, element: &Element<N>) -> usize {
        if let Element::Source(list, _) | Element::SourceList(list) = element {
            return self.lists.get(list).copied().unwrap_or_default();
        }
        let number = self.number(element);
        number.and_then(|number| self.weights.get(&number)).copied().unwrap_or_default()
    }

    fn is_large(&self, element: &Element<N>) -> bool {
        let restricted = !self.restricted.is_empty()
            && place(element).is_some_and(|place| self.restricted.contains(&place));
        restricted || self.weight(element) > self.limit / 8
    }

    fn is_large_list(&self, list: u32) -> bool {
        self.lists.get(&list).is_some_and(|ranges| *ranges > self.limit / 8)
    }

    fn stage(&self, element: &Element<N>, (before, after): &Change<N>) -> Stage {
        // Frontends lead packets to these; they are not looked up by themselves.
        let led_to = match element {
            Element::Slot { pool, .. } => after.is_none() || !self.modified.contains(pool),
            Element::Backend(_) | Element::StickyCluster(_) | Element::StickyLocal(_) => true,
            Element::SourceList(_) | Element::Source(..) => true,
            _ => false,
        };
        let large = match element {
            Element::Vip(address) | Element::ClusterIp(address) => !self.small.contains(address),
            _ => self.is_large(element),
        };
        match (led_to, before, after, large) {
            (true, Some(_), None, _) => Stage::Clear,
            (true, None, Some(_), false) => Stage::Prepare,
            (true, None, Some(_), true) => Stage::PrepareLarge,
            (_, _, _, false) => Stage::Switch,
            (_, _, _, true) => Stage::SwitchLarge,
        }
    }
}

/// Returns the key that the elements of one frontend share.
fn place<const N: usize>(element: &Element<N>) -> Option<Key<N>> {
    match element {
        Element::Frontend(key)
        | Element::Inside(key)
        | Element::Outside(key)
        | Element::Guarded(key)
        | Element::Refused(key) => Some(*key),
        _ => None,
    }
}

/// Elements that change together, in the order in which they change: those that packets reach at one address, otherwise one
/// element.
fn group<const N: usize>(element: &Element<N>, stage: Stage) -> Option<[u8; N]> {
    match element {
        _ if !matches!(stage, Stage::Switch | Stage::SwitchLarge) => None,
        Element::Vip(address) | Element::ClusterIp(address) => Some(*address),
        _ => place(element).map(|key| key.address),
    }
}

/// Returns the order within a stage and group: referenced elements are added first and removed last.
fn rank<const N: usize>(element: &Element<N>, stage: Stage) -> u8 {
    let rank = match element {
        Element::Backend(_) | Element::StickyCluster(_) | Element::StickyLocal(_) => 0,
        Element::SourceList(_) => 1,
        Element::Slot { .. } => 2,
        _ => 3,
    };
    if stage == Stage::Clear { 3 - rank } else { rank }
}

/// The order of commits: by stage, address, weight of their service port, its number, and rank.
type Order<const N: usize> = (Stage, Option<[u8; N]>, usize, Option<u32>, u8);

/// Changes in parts of `limit`, or a little more where an address needs it.
fn parts<const N: usize>(changes: Changes<N>, limit: usize) -> Vec<Changes<N>> {
    let owners = Owners::of(&changes, limit);
    let order = |element: &Element<N>, change: &Change<N>| -> Order<N> {
        let stage = owners.stage(element, change);
        let group = group(element, stage);
        let (weight, number) = match group {
            Some(_) => (0, None),
            None => (owners.weight(element), owners.number(element)),
        };
        (stage, group, weight, number, rank(element, stage))
    };
    let ordered = changes.0.into_iter().map(|(element, change)| (order(&element, &change), element, change));
    let mut ordered: Vec<_> = ordered.collect();
    ordered.sort_unstable_by_key(|(order, ..)| *order);
    let (mut parts, mut last) = (vec![Changes::default()], None);
    for ((stage, group, ..), element, change) in ordered {
        let full = parts.last().is_none_or(|part: &Changes<N>| part.0.len() >= limit);
        if full && !(group.is_some() && last == Some((stage, group))) {
            parts.push(Changes::default());
        }
        last = Some((stage, group));
        if let Some(part) = parts.last_mut() {
            part.0.insert(element, change);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::element::Range;
    use crate::kernel::nft::layout::{CODE_DROP, Masquerade};

    fn service(number: u32, members: u32) -> Vec<(Element<4>, Change<4>)> {
        let pool = number << 13;
        let value = pool | Pick::new(Masquerade::ClusterIp, 0, members).code();
        let address = (0x0a60_0000 + number).to_be_bytes();
        let key = Key { address, port: 80, protocol: 6 };
        let new = |data| (None, Some(data));
        let mut all = vec![
            (Element::Frontend(key), new(Data::Value(value))),
            (Element::Vip(address), new(Data::Present)),
        ];
        for index in 0..members {
            let id = number * 100_000 + index;
            all.push((Element::Backend(id), new(Data::Endpoint(id.to_be_bytes(), 80))));
            all.push((Element::Slot { pool, index }, new(Data::Value(id))));
        }
        all
    }

    #[test]
    fn small_service_ports_committed_before_large() {
        let mut all = service(1, 50_000);
        (2..2000).for_each(|number| all.extend(service(number, 3)));
        let count = all.len();
        let parts = parts(Changes(all.into_iter().collect()), 10_000);
        assert_eq!(parts.iter().map(|part| part.0.len()).sum::<usize>(), count);
        assert!(parts.iter().all(|part| part.0.len() <= 10_001));
        let first_of_large = parts.iter().position(|part| {
            part.0.keys().any(|element| matches!(element, Element::Slot { pool, .. } if pool >> 13 == 1))
        });
        let frontends = |part: &Changes<4>| {
            part.0.keys().filter(|element| matches!(element, Element::Frontend(_))).count()
        };
        let small: usize = parts[..=first_of_large.unwrap()].iter().map(frontends).sum();
        assert_eq!(small, 1998, "all small ones come before the large one");
        assert_eq!(frontends(parts.last().unwrap()), 1);
    }

    #[test]
    fn large_source_list_committed_last() {
        let mut all: Vec<_> = (2..2000).flat_map(|number| service(number, 3)).collect();
        let new = |data| (None, Some(data));
        let mut restrict = |list: u32, ranges: u32| {
            let address = (0xc633_6400 + list).to_be_bytes();
            let key = Key { address, port: 80, protocol: 6 };
            all.push((Element::Frontend(key), new(Data::Value(list << LIST_SHIFT | CODE_RESTRICTED))));
            all.push((Element::Guarded(key), new(Data::Value(CODE_DROP))));
            all.push((Element::Vip(address), new(Data::Present)));
            all.push((Element::SourceList(list), new(Data::Present)));
            for number in 0..ranges {
                let range = Range { address: number.to_be_bytes(), prefix: 32 };
                all.push((Element::Source(list, range), new(Data::Present)));
            }
        };
        restrict(1, 40_000);
        restrict(2, 10);
        let parts = parts(Changes(all.into_iter().collect()), 10_000);
        let part_of = |wanted: &dyn Fn(&Element<4>) -> bool| {
            let holds = |part: &Changes<4>| part.0.keys().any(wanted);
            (parts.iter().position(holds).unwrap(), parts.iter().rposition(holds).unwrap())
        };
        let (list, _) = part_of(&|element| matches!(element, Element::Source(1, _)));
        let (_, others) = part_of(&|element| match element {
            Element::Frontend(key) => key.address != 0xc633_6401_u32.to_be_bytes(),
            _ => false,
        });
        assert!(others <= list, "every other frontend precedes the large list");
        let (large, _) = part_of(&|element| match element {
            Element::Frontend(key) | Element::Guarded(key) => key.address == 0xc633_6401_u32.to_be_bytes(),
            Element::Vip(address) => *address == 0xc633_6401_u32.to_be_bytes(),
            _ => false,
        });
        assert_eq!(large, parts.len() - 1, "its frontend refers to the complete list");
    }

    #[test]
    fn small_change_not_split() {
        let mut mirror = Mirror::<4>::new();
        mirror.changes = Changes(service(1, 10).into_iter().collect());
        mirror.split(22);
        assert!(mirror.is_last_part() && mirror.changes.0.len() == 22);
        mirror.split(5);
        assert!(!mirror.is_last_part());
        mirror.rejoin();
        assert_eq!(mirror.changes.0.len(), 22);
    }
}
