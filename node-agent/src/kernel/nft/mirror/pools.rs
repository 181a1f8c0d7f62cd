//! Pools in the kernel: members, slots and the numbers of service ports.

use std::collections::{HashMap, HashSet};

use super::{Member, Mirror, Pool, Reference, STICKY_MEMBERS};
use crate::kernel::nft::allocate::Allocator;
use crate::kernel::nft::element::{Data, Element, Key};
use crate::kernel::nft::layout::{BACKEND_BIT, Masquerade, POOL_MASK, Pick};
use crate::kernel::nft::numbering::{Numbering, index_of, pool_bits};
use crate::kernel::nft::pool_role::PoolRole;
use crate::kernel::nft::port_name::PortName;

impl<const N: usize> Mirror<N> {
    /// Creates a pool if it is absent; returns whether it was.
    pub(crate) fn create_pool(&mut self, port: &PortName, role: PoolRole) -> bool {
        let index = self.port_index(port);
        self.dirty_ports.insert(index);
        let Some(port) = self.port_mut(index) else { return false };
        let absent = port.pools[role].is_none();
        port.pools[role].get_or_insert_default();
        absent
    }

    /// Removes a pool; returns its members, `None` if it was absent.
    pub(crate) fn remove_pool(&mut self, port: &PortName, role: PoolRole) -> Option<Vec<([u8; N], u16)>> {
        let index = *self.names.get(port)?;
        self.dirty_ports.insert(index);
        let pool = self.port(index)?.pools[role].as_ref()?;
        let mut members: Vec<_> = pool.members.iter().map(|member| (member.address, member.port)).collect();
        for (address, port) in &members {
            self.remove_member(index, role, *address, *port);
        }
        let refused = self.refused_members.iter().filter(|other| other.0 == index && other.1 == role);
        members.extend(refused.map(|(_, _, member, _)| (member.address, member.port)));
        self.refused_members.retain(|other| (other.0, other.1) != (index, role));
        self.note_sticky_pool(index, role);
        self.port_mut(index)?.pools[role] = None;
        Some(members)
    }

    /// Adds members to a pool; returns those that were not members.
    pub(crate) fn add_members(
        &mut self,
        port: &PortName,
        role: PoolRole,
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
        port: &PortName,
        role: PoolRole,
        endpoints: &[([u8; N], u16)],
    ) -> Vec<([u8; N], u16)> {
        let Some(index) = self.names.get(port).copied() else { return Vec::new() };
        self.dirty_ports.insert(index);
        let mut removed = endpoints.to_vec();
        removed.retain(|(address, port)| {
            let same = |other: &(u32, PoolRole, Member<N>, i32)| {
                (other.0, other.1, other.2.address, other.2.port) == (index, role, *address, *port)
            };
            let refused = self.refused_members.iter().any(same);
            self.refused_members.retain(|other| !same(other));
            self.remove_member(index, role, *address, *port) || refused
        });
        removed
    }

    pub(super) fn position(
        &self,
        index: u32,
        role: PoolRole,
        (address, port): ([u8; N], u16),
    ) -> Option<usize> {
        let pool = self.port(index)?.pools[role].as_ref()?;
        pool.members.iter().position(|member| member.port == port && member.address == address)
    }

    /// Appends a member and, if the service port has a number, its elements.
    pub(super) fn add_member(&mut self, index: u32, role: PoolRole, (address, port): ([u8; N], u16)) {
        let Some(number) = self.port(index).map(|port| port.number) else { return };
        let mut member = Member { address, port, id: 0 };
        if number != 0 {
            let Some(id) = self.member_id(index, role, (address, port)) else {
                self.refused_members.push((index, role, member, 0));
                return;
            };
            member.id = id;
        }
        let Some(owner) = self.port_mut(index) else { return };
        let numbering = owner.numbering;
        let pool = owner.pools[role].get_or_insert_default();
        let slot = pool.members.len() as u32;
        pool.members.push(member);
        if number != 0 {
            self.put(numbering.backend(role, member.id), None, member.data());
            let element = Element::Slot { pool: pool_bits(number, role), index: slot };
            self.put(element, None, Some(Data::Value(member.id)));
        }
    }

