//! The tables' structure as values: sets, maps and chains, without Services.
//!
//! Everything that depends on a Service is an element of a set or map. A frontend's value is 32 bits: bit 31
//! zero, bits 30..12 the pool (18 bits of service-port number, then one bit of role: 0 Cluster, 1 Local), bits
//! 11..0 the dispatch code. Codes below [`FIRST_CODE`] are fixed; each other code stands for one [`Pick`]: a
//! chain that chooses one of N slots of the pool. `meta priority` is the scratch register: marks belong to
//! others, the kernel overwrites the priority when it forwards IPv4, and postrouting resets it.
//!
//! A packet can cross a commit: each lookup reads the current generation anew, so it may hit the old element of
//! one map and miss the new one of the next. After a hit in `frontends` a miss is therefore tried once more and
//! then dropped: passed on un-NATed, the connection tracking entry would pin the flow to no NAT.

use super::expression::{
    CT_STATE, CT_STATUS, DynamicOperation, Expression as E, META_INTERFACE, META_MARK, META_PRIORITY,
    META_PROTOCOL, NETWORK, Rule, TRANSPORT, Verdict,
};

/// The name of our table in both families.
pub const TABLE: &str = "switchtower";
/// Changes when the rules or sets change their meaning; part of the stamp.
pub const LAYOUT_VERSION: u16 = 1;

/// Only listed sources may use the frontend: continue in chain `restricted`.
pub(crate) const CODE_RESTRICTED: u32 = 1;
/// The target depends on where the packet comes from: continue in chain `split`.
pub(crate) const CODE_SPLIT: u32 = 2;
/// No endpoint, policy DROP.
pub(crate) const CODE_DROP: u32 = 3;
/// No endpoint, policy REJECT: left to the filter chains, since `reject` is not for prerouting.
pub(crate) const CODE_REFUSE: u32 = 4;
/// The first code of a [`Pick`].
pub(crate) const FIRST_CODE: u32 = 5;
/// The last code of a [`Pick`].
pub(crate) const LAST_CODE: u32 = 0xfff;
/// Mask of a value's code.
const CODE_MASK: u32 = 0xfff;
/// Mask of a value's pool.
pub(crate) const POOL_MASK: u32 = 0xffff_f000;
/// Mask of the service-port number of a pool with affinity, in values and in ids of its backends.
pub(crate) const STICKY_MASK: u32 = 0x7fff_0000;
/// The role bit of a value: Local.
pub(crate) const ROLE_BIT: u32 = 0x1000;
/// Set in ids of backends, never in values.
pub(crate) const BACKEND_BIT: u32 = 0x8000_0000;
/// Elements that an affinity map holds at most; beyond it new clients are balanced without being remembered.
const AFFINITY_SIZE: u32 = 1 << 20;

/// Which connections through a pick chain are masqueraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Masquerade {
    /// None, or decided before.
    Never,
    /// As a ClusterIP: chain `mark_cluster_ip` decides.
    ClusterIp,
    /// All.
    Always,
}

/// What a dispatch code above the fixed ones stands for, apart from the number of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Kind {
    pub(crate) masquerade: Masquerade,
    /// Affinity timeout in seconds and whether the pool is the Local one; `None` without affinity.
    pub(crate) affinity: Option<(u32, bool)>,
}

/// A kind and a number of slots: one chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Pick {
    pub(crate) kind: Kind,
    pub(crate) size: u32,
}

impl Pick {
    /// The chain's name.
    pub(crate) fn chain(&self) -> String {
        let masquerade = match self.kind.masquerade {
            Masquerade::Never => "plain",
            Masquerade::ClusterIp => "cluster_ip",
            Masquerade::Always => "masquerade",
        };
        match self.kind.affinity {
            None => format!("pick-{masquerade}-{}", self.size),
            Some((seconds, local)) => {
                let role = if local { "local" } else { "cluster" };
                format!("stick-{masquerade}-{seconds}-{role}-{}", self.size)
            }
        }
    }

