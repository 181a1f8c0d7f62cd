//! The rules from a frontend's value to a backend, which are the same for every Service.
//!
//! When a rule is bound to a map, the kernel walks all its elements, and each rule bound to a map adds to the cost of
//! adding an element. So every chain here exists from the creation of the table, independent of the pools, and each
//! large map is bound to a small, constant number of rules.
//!
//! A pool of up to [`EXACT_SIZES`] members has a chain of exactly its size. Above that, the chain of the next power
//! of two picks a slot: an index without a slot is a miss, and the pick is repeated. At least every second index
//! has a slot, so that [`TRIES`] picks miss with a probability of at most 1/32, and then the chain of half the size
//! picks, all of whose indexes have slots. No member gets more than 33/32 of another's share.

use switchtower_proto::affinity::{TIMEOUTS, programmed_timeout};

use super::{
    BACKEND_BIT, CODE_MASK, Chain, DynamicOperation, E, Expression, Layout, LookupResult, META_PRIORITY,
    META_PROTOCOL, POOL_MASK, Rule, RuleConfig, STICKY_MASK, Verdict, chain, forget, set_mark, verdict,
};
use crate::kernel::nft::pool_role::{PoolRole, ROLE_BIT};

/// Pools of at most so many members have a size class of their own.
const EXACT_SIZES: u32 = 16;
/// The largest size class: 2^19 members.
const LAST_CLASS: u32 = 31;
/// Picks among the slots of the next power of two before those of half of it.
const TRIES: usize = 5;
/// A client is remembered by the hash of its address, of so many values: an upper bound for the entries that one
/// service port can have in map `affinity`. Clients with the same hash share a backend.
const CLIENT_HASHES: u32 = 1 << 15;
/// The seed that nft prints and reads back.
const CLIENT_SEED: u32 = 0x5354;

const CLASS_MASK: u32 = 0x1f;
const TIMEOUT_SHIFT: u32 = 5;
const TIMEOUT_MASK: u32 = 0x3e0;
const MASQUERADE_SHIFT: u32 = 10;
const MASQUERADE_MASK: u32 = 0xc00;

/// Which connections to a target are masqueraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Masquerade {
    /// None, or decided before.
    Never = 1,
    /// As a ClusterIP: chain `mark_cluster_ip` decides.
    ClusterIp = 2,
    /// All.
    Always = 3,
}

/// The code of a value that leads to a pool: how to pick a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Pick {
    pub(crate) masquerade: Masquerade,
    /// Affinity timeout in seconds, one of [`TIMEOUTS`]; 0: no affinity.
    pub(crate) affinity: u32,
    /// Size class, from [`size_class`].
    pub(crate) class: u32,
}

/// The class of a pool with so many members; members beyond the largest class are not picked.
pub(crate) fn size_class(members: u32) -> u32 {
    if members <= EXACT_SIZES {
        return members;
    }
    let bits = u32::BITS - (members - 1).leading_zeros();
    (EXACT_SIZES + bits - EXACT_SIZES.ilog2()).min(LAST_CLASS)
}

/// Returns the number of indexes from which the chain of a class picks.
pub(crate) fn class_size(class: u32) -> u32 {
    if class <= EXACT_SIZES { class } else { EXACT_SIZES << (class - EXACT_SIZES) }
}

impl Pick {
    /// For a pool of `members`, with an affinity timeout in seconds or 0, which is rounded up.
    pub(crate) fn new(masquerade: Masquerade, affinity: u32, members: u32) -> Self {
        Pick { masquerade, affinity: programmed_timeout(affinity), class: size_class(members) }
    }

    /// The code's bits.
    pub(crate) fn code(self) -> u32 {
        let timeout = TIMEOUTS.iter().position(|timeout| *timeout == self.affinity);
        let timeout = timeout.map_or(0, |index| index as u32 + 1);
        (self.masquerade as u32) << MASQUERADE_SHIFT | timeout << TIMEOUT_SHIFT | self.class
    }

    /// The pick of a value; `None` if the value does not lead to a pool.
    pub(crate) fn of(value: u32) -> Option<Self> {
        let masquerade = match (value & MASQUERADE_MASK) >> MASQUERADE_SHIFT {
            1 => Masquerade::Never,
            2 => Masquerade::ClusterIp,
            3 => Masquerade::Always,
            _ => return None,
        };
        let affinity = match ((value & TIMEOUT_MASK) >> TIMEOUT_SHIFT) as usize {
            0 => 0,
            index => TIMEOUTS[index - 1],
        };
        let class = value & CLASS_MASK;
        (class > 0).then_some(Pick { masquerade, affinity, class })
    }