    /// An id for a new member: with affinity, the id of the same endpoint in the port's other pool.
    pub(super) fn member_id(&mut self, index: u32, role: PoolRole, endpoint: ([u8; N], u16)) -> Option<u32> {
        let port = self.port(index)?;
        if port.numbering == Numbering::Plain {
            return self.backends.allocate().map(|id| BACKEND_BIT | id);
        }
        let twin = port.pools[role.other()].as_ref().and_then(|pool| {
            let same = |member: &&Member<N>| (member.address, member.port) == endpoint && member.id != 0;
            pool.members.iter().find(same)
        });
        if let Some(twin) = twin {
            return Some(twin.id);
        }
        let base = BACKEND_BIT | port.number << 13;
        let next = port.next_member;
        let members = || port.pools().flat_map(|(_, pool)| &pool.members);
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
    pub(super) fn remove_member(&mut self, index: u32, role: PoolRole, address: [u8; N], port: u16) -> bool {
        let Some(position) = self.position(index, role, (address, port)) else { return false };
        let Some(owner) = self.port_mut(index) else { return false };
        let (number, numbering) = (owner.number, owner.numbering);
        let Some(pool) = owner.pools[role].as_mut() else { return false };
        let last = pool.members.len() - 1;
        let (removed, moved) = (pool.members[position], pool.members[last]);
        pool.members.swap_remove(position);
        if number == 0 {
            return true;
        }
        let slot = |index: usize| Element::Slot { pool: pool_bits(number, role), index: index as u32 };
        if position != last {
            self.put(slot(position), Some(Data::Value(removed.id)), Some(Data::Value(moved.id)));
        }
        self.put(slot(last), Some(Data::Value(moved.id)), None);
        self.put(numbering.backend(role, removed.id), removed.data(), None);
        if numbering == Numbering::Plain {
            self.backends.release(removed.id & !BACKEND_BIT);
        }
        true
    }

    /// Brings the value by which a forgotten client's connection finds its pool again in line.
    pub(super) fn note_sticky_pool(&mut self, index: u32, role: PoolRole) {
        let Some(port) = self.port(index) else { return };
        let Some(pool) = port.pools[role].as_ref() else { return };
        let wanted = match port.numbering {
            Numbering::Plain => 0,
            Numbering::Sticky => sticky_value(port.number, role, pool),
        };
        let before = pool.sticky_value;
        if before == wanted {
            return;
        }
        if let Some(pool) = self.port_mut(index).and_then(|port| port.pools[role].as_mut()) {
            pool.sticky_value = wanted;
        }
        let data = |value: u32| (value != 0).then_some(Data::Value(value));
        // The key of a value is its upper bits; of one pool they differ only across a new number.
        if before & POOL_MASK != wanted & POOL_MASK && before != 0 && wanted != 0 {
            self.put(Element::StickyPool(before & POOL_MASK), data(before), None);
            self.put(Element::StickyPool(wanted & POOL_MASK), None, data(wanted));
        } else {
            self.put(Element::StickyPool((before | wanted) & POOL_MASK), data(before), data(wanted));
        }
    }

    /// Gives a service port a number if its pools have members, and takes it if not; a port whose affinity
    /// begins or ends gets another one.
    pub(super) fn number_port(&mut self, index: u32, hinted: bool) {
        let Some(port) = self.port(index) else { return };
        let affinity =
            |reference| self.frontends.get(reference).is_some_and(|frontend| frontend.affinity > 0);
        let numbering =
            if port.references.iter().any(affinity) { Numbering::Sticky } else { Numbering::Plain };
        let wanted = port.pools().any(|(_, pool)| !pool.members.is_empty());
        if port.number != 0 && (!wanted || numbering != port.numbering) {
            self.detach(index);
        }
        let attached = self.port(index).is_some_and(|port| port.number != 0);
        if !wanted || attached {
            return;
        }
        let number = if hinted {
            match self.hinted_number(index, numbering) {
                Some(number) => number,
                None => return,
            }
        } else {
            match self.allocator(numbering).allocate() {
                Some(index) => numbering.number(index),
                None => return,
            }
        };
        self.attach(index, number);
    }

    /// The number that a dump shows for one of the port's frontends, if it is of the right kind and free.
    pub(super) fn hinted_number(&mut self, index: u32, numbering: Numbering) -> Option<u32> {
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
            let Some(number) = number.filter(|number| Numbering::of(*number) == numbering) else { continue };
            // The first port that claims a number gets it.
            if self.hints.claimed.insert(number) {
                return Some(number);
            }
        }
        None
    }

