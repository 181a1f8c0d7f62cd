//! The desired elements of one family's table, derived from the view without IO, in memory for 50,000 Services.
//!
//! Changes of the view are applied with [`Mirror::set_frontend`] and the like, which only mark what they touch;
//! [`Mirror::settle`] then brings numbers, codes and elements in line and records the differences in
//! [`Mirror::changes`]. That record stays until the kernel accepts it, so a batch that the kernel refused can be
//! undone by applying the inverse changes: the record then has the remaining differences.

mod frontends;
mod lists;
mod parts;
mod pools;
mod refusal;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use switchtower_proto::v1::{Cidr, FrontendKind, Role, Verdict};

use super::allocate::Allocator;
use super::element::{Changes, Data, Element, Key, Range};
use super::layout::{BACKEND_BIT, RuleConfig};
use super::numbering::{Numbering, index_of, pool_bits};
use super::pool_role::{ByRole, PoolRole};
use super::port_name::PortName;

/// Service-port numbers without affinity: those below 2^18 that are no multiples of 8.
const PLAIN_NUMBERS: u32 = (1 << 18) / 8 * 7;
/// Service-port numbers with affinity: multiples of 8, not 0.
const STICKY_NUMBERS: u32 = (1 << 15) - 1;
/// Member numbers of a service port with affinity.
const STICKY_MEMBERS: u32 = 1 << 16;
/// Number of freed numbers that are not reused yet.
const QUARANTINE: usize = 1024;

/// The key of a frontend in the view: an address, or a port of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Reference<const N: usize> {
    Explicit(Key<N>),
    NodePort { protocol: u8, port: u16 },
}

/// The target of the traffic from one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) role: Role,
    pub(crate) when_empty: Verdict,
}

/// A frontend of the view.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frontend {
    pub(crate) kind: FrontendKind,
    pub(crate) outside: Target,
    pub(crate) inside: Target,
    pub(crate) affinity: u32,
    /// As received, both families.
    pub(crate) ranges: Arc<[Cidr]>,
    pub(crate) port: u32,
}

/// The node that refuses connections without endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refuses {
    /// The node that the connection comes through or from.
    Anywhere,
    /// The node that it is for: its port is a node port.
    AtTheNode,
}

impl Refuses {
    fn element<const N: usize>(self, key: Key<N>) -> Element<N> {
        match self {
            Refuses::Anywhere => Element::Refused(key),
            Refuses::AtTheNode => Element::RefusedNodePort(key),
        }
    }
}

/// The programmed elements of one address, protocol and port. A value of 0 is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Programmed {
    main: u32,
    inside: u32,
    outside: u32,
    guarded: u32,
    /// The element by which connections are refused.
    refused: Option<Refuses>,
    cluster_ip: bool,
}

/// One endpoint of a pool.
#[derive(Debug, Clone, Copy)]
struct Member<const N: usize> {
    address: [u8; N],
    port: u16,
    /// 0 while the service port has no number.
    id: u32,
}

impl<const N: usize> Member<N> {
    /// The data of the member's element.
    fn data(&self) -> Option<Data<N>> {
        Some(Data::Endpoint(self.address, self.port))
    }
}

#[derive(Debug, Default)]
struct Pool<const N: usize> {
    members: Vec<Member<N>>,
    /// The value in map `sticky_pools`; 0: none.
    sticky_value: u32,
}

#[derive(Debug)]
struct Port<const N: usize> {
    name: Arc<PortName>,
    /// 0: none, nothing of its pools is in the kernel.
    number: u32,
    numbering: Numbering,
    next_member: u32,
    references: Vec<Reference<N>>,
    pools: ByRole<Option<Box<Pool<N>>>>,
}

impl<const N: usize> Port<N> {
    fn pools(&self) -> impl Iterator<Item = (PoolRole, &Pool<N>)> {
        self.pools.iter().filter_map(|(role, pool)| pool.as_deref().map(|pool| (role, pool)))
    }
}

/// Facts of the node and the settings, as far as they concern one family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Facts<const N: usize> {
    /// Addresses on which NodePorts are served.
    pub(crate) node_ports: BTreeSet<[u8; N]>,
    /// Number of further addresses that `nodePortAddresses` selects, beyond the limit.
    pub(crate) unserved: usize,
    /// The node's primary address.
    pub(crate) primary: Option<[u8; N]>,
    pub(crate) local_pods: Vec<Range<N>>,
    pub(crate) rules: RuleConfig,
    /// Frontends that would capture connections to the controllers.
    pub(crate) controllers: BTreeSet<Key<N>>,
}

use lists::SourceLists;
pub(crate) use refusal::UnprogrammedItem;

