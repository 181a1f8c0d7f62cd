//! The structure of the tables as values: sets, maps and chains, independent of Services.
//!
//! Everything that depends on a Service is an element of a set or map. A frontend's value is 32 bits: bit 31
//! zero, bits 30..12 the pool (18 bits of service-port number, then one bit of role: 0 Cluster, 1 Local), bits
//! 11..0 the code: a fixed one, or a [`Pick`], with two bits of masquerading, five of affinity timeout and five of
//! size class. `meta priority` is the scratch register: marks belong to others, the kernel overwrites the priority
//! when it forwards IPv4, and chain `routed` resets it.
//!
//! A packet can cross a commit: each lookup reads the current generation, so it may hit the old element of one map and
//! miss the new one of the next. After a hit in `frontends` a miss is therefore retried once and then dropped: without
//! NAT, the connection tracking entry would pin the flow to no NAT.

mod dispatch;
mod sets;

use super::data::Verdict;
use super::expression::{
    CT_STATE, CT_STATUS, DynamicOperation, Expression, Expression as E, LookupResult, META_INTERFACE,
    META_MARK, META_OUTPUT_INTERFACE, META_PRIORITY, META_PROTOCOL, NETWORK, Rule, TRANSPORT,
};

pub(crate) use dispatch::{Masquerade, Pick, source_list_name, source_list_of};
pub(crate) use sets::{DataType, SetSpec};

/// The name of our table in both families.
pub(crate) const TABLE: &str = "switchtower";
/// Version of the layout, part of the stamp; raised when rules or sets change their meaning.
pub(crate) const LAYOUT_VERSION: u16 = 6;

/// Code of a frontend that only listed sources may use: continue in chain `restricted`.
pub(crate) const CODE_RESTRICTED: u32 = 1;
/// Code of a frontend whose target depends on the source: continue in chain `split`.
pub(crate) const CODE_SPLIT: u32 = 2;
/// Code of a frontend without endpoint and with policy DROP.
pub(crate) const CODE_DROP: u32 = 3;
/// Code of a frontend without endpoint and with policy REJECT: left to the filter chains, since the kernel has no
/// `reject` in prerouting of type nat.
pub(crate) const CODE_REFUSE: u32 = 4;
/// Mask of a value's code.
pub(crate) const CODE_MASK: u32 = 0xfff;
/// Mask of a value's pool.
pub(crate) const POOL_MASK: u32 = 0xffff_f000;
/// Mask of the service-port number of a pool with affinity, in values and in ids of its backends.
pub(crate) const STICKY_MASK: u32 = 0x7fff_0000;
/// Set in ids of backends, never in values.
pub(crate) const BACKEND_BIT: u32 = 0x8000_0000;

/// Detection of packets of local pods.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) enum LocalPods {
    /// No detection.
    #[default]
    Unknown,
    /// The source is in set `local_pods`.
    Sources,
    /// It came in through this interface.
    Interface(String),
    /// It came in through an interface whose name has this prefix.
    InterfacePrefix(String),
}

/// Presence of the base chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) enum Hooks {
    /// Packets pass the rules.
    #[default]
    Registered,
    /// Mode Shadow: there are no base chains, and the rest of the table is the same.
    Absent,
}

/// The settings that the chains depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct RuleConfig {
    pub(crate) hooks: Hooks,
    pub(crate) mark: u32,
    pub(crate) masquerade_all: bool,
    pub(crate) local_pods: LocalPods,
    /// Port of the drain gate.
    pub(crate) drain_gate: Option<u16>,
    /// The node's own addresses of the family, for host-network pods; empty without a drain gate.
    pub(crate) drain_gate_hosts: Vec<Vec<u8>>,
}

impl Default for RuleConfig {
    fn default() -> Self {
        RuleConfig {
            hooks: Hooks::Registered,
            mark: 0x4000,
            masquerade_all: false,
            local_pods: LocalPods::Unknown,
            drain_gate: None,
            drain_gate_hosts: Vec::new(),
        }
    }
}

/// The hook of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Hook {
    pub(crate) kind: &'static str,
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

impl Hook {
    fn nat(number: i32, priority: i32) -> Self {
        Hook { kind: "nat", number: number as u32, priority }
    }

    fn filter(number: i32, priority: i32) -> Self {
        Hook { kind: "filter", number: number as u32, priority }
    }
}

/// A chain and its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// One address family's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub(crate) family: u8,
    /// Length of an address in bytes.
    pub(crate) length: u32,
}