    /// The inverse of [`Pick::chain`].
    pub(crate) fn parse(chain: &str) -> Option<Self> {
        let parts: Vec<&str> = chain.split('-').collect();
        let masquerade = match *parts.get(1)? {
            "plain" => Masquerade::Never,
            "cluster_ip" => Masquerade::ClusterIp,
            "masquerade" => Masquerade::Always,
            _ => return None,
        };
        let (affinity, size) = match parts[..] {
            ["pick", _, size] => (None, size),
            ["stick", _, seconds, role, size] => (Some((seconds.parse().ok()?, role == "local")), size),
            _ => return None,
        };
        let pick = Pick { kind: Kind { masquerade, affinity }, size: size.parse().ok()? };
        (pick.chain() == chain).then_some(pick)
    }
}

/// How a packet of a local pod is recognised.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) enum LocalPods {
    /// Not at all.
    #[default]
    Unknown,
    /// The source is in set `local_pods`.
    Sources,
    /// It came in through this interface.
    Interface(String),
    /// It came in through an interface whose name starts so.
    InterfacePrefix(String),
}

/// What the chains depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct RuleConfig {
    pub(crate) mark: u32,
    pub(crate) masquerade_all: bool,
    pub(crate) local_pods: LocalPods,
}

impl Default for RuleConfig {
    fn default() -> Self {
        RuleConfig { mark: 0x4000, masquerade_all: false, local_pods: LocalPods::Unknown }
    }
}

/// Where a base chain is hooked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Hook {
    pub(crate) kind: &'static str,
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

/// A chain and its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// A set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SetSpec {
    pub(crate) name: String,
    pub(crate) flags: u32,
    /// nft's type number and length in bytes.
    pub(crate) key: (u32, u32),
    /// The same of a map's value.
    pub(crate) data: Option<(u32, u32)>,
    pub(crate) size: Option<u32>,
    /// Lengths of the key's fields in bytes, for concatenations with ranges.
    pub(crate) fields: Vec<u32>,
    /// What nft needs to print the set as it was declared.
    pub(crate) user_data: &'static [u8],
}

/// nft's numbers of data types; a concatenation has 6 bits per field.
const IPV6: u32 = 8;
const PROTOCOL: u32 = 12;
const SERVICE: u32 = 13;
const MARK: u32 = 19;
const CLASSID: u32 = 23;
const INTEGER: u32 = 4;
const VERDICT: u32 = 0xffff_ff00;

const FLAG_INTERVAL: u32 = 4;
const FLAG_MAP: u32 = 8;
const FLAG_TIMEOUT: u32 = 0x10;
const FLAG_DYNAMIC: u32 = 0x20;
const FLAG_CONCATENATION: u32 = 0x80;

// User data of sets, as nft 1.0.6 writes it: the sets were declared in a file, loaded, and the attribute was read
// back by a netlink dump. All but SLOTS say only byte orders; SLOTS holds the `typeof` of key and value
// (`typeof meta priority . numgen random mod 65536 : meta priority`), without which its key has no name.
const HOST_TO_NETWORK: &[u8] = &[0, 4, 1, 0, 0, 0, 1, 4, 2, 0, 0, 0, 6, 4, 0, 0, 0, 0];
const CONCATENATION_TO_HOST: &[u8] =
    &[0, 4, 0, 0, 0, 0, 1, 4, 1, 0, 0, 0, 3, 8, 0, 4, 13, 0, 0, 0, 1, 0, 6, 4, 0, 0, 0, 0];
const HOST_TO_CONCATENATION: &[u8] =
    &[0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 0, 0, 4, 8, 0, 4, 13, 0, 0, 0, 1, 0, 6, 4, 0, 0, 0, 0];