    /// Slots that a pool of this class has at least, and at most.
    pub(crate) fn slots(self) -> (u32, u32) {
        let size = class_size(self.class);
        if self.class <= EXACT_SIZES { (size, size) } else { (size / 2 + 1, size) }
    }

    /// The chain that picks the slot.
    pub(crate) fn chain(self) -> String {
        size_chain(self.class)
    }
}

fn size_chain(class: u32) -> String {
    format!("size-{}", class_size(class))
}

fn sticky_chain(seconds: u32, role: PoolRole) -> String {
    format!("stick-{seconds}-{}", role.name())
}

fn jump(chain: &str) -> Verdict {
    Verdict::Jump(chain.to_owned())
}

fn goto(chain: &str) -> Verdict {
    Verdict::Goto(chain.to_owned())
}

/// Loads the priority's masked bits.
fn bits(mask: u32) -> Vec<Expression> {
    vec![E::LoadMeta { key: META_PRIORITY, register: 0 }, E::Bitwise { register: 0, mask, xor: 0 }]
}

/// A rule for packets whose masked priority is not zero.
fn if_any(mask: u32, verdict: Verdict) -> Rule {
    let mut rule = bits(mask);
    rule.push(E::Compare { equal: false, register: 0, data: vec![0; 4] });
    rule.push(E::Verdict(verdict));
    Rule(rule)
}

/// The test that the priority is the id of a backend.
pub(super) fn is_backend() -> Vec<Expression> {
    let mut test = bits(BACKEND_BIT);
    test.push(E::Compare { equal: true, register: 0, data: BACKEND_BIT.to_ne_bytes().to_vec() });
    test
}

/// A rule for packets whose priority is the id of a backend.
fn if_backend(verdict: Verdict) -> Rule {
    let mut rule = is_backend();
    rule.push(E::Verdict(verdict));
    Rule(rule)
}

fn vmap(mask: u32, verdicts: Vec<(u32, Verdict)>) -> Rule {
    let mut rule = bits(mask);
    rule.push(E::Dispatch { register: 0, verdicts });
    Rule(rule)
}

/// The rules that act on a frontend's value, and pass values of none of these kinds to the next rule. The first one serves
/// most connections.
pub(super) fn dispatch(fixed: &[(u32, Verdict)]) -> [Rule; 3] {
    let pools = [
        (Masquerade::Never, "connect"),
        (Masquerade::ClusterIp, "connect_cluster_ip"),
        (Masquerade::Always, "connect_external"),
    ];
    [
        vmap(MASQUERADE_MASK | TIMEOUT_MASK, by_masquerade(&pools, goto)),
        vmap(CODE_MASK, fixed.to_vec()),
        if_any(MASQUERADE_MASK, goto("connect_sticky")),
    ]
}

fn by_masquerade(chains: &[(Masquerade, &str)], to: fn(&str) -> Verdict) -> Vec<(u32, Verdict)> {
    chains.iter().map(|(masquerade, chain)| ((*masquerade as u32) << MASQUERADE_SHIFT, to(chain))).collect()
}

impl Layout {
    /// The chains from those of [`dispatch`] on, in an order in which each names only earlier ones.
    pub(super) fn connect_chains(self, config: &RuleConfig) -> Vec<Chain> {
        let mut chains: Vec<Chain> = (1..=LAST_CLASS).map(|class| self.size(class)).collect();
        chains.push(chain("pick", vec![pick()]));
        chains.push(choose());
        for role in PoolRole::ALL {
            let name = role.name();
            let recalled = vec![self.translate(&format!("sticky_{name}"))];
            chains.push(chain(&format!("recalled_{name}"), recalled));
            chains.push(self.forgotten(role));
        }
        let mut timeouts = Vec::new();
        for (seconds, code) in TIMEOUTS.into_iter().zip(1..) {
            for role in PoolRole::ALL {
                chains.push(self.stick(seconds, role));
                let verdict = goto(&sticky_chain(seconds, role));
                timeouts.push((code << TIMEOUT_SHIFT | role.bit(), verdict));
            }
        }
        chains.push(chain("stick", vec![vmap(TIMEOUT_MASK | ROLE_BIT, timeouts), verdict(Verdict::Drop)]));
        let mark = || Rule(set_mark(config.mark));
        chains.push(chain("mark_cluster_ip", self.mark_cluster_ip(config, Verdict::Return)));
        chains.push(chain("mark_external", vec![mark()]));
        chains.push(self.connect());
        let mut cluster_ip = self.mark_cluster_ip(config, goto("connect"));
        cluster_ip.push(verdict(goto("connect")));
        chains.push(chain("connect_cluster_ip", cluster_ip));
        chains.push(chain("connect_external", vec![mark(), verdict(goto("connect"))]));
        chains.push(connect_sticky());
        chains
    }

