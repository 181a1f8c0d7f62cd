//! What one family's table holds, derived from the view: pure, and compact enough for 50,000 services.
//!
//! Changes of the view are applied with [`Mirror::set_frontend`] and the like, which only mark what they touch;
//! [`Mirror::settle`] then brings numbers, codes and elements in line and notes what differs in
//! [`Mirror::changes`]. That record stays until the kernel took it, so a batch that the kernel refused can be
//! undone by applying the inverse changes: what is left in the record is what still differs.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use switchtower_proto::v1::{Cidr, FrontendKind, Role, Verdict};

use super::allocate::{Allocator, Codes};
use super::element::{Changes, Data, Element, Key, Range};
use super::ruleset::{
    BACKEND_BIT, CODE_DROP, CODE_REFUSE, CODE_RESTRICTED, CODE_SPLIT, Kind, Masquerade, RuleConfig,
};

/// Service-port numbers without affinity: those below 2^18 that are no multiples of 8.
const PLAIN_NUMBERS: u32 = (1 << 18) / 8 * 7;
/// Service-port numbers with affinity: multiples of 8, not 0.
const STICKY_NUMBERS: u32 = (1 << 15) - 1;
/// Member numbers of a service port with affinity.
const STICKY_MEMBERS: u32 = 1 << 16;
/// How many freed numbers rest before they are used again.
const QUARANTINE: usize = 1024;

/// A frontend's place in the view: an address, or a port of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Reference<const N: usize> {
    Explicit(Key<N>),
    NodePort { protocol: u8, port: u16 },
}

/// Where traffic of one direction goes.
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
    pub(crate) ranges: Box<[Cidr]>,
    pub(crate) port: u32,
}

/// What is in the kernel for one address, protocol and port. A value of 0 is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Programmed<const N: usize> {
    main: u32,
    inside: u32,
    outside: u32,
    guarded: u32,
    refused: bool,
    cluster_ip: bool,
    allowed: Box<[Range<N>]>,
}

/// One endpoint of a pool.
#[derive(Debug, Clone, Copy)]
struct Member<const N: usize> {
    address: [u8; N],
    port: u16,
    /// 0 while the service port has no number.
    id: u32,
}

#[derive(Debug, Default)]
struct Pool<const N: usize> {
    members: Vec<Member<N>>,
    /// Slots in the kernel; more than members where the dispatch code's size is larger.
    slots: u32,
}

#[derive(Debug)]
struct Port<const N: usize> {
    name: Arc<str>,
    /// 0: none, nothing of its pools is in the kernel.
    number: u32,
    sticky: bool,
    next_member: u32,
    references: Vec<Reference<N>>,
    /// Cluster, Local.
    pools: [Option<Box<Pool<N>>>; 2],
}

/// Facts of the node and the settings, as far as they concern one family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Facts<const N: usize> {
    /// Addresses on which NodePorts are served.
    pub(crate) node_ports: BTreeSet<[u8; N]>,
    /// The node's primary address.
    pub(crate) primary: Option<[u8; N]>,
    pub(crate) local_pods: Vec<Range<N>>,
    pub(crate) rules: RuleConfig,
}

/// What a dump told about numbers, so that an adopted mirror uses the same ones.
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
}

/// Why an item is not in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) item: String,
    pub(crate) reason: String,
    pub(crate) errno: i32,
}

/// The mirror of one table.
#[derive(Debug)]
pub(crate) struct Mirror<const N: usize> {
    ports: Vec<Option<Port<N>>>,
    free_ports: Vec<u32>,
    names: HashMap<Arc<str>, u32>,
    frontends: HashMap<Reference<N>, Frontend>,
    programmed: HashMap<Key<N>, Programmed<N>>,
    /// Frontends and ClusterIP frontends per address.
    addresses: HashMap<[u8; N], (u32, u32)>,
    hairpin: HashSet<Key<N>>,
    service_cidrs: BTreeSet<Range<N>>,
    programmed_cidrs: Vec<Range<N>>,
    pub(crate) facts: Facts<N>,
    pub(crate) codes: Codes,
    affinity_maps: HashMap<u32, u32>,
    plain: Allocator,
    sticky: Allocator,
    backends: Allocator,
    dirty_ports: BTreeSet<u32>,
    dirty_keys: BTreeSet<Key<N>>,
    /// Elements that the kernel refused.
    blocked: HashMap<Element<N>, i32>,
    refused_members: Vec<(u32, usize, Member<N>, i32)>,
    overflowed: HashMap<Key<N>, &'static str>,
    pub(crate) hints: Hints<N>,
    /// What the kernel does not hold yet.
    pub(crate) changes: Changes<N>,
    /// False while a mirror is built that will be compared as a whole.
    pub(crate) recording: bool,
}