const NETWORK_ORDER: &[u8] = &[0, 4, 2, 0, 0, 0];
const CONCATENATION: &[u8] = &[0, 4, 0, 0, 0, 0, 3, 8, 0, 4, 13, 0, 0, 0, 1, 0];
const HOST_TO_VERDICT: &[u8] = &[0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 0, 0, 6, 4, 0, 0, 0, 0];
const SLOTS: &[u8] = &[
    0, 4, 0, 0, 0, 0, 1, 4, 1, 0, 0, 0, 3, 0x34, 0, 4, 13, 0, 0, 0, 1, 0x2c, 0, 14, 0, 4, 9, 0, 0, 0, 1, 6,
    0, 4, 2, 0, 0, 0, 1, 0x1a, 0, 4, 0x17, 0, 0, 0, 1, 0x12, 0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 1, 0, 2, 4, 0, 0,
    0, 0, 4, 14, 0, 4, 9, 0, 0, 0, 1, 6, 0, 4, 2, 0, 0, 0, 6, 4, 0, 0, 0, 0,
];

/// One address family's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub(crate) family: u8,
    /// Length of an address in bytes.
    pub(crate) length: u32,
}

/// `NFPROTO_IPV4`.
pub(crate) const FAMILY_IPV4: u8 = 2;
/// `NFPROTO_IPV6`.
pub(crate) const FAMILY_IPV6: u8 = 10;

fn concatenation(types: &[u32]) -> u32 {
    types.iter().fold(0, |number, kind| number << 6 | kind)
}

impl Layout {
    pub(crate) fn new(length: usize) -> Self {
        Layout { family: if length == 4 { FAMILY_IPV4 } else { FAMILY_IPV6 }, length: length as u32 }
    }

    fn address_type(self) -> u32 {
        if self.family == FAMILY_IPV4 { 7 } else { IPV6 }
    }

    fn words(self) -> u32 {
        self.length / 4
    }

    /// The sets and maps that always exist.
    pub(crate) fn sets(self) -> Vec<SetSpec> {
        let (address, length) = (self.address_type(), self.length);
        let frontend = (concatenation(&[address, PROTOCOL, SERVICE]), length + 8);
        let endpoint = (concatenation(&[address, SERVICE]), length + 4);
        let map = |name: &str, key, data, user_data| SetSpec {
            name: name.to_owned(),
            flags: FLAG_MAP,
            key,
            data: Some(data),
            size: None,
            fields: Vec::new(),
            user_data,
        };
        let set = |name: &str, flags, key, user_data| SetSpec {
            name: name.to_owned(),
            flags,
            key,
            data: None,
            size: None,
            fields: Vec::new(),
            user_data,
        };
        let value = (CLASSID, 4);
        let mut sets: Vec<SetSpec> = ["frontends", "inside", "outside", "guarded"]
            .map(|name| map(name, frontend, value, CONCATENATION_TO_HOST))
            .to_vec();
        sets.extend([
            map("slots", (concatenation(&[CLASSID, INTEGER]), 8), value, SLOTS),
            map("backends", value, endpoint, HOST_TO_CONCATENATION),
            map("sticky_cluster", value, endpoint, HOST_TO_CONCATENATION),
            map("sticky_local", value, endpoint, HOST_TO_CONCATENATION),
            map("picks", value, (VERDICT, 16), HOST_TO_VERDICT),
            map("stamp", (MARK, 4), (IPV6, 16), HOST_TO_NETWORK),
            set("vips", 0, (address, length), NETWORK_ORDER),
            set("cluster_ips", 0, (address, length), NETWORK_ORDER),
            set("service_cidrs", FLAG_INTERVAL, (address, length), NETWORK_ORDER),
            set("local_pods", FLAG_INTERVAL, (address, length), NETWORK_ORDER),
            set("refused", 0, frontend, CONCATENATION),
            set(
                "hairpin",
                0,
                (concatenation(&[address, address, PROTOCOL, SERVICE]), 2 * length + 8),
                CONCATENATION,
            ),
        ]);
        let allowed = (concatenation(&[address, PROTOCOL, SERVICE, address]), 2 * length + 8);
        sets.push(SetSpec {
            fields: vec![length, 1, 2, length],
            ..set("allowed_sources", FLAG_INTERVAL | FLAG_CONCATENATION, allowed, CONCATENATION)
        });
        sets
    }