    /// Picks among `size` slots of the pool in the priority, which becomes the id of a backend. A miss leaves it.
    fn size(self, class: u32) -> Chain {
        let mut rule = bits(POOL_MASK);
        rule.extend([
            E::Random { register: 1, modulus: class_size(class) },
            E::Lookup { set: "slots".to_owned(), register: 0, result: Some(LookupResult::Value(0)) },
            E::SetMeta { key: META_PRIORITY, register: 0 },
        ]);
        chain(&size_chain(class), vec![Rule(rule)])
    }

    /// A connection whose value leads to a pool without affinity.
    fn connect(self) -> Chain {
        let rules = vec![
            pick(),
            self.translate("backends"),
            // The slot and the backend are of two commits.
            if_backend(Verdict::Drop),
            verdict(jump("choose")),
            self.translate("backends"),
            verdict(Verdict::Drop),
        ];
        chain("connect", rules)
    }

    /// The client's remembered backend, or a fresh one that is then remembered.
    fn stick(self, seconds: u32, role: PoolRole) -> Chain {
        let name = role.name();
        let mut recall = self.client(0);
        recall.extend([
            E::Lookup { set: "affinity".to_owned(), register: 0, result: Some(LookupResult::Value(0)) },
            E::SetMeta { key: META_PRIORITY, register: 0 },
        ]);
        let recall = Rule(recall);
        let remember = self.dynamic(DynamicOperation::Update, seconds);
        let recalled = verdict(jump(&format!("recalled_{name}")));
        // `update` of a present key renews its timeout and keeps its data: a stale one must be deleted.
        let forgotten = verdict(jump(&format!("forgotten_{name}")));
        // Another first packet of this client may have been remembered since the lookup: its choice wins.
        let fresh = [verdict(jump("choose")), remember.clone(), recall.clone(), recalled.clone()];
        let mut rules = vec![recall, remember, recalled];
        for _ in 0..2 {
            rules.push(forgotten.clone());
            rules.extend(fresh.clone());
        }
        rules.push(verdict(Verdict::Drop));
        chain(&sticky_chain(seconds, role), rules)
    }

    /// Forgets a backend that is gone, and gives the priority the value of the pool again.
    fn forgotten(self, role: PoolRole) -> Chain {
        let mut pool = is_backend();
        pool.extend([
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Bitwise { register: 0, mask: STICKY_MASK, xor: role.bit() },
            E::Lookup { set: "sticky_pools".to_owned(), register: 0, result: Some(LookupResult::Value(0)) },
            E::SetMeta { key: META_PRIORITY, register: 0 },
        ]);
        let rules = vec![self.dynamic(DynamicOperation::Delete, 0), Rule(pool)];
        chain(&format!("forgotten_{}", role.name()), rules)
    }

    /// `service port . client`, the key of map `affinity`.
    fn client(self, register: u32) -> Vec<Expression> {
        vec![
            E::LoadMeta { key: META_PRIORITY, register },
            E::Bitwise { register, mask: STICKY_MASK, xor: 0 },
            self.source(register + 1),
            E::Hash {
                register: register + 1,
                length: self.length,
                modulus: CLIENT_HASHES,
                seed: CLIENT_SEED,
            },
        ]
    }

    fn dynamic(self, operation: DynamicOperation, seconds: u32) -> Rule {
        let mut rule = is_backend();
        rule.extend(self.client(0));
        rule.push(E::LoadMeta { key: META_PRIORITY, register: 2 });
        rule.push(E::Dynamic { operation, set: "affinity".to_owned(), key: 0, data: 2, seconds });
        Rule(rule)
    }

    /// `dnat to meta priority map @map`; a miss continues with the next rule.
    fn translate(self, map: &str) -> Rule {
        let protocol =
            [E::LoadMeta { key: META_PROTOCOL, register: 0 }, E::ProtocolWithPorts { register: 0 }];
        let nat = [
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Lookup { set: map.to_owned(), register: 0, result: Some(LookupResult::Value(0)) },
            E::DestinationNat { family: self.family, address: 0, port: self.words() },
        ];
        Rule(protocol.into_iter().chain(nat).collect())
    }

    /// Source lists: only a listed source continues, with priority 0.
    pub(super) fn restricted(self) -> Chain {
        let mut lists = bits(POOL_MASK);
        lists.push(E::Lookup {
            set: "source_lists".to_owned(),
            register: 0,
            result: Some(LookupResult::Verdict),
        });
        let unlisted = [
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Compare { equal: false, register: 0, data: vec![0; 4] },
            E::Verdict(Verdict::Drop),
        ];
        let goto = verdict(goto("guarded"));
        chain("restricted", vec![Rule(lists), Rule(unlisted.to_vec()), goto])
    }