    /// Programs a service port's pools under a number.
    pub(super) fn attach(&mut self, index: u32, number: u32) {
        let Some(port) = self.port_mut(index) else { return };
        (port.number, port.numbering, port.next_member) = (number, Numbering::of(number), 0);
        for role in PoolRole::ALL {
            let Some(pool) = self.port_mut(index).and_then(|port| port.pools[role].as_mut()) else {
                continue;
            };
            let mut members = std::mem::take(&mut pool.members);
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
    pub(super) fn adopt_members(&mut self, index: u32, role: PoolRole, members: &mut [Member<N>]) -> usize {
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
    pub(super) fn push_known(&mut self, index: u32, role: PoolRole, member: Member<N>) {
        let Some(port) = self.port_mut(index) else { return };
        let (number, numbering) = (port.number, port.numbering);
        if numbering == Numbering::Sticky {
            port.next_member = port.next_member.max((member.id & 0xffff) + 1);
        }
        let Some(pool) = port.pools[role].as_mut() else { return };
        let slot = pool.members.len() as u32;
        pool.members.push(member);
        self.put(numbering.backend(role, member.id), None, member.data());
        let element = Element::Slot { pool: pool_bits(number, role), index: slot };
        self.put(element, None, Some(Data::Value(member.id)));
    }

    /// Takes a service port's pools out of the kernel and frees its number; the members stay.
    pub(super) fn detach(&mut self, index: u32) {
        let Some(port) = self.port(index) else { return };
        let (number, numbering) = (port.number, port.numbering);
        for role in PoolRole::ALL {
            let Some(pool) = self.port_mut(index).and_then(|port| port.pools[role].as_mut()) else {
                continue;
            };
            let members = pool.members.clone();
            pool.members.iter_mut().for_each(|member| member.id = 0);
            for (slot, member) in members.iter().enumerate() {
                let element = Element::Slot { pool: pool_bits(number, role), index: slot as u32 };
                self.put(element, Some(Data::Value(member.id)), None);
                self.put(numbering.backend(role, member.id), member.data(), None);
                if numbering == Numbering::Plain {
                    self.backends.release(member.id & !BACKEND_BIT);
                }
            }
        }
        self.allocator(numbering).release(index_of(number));
        self.freed = true;
        if let Some(port) = self.port_mut(index) {
            port.number = 0;
        }
    }

    fn allocator(&mut self, numbering: Numbering) -> &mut Allocator {
        match numbering {
            Numbering::Plain => &mut self.plain,
            Numbering::Sticky => &mut self.sticky,
        }
    }
}

/// The value of map `sticky_pools` for a pool of a port with affinity; 0: none.
fn sticky_value<const N: usize>(number: u32, role: PoolRole, pool: &Pool<N>) -> u32 {
    if number == 0 || pool.members.is_empty() {
        return 0;
    }
    pool_bits(number, role) | Pick::new(Masquerade::Never, 0, pool.members.len() as u32).code()
}