    /// The map that remembers clients for `seconds`.
    pub(crate) fn affinity_map(self, seconds: u32) -> SetSpec {
        SetSpec {
            name: affinity_name(seconds),
            flags: FLAG_MAP | FLAG_TIMEOUT | FLAG_DYNAMIC,
            key: (concatenation(&[CLASSID, self.address_type()]), self.length + 4),
            data: Some((CLASSID, 4)),
            size: Some(AFFINITY_SIZE),
            fields: Vec::new(),
            user_data: CONCATENATION_TO_HOST,
        }
    }

    fn source(self, register: u32) -> E {
        let offset = if self.family == FAMILY_IPV4 { 12 } else { 8 };
        E::LoadPayload { base: NETWORK, offset, length: self.length, register }
    }

    fn destination(self, register: u32) -> E {
        let offset = if self.family == FAMILY_IPV4 { 16 } else { 24 };
        E::LoadPayload { base: NETWORK, offset, length: self.length, register }
    }

    /// Loads destination address, protocol and port; the next free register is `words + 2`.
    fn frontend_key(self) -> Vec<E> {
        let words = self.words();
        vec![
            self.destination(0),
            E::LoadMeta { key: META_PROTOCOL, register: words },
            E::LoadPayload { base: TRANSPORT, offset: 2, length: 2, register: words + 1 },
        ]
    }

    /// `meta priority set daddr . proto . dport map @map`: a miss leaves the priority as it is.
    fn look_up_frontend(self, map: &str) -> Rule {
        let mut rule = self.frontend_key();
        rule.push(E::Lookup { set: map.to_owned(), register: 0, result: Some(Some(0)) });
        rule.push(E::SetMeta { key: META_PRIORITY, register: 0 });
        Rule(rule)
    }

    /// The two rules that send a frontend's value to its chain.
    fn dispatch(self, fixed: &[(u32, Verdict)]) -> [Rule; 2] {
        let code = [
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Bitwise { register: 0, mask: CODE_MASK, xor: 0 },
        ];
        let picks = E::Lookup { set: "picks".to_owned(), register: 0, result: Some(None) };
        let verdicts = E::Dispatch { register: 0, verdicts: fixed.to_vec() };
        [
            Rule(code.iter().cloned().chain([picks]).collect()),
            Rule(code.iter().cloned().chain([verdicts]).collect()),
        ]
    }

    /// Looks a packet up in `map` and dispatches it, twice; then drops it.
    fn dispatch_or_drop(self, name: &str, map: &str, fixed: &[(u32, Verdict)]) -> Chain {
        let mut rules = vec![forget()];
        for _ in 0..2 {
            rules.push(self.look_up_frontend(map));
            rules.extend(self.dispatch(fixed));
        }
        rules.push(verdict(Verdict::Drop));
        chain(name, rules)
    }

    /// The test for a local pod, to be continued with a verdict.
    fn from_local_pod(self, config: &RuleConfig) -> Option<Vec<E>> {
        let interface = |data: Vec<u8>| {
            let load = E::LoadMeta { key: META_INTERFACE, register: 0 };
            Some(vec![load, E::Compare { equal: true, register: 0, data }])
        };
        match &config.local_pods {
            LocalPods::Unknown => None,
            LocalPods::Sources => Some(vec![
                self.source(0),
                E::Lookup { set: "local_pods".to_owned(), register: 0, result: None },
            ]),
            LocalPods::Interface(name) => {
                let mut data = name.as_bytes().to_vec();
                data.resize(16, 0);
                interface(data)
            }
            LocalPods::InterfacePrefix(prefix) => interface(prefix.as_bytes().to_vec()),
        }
    }