/// Numbers from a dump, which an adopted mirror continues to use.
#[derive(Debug, Default)]
pub(crate) struct Hints<const N: usize> {
    /// Service-port numbers by frontend.
    pub(crate) numbers: HashMap<Key<N>, u32>,
    /// Numbers that a port has claimed.
    pub(crate) claimed: HashSet<u32>,
    /// Ids of backends without affinity.
    pub(crate) backends: BTreeSet<u32>,
    /// Ids by pool, in the order of the slots.
    pub(crate) slots: HashMap<u32, Vec<u32>>,
    pub(crate) endpoints: HashMap<u32, ([u8; N], u16)>,
    /// Numbers of source lists by their sorted ranges.
    pub(crate) lists: HashMap<Vec<Range<N>>, u32>,
}

/// The mirror of one table.
#[derive(Debug)]
pub(crate) struct Mirror<const N: usize> {
    ports: Vec<Option<Port<N>>>,
    free_ports: Vec<u32>,
    names: HashMap<Arc<PortName>, u32>,
    frontends: HashMap<Reference<N>, Frontend>,
    programmed: HashMap<Key<N>, Programmed>,
    /// Frontends and ClusterIP frontends per address.
    addresses: HashMap<[u8; N], (u32, u32)>,
    hairpin: HashSet<Key<N>>,
    service_cidrs: BTreeSet<Range<N>>,
    programmed_cidrs: Vec<Range<N>>,
    pub(crate) facts: Facts<N>,
    lists: SourceLists<N>,
    plain: Allocator,
    sticky: Allocator,
    backends: Allocator,
    dirty_ports: BTreeSet<u32>,
    dirty_keys: BTreeSet<Key<N>>,
    /// Elements that the kernel refused.
    blocked: HashMap<Element<N>, i32>,
    refused_members: Vec<(u32, PoolRole, Member<N>, i32)>,
    /// Frontends without a free number, with the reason.
    overflowed: HashMap<Key<N>, &'static str>,
    /// A number became free since the last time.
    freed: bool,
    pub(crate) hints: Hints<N>,
    /// Differences between the kernel and the desired elements.
    pub(crate) changes: Changes<N>,
    /// Parts of it that later transactions write, the last one first.
    later: Vec<Changes<N>>,
    /// False while a mirror is built that will be compared as a whole.
    pub(crate) recording: bool,
}

impl<const N: usize> Mirror<N> {
    /// An empty table.
    pub(crate) fn new() -> Self {
        Mirror {
            ports: Vec::new(),
            free_ports: Vec::new(),
            names: HashMap::new(),
            frontends: HashMap::new(),
            programmed: HashMap::new(),
            addresses: HashMap::new(),
            hairpin: HashSet::new(),
            service_cidrs: BTreeSet::new(),
            programmed_cidrs: Vec::new(),
            facts: Facts::default(),
            lists: SourceLists::default(),
            plain: Allocator::new(PLAIN_NUMBERS, QUARANTINE),
            sticky: Allocator::new(STICKY_NUMBERS, QUARANTINE),
            backends: Allocator::new(BACKEND_BIT, QUARANTINE),
            dirty_ports: BTreeSet::new(),
            dirty_keys: BTreeSet::new(),
            blocked: HashMap::new(),
            refused_members: Vec::new(),
            overflowed: HashMap::new(),
            freed: false,
            hints: Hints::default(),
            changes: Changes::default(),
            later: Vec::new(),
            recording: true,
        }
    }

    fn put(&mut self, element: Element<N>, before: Option<Data<N>>, after: Option<Data<N>>) {
        let before = if self.blocked.remove(&element).is_some() { None } else { before };
        if self.recording {
            self.changes.put(element, before, after);
        }
    }

    fn port_index(&mut self, name: &PortName) -> u32 {
        if let Some(index) = self.names.get(name) {
            return *index;
        }
        let name = Arc::new(name.clone());
        let port = Port {
            name: Arc::clone(&name),
            number: 0,
            numbering: Numbering::Plain,
            next_member: 0,
            references: Vec::new(),
            pools: ByRole::default(),
        };
        let index = self.free_ports.pop().unwrap_or(self.ports.len() as u32);
        if index as usize == self.ports.len() {
            self.ports.push(None);
        }
        self.ports[index as usize] = Some(port);
        self.names.insert(name, index);
        index
    }

    fn port(&self, index: u32) -> Option<&Port<N>> {
        self.ports.get(index as usize)?.as_ref()
    }

    fn port_mut(&mut self, index: u32) -> Option<&mut Port<N>> {
        self.ports.get_mut(index as usize)?.as_mut()
    }

    fn port_name(&self, index: u32) -> Option<Arc<PortName>> {
        self.port(index).map(|port| Arc::clone(&port.name))
    }

