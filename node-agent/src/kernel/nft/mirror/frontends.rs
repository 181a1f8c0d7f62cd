//! Frontends in the kernel: which values lead a connection where.

use switchtower_proto::v1::{FrontendKind, Role, Verdict};

use super::{Frontend, Mirror, Programmed, Reference, Refuses, Target};
use crate::kernel::nft::element::{Data, Element, Key, LIST_SHIFT, Range};
use crate::kernel::nft::layout::{
    CODE_DROP, CODE_MASK, CODE_REFUSE, CODE_RESTRICTED, CODE_SPLIT, Masquerade, Pick,
};
use crate::kernel::nft::numbering::{Numbering, pool_bits};
use crate::kernel::nft::pool_role::PoolRole;

impl<const N: usize> Mirror<N> {
    /// The frontend that an address, protocol and port belongs to: an explicit one before a NodePort.
    pub(super) fn frontend_at(&self, key: &Key<N>) -> Option<&Frontend> {
        self.frontends.get(&Reference::Explicit(*key)).or_else(|| {
            let served = self.facts.node_ports.contains(&key.address);
            let reference = Reference::NodePort { protocol: key.protocol, port: key.port };
            served.then(|| self.frontends.get(&reference)).flatten()
        })
    }

    /// Brings one frontend's elements in line.
    pub(super) fn program(&mut self, key: Key<N>) {
        self.overflowed.remove(&key);
        let mut frontend = self.frontend_at(&key).cloned();
        let external = frontend.as_ref().is_some_and(|frontend| frontend.kind != FrontendKind::ClusterIp);
        if external && self.facts.controllers.contains(&key) {
            frontend = None;
            self.overflowed.insert(key, "the agent reaches a controller at this address and port");
        }
        let wanted = frontend.map(|frontend| self.values(&key, &frontend)).unwrap_or_default();
        let before = self.programmed.remove(&key).unwrap_or_default();
        let values = |programmed: &Programmed| {
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
        }
        // The new reference was taken before: a list in use by both is never given up.
        if let Some(list) = before.list() {
            self.release_list(list);
        }
        let present = |present: bool| present.then_some(Data::Present);
        if before.refused != wanted.refused {
            for (refuses, old, new) in [(before.refused, true, false), (wanted.refused, false, true)] {
                if let Some(refuses) = refuses {
                    self.put(refuses.element(key), present(old), present(new));
                }
            }
        }
        self.count_address(key.address, &before, &wanted);
        if wanted.main != 0 {
            self.programmed.insert(key, wanted);
        }
    }

    pub(super) fn count_address(&mut self, address: [u8; N], before: &Programmed, after: &Programmed) {
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

    /// Desired values of a frontend's elements; takes a reference on the list of sources.
    pub(super) fn values(&mut self, key: &Key<N>, frontend: &Frontend) -> Programmed {
        let mut programmed = Programmed::default();
        let target = |mirror: &mut Self, target: Target, masquerade: Masquerade| {
            let (value, short) = mirror.target_value(frontend, target, masquerade);
            if let Some(reason) = short {
                mirror.overflowed.insert(*key, reason);
            }
            value
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
        let refuses = match frontend.kind {
            FrontendKind::NodePort => Refuses::AtTheNode,
            _ => Refuses::Anywhere,
        };
        programmed.refused = values.contains(&CODE_REFUSE).then_some(refuses);
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
                let main = match self.acquire_list(&allowed) {
                    Some(list) => list << LIST_SHIFT | CODE_RESTRICTED,
                    None => {
                        self.overflowed.insert(*key, "no number for its list of sources is left");
                        CODE_DROP
                    }
                };
                programmed.guarded = std::mem::replace(&mut programmed.main, main);
            }
        }
        programmed
    }

    /// The load-balancer addresses of a service port.
    pub(super) fn port_vips(&self, index: u32) -> Vec<Range<N>> {
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

    /// The value that leads to a target, and what is not as it should be if numbers are short.
    pub(super) fn target_value(
        &mut self,
        frontend: &Frontend,
        target: Target,
        masquerade: Masquerade,
    ) -> (u32, Option<&'static str>) {
        // The wire has no other role for a frontend.
        let role = PoolRole::of(target.role).unwrap_or(PoolRole::Cluster);
        let Some(port) = self.port(frontend.port) else { return (CODE_DROP, None) };
        let count = port.pools[role].as_ref().map_or(0, |pool| pool.members.len()) as u32;
        if count == 0 {
            let drop = target.when_empty == Verdict::Drop;
            return (if drop { CODE_DROP } else { CODE_REFUSE }, None);
        }
        if port.number == 0 {
            return (CODE_DROP, Some("no service-port number is left"));
        }
        // Without affinity of its own, a frontend of a port with affinity still needs the sticky maps.
        let affinity = match port.numbering {
            Numbering::Plain => 0,
            Numbering::Sticky => frontend.affinity.max(1),
        };
        (pool_bits(port.number, role) | Pick::new(masquerade, affinity, count).code(), None)
    }
}

impl Programmed {
    /// The list of sources that restricts the frontend.
    pub(super) fn list(&self) -> Option<u32> {
        (self.main & CODE_MASK == CODE_RESTRICTED).then_some(self.main >> LIST_SHIFT)
    }
}