    /// The chains that do not depend on Services, in an order in which each only names earlier ones.
    pub(crate) fn chains(self, config: &RuleConfig) -> Vec<Chain> {
        let fixed = [(CODE_DROP, Verdict::Drop), (CODE_REFUSE, Verdict::Accept)];
        let split = (CODE_SPLIT, Verdict::Goto("split".to_owned()));
        let guarded: Vec<_> = [split.clone()].into_iter().chain(fixed.clone()).collect();
        let restricted = (CODE_RESTRICTED, Verdict::Goto("restricted".to_owned()));
        let all: Vec<_> = [restricted, split].into_iter().chain(fixed.clone()).collect();
        vec![
            self.mark_cluster_ip(config),
            self.dispatch_or_drop("inside", "inside", &fixed),
            self.dispatch_or_drop("outside", "outside", &fixed),
            self.split(config),
            self.dispatch_or_drop("guarded", "guarded", &guarded),
            self.restricted(),
            self.services(&all),
            self.no_endpoint("no_endpoint_input", false),
            self.no_endpoint("no_endpoint", true),
            base("nat_prerouting", ("nat", 0, -100), vec![verdict(Verdict::Jump("services".to_owned()))]),
            base("nat_output", ("nat", 3, -100), vec![verdict(Verdict::Jump("services".to_owned()))]),
            self.postrouting(config),
            base("filter_input", ("filter", 1, -110), vec![new_without_nat("no_endpoint_input")]),
            base("filter_forward", ("filter", 2, -110), vec![new_without_nat("no_endpoint")]),
            // After our nat_output, so that connections to Services with endpoints are known by their NAT.
            base("filter_output", ("filter", 3, -90), vec![new_without_nat("no_endpoint")]),
        ]
    }

    /// Whether a connection to a ClusterIP is masqueraded.
    fn mark_cluster_ip(self, config: &RuleConfig) -> Chain {
        let mark = Rule(set_mark(config.mark));
        let rules = match self.from_local_pod(config) {
            _ if config.masquerade_all => vec![mark],
            Some(mut local) => {
                local.push(E::Verdict(Verdict::Return));
                vec![Rule(local), mark]
            }
            None => Vec::new(),
        };
        chain("mark_cluster_ip", rules)
    }

    /// An external frontend with policy Local: local pods and host processes use every endpoint, others only
    /// those of this node, with their own address.
    fn split(self, config: &RuleConfig) -> Chain {
        let mut rules = Vec::new();
        if let Some(mut local) = self.from_local_pod(config) {
            local.push(E::Verdict(Verdict::Goto("inside".to_owned())));
            rules.push(Rule(local));
        }
        let host = [
            E::LoadSourceType { register: 0 },
            E::Compare { equal: true, register: 0, data: 2u32.to_ne_bytes().to_vec() },
        ];
        rules.push(Rule(host.iter().cloned().chain(set_mark(config.mark)).collect()));
        let goto = E::Verdict(Verdict::Goto("inside".to_owned()));
        rules.push(Rule(host.into_iter().chain([goto]).collect()));
        rules.push(verdict(Verdict::Goto("outside".to_owned())));
        chain("split", rules)
    }

    fn restricted(self) -> Chain {
        let mut allowed = self.frontend_key();
        allowed.push(self.source(self.words() + 2));
        allowed.push(E::Lookup { set: "allowed_sources".to_owned(), register: 0, result: None });
        allowed.push(E::Verdict(Verdict::Goto("guarded".to_owned())));
        chain("restricted", vec![Rule(allowed), verdict(Verdict::Drop)])
    }

    fn services(self, fixed: &[(u32, Verdict)]) -> Chain {
        let mut rules = vec![forget(), self.look_up_frontend("frontends")];
        rules.extend(self.dispatch(fixed));
        // An address of ours without that port, or a lookup that crossed a commit: once more, then it is known.
        let mut again =
            vec![self.destination(0), E::Lookup { set: "vips".to_owned(), register: 0, result: None }];
        again.extend(self.look_up_frontend("frontends").0);
        rules.push(Rule(again));
        rules.extend(self.dispatch(fixed));
        // A hit whose chain is missing: its code is newer than this packet's view of the rules.
        let hit = [
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Compare { equal: false, register: 0, data: vec![0; 4] },
            E::Verdict(Verdict::Drop),
        ];
        rules.push(Rule(hit.to_vec()));
        chain("services", rules)
    }

