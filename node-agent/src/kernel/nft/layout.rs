//! The tables' structure as values: sets, maps and chains, without Services.
//!
//! Everything that depends on a Service is an element of a set or map. A frontend's value is 32 bits: bit 31
//! zero, bits 30..12 the pool (18 bits of service-port number, then one bit of role: 0 Cluster, 1 Local), bits
//! 11..0 the code: a fixed one, or a [`Pick`], with two bits of masquerading, five of affinity timeout and five of
//! size class. `meta priority` is the scratch register: marks belong to others, the kernel overwrites the priority
//! when it forwards IPv4, and chain `routed` resets it.
//!
//! A packet can cross a commit: each lookup reads the current generation anew, so it may hit the old element of
//! one map and miss the new one of the next. After a hit in `frontends` a miss is therefore tried once more and
//! then dropped: passed on un-NATed, the connection tracking entry would pin the flow to no NAT.

mod dispatch;
mod sets;

use super::expression::{
    CT_STATE, CT_STATUS, DynamicOperation, Expression, Expression as E, META_INTERFACE, META_MARK,
    META_PRIORITY, META_PROTOCOL, NETWORK, Rule, TRANSPORT, Verdict,
};

pub(crate) use dispatch::{Masquerade, Pick, source_list_name, source_list_of};
pub(crate) use sets::SetSpec;

/// The name of our table in both families.
pub const TABLE: &str = "switchtower";
/// Changes when the rules or sets change their meaning; part of the stamp.
pub const LAYOUT_VERSION: u16 = 4;

/// Only listed sources may use the frontend: continue in chain `restricted`.
pub(crate) const CODE_RESTRICTED: u32 = 1;
/// The target depends on where the packet comes from: continue in chain `split`.
pub(crate) const CODE_SPLIT: u32 = 2;
/// No endpoint, policy DROP.
pub(crate) const CODE_DROP: u32 = 3;
/// No endpoint, policy REJECT: left to the filter chains, since `reject` is not for prerouting.
pub(crate) const CODE_REFUSE: u32 = 4;
/// Mask of a value's code.
pub(crate) const CODE_MASK: u32 = 0xfff;
/// Mask of a value's pool.
pub(crate) const POOL_MASK: u32 = 0xffff_f000;
/// Mask of the service-port number of a pool with affinity, in values and in ids of its backends.
pub(crate) const STICKY_MASK: u32 = 0x7fff_0000;
/// The role bit of a value: Local.
pub(crate) const ROLE_BIT: u32 = 0x1000;
/// Set in ids of backends, never in values.
pub(crate) const BACKEND_BIT: u32 = 0x8000_0000;

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
        rule.push(E::Lookup { set: map.to_owned(), register: 0, result: Some(Some(0)) });
        rule.push(E::SetMeta { key: META_PRIORITY, register: 0 });
        Rule(rule)
    }

    /// Looks a packet up in `map`, twice, and returns with a value that leads to a pool; otherwise drops it.
    fn look_up_or_drop(self, map: &str, fixed: &[(u32, Verdict)]) -> Chain {
        let mut rules = vec![forget()];
        for _ in 0..2 {
            rules.push(self.look_up_frontend(map));
            rules.extend(dispatch::dispatch(fixed, Verdict::Return));
        }
        rules.push(verdict(Verdict::Drop));
        chain(map, rules)
    }

    /// The test for a local pod, to be continued with a verdict.
    fn local_pod_test(self, config: &RuleConfig) -> Option<Vec<E>> {
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
        let fixed = [(CODE_DROP, Verdict::Drop), (CODE_REFUSE, Verdict::Goto("refuse".to_owned()))];
        let split = (CODE_SPLIT, Verdict::Jump("split".to_owned()));
        let guarded: Vec<_> = [split.clone()].into_iter().chain(fixed.clone()).collect();
        // The other bits of a restricted frontend's value name its list of sources.
        let restricted = (CODE_RESTRICTED, Verdict::Jump("restricted".to_owned()));
        let all: Vec<_> = [restricted, split].into_iter().chain(fixed.clone()).collect();
        let refuse = chain("refuse", vec![forget(), verdict(Verdict::Accept)]);
        let mut chains = vec![refuse, self.mark_cluster_ip(config)];
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
            base("nat_prerouting", ("nat", 0, -100), vec![verdict(Verdict::Jump("services".to_owned()))]),
            base("nat_output", ("nat", 3, -100), vec![verdict(Verdict::Jump("services".to_owned()))]),
            self.postrouting(config),
            base("filter_input", ("filter", 1, -110), vec![new("no_endpoint_input", with_nat(false))]),
            base("filter_forward", ("filter", 2, -110), vec![new("routed", vec![])]),
            // After our nat_output, so that connections to Services with endpoints are known by their NAT.
            base("filter_output", ("filter", 3, -90), vec![new("routed", vec![])]),
        ]);
        chains
    }

    /// Whether a connection to a ClusterIP is masqueraded.
    fn mark_cluster_ip(self, config: &RuleConfig) -> Chain {
        let mark = Rule(set_mark(config.mark));
        let rules = match self.local_pod_test(config) {
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
        if let Some(mut local) = self.local_pod_test(config) {
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

    /// Looks every new connection up. The priority of those that are not ours stays as it is.
    fn services(self) -> Chain {
        let found = E::Verdict(Verdict::Goto("found".to_owned()));
        let mut first = self.look_up_frontend("frontends").0;
        first.push(found.clone());
        // An address of ours without that port, or a lookup that crossed a commit: once more, then it is known.
        let mut again = vec![self.destination(0), lookup("vips")];
        again.extend(self.look_up_frontend("frontends").0);
        again.push(found);
        chain("services", vec![Rule(first), Rule(again)])
    }

    /// A new connection to a frontend, whose value is in the priority.
    fn found(self, fixed: &[(u32, Verdict)]) -> Chain {
        let mut rules = dispatch::dispatch(fixed, Verdict::Goto("connect".to_owned())).to_vec();
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
        E::Reject { code: if self.family == FAMILY_IPV4 { 3 } else { 4 } }
    }

    /// New connections to this node that no rule gave a backend. Those to node ports are refused only here, so that
    /// a process of the node gets the answer that everybody gets: refused in output, its send() would fail instead.
    fn no_endpoint_input(self) -> Chain {
        let rules = ["refused", "refused_node_ports"].map(|set| Rule(self.refuse_listed(set)));
        chain("no_endpoint_input", rules.to_vec())
    }

    /// New connections that are forwarded or sent by this node.
    ///
    /// The id of the chosen backend must not stay in the priority, where queueing disciplines would read it. It is
    /// reset here and not in postrouting: there the first nat chain that masquerades, which may be another program's,
    /// is the last one. The kernel itself has done it for forwarded IPv4.
    ///
    /// No address of the Service ranges may leave it: with
    /// a backend in them (an EndpointSlice may name any address) the packet would go to the default router, and
    /// come back translated anew where the ranges are routed to nodes.
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
        base("nat_postrouting", ("nat", 4, 100), vec![marked, Rule(hairpin)])
    }
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

/// `ct state new jump chain`, if `test` holds too: other packets pay no lookup.
fn new(chain: &str, test: Vec<E>) -> Rule {
    let mut rule = vec![
        E::LoadConntrack { key: CT_STATE, register: 0 },
        E::Bitwise { register: 0, mask: 8, xor: 0 },
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