pub(crate) const FAMILY_IPV4: u8 = libc::NFPROTO_IPV4 as u8;
pub(crate) const FAMILY_IPV6: u8 = libc::NFPROTO_IPV6 as u8;

/// `ICMP_UNREACH_PORT`: code of ICMP "destination unreachable".
const ICMP_PORT_UNREACHABLE: u8 = 3;
/// `ICMPV6_PORT_UNREACH`.
const ICMPV6_PORT_UNREACHABLE: u8 = 4;
/// `IPS_DST_NAT` of `ct status`.
const STATUS_DNAT: u32 = 0x20;
/// `ct state new`: bit of `IP_CT_NEW`.
const STATE_NEW: u32 = 8;
/// Before other tables' filter chains, so that they see no packet that we refuse.
const BEFORE_FILTER: i32 = -110;
/// Before the chains of kube-proxy and of iptables at `NF_IP_PRI_NAT_DST`, in whatever order they are registered: the
/// first chain that translates a connection decides. Connection tracking precedes all chains of type nat.
const BEFORE_NAT_DST: i32 = libc::NF_IP_PRI_NAT_DST - 1;
/// After our nat_output, so that connections to Services with endpoints are known by their NAT.
const AFTER_NAT_DST: i32 = libc::NF_IP_PRI_NAT_DST + 10;

impl Layout {
    pub(crate) fn new(length: usize) -> Self {
        Layout { family: if length == 4 { FAMILY_IPV4 } else { FAMILY_IPV6 }, length: length as u32 }
    }

    fn words(self) -> u32 {
        self.length / 4
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
        rule.push(E::Lookup { set: map.to_owned(), register: 0, result: Some(LookupResult::Value(0)) });
        rule.push(E::SetMeta { key: META_PRIORITY, register: 0 });
        Rule(rule)
    }

    /// Looks a packet up in `map`, at most twice, and acts on the value; drops the packet if there is none.
    fn look_up_or_drop(self, map: &str, fixed: &[(u32, Verdict)]) -> Chain {
        let mut rules = vec![forget()];
        for _ in 0..2 {
            rules.push(self.look_up_frontend(map));
            rules.extend(dispatch::dispatch(fixed));
        }
        rules.push(verdict(Verdict::Drop));
        chain(map, rules)
    }

    /// Returns the test for a local pod, to be followed by a verdict.
    fn local_pod_test(self, config: &RuleConfig) -> Option<Vec<E>> {
        let interface = |data: Vec<u8>| Some(interface_test(META_INTERFACE, data));
        match &config.local_pods {
            LocalPods::Unknown => None,
            LocalPods::Sources => Some(vec![
                self.source(0),
                E::Lookup { set: "local_pods".to_owned(), register: 0, result: None },
            ]),
            LocalPods::Interface(name) => interface(whole_name(name)),
            LocalPods::InterfacePrefix(prefix) => interface(prefix.as_bytes().to_vec()),
        }
    }

    /// Returns the chains that do not depend on Services, in an order in which each refers only to earlier ones. Base
    /// chains are the last ones.
    pub(crate) fn chains(self, config: &RuleConfig) -> Vec<Chain> {
        let mut chains = self.regular_chains(config);
        if config.hooks == Hooks::Registered {
            chains.extend(self.base_chains(config));
        }
        chains
    }

    fn regular_chains(self, config: &RuleConfig) -> Vec<Chain> {
        let fixed = [(CODE_DROP, Verdict::Drop), (CODE_REFUSE, Verdict::Goto("refuse".to_owned()))];
        let split = (CODE_SPLIT, Verdict::Goto("split".to_owned()));
        let guarded: Vec<_> = [split.clone()].into_iter().chain(fixed.clone()).collect();
        // The other bits of a restricted frontend's value name its list of sources.
        let restricted = (CODE_RESTRICTED, Verdict::Goto("restricted".to_owned()));
        let all: Vec<_> = [restricted, split].into_iter().chain(fixed.clone()).collect();
        let refuse = chain("refuse", vec![forget(), verdict(Verdict::Accept)]);
        let mut chains = vec![refuse];
        chains.extend(self.connect_chains(config));
        chains.extend([
            self.look_up_or_drop("inside", &fixed),
            self.look_up_or_drop("outside", &fixed),
            self.split(config),
            self.look_up_or_drop("guarded", &guarded),
            self.restricted(),
            self.found(&all),
            self.services(),
            self.no_endpoint_input(),
            self.routed(),
        ]);
        chains
    }