/// The number of a service port from its index in an allocator.
fn number_of(sticky: bool, index: u32) -> u32 {
    if sticky { (index + 1) * 8 } else { index / 7 * 8 + index % 7 + 1 }
}

/// The inverse of [`number_of`].
fn index_of(number: u32) -> u32 {
    if number.is_multiple_of(8) { (number / 8).saturating_sub(1) } else { number / 8 * 7 + number % 8 - 1 }
}

/// The value's upper bits: service port and role.
fn pool_bits(number: u32, role: usize) -> u32 {
    number << 13 | (role as u32) << 12
}

/// Index of a role's pool.
pub(crate) fn role_index(role: Role) -> usize {
    usize::from(role == Role::Local)
}

impl<const N: usize> Mirror<N> {
    /// An empty table. `last_code`: the last dispatch code to use.
    pub(crate) fn new(last_code: u32) -> Self {
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
            codes: Codes::new(last_code),
            affinity_maps: HashMap::new(),
            plain: Allocator::new(PLAIN_NUMBERS, QUARANTINE),
            sticky: Allocator::new(STICKY_NUMBERS, QUARANTINE),
            backends: Allocator::new(BACKEND_BIT, QUARANTINE),
            dirty_ports: BTreeSet::new(),
            dirty_keys: BTreeSet::new(),
            blocked: HashMap::new(),
            refused_members: Vec::new(),
            overflowed: HashMap::new(),
            hints: Hints::default(),
            changes: Changes::default(),
            recording: true,
        }
    }

    fn put(&mut self, element: Element<N>, before: Option<Data<N>>, after: Option<Data<N>>) {
        let before = if self.blocked.remove(&element).is_some() { None } else { before };
        if self.recording {
            self.changes.put(element, before, after);
        }
    }

    fn port_index(&mut self, name: &str) -> u32 {
        if let Some(index) = self.names.get(name) {
            return *index;
        }
        let name: Arc<str> = name.into();
        let pools = [None, None];
        let port = Port {
            name: Arc::clone(&name),
            number: 0,
            sticky: false,
            next_member: 0,
            references: Vec::new(),
            pools,
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

    /// The service port's name as it was given.
    pub(crate) fn port_name(&self, index: u32) -> Arc<str> {
        self.port(index).map_or_else(|| "".into(), |port| Arc::clone(&port.name))
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
        port: &str,
        mut frontend: Frontend,
    ) -> Option<(Arc<str>, Frontend)> {
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
    pub(crate) fn remove_frontend(&mut self, reference: Reference<N>) -> Option<(Arc<str>, Frontend)> {
        let frontend = self.frontends.remove(&reference)?;
        self.mark_keys(reference);
        let index = frontend.port;
        let name = self.port_name(index);
        if let Some(port) = self.port_mut(index) {
            port.references.retain(|other| *other != reference);
        }
        self.dirty_ports.insert(index);
        Some((name, frontend))
    }

    /// Creates a pool if it is absent; returns whether it was.
    pub(crate) fn create_pool(&mut self, port: &str, role: usize) -> bool {
        let index = self.port_index(port);
        self.dirty_ports.insert(index);
        let Some(port) = self.port_mut(index) else { return false };
        let absent = port.pools[role].is_none();
        port.pools[role].get_or_insert_default();
        absent
    }

    /// Removes a pool; returns its members, `None` if it was absent.
    pub(crate) fn remove_pool(&mut self, port: &str, role: usize) -> Option<Vec<([u8; N], u16)>> {
        let index = *self.names.get(port)?;
        self.dirty_ports.insert(index);
        let pool = self.port(index)?.pools[role].as_ref()?;
        let mut members: Vec<_> = pool.members.iter().map(|member| (member.address, member.port)).collect();
        self.clear_slots(index, role);
        for (address, port) in &members {
            self.remove_member(index, role, *address, *port);
        }
        let refused = self.refused_members.iter().filter(|other| other.0 == index && other.1 == role);
        members.extend(refused.map(|(_, _, member, _)| (member.address, member.port)));
        self.refused_members.retain(|other| (other.0, other.1) != (index, role));
        self.port_mut(index)?.pools[role] = None;
        Some(members)
    }

    /// Adds members to a pool; returns those that were not members.
    pub(crate) fn add_members(
        &mut self,
        port: &str,
        role: usize,
        endpoints: &[([u8; N], u16)],
    ) -> Vec<([u8; N], u16)> {
        let index = self.port_index(port);
        self.dirty_ports.insert(index);
        let mut known: HashSet<([u8; N], u16)> = HashSet::new();
        if endpoints.len() > 16 {
            let pool = self.port(index).and_then(|port| port.pools[role].as_ref());
            known.extend(
                pool.iter().flat_map(|pool| &pool.members).map(|member| (member.address, member.port)),
            );
        }
        let mut added = Vec::new();
        for endpoint in endpoints {
            let present = if endpoints.len() > 16 {
                !known.insert(*endpoint)
            } else {
                self.position(index, role, *endpoint).is_some()
            };
            if !present {
                self.add_member(index, role, *endpoint);
                added.push(*endpoint);
            }
        }
        added
    }

    /// Removes members from a pool; returns those that were members.
    pub(crate) fn remove_members(
        &mut self,
        port: &str,
        role: usize,
        endpoints: &[([u8; N], u16)],
    ) -> Vec<([u8; N], u16)> {
        let Some(index) = self.names.get(port).copied() else { return Vec::new() };
        self.dirty_ports.insert(index);
        let mut removed = endpoints.to_vec();
        removed.retain(|(address, port)| {
            let same = |other: &(u32, usize, Member<N>, i32)| {
                (other.0, other.1, other.2.address, other.2.port) == (index, role, *address, *port)
            };
            let refused = self.refused_members.iter().any(same);
            self.refused_members.retain(|other| !same(other));
            self.remove_member(index, role, *address, *port) || refused
        });
        removed
    }

    fn position(&self, index: u32, role: usize, (address, port): ([u8; N], u16)) -> Option<usize> {
        let pool = self.port(index)?.pools[role].as_ref()?;
        pool.members.iter().position(|member| member.port == port && member.address == address)
    }

    /// Appends a member and, if the service port has a number, its elements.
    fn add_member(&mut self, index: u32, role: usize, (address, port): ([u8; N], u16)) {
        let Some(number) = self.port(index).map(|port| port.number) else { return };
        let mut member = Member { address, port, id: 0 };
        if number != 0 {
            self.trim_padding(index, role);
            let Some(id) = self.member_id(index, role, (address, port)) else {
                self.refused_members.push((index, role, member, 0));
                return;
            };
            member.id = id;
        }
        let Some(owner) = self.port_mut(index) else { return };
        let sticky = owner.sticky;
        let pool = owner.pools[role].get_or_insert_default();
        let slot = pool.members.len() as u32;
        pool.members.push(member);
        if number != 0 {
            pool.slots = slot + 1;
            self.put_backend(sticky, role, &member, true);
            let element = Element::Slot { pool: pool_bits(number, role), index: slot };
            self.put(element, None, Some(Data::Value(member.id)));
        }
    }

    fn put_backend(&mut self, sticky: bool, role: usize, member: &Member<N>, present: bool) {
        let element = match (sticky, role) {
            (false, _) => Element::Backend(member.id),
            (true, 0) => Element::StickyCluster(member.id),
            (true, _) => Element::StickyLocal(member.id),
        };
        let data = Some(Data::Endpoint(member.address, member.port));
        let (before, after) = if present { (None, data) } else { (data, None) };
        self.put(element, before, after);
    }

    /// An id for a new member: with affinity, the id of the same endpoint in the port's other pool.
    fn member_id(&mut self, index: u32, role: usize, endpoint: ([u8; N], u16)) -> Option<u32> {
        let port = self.port(index)?;
        if !port.sticky {
            return self.backends.allocate().map(|id| BACKEND_BIT | id);
        }
        let twin = port.pools[1 - role].as_ref().and_then(|pool| {
            let same = |member: &&Member<N>| (member.address, member.port) == endpoint && member.id != 0;
            pool.members.iter().find(same)
        });
        if let Some(twin) = twin {
            return Some(twin.id);
        }
        let base = BACKEND_BIT | port.number << 13;
        let next = port.next_member;
        let members = || port.pools.iter().flatten().flat_map(|pool| &pool.members);
        let wrapped = next >= STICKY_MEMBERS;
        let id = if wrapped {
            let used: HashSet<u32> = members().map(|member| member.id).collect();
            (next..next.saturating_add(STICKY_MEMBERS))
                .map(|number| base | (number % STICKY_MEMBERS))
                .find(|id| !used.contains(id))?
        } else {
            base | next
        };
        let port = self.port_mut(index)?;
        let step = (id & 0xffff).wrapping_sub(next) & 0xffff;
        port.next_member = next.wrapping_add(step + 1).max(if wrapped { STICKY_MEMBERS } else { 0 });
        Some(id)
    }

    /// Takes a member out; the last slot moves into the hole.
    fn remove_member(&mut self, index: u32, role: usize, address: [u8; N], port: u16) -> bool {
        let Some(position) = self.position(index, role, (address, port)) else { return false };
        self.trim_padding(index, role);
        let Some(owner) = self.port_mut(index) else { return false };
        let (number, sticky) = (owner.number, owner.sticky);
        let Some(pool) = owner.pools[role].as_mut() else { return false };
        let last = pool.members.len() - 1;
        let (removed, moved) = (pool.members[position], pool.members[last]);
        pool.members.swap_remove(position);
        if number == 0 {
            return true;
        }
        pool.slots = last as u32;
        let slot = |index: usize| Element::Slot { pool: pool_bits(number, role), index: index as u32 };
        if position != last {
            self.put(slot(position), Some(Data::Value(removed.id)), Some(Data::Value(moved.id)));
        }
        self.put(slot(last), Some(Data::Value(moved.id)), None);
        self.put_backend(sticky, role, &removed, false);
        if !sticky {
            self.backends.release(removed.id & !BACKEND_BIT);
        }
        true
    }

    /// Removes the slots that repeat members.
    fn trim_padding(&mut self, index: u32, role: usize) {
        self.pad(index, role, 0);
    }

    /// Makes the pool have `slots` slots, at least one per member; further ones repeat members in order.
    fn pad(&mut self, index: u32, role: usize, slots: u32) {
        let Some(owner) = self.port_mut(index) else { return };
        let number = owner.number;
        let Some(pool) = owner.pools[role].as_mut() else { return };
        let count = pool.members.len() as u32;
        let (before, after) = (pool.slots, if count == 0 { 0 } else { slots.max(count) });
        if number == 0 || count == 0 || before == after {
            return;
        }
        pool.slots = after;
        let repeated: Vec<(u32, u32)> = (before.min(after)..before.max(after))
            .map(|slot| (slot, pool.members[(slot % count) as usize].id))
            .collect();
        for (slot, id) in repeated {
            let element = Element::Slot { pool: pool_bits(number, role), index: slot };
            let data = Some(Data::Value(id));
            let (old, new) = if after > before { (None, data) } else { (data, None) };
            self.put(element, old, new);
        }
    }

    fn clear_slots(&mut self, index: u32, role: usize) {
        self.trim_padding(index, role);
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
        for range in before.iter().filter(|range| !after.contains(range)) {
            self.put(element(*range), Some(Data::Present), None);
        }
        for range in after.iter().filter(|range| !before.contains(range)) {
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
        for (code, pick) in self.codes.expire() {
            self.put(Element::Pick(code), Some(Data::Pick(pick)), None);
            self.count_affinity_map(&pick, false);
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
        let mut sizes = HashMap::new();
        for key in std::mem::take(&mut self.dirty_keys) {
            self.program(key, &mut sizes);
        }
        for ((index, role), size) in sizes {
            // Of a port that is not dirty only some frontends were looked at: others may need more slots.
            let held =
                self.port(index).and_then(|port| port.pools[role].as_ref()).map_or(0, |pool| pool.slots);
            let floor = if dirty.contains(&index) { 0 } else { held };
            self.pad(index, role, size.max(floor));
        }
        dirty.iter().for_each(|index| self.drop_unused(*index));
    }

    /// Gives a service port a number if its pools have members, and takes it if not; a port whose affinity
    /// begins or ends gets another one.
    fn number_port(&mut self, index: u32, hinted: bool) {
        let Some(port) = self.port(index) else { return };
        let sticky = port
            .references
            .iter()
            .any(|reference| self.frontends.get(reference).is_some_and(|frontend| frontend.affinity > 0));
        let wanted = port.pools.iter().flatten().any(|pool| !pool.members.is_empty());
        let (number, was_sticky) = (port.number, port.sticky);
        if number != 0 && (!wanted || sticky != was_sticky) {
            self.detach(index);
        }
        let attached = self.port(index).is_some_and(|port| port.number != 0);
        if !wanted || attached {
            return;
        }
        let number = if hinted {
            match self.hinted_number(index, sticky) {
                Some(number) => number,
                None => return,
            }
        } else {
            let allocator = if sticky { &mut self.sticky } else { &mut self.plain };
            match allocator.allocate() {
                Some(index) => number_of(sticky, index),
                None => return,
            }
        };
        self.attach(index, number, sticky);
    }

    /// The number that a dump shows for one of the port's frontends, if it is of the right kind and free.
    fn hinted_number(&mut self, index: u32, sticky: bool) -> Option<u32> {
        let references = self.port(index)?.references.clone();
        for reference in references {
            let key = match reference {
                Reference::Explicit(key) => Some(key),
                Reference::NodePort { protocol, port } => {
                    let address = self.facts.node_ports.first();
                    let key = address.map(|address| Key { address: *address, port, protocol });
                    // An explicit frontend hides the NodePort, and has a number of its own.
                    key.filter(|key| !self.frontends.contains_key(&Reference::Explicit(*key)))
                }
            };
            let number = key.and_then(|key| self.hints.numbers.get(&key).copied());
            let Some(number) = number.filter(|number| number.is_multiple_of(8) == sticky) else { continue };
            // The first port that claims a number gets it.
            if self.hints.claimed.insert(number) {
                return Some(number);
            }
        }
        None
    }

    /// Programs a service port's pools under a number.
    fn attach(&mut self, index: u32, number: u32, sticky: bool) {
        let Some(port) = self.port_mut(index) else { return };
        (port.number, port.sticky, port.next_member) = (number, sticky, 0);
        for role in 0..2 {
            let Some(pool) = self.port_mut(index).and_then(|port| port.pools[role].as_mut()) else {
                continue;
            };
            let mut members = std::mem::take(&mut pool.members);
            pool.slots = 0;
            let known = self.adopt_members(index, role, &mut members);
            for member in &members[..known] {
                self.push_known(index, role, *member);
            }
            for member in &members[known..] {
                self.add_member(index, role, (member.address, member.port));
            }
        }
    }

    /// Puts the members that a dump shows first, in the order of their slots and with their ids; returns how
    /// many these are.
    fn adopt_members(&mut self, index: u32, role: usize, members: &mut [Member<N>]) -> usize {
        let Some(port) = self.port(index) else { return 0 };
        let Some(slots) = self.hints.slots.remove(&pool_bits(port.number, role)) else { return 0 };
        let mut places: HashMap<([u8; N], u16), usize> = members
            .iter()
            .enumerate()
            .map(|(place, member)| ((member.address, member.port), place))
            .collect();
        let mut known = 0;
        for id in slots {
            let Some(endpoint) = self.hints.endpoints.get(&id) else { continue };
            let Some(place) = places.get(endpoint).copied().filter(|place| *place >= known) else { continue };
            members.swap(known, place);
            members[known].id = id;
            let moved = (members[place].address, members[place].port);
            places.insert(moved, place);
            places.insert((members[known].address, members[known].port), known);
            known += 1;
        }
        known
    }

    /// Appends a member whose id is known.
    fn push_known(&mut self, index: u32, role: usize, member: Member<N>) {
        let Some(port) = self.port_mut(index) else { return };
        let (number, sticky) = (port.number, port.sticky);
        if sticky {
            port.next_member = port.next_member.max((member.id & 0xffff) + 1);
        }
        let Some(pool) = port.pools[role].as_mut() else { return };
        let slot = pool.members.len() as u32;
        pool.members.push(member);
        pool.slots = slot + 1;
        self.put_backend(sticky, role, &member, true);
        let element = Element::Slot { pool: pool_bits(number, role), index: slot };
        self.put(element, None, Some(Data::Value(member.id)));
    }

    /// Takes a service port's pools out of the kernel and frees its number; the members stay.
    fn detach(&mut self, index: u32) {
        let Some(port) = self.port(index) else { return };
        let (number, sticky) = (port.number, port.sticky);
        for role in 0..2 {
            self.trim_padding(index, role);
            let Some(pool) = self.port_mut(index).and_then(|port| port.pools[role].as_mut()) else {
                continue;
            };
            pool.slots = 0;
            let members = pool.members.clone();
            pool.members.iter_mut().for_each(|member| member.id = 0);
            for (slot, member) in members.iter().enumerate() {
                let element = Element::Slot { pool: pool_bits(number, role), index: slot as u32 };
                self.put(element, Some(Data::Value(member.id)), None);
                self.put_backend(sticky, role, member, false);
                if !sticky {
                    self.backends.release(member.id & !BACKEND_BIT);
                }
            }
        }
        let allocator = if sticky { &mut self.sticky } else { &mut self.plain };
        allocator.release(index_of(number));
        if let Some(port) = self.port_mut(index) {
            port.number = 0;
        }
    }

    /// Forgets a service port without frontends and pools.
    fn drop_unused(&mut self, index: u32) {
        let unused = self
            .port(index)
            .is_some_and(|port| port.references.is_empty() && port.pools.iter().all(Option::is_none));
        if unused {
            self.names.remove(&self.port_name(index));
            self.ports[index as usize] = None;
            self.free_ports.push(index);
        }
    }

    /// The frontend that an address, protocol and port belongs to: an explicit one before a NodePort.
    fn frontend_at(&self, key: &Key<N>) -> Option<&Frontend> {
        self.frontends.get(&Reference::Explicit(*key)).or_else(|| {
            let served = self.facts.node_ports.contains(&key.address);
            let reference = Reference::NodePort { protocol: key.protocol, port: key.port };
            served.then(|| self.frontends.get(&reference)).flatten()
        })
    }

    /// Brings one frontend's elements in line.
    fn program(&mut self, key: Key<N>, sizes: &mut HashMap<(u32, usize), u32>) {
        self.overflowed.remove(&key);
        let frontend = self.frontend_at(&key).cloned();
        let wanted = frontend.map(|frontend| self.values(&key, &frontend, sizes)).unwrap_or_default();
        let before = self.programmed.remove(&key).unwrap_or_default();
        let values = |programmed: &Programmed<N>| {
            [
                (Element::Frontend(key), programmed.main),
                (Element::Inside(key), programmed.inside),
                (Element::Outside(key), programmed.outside),
                (Element::Guarded(key), programmed.guarded),
            ]
        };
        let data = |value: u32| (value != 0).then_some(Data::Value(value));
        for ((element, old), (_, new)) in values(&before).into_iter().zip(values(&wanted)) {
            if old != new {
                self.put(element, data(old), data(new));
            }
            // The new references were taken before: a code in use by both is never given up.
            self.release_code(old);
        }
        let present = |present: bool| present.then_some(Data::Present);
        if before.refused != wanted.refused {
            self.put(Element::Refused(key), present(before.refused), present(wanted.refused));
        }
        for range in before.allowed.iter().filter(|range| !wanted.allowed.contains(range)) {
            self.put(Element::AllowedSource(key, *range), Some(Data::Present), None);
        }
        for range in wanted.allowed.iter().filter(|range| !before.allowed.contains(range)) {
            self.put(Element::AllowedSource(key, *range), None, Some(Data::Present));
        }
        self.count_address(key.address, &before, &wanted);
        if wanted.main != 0 {
            self.programmed.insert(key, wanted);
        }
    }

    fn count_address(&mut self, address: [u8; N], before: &Programmed<N>, after: &Programmed<N>) {
        let counts = self.addresses.entry(address).or_default();
        let old = *counts;
        counts.0 = counts.0 + u32::from(after.main != 0) - u32::from(before.main != 0);
        counts.1 = counts.1 + u32::from(after.cluster_ip) - u32::from(before.cluster_ip);
        let new = *counts;
        if new.0 == 0 {
            self.addresses.remove(&address);
        }
        let present = |count: u32| (count > 0).then_some(Data::Present);
        if (old.0 > 0) != (new.0 > 0) {
            self.put(Element::Vip(address), present(old.0), present(new.0));
        }
        if (old.1 > 0) != (new.1 > 0) {
            self.put(Element::ClusterIp(address), present(old.1), present(new.1));
        }
    }

    fn release_code(&mut self, value: u32) {
        self.codes.release(value & 0xfff);
    }

    fn count_affinity_map(&mut self, pick: &super::ruleset::Pick, more: bool) {
        let Some((seconds, _)) = pick.kind.affinity else { return };
        let count = self.affinity_maps.entry(seconds).or_default();
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        let count = *count;
        if count == 0 {
            self.affinity_maps.remove(&seconds);
            self.put(Element::AffinityMap(seconds), Some(Data::Present), None);
        } else if more && count == 1 {
            self.put(Element::AffinityMap(seconds), None, Some(Data::Present));
        }
    }

    /// Makes known a code that the kernel holds.
    pub(crate) fn adopt_code(&mut self, code: u32, pick: super::ruleset::Pick) {
        self.codes.adopt(code, pick);
        if self.codes.pick(code) == Some(pick) {
            self.count_affinity_map(&pick, true);
        }
    }

    /// Marks numbers and ids that the kernel holds as in use.
    pub(crate) fn adopt_numbers(&mut self) {
        let numbers: BTreeSet<u32> = self.hints.numbers.values().copied().collect();
        let indexes = |sticky: bool| -> BTreeSet<u32> {
            let own = numbers.iter().filter(|number| number.is_multiple_of(8) == sticky);
            own.map(|number| index_of(*number)).collect()
        };
        self.plain.adopt(&indexes(false));
        self.sticky.adopt(&indexes(true));
        let ids = self.hints.backends.iter().map(|id| id & !BACKEND_BIT).collect();
        self.backends.adopt(&ids);
    }

    /// What a frontend's elements must be; takes a reference on each code it uses.
    fn values(
        &mut self,
        key: &Key<N>,
        frontend: &Frontend,
        sizes: &mut HashMap<(u32, usize), u32>,
    ) -> Programmed<N> {
        let mut programmed = Programmed::default();
        let mut target = |mirror: &mut Self, target: Target, masquerade: Masquerade| {
            let value = mirror.target_value(frontend, target, masquerade, sizes);
            value.unwrap_or_else(|reason| {
                mirror.overflowed.insert(*key, reason);
                CODE_DROP
            })
        };
        programmed.cluster_ip = frontend.kind == FrontendKind::ClusterIp;
        if programmed.cluster_ip {
            programmed.main = target(self, frontend.outside, Masquerade::ClusterIp);
        } else if frontend.outside.role == Role::Local {
            programmed.main = CODE_SPLIT;
            programmed.inside = target(self, frontend.inside, Masquerade::Never);
            programmed.outside = target(self, frontend.outside, Masquerade::Never);
        } else {
            programmed.main = target(self, frontend.outside, Masquerade::Always);
        }
        let values = [programmed.main, programmed.inside, programmed.outside];
        programmed.refused = values.contains(&CODE_REFUSE);
        if frontend.kind == FrontendKind::LoadBalancer {
            let ranges = frontend.ranges.iter();
            let ranges = ranges.filter_map(|range| Range::new(&range.address, range.prefix_length));
            let mut allowed = Range::outermost(ranges.collect());
            if !allowed.is_empty() {
                // A VIP bound on the node itself: its connections loop back with the VIP as source.
                let own = self
                    .facts
                    .primary
                    .is_some_and(|primary| allowed.iter().any(|range| range.contains(&primary)));
                if own {
                    allowed.extend(self.port_vips(frontend.port));
                    allowed = Range::outermost(allowed);
                }
                programmed.allowed = allowed.into_boxed_slice();
                programmed.guarded = std::mem::replace(&mut programmed.main, CODE_RESTRICTED);
            }
        }
        programmed
    }

    /// The load-balancer addresses of a service port.
    fn port_vips(&self, index: u32) -> Vec<Range<N>> {
        let Some(port) = self.port(index) else { return Vec::new() };
        let vips = port.references.iter().filter_map(|reference| match reference {
            Reference::Explicit(key) => self
                .frontends
                .get(reference)
                .filter(|frontend| frontend.kind == FrontendKind::LoadBalancer)
                .map(|_| Range { address: key.address, prefix: (N * 8) as u8 }),
            Reference::NodePort { .. } => None,
        });
        vips.collect()
    }

    /// The value that leads to a target; the reason if it has no room.
    fn target_value(
        &mut self,
        frontend: &Frontend,
        target: Target,
        masquerade: Masquerade,
        sizes: &mut HashMap<(u32, usize), u32>,
    ) -> Result<u32, &'static str> {
        let role = role_index(target.role);
        let Some(port) = self.port(frontend.port) else { return Ok(CODE_DROP) };
        let count = port.pools[role].as_ref().map_or(0, |pool| pool.members.len()) as u32;
        if count == 0 {
            return Ok(if target.when_empty == Verdict::Drop { CODE_DROP } else { CODE_REFUSE });
        }
        let (number, sticky) = (port.number, port.sticky);
        if number == 0 {
            return Err("no service-port number is left");
        }
        let affinity = (sticky && frontend.affinity > 0).then_some((frontend.affinity, role == 1));
        // Without affinity of its own, a frontend of a port with affinity still needs the sticky maps.
        let affinity = if sticky { affinity.or(Some((1, role == 1))) } else { None };
        let kind = Kind { masquerade, affinity };
        let Some((code, new)) = self.codes.acquire(kind, count) else {
            return Err("no dispatch code is left");
        };
        let Some(pick) = self.codes.pick(code) else { return Err("no dispatch code is left") };
        if new {
            self.count_affinity_map(&pick, true);
            self.put(Element::Pick(code), None, Some(Data::Pick(pick)));
        }
        let size = sizes.entry((frontend.port, role)).or_default();
        *size = (*size).max(pick.size);
        Ok(pool_bits(number, role) | code)
    }

    /// Everything that the table should hold.
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
            if programmed.refused {
                all.insert(Element::Refused(*key), Data::Present);
            }
            all.extend(
                programmed.allowed.iter().map(|range| (Element::AllowedSource(*key, *range), Data::Present)),
            );
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
        all.extend(self.codes.all().map(|(code, pick)| (Element::Pick(code), Data::Pick(pick))));
        all.extend(self.affinity_maps.keys().map(|seconds| (Element::AffinityMap(*seconds), Data::Present)));
        all.extend(self.hairpin.iter().map(|key| (Element::Hairpin(*key), Data::Present)));
        all.extend(self.programmed_cidrs.iter().map(|range| (Element::ServiceCidr(*range), Data::Present)));
        all.extend(self.facts.local_pods.iter().map(|range| (Element::LocalPod(*range), Data::Present)));
        all.retain(|element, _| !self.blocked.contains_key(element));
        all
    }

    /// Notes everything as missing: the table is built anew.
    pub(crate) fn rebuild(&mut self) {
        let all = self.elements().into_iter();
        self.changes = Changes(all.map(|(element, data)| (element, (None, Some(data)))).collect());
    }

    /// Forgets that the kernel refused elements: they are tried again by a repair.
    pub(crate) fn unblock(&mut self) {
        self.blocked.clear();
    }
}

fn port_elements<const N: usize>(port: &Port<N>, all: &mut HashMap<Element<N>, Data<N>>) {
    for (role, pool) in port.pools.iter().enumerate() {
        let Some(pool) = pool else { continue };
        for member in &pool.members {
            let element = match (port.sticky, role) {
                (false, _) => Element::Backend(member.id),
                (true, 0) => Element::StickyCluster(member.id),
                (true, _) => Element::StickyLocal(member.id),
            };
            all.insert(element, Data::Endpoint(member.address, member.port));
        }
        let bits = pool_bits(port.number, role);
        for slot in 0..pool.slots {
            let member = &pool.members[slot as usize % pool.members.len().max(1)];
            all.insert(Element::Slot { pool: bits, index: slot }, Data::Value(member.id));
        }
    }
}

/// Refused elements: taking them out, and naming them.
impl<const N: usize> Mirror<N> {
    /// Takes out what owns an element that the kernel refused.
    pub(crate) fn refuse(&mut self, element: Element<N>, errno: i32) {
        let owner = match element {
            Element::Slot { pool, index } => self.port_numbered(pool >> 13).and_then(|(port, owner)| {
                let role = (pool >> 12 & 1) as usize;
                let members = &owner.pools[role].as_ref()?.members;
                Some((port, role, *members.get(index as usize % members.len().max(1))?))
            }),
            Element::Backend(id) | Element::StickyCluster(id) | Element::StickyLocal(id) => {
                let local = matches!(element, Element::StickyLocal(_));
                self.member_with(id, local)
            }
            _ => None,
        };
        match owner {
            Some((index, role, member)) => {
                self.remove_member(index, role, member.address, member.port);
                self.refused_members.push((index, role, member, errno));
                self.dirty_ports.insert(index);
                // The element itself is not in the kernel, whatever was noted.
                self.changes.0.remove(&element);
            }
            None => {
                self.changes.0.remove(&element);
                self.blocked.insert(element, errno);
            }
        }
    }

    fn port_numbered(&self, number: u32) -> Option<(u32, &Port<N>)> {
        let mut ports = self.ports.iter().enumerate();
        ports.find_map(|(index, port)| {
            port.as_ref().filter(|port| port.number == number).map(|port| (index as u32, port))
        })
    }

    fn member_with(&self, id: u32, local: bool) -> Option<(u32, usize, Member<N>)> {
        self.ports.iter().enumerate().find_map(|(index, port)| {
            let pools = port.as_ref()?.pools.iter().enumerate();
            let mut pools = pools.filter(|(role, _)| !local || *role == 1);
            pools.find_map(|(role, pool)| {
                let member = pool.as_ref()?.members.iter().find(|member| member.id == id)?;
                Some((index as u32, role, *member))
            })
        })
    }

    /// All items that are not in the kernel although the view has them.
    pub(crate) fn refusals(&self) -> Vec<Refusal> {
        let mut all: Vec<Refusal> = self
            .overflowed
            .iter()
            .map(|(key, reason)| Refusal {
                item: self.frontend_item(key),
                reason: (*reason).to_owned(),
                errno: 0,
            })
            .collect();
        for (element, errno) in &self.blocked {
            let reason = std::io::Error::from_raw_os_error(*errno);
            let reason =
                format!("the kernel refused an element of {}: {reason}", element.set().unwrap_or("maps"));
            all.push(Refusal { item: self.item(element), reason, errno: *errno });
        }
        for (index, _, member, errno) in &self.refused_members {
            let reason = match errno {
                0 => "the service port has too many endpoints for affinity".to_owned(),
                _ => format!("the kernel refused it: {}", std::io::Error::from_raw_os_error(*errno)),
            };
            let address = super::text::socket_address(&member.address, member.port);
            let item = format!("endpoint {address} of {}", super::text::port_name(&self.port_name(*index)));
            all.push(Refusal { item, reason, errno: *errno });
        }
        all.sort_by(|left, right| left.item.cmp(&right.item));
        all
    }

    fn frontend_item(&self, key: &Key<N>) -> String {
        let address = super::text::socket_address(&key.address, key.port);
        let protocol = super::text::protocol(key.protocol);
        let owner = self.frontend_at(key).map(|frontend| self.port_name(frontend.port));
        let owner = owner.map(|name| format!(" ({})", super::text::service(&name))).unwrap_or_default();
        format!("frontend {address}/{protocol}{owner}")
    }

    fn item(&self, element: &Element<N>) -> String {
        match element {
            Element::Frontend(key)
            | Element::Inside(key)
            | Element::Outside(key)
            | Element::Guarded(key)
            | Element::Refused(key)
            | Element::AllowedSource(key, _) => self.frontend_item(key),
            Element::Hairpin(key) => {
                format!("local endpoint {}", super::text::socket_address(&key.address, key.port))
            }
            Element::Vip(address) | Element::ClusterIp(address) => {
                format!("address {}", super::text::address(address))
            }
            Element::ServiceCidr(range) => {
                format!("ServiceCIDR {}/{}", super::text::address(&range.address), range.prefix)
            }
            Element::LocalPod(range) => {
                format!("pod CIDR {}/{}", super::text::address(&range.address), range.prefix)
            }
            other => format!("{other:?}"),
        }
    }
}