    fn mark_keys(&mut self, reference: Reference<N>) {
        match reference {
            Reference::Explicit(key) => {
                self.dirty_keys.insert(key);
            }
            Reference::NodePort { protocol, port } => {
                for address in &self.facts.node_ports {
                    self.dirty_keys.insert(Key { address: *address, port, protocol });
                }
            }
        }
    }

    /// Adds or replaces a frontend of the named service port; returns the one before with its port's name.
    pub(crate) fn set_frontend(
        &mut self,
        reference: Reference<N>,
        port: &PortName,
        mut frontend: Frontend,
    ) -> Option<(Arc<PortName>, Frontend)> {
        let before = self.remove_frontend(reference);
        let index = self.port_index(port);
        frontend.port = index;
        if let Some(port) = self.port_mut(index) {
            port.references.push(reference);
        }
        self.frontends.insert(reference, frontend);
        self.dirty_ports.insert(index);
        self.mark_keys(reference);
        before
    }

    /// Removes a frontend; returns it with its port's name.
    pub(crate) fn remove_frontend(&mut self, reference: Reference<N>) -> Option<(Arc<PortName>, Frontend)> {
        let frontend = self.frontends.remove(&reference)?;
        self.mark_keys(reference);
        let index = frontend.port;
        let name = self.port_name(index)?;
        if let Some(port) = self.port_mut(index) {
            port.references.retain(|other| *other != reference);
        }
        self.dirty_ports.insert(index);
        Some((name, frontend))
    }

    /// Adds or removes a local endpoint; returns whether that changed anything.
    pub(crate) fn set_hairpin(&mut self, key: Key<N>, present: bool) -> bool {
        let changed = if present { self.hairpin.insert(key) } else { self.hairpin.remove(&key) };
        if changed {
            let data = Some(Data::Present);
            let (before, after) = if present { (None, data) } else { (data, None) };
            self.put(Element::Hairpin(key), before, after);
        }
        changed
    }

    /// Adds or removes a ServiceCIDR; returns whether that changed anything.
    pub(crate) fn set_service_cidr(&mut self, range: Range<N>, present: bool) -> bool {
        let changed =
            if present { self.service_cidrs.insert(range) } else { self.service_cidrs.remove(&range) };
        let before = std::mem::take(&mut self.programmed_cidrs);
        self.programmed_cidrs = Range::outermost(self.service_cidrs.iter().copied().collect());
        let after = self.programmed_cidrs.clone();
        self.put_difference(&before, &after, Element::ServiceCidr);
        changed
    }

    fn put_difference(
        &mut self,
        before: &[Range<N>],
        after: &[Range<N>],
        element: fn(Range<N>) -> Element<N>,
    ) {
        // Both are sorted, as `Range::outermost` leaves them.
        for range in before.iter().filter(|range| after.binary_search(range).is_err()) {
            self.put(element(*range), Some(Data::Present), None);
        }
        for range in after.iter().filter(|range| before.binary_search(range).is_err()) {
            self.put(element(*range), None, Some(Data::Present));
        }
    }

    /// Replaces the facts; only what depends on them is touched.
    pub(crate) fn set_facts(&mut self, mut facts: Facts<N>) {
        facts.local_pods = Range::outermost(facts.local_pods);
        let before = std::mem::replace(&mut self.facts, facts);
        let after = self.facts.local_pods.clone();
        self.put_difference(&before.local_pods, &after, Element::LocalPod);
        if before.primary != self.facts.primary {
            let restricted = self.frontends.iter().filter(|(_, frontend)| !frontend.ranges.is_empty());
            let references: Vec<Reference<N>> = restricted.map(|(reference, _)| *reference).collect();
            references.into_iter().for_each(|reference| self.mark_keys(reference));
        }
        self.dirty_keys.extend(before.controllers.symmetric_difference(&self.facts.controllers));
        let changed: Vec<[u8; N]> =
            before.node_ports.symmetric_difference(&self.facts.node_ports).copied().collect();
        if !changed.is_empty() {
            for reference in self.frontends.keys() {
                if let Reference::NodePort { protocol, port } = *reference {
                    let keys = changed.iter().map(|address| Key { address: *address, port, protocol });
                    self.dirty_keys.extend(keys);
                }
            }
        }
    }

    /// Brings numbers, codes and elements in line with the view.
    pub(crate) fn settle(&mut self) {
        if std::mem::take(&mut self.freed) {
            self.retry_overflowed();
        }
        let dirty = std::mem::take(&mut self.dirty_ports);
        // Numbers known from a dump first, so that no other port takes them.
        if !self.hints.numbers.is_empty() {
            dirty.iter().for_each(|index| self.number_port(*index, true));
        }
        dirty.iter().for_each(|index| self.number_port(*index, false));
        for index in &dirty {
            let references = self.port(*index).map(|port| port.references.clone()).unwrap_or_default();
            references.into_iter().for_each(|reference| self.mark_keys(reference));
        }
        for key in std::mem::take(&mut self.dirty_keys) {
            self.program(key);
        }
        for index in &dirty {
            PoolRole::ALL.into_iter().for_each(|role| self.note_sticky_pool(*index, role));
        }
        dirty.iter().for_each(|index| self.drop_unused(*index));
    }