    /// Returns the base chains, through which packets reach the others.
    pub(crate) fn base_chains(self, config: &RuleConfig) -> Vec<Chain> {
        vec![
            base(
                "nat_prerouting",
                Hook::nat(libc::NF_INET_PRE_ROUTING, BEFORE_NAT_DST),
                vec![verdict(Verdict::Jump("services".to_owned()))],
            ),
            base(
                "nat_output",
                Hook::nat(libc::NF_INET_LOCAL_OUT, BEFORE_NAT_DST),
                self.drain_gate(config)
                    .into_iter()
                    .chain([verdict(Verdict::Jump("services".to_owned()))])
                    .collect(),
            ),
            self.postrouting(config),
            base(
                "filter_input",
                Hook::filter(libc::NF_INET_LOCAL_IN, BEFORE_FILTER),
                vec![new("no_endpoint_input", with_nat(false))],
            ),
            base(
                "filter_forward",
                Hook::filter(libc::NF_INET_FORWARD, BEFORE_FILTER),
                vec![new("routed", vec![])],
            ),
            base(
                "filter_output",
                Hook::filter(libc::NF_INET_LOCAL_OUT, AFTER_NAT_DST),
                vec![new("routed", vec![])],
            ),
        ]
    }

    /// Redirects connections of this host to the drain gate's port of a local pod to the agent's listener on loopback. A
    /// host-network pod has an address of the node.
    fn drain_gate(self, config: &RuleConfig) -> Vec<Rule> {
        let Some(port) = config.drain_gate else { return Vec::new() };
        let local_pod = match &config.local_pods {
            LocalPods::Unknown => return Vec::new(),
            LocalPods::Sources => vec![self.destination(0), lookup("local_pods")],
            LocalPods::Interface(name) => interface_test(META_OUTPUT_INTERFACE, whole_name(name)),
            LocalPods::InterfacePrefix(prefix) => {
                interface_test(META_OUTPUT_INTERFACE, prefix.as_bytes().to_vec())
            }
        };
        let host = |address: &Vec<u8>| {
            vec![self.destination(0), E::Compare { equal: true, register: 0, data: address.clone() }]
        };
        let rule = |destination: Vec<E>| {
            let mut rule = vec![
                E::LoadMeta { key: META_PROTOCOL, register: 0 },
                E::Compare { equal: true, register: 0, data: vec![libc::IPPROTO_TCP as u8] },
                E::LoadPayload { base: TRANSPORT, offset: 2, length: 2, register: 0 },
                E::Compare { equal: true, register: 0, data: port.to_be_bytes().to_vec() },
            ];
            rule.extend(destination);
            rule.push(E::Redirect);
            Rule(rule)
        };
        std::iter::once(local_pod).chain(config.drain_gate_hosts.iter().map(host)).map(rule).collect()
    }

    /// Decides whether a connection to a ClusterIP is masqueraded. Others leave with `unmarked` or behind the last rule.
    fn mark_cluster_ip(self, config: &RuleConfig, unmarked: Verdict) -> Vec<Rule> {
        let mark = Rule(set_mark(config.mark));
        match self.local_pod_test(config) {
            _ if config.masquerade_all => vec![mark],
            Some(mut local) => {
                local.push(E::Verdict(unmarked));
                vec![Rule(local), mark]
            }
            None => Vec::new(),
        }
    }

    /// An external frontend with policy Local: local pods and host processes use every endpoint, others only
    /// those of this node, with their own address.
    fn split(self, config: &RuleConfig) -> Chain {
        let mut rules = Vec::new();
        if let Some(mut local) = self.local_pod_test(config) {
            local.push(E::Verdict(Verdict::Goto("inside".to_owned())));
            rules.push(Rule(local));
        }
        let host = [
            E::LoadSourceType { register: 0 },
            E::Compare { equal: true, register: 0, data: u32::from(libc::RTN_LOCAL).to_ne_bytes().to_vec() },
        ];
        rules.push(Rule(host.iter().cloned().chain(set_mark(config.mark)).collect()));
        let goto = E::Verdict(Verdict::Goto("inside".to_owned()));
        rules.push(Rule(host.into_iter().chain([goto]).collect()));
        rules.push(verdict(Verdict::Goto("outside".to_owned())));
        chain("split", rules)
    }