    /// The chain of one list of sources.
    pub(crate) fn source_chain(self, list: u32) -> Chain {
        let name = source_list_name(list);
        let mut rule = vec![self.source(0), E::Lookup { set: name.clone(), register: 0, result: None }];
        rule.extend(forget().0);
        chain(&name, vec![Rule(rule)])
    }
}

/// A connection whose value leads to a pool with affinity.
fn connect_sticky() -> Chain {
    let marks = [(Masquerade::ClusterIp, "mark_cluster_ip"), (Masquerade::Always, "mark_external")];
    let rules = vec![vmap(MASQUERADE_MASK, by_masquerade(&marks, jump)), verdict(goto("stick"))];
    chain("connect_sticky", rules)
}

/// Picks a slot once.
fn pick() -> Rule {
    vmap(CLASS_MASK, (1..=LAST_CLASS).map(|class| (class, jump(&size_chain(class)))).collect())
}

/// Picks a slot of any size class.
fn choose() -> Chain {
    let mut rules = Vec::new();
    for _ in 0..TRIES {
        rules.extend([verdict(jump("pick")), if_backend(Verdict::Return)]);
    }
    let halves = (EXACT_SIZES + 1..=LAST_CLASS).map(|class| (class, jump(&size_chain(class - 1))));
    rules.push(vmap(CLASS_MASK, halves.collect()));
    chain("choose", rules)
}

/// The name of a source list's set and of its chain.
pub(crate) fn source_list_name(list: u32) -> String {
    format!("sources-{list}")
}

/// The inverse of [`source_list_name`].
pub(crate) fn source_list_of(name: &str) -> Option<u32> {
    let list = name.strip_prefix("sources-")?.parse().ok()?;
    (source_list_name(list) == name).then_some(list)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn pick_recovered_from_its_code() {
        for masquerade in [Masquerade::Never, Masquerade::ClusterIp, Masquerade::Always] {
            for affinity in [0].into_iter().chain(TIMEOUTS) {
                for class in 1..=LAST_CLASS {
                    let pick = Pick { masquerade, affinity, class };
                    assert!(pick.code() <= CODE_MASK);
                    assert_eq!(Pick::of(pick.code() | 0x7fff_f000), Some(pick));
                }
            }
        }
        for fixed in 0..16 {
            assert_eq!(Pick::of(fixed), None);
        }
    }

    #[test]
    fn class_has_slots_for_its_members() {
        for members in 1..=(1 << 17) {
            let (least, most) = Pick::new(Masquerade::Never, 0, members).slots();
            assert!((least..=most).contains(&members), "{members}: {least}..={most}");
            if members <= EXACT_SIZES {
                assert_eq!((least, most), (members, members));
            }
        }
    }

    /// The largest over the smallest share of a pool's members, computed from the rules' probabilities.
    fn unfairness(members: u32) -> f64 {
        let (_, size) = Pick::new(Masquerade::Never, 0, members).slots();
        let hit = f64::from(members) / f64::from(size);
        let missed = (1.0 - hit).powi(TRIES as i32);
        let (all, low) = ((1.0 - missed) / f64::from(members), missed / f64::from(size / 2));
        (all + low) / all
    }

    #[test]
    fn member_shares_differ_by_less_than_4_percent() {
        let worst = (1..100_000).map(unfairness).fold(1.0, f64::max);
        assert!(worst < 1.04, "{worst}");
    }

    #[test]
    fn service_port_fills_64th_of_affinity_map() {
        assert_eq!(CLIENT_HASHES * 64, super::super::sets::AFFINITY_SIZE);
        let layouts = [Layout::new(4), Layout::new(16)];
        for expression in layouts.iter().flat_map(|layout| layout.client(0)) {
            if let E::Hash { modulus, .. } = expression {
                assert_eq!(modulus, CLIENT_HASHES);
            }
        }
    }

    #[test]
    fn large_maps_bound_to_few_rules() {
        for length in [4, 16] {
            let layout = Layout::new(length);
            let mut bound: HashMap<String, usize> = HashMap::new();
            let chains = layout.chains(&RuleConfig::default());
            for expression in chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.0) {
                if let E::Lookup { set, .. } = expression {
                    *bound.entry(set.clone()).or_default() += 1;
                }
            }
            for (set, limit) in [("slots", 31), ("backends", 2), ("sticky_cluster", 1), ("frontends", 2)] {
                assert_eq!(bound[set], limit, "{set}");
            }
        }
    }
}