    /// Marks the frontends that found no number after one became free.
    fn retry_overflowed(&mut self) {
        let keys: Vec<Key<N>> = self.overflowed.keys().copied().collect();
        for key in keys {
            let port = self.frontend_at(&key).map(|frontend| frontend.port);
            self.dirty_ports.extend(port);
            self.dirty_keys.insert(key);
        }
    }

    /// Forgets a service port without frontends and pools.
    fn drop_unused(&mut self, index: u32) {
        let unused =
            self.port(index).is_some_and(|port| port.references.is_empty() && port.pools().next().is_none());
        if unused {
            if let Some(name) = self.port_name(index) {
                self.names.remove(&name);
            }
            self.ports[index as usize] = None;
            self.free_ports.push(index);
        }
    }

    /// Marks numbers and ids that the kernel holds as in use.
    pub(crate) fn adopt_numbers(&mut self) {
        let numbers: BTreeSet<u32> = self.hints.numbers.values().copied().collect();
        let indexes = |numbering: Numbering| -> BTreeSet<u32> {
            let own = numbers.iter().filter(|number| Numbering::of(**number) == numbering);
            own.map(|number| index_of(*number)).collect()
        };
        self.plain.adopt(&indexes(Numbering::Plain));
        self.sticky.adopt(&indexes(Numbering::Sticky));
        let ids = self.hints.backends.iter().map(|id| id & !BACKEND_BIT).collect();
        self.backends.adopt(&ids);
        self.lists.adopt(std::mem::take(&mut self.hints.lists));
    }

    /// Ends an adoption.
    pub(crate) fn forget_hints(&mut self) {
        self.hints = Hints::default();
        self.lists.forget_adopted();
    }

    /// Returns all desired elements.
    pub(crate) fn elements(&self) -> HashMap<Element<N>, Data<N>> {
        let mut all = HashMap::new();
        for (key, programmed) in &self.programmed {
            let values = [
                (Element::Frontend(*key), programmed.main),
                (Element::Inside(*key), programmed.inside),
                (Element::Outside(*key), programmed.outside),
                (Element::Guarded(*key), programmed.guarded),
            ];
            let present = values.into_iter().filter(|(_, value)| *value != 0);
            all.extend(present.map(|(element, value)| (element, Data::Value(value))));
            if let Some(refuses) = programmed.refused {
                all.insert(refuses.element(*key), Data::Present);
            }
        }
        for (address, (_, cluster_ips)) in &self.addresses {
            all.insert(Element::Vip(*address), Data::Present);
            if *cluster_ips > 0 {
                all.insert(Element::ClusterIp(*address), Data::Present);
            }
        }
        for port in self.ports.iter().flatten().filter(|port| port.number != 0) {
            port_elements(port, &mut all);
        }
        for (list, ranges) in self.lists.all() {
            all.insert(Element::SourceList(list), Data::Present);
            all.extend(ranges.iter().map(|range| (Element::Source(list, *range), Data::Present)));
        }
        all.extend(self.hairpin.iter().map(|key| (Element::Hairpin(*key), Data::Present)));
        all.extend(self.programmed_cidrs.iter().map(|range| (Element::ServiceCidr(*range), Data::Present)));
        all.extend(self.facts.local_pods.iter().map(|range| (Element::LocalPod(*range), Data::Present)));
        all.retain(|element, _| !self.blocked.contains_key(element));
        all
    }

    /// Records every element as missing: the table is rebuilt.
    pub(crate) fn rebuild(&mut self) {
        let all = self.elements().into_iter();
        self.changes = Changes(all.map(|(element, data)| (element, (None, Some(data)))).collect());
    }
}

fn port_elements<const N: usize>(port: &Port<N>, all: &mut HashMap<Element<N>, Data<N>>) {
    for (role, pool) in port.pools() {
        for member in &pool.members {
            let data = Data::Endpoint(member.address, member.port);
            all.insert(port.numbering.backend(role, member.id), data);
        }
        let bits = pool_bits(port.number, role);
        for (index, member) in (0..).zip(&pool.members) {
            all.insert(Element::Slot { pool: bits, index }, Data::Value(member.id));
        }
        if pool.sticky_value != 0 {
            all.insert(Element::StickyPool(bits), Data::Value(pool.sticky_value));
        }
    }
}
