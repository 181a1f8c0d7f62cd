//! Elements that the kernel refused: their removal from the mirror and their names.

use std::collections::HashMap;

use super::{Member, Mirror, Port};
use crate::kernel::nft::element::{Changes, Data, Element, Key};
use crate::kernel::nft::pool_role::PoolRole;
use crate::kernel::nft::text;

/// An item that is not in the kernel, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnprogrammedItem {
    pub(crate) item: String,
    pub(crate) reason: String,
    pub(crate) errno: i32,
}

impl<const N: usize> Mirror<N> {
    /// Removes the owner of an element that the kernel refused.
    pub(crate) fn refuse(&mut self, element: Element<N>, errno: i32) {
        let owner = match element {
            Element::Slot { pool, index } => self.port_numbered(pool >> 13).and_then(|(port, owner)| {
                let role = PoolRole::of_value(pool);
                let members = &owner.pools[role].as_ref()?.members;
                Some((port, role, *members.get(index as usize % members.len().max(1))?))
            }),
            Element::Backend(id) | Element::StickyCluster(id) | Element::StickyLocal(id) => {
                self.member_with(id, &element)
            }
            _ => None,
        };
        match owner {
            Some((index, role, member)) => {
                self.remove_member(index, role, member.address, member.port);
                self.refused_members.push((index, role, member, errno));
                self.dirty_ports.insert(index);
                // The element is not in the kernel, contrary to the record.
                self.changes.0.remove(&element);
            }
            None => {
                self.changes.0.remove(&element);
                self.blocked.insert(element, errno);
            }
        }
    }

    /// Prepares a retry of all refused elements, before a comparison. Returns the changed elements with their values in
    /// the kernel, unless another process changed them.
    pub(crate) fn retry_refused(&mut self) -> HashMap<Element<N>, Option<Data<N>>> {
        self.changes = Changes::default();
        let mut held: HashMap<Element<N>, Option<Data<N>>> =
            self.blocked.drain().map(|(element, _)| (element, None)).collect();
        if self.add_refused_members() {
            self.settle();
            held.extend(self.changes.0.iter().map(|(element, (before, _))| (*element, *before)));
        }
        held
    }

    /// Records the refused elements as missing from the kernel, so that the next transaction retries them.
    pub(crate) fn requeue_refused(&mut self) {
        let blocked = std::mem::take(&mut self.blocked);
        if !blocked.is_empty() {
            let wanted = self.elements();
            for element in blocked.into_keys() {
                match wanted.get(&element) {
                    Some(data) => self.changes.put(element, None, Some(*data)),
                    // The kernel refused its removal.
                    None => self.changes.put(element, Some(Data::Present), None),
                }
            }
        }
        self.add_refused_members();
    }

    /// Adds the members that the kernel refused to their pools again. Returns whether there were any.
    fn add_refused_members(&mut self) -> bool {
        let refused = std::mem::take(&mut self.refused_members);
        let (again, kept): (Vec<_>, Vec<_>) = refused.into_iter().partition(|(_, _, _, errno)| *errno != 0);
        self.refused_members = kept;
        for (index, role, member, _) in &again {
            self.dirty_ports.insert(*index);
            self.add_member(*index, *role, (member.address, member.port));
        }
        !again.is_empty()
    }

    /// Counts the changes that [`Mirror::retry_refused`] returned, as opposed to foreign changes.
    pub(crate) fn count_of(&self, retried: &HashMap<Element<N>, Option<Data<N>>>) -> usize {
        let found = |(element, before): &(&Element<N>, &Option<Data<N>>)| {
            self.changes.0.get(*element).is_some_and(|(kernel, _)| kernel == *before)
        };
        retried.iter().filter(found).count()
    }

    fn port_numbered(&self, number: u32) -> Option<(u32, &Port<N>)> {
        let mut ports = self.ports.iter().enumerate();
        ports.find_map(|(index, port)| {
            port.as_ref().filter(|port| port.number == number).map(|port| (index as u32, port))
        })
    }