    /// Looks every new connection up. The priority of packets to other destinations does not change.
    fn services(self) -> Chain {
        let found = E::Verdict(Verdict::Goto("found".to_owned()));
        let mut first = self.look_up_frontend("frontends").0;
        first.push(found.clone());
        // One of our addresses without that port, or a lookup that crossed a commit: a second lookup decides.
        let mut again = vec![self.destination(0), lookup("vips")];
        again.extend(self.look_up_frontend("frontends").0);
        again.push(found);
        chain("services", vec![Rule(first), Rule(again)])
    }

    /// A new connection to a frontend, whose value is in the priority.
    fn found(self, fixed: &[(u32, Verdict)]) -> Chain {
        let mut rules = dispatch::dispatch(fixed).to_vec();
        rules.push(verdict(Verdict::Drop));
        chain("found", rules)
    }

    /// `refuse` if the destination's address, protocol and port are in `set`.
    fn refuse_listed(self, set: &str) -> Vec<E> {
        let mut rule = self.frontend_key();
        rule.extend([lookup(set), self.reject()]);
        rule
    }

    fn reject(self) -> E {
        let v4 = self.family == FAMILY_IPV4;
        E::Reject { code: if v4 { ICMP_PORT_UNREACHABLE } else { ICMPV6_PORT_UNREACHABLE } }
    }

    /// New connections to this node without a backend. Those to node ports are refused only here, so that a process of
    /// the node gets the same answer as other clients: refused in output, its send() would fail instead.
    fn no_endpoint_input(self) -> Chain {
        let rules = ["refused", "refused_node_ports"].map(|set| Rule(self.refuse_listed(set)));
        chain("no_endpoint_input", rules.to_vec())
    }

    /// New connections that this node forwards or sends.
    ///
    /// The id of the chosen backend must not stay in the priority, where queueing disciplines would read it. It is
    /// reset here and not in postrouting: there the first nat chain that masquerades, which may belong to another
    /// program, ends the evaluation. The kernel itself resets it for forwarded IPv4.
    ///
    /// No packet to the Service ranges may leave the node: with a backend in them (an EndpointSlice may contain any
    /// address) the packet would go to the default router, and return to be translated again where the ranges are
    /// routed to nodes.
    fn routed(self) -> Chain {
        let mut scratch = with_nat(true);
        scratch.extend(dispatch::is_backend());
        scratch.extend(forget().0);
        let mut refused = with_nat(false);
        refused.extend(self.refuse_listed("refused"));
        let to = |set: &str, verdict: E| Rule(vec![self.destination(0), lookup(set), verdict]);
        let rules = vec![
            Rule(scratch),
            Rule(refused),
            to("cluster_ips", self.reject()),
            to("service_cidrs", E::Verdict(Verdict::Drop)),
        ];
        chain("routed", rules)
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
        base(
            "nat_postrouting",
            Hook::nat(libc::NF_INET_POST_ROUTING, libc::NF_IP_PRI_NAT_SRC),
            vec![marked, Rule(hairpin)],
        )
    }
}

/// The test that a name of an interface begins with `data`.
fn interface_test(key: u32, data: Vec<u8>) -> Vec<E> {
    vec![E::LoadMeta { key, register: 0 }, E::Compare { equal: true, register: 0, data }]
}

/// Data that only the whole name begins with.
fn whole_name(name: &str) -> Vec<u8> {
    let mut data = name.as_bytes().to_vec();
    data.resize(16, 0);
    data
}

fn chain(name: &str, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), hook: None, rules }
}

fn base(name: &str, hook: Hook, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), hook: Some(hook), rules }
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
        E::Bitwise { register: 0, mask: STATUS_DNAT, xor: 0 },
        E::Compare { equal: !wanted, register: 0, data: vec![0; 4] },
    ]
}

/// `ct state new jump chain`, if `test` matches too: other packets cause no lookup.
fn new(chain: &str, test: Vec<E>) -> Rule {
    let mut rule = vec![
        E::LoadConntrack { key: CT_STATE, register: 0 },
        E::Bitwise { register: 0, mask: STATE_NEW, xor: 0 },
        E::Compare { equal: false, register: 0, data: vec![0; 4] },
    ];
    rule.extend(test);
    rule.push(E::Verdict(Verdict::Jump(chain.to_owned())));
    Rule(rule)
}

/// Membership of register 0 and the following in a set.
fn lookup(set: &str) -> E {
    E::Lookup { set: set.to_owned(), register: 0, result: None }
}