    /// New connections that no rule gave a backend.
    fn no_endpoint(self, name: &str, routed: bool) -> Chain {
        let code = if self.family == FAMILY_IPV4 { 3 } else { 4 };
        let lookup = |set: &str| E::Lookup { set: set.to_owned(), register: 0, result: None };
        let mut refused = self.frontend_key();
        refused.extend([lookup("refused"), E::Reject { code }]);
        let mut rules = vec![Rule(refused)];
        if routed {
            rules.push(Rule(vec![self.destination(0), lookup("cluster_ips"), E::Reject { code }]));
            let drop = E::Verdict(Verdict::Drop);
            rules.push(Rule(vec![self.destination(0), lookup("service_cidrs"), drop]));
        }
        chain(name, rules)
    }

    fn postrouting(self, config: &RuleConfig) -> Chain {
        let words = self.words();
        let load_mark = E::LoadMeta { key: META_MARK, register: 0 };
        let marked = Rule(vec![
            load_mark.clone(),
            E::Bitwise { register: 0, mask: config.mark, xor: 0 },
            E::Compare { equal: true, register: 0, data: config.mark.to_ne_bytes().to_vec() },
            load_mark,
            E::Bitwise { register: 0, mask: !config.mark, xor: 0 },
            E::SetMeta { key: META_MARK, register: 0 },
            E::Masquerade,
        ]);
        let mut hairpin = with_nat(true);
        hairpin.extend([
            self.source(0),
            self.destination(words),
            E::LoadMeta { key: META_PROTOCOL, register: 2 * words },
            E::LoadPayload { base: TRANSPORT, offset: 2, length: 2, register: 2 * words + 1 },
            E::Lookup { set: "hairpin".to_owned(), register: 0, result: None },
            E::Masquerade,
        ]);
        base("nat_postrouting", ("nat", 4, 100), vec![forget(), marked, Rule(hairpin)])
    }

    /// The chain that a pick's code leads to.
    pub(crate) fn pick_chain(self, pick: &Pick, config: &RuleConfig) -> Chain {
        let mut rules = match pick.kind.masquerade {
            Masquerade::Never => Vec::new(),
            Masquerade::ClusterIp => vec![verdict(Verdict::Jump("mark_cluster_ip".to_owned()))],
            Masquerade::Always => vec![Rule(set_mark(config.mark))],
        };
        let choose = Rule(vec![
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Bitwise { register: 0, mask: POOL_MASK, xor: 0 },
            E::Random { register: 1, modulus: pick.size },
            E::Lookup { set: "slots".to_owned(), register: 0, result: Some(Some(0)) },
            E::SetMeta { key: META_PRIORITY, register: 0 },
        ]);
        match pick.kind.affinity {
            None => {
                for _ in 0..2 {
                    rules.extend([choose.clone(), self.translate("backends")]);
                }
            }
            Some((seconds, local)) => rules.extend(self.sticky_rules(&choose, seconds, local)),
        }
        rules.push(verdict(Verdict::Drop));
        chain(&pick.chain(), rules)
    }

    /// The client's remembered backend, or a fresh one that is then remembered.
    fn sticky_rules(self, choose: &Rule, seconds: u32, local: bool) -> Vec<Rule> {
        let map = affinity_name(seconds);
        let backends = self.translate(if local { "sticky_local" } else { "sticky_cluster" });
        let pool = Rule(vec![
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Bitwise { register: 0, mask: STICKY_MASK, xor: if local { ROLE_BIT } else { 0 } },
            E::SetMeta { key: META_PRIORITY, register: 0 },
        ]);
        let mut remembered = self.client(0);
        remembered.extend([
            E::Lookup { set: map.clone(), register: 0, result: Some(Some(0)) },
            E::SetMeta { key: META_PRIORITY, register: 0 },
        ]);
        let remember = self.dynamic(DynamicOperation::Update, &map, seconds);
        // `update` of a present key renews its timeout and keeps its data: a stale one must be deleted.
        let forget = self.dynamic(DynamicOperation::Delete, &map, 0);
        let mut rules = vec![Rule(remembered), remember.clone(), backends.clone(), forget.clone()];
        rules.extend([pool.clone(), choose.clone(), remember.clone(), backends.clone(), forget]);
        rules.extend([pool, choose.clone(), remember, backends]);
        rules
    }