    /// The member with this id whose element it is.
    fn member_with(&self, id: u32, element: &Element<N>) -> Option<(u32, PoolRole, Member<N>)> {
        self.ports.iter().enumerate().find_map(|(index, port)| {
            let port = port.as_ref()?;
            let mut pools = port.pools().filter(|(role, _)| port.numbering.backend(*role, id) == *element);
            pools.find_map(|(role, pool)| {
                let member = pool.members.iter().find(|member| member.id == id)?;
                Some((index as u32, role, *member))
            })
        })
    }

    /// Returns all items of the view that are not in the kernel.
    pub(crate) fn refusals(&self) -> Vec<UnprogrammedItem> {
        let mut all: Vec<UnprogrammedItem> = self
            .overflowed
            .iter()
            .map(|(key, reason)| UnprogrammedItem {
                item: self.frontend_item(key),
                reason: (*reason).to_owned(),
                errno: 0,
            })
            .collect();
        if self.facts.unserved > 0 {
            let (served, family) = (self.facts.node_ports.len(), if N == 4 { "IPv4" } else { "IPv6" });
            let total = served + self.facts.unserved;
            all.push(UnprogrammedItem {
                item: format!("{family} addresses for node ports"),
                reason: format!(
                    "nodePortAddresses selects {total} addresses of this node; node ports are served on {served}. Select \
                     fewer addresses"
                ),
                errno: 0,
            });
        }
        for (element, errno) in &self.blocked {
            let reason = std::io::Error::from_raw_os_error(*errno);
            let reason = format!("the kernel refused an element of {}: {reason}", element.set());
            all.push(UnprogrammedItem { item: self.item(element), reason, errno: *errno });
        }
        for (index, _, member, errno) in &self.refused_members {
            let reason = match errno {
                0 => "the service port has too many endpoints for affinity".to_owned(),
                _ => format!("the kernel refused it: {}", std::io::Error::from_raw_os_error(*errno)),
            };
            let address = text::socket_address(&member.address, member.port);
            let owner = self.port_name(*index).map(|name| format!(" of {name}")).unwrap_or_default();
            let item = format!("endpoint {address}{owner}");
            all.push(UnprogrammedItem { item, reason, errno: *errno });
        }
        all.sort_by(|left, right| left.item.cmp(&right.item));
        all
    }

    fn frontend_item(&self, key: &Key<N>) -> String {
        let address = text::socket_address(&key.address, key.port);
        let protocol = text::protocol(key.protocol);
        let owner = self.frontend_at(key).and_then(|frontend| self.port_name(frontend.port));
        let owner = owner.map(|name| format!(" ({})", name.service())).unwrap_or_default();
        format!("frontend {address}/{protocol}{owner}")
    }

    /// The frontends that a list of sources restricts, the first by name and how many more.
    fn list_item(&self, list: u32) -> String {
        let restricted = self.programmed.iter().filter(|(_, programmed)| programmed.list() == Some(list));
        let mut keys: Vec<&Key<N>> = restricted.map(|(key, _)| key).collect();
        keys.sort_unstable();
        match keys.as_slice() {
            [] => format!("list of sources {list}"),
            [key] => self.frontend_item(key),
            [key, more @ ..] => format!("{} and {} more frontends", self.frontend_item(key), more.len()),
        }
    }

    fn item(&self, element: &Element<N>) -> String {
        match element {
            Element::Frontend(key)
            | Element::Inside(key)
            | Element::Outside(key)
            | Element::Guarded(key)
            | Element::Refused(key)
            | Element::RefusedNodePort(key) => self.frontend_item(key),
            Element::SourceList(list) | Element::Source(list, _) => self.list_item(*list),
            Element::Hairpin(key) => {
                format!("local endpoint {}", text::socket_address(&key.address, key.port))
            }
            Element::Vip(address) | Element::ClusterIp(address) => {
                format!("address {}", text::address(address))
            }
            Element::ServiceCidr(range) => {
                format!("ServiceCIDR {}/{}", text::address(&range.address), range.prefix)
            }
            Element::LocalPod(range) => {
                format!("pod CIDR {}/{}", text::address(&range.address), range.prefix)
            }
            other => format!("{other:?}"),
        }
    }
}