    /// `service port . client`, the key of an affinity map.
    fn client(self, register: u32) -> Vec<E> {
        vec![
            E::LoadMeta { key: META_PRIORITY, register },
            E::Bitwise { register, mask: STICKY_MASK, xor: 0 },
            self.source(register + 1),
        ]
    }

    fn dynamic(self, operation: DynamicOperation, map: &str, seconds: u32) -> Rule {
        // The key's last register, rounded up to a multiple of four as nft does.
        let data = if self.family == FAMILY_IPV4 { 4 } else { 8 };
        let mut rule = vec![
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Bitwise { register: 0, mask: BACKEND_BIT, xor: 0 },
            E::Compare { equal: true, register: 0, data: BACKEND_BIT.to_ne_bytes().to_vec() },
        ];
        rule.extend(self.client(0));
        rule.push(E::LoadMeta { key: META_PRIORITY, register: data });
        rule.push(E::Dynamic { operation, set: map.to_owned(), key: 0, data, seconds });
        Rule(rule)
    }

    /// `dnat to meta priority map @map`; a miss continues with the next rule.
    fn translate(self, map: &str) -> Rule {
        let protocol =
            [E::LoadMeta { key: META_PROTOCOL, register: 0 }, E::ProtocolWithPorts { register: 0 }];
        let nat = [
            E::LoadMeta { key: META_PRIORITY, register: 0 },
            E::Lookup { set: map.to_owned(), register: 0, result: Some(Some(0)) },
            E::DestinationNat { family: self.family, address: 0, port: self.words() },
        ];
        Rule(protocol.into_iter().chain(nat).collect())
    }
}

/// The name of the map that remembers clients for `seconds`.
pub(crate) fn affinity_name(seconds: u32) -> String {
    format!("affinity_{seconds}")
}

fn chain(name: &str, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), hook: None, rules }
}

fn base(name: &str, (kind, number, priority): (&'static str, u32, i32), rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), hook: Some(Hook { kind, number, priority }), rules }
}

fn verdict(verdict: Verdict) -> Rule {
    Rule(vec![E::Verdict(verdict)])
}

/// `meta priority set none`.
fn forget() -> Rule {
    Rule(vec![E::Immediate { register: 0, value: 0 }, E::SetMeta { key: META_PRIORITY, register: 0 }])
}

fn set_mark(mark: u32) -> Vec<E> {
    vec![
        E::LoadMeta { key: META_MARK, register: 0 },
        E::Bitwise { register: 0, mask: !mark, xor: mark },
        E::SetMeta { key: META_MARK, register: 0 },
    ]
}

/// `ct status dnat`, or its negation.
fn with_nat(wanted: bool) -> Vec<E> {
    vec![
        E::LoadConntrack { key: CT_STATUS, register: 0 },
        E::Bitwise { register: 0, mask: 0x20, xor: 0 },
        E::Compare { equal: !wanted, register: 0, data: vec![0; 4] },
    ]
}

/// `ct state new ct status ! dnat jump chain`: connections that have a backend pay no lookup.
fn new_without_nat(chain: &str) -> Rule {
    let mut rule = vec![
        E::LoadConntrack { key: CT_STATE, register: 0 },
        E::Bitwise { register: 0, mask: 8, xor: 0 },
        E::Compare { equal: false, register: 0, data: vec![0; 4] },
    ];
    rule.extend(with_nat(false));
    rule.push(E::Verdict(Verdict::Jump(chain.to_owned())));
    Rule(rule)
}
