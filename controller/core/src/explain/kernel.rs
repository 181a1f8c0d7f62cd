//! Expected and actual kernel state of a frontend: the target of each side, the source address that the endpoint sees,
//! the affinity timeout, and the permitted sources. The actual state is the agent's answer to a query.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use switchtower_proto::affinity::programmed_timeout;
use switchtower_proto::v1::{
    Cidr, Endpoint, Family, Frontend, FrontendKey, FrontendKind, KernelFrontend, KernelMasquerade,
    KernelTarget, KernelVerdict, Role, Target, Verdict,
};

use crate::names;
use crate::tracer::{self, ClusterIpMasquerade};
use crate::view::View;
use crate::wire;

/// A frontend in the kernel's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// For connections that do not originate on the node.
    pub outside: Side,
    /// For those of the node's pods and processes.
    pub inside: Side,
    /// Only these sources; empty: all.
    pub sources: BTreeSet<IpNet>,
}

/// Destination of one side of a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    /// To an endpoint.
    Forward(Forward),
    /// Refused.
    Reject,
    /// Dropped.
    Drop,
    /// A lookup misses, and the packet is dropped.
    Broken,
}

/// Forwarding of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// To one of these, sorted.
    pub endpoints: Vec<Endpoint>,
    /// Connections that the endpoint sees with an address of the node.
    pub masquerade: KernelMasquerade,
    /// Session affinity timeout in seconds; 0 without affinity.
    pub affinity_seconds: u32,
}

/// Returns the expected kernel state of every address of these frontends. A NodePort is one entry for each address that the
/// node serves it on.
pub fn expected<'a>(
    view: &View,
    frontends: impl Iterator<Item = &'a Frontend>,
) -> BTreeMap<FrontendKey, Held> {
    let served = view.node_port_addresses();
    let mut expected = BTreeMap::new();
    for frontend in frontends {
        let Some(key) = &frontend.key else { continue };
        let held = Held {
            outside: side(view, frontend, frontend.outside.as_ref()),
            inside: side(view, frontend, frontend.inside.as_ref()),
            sources: sources(view, frontend),
        };
        if !key.address.is_empty() {
            expected.insert(key.clone(), held);
            continue;
        }
        let ipv6 = key.family() == Family::Ipv6;
        for address in served.iter().filter(|address| address.is_ipv6() == ipv6) {
            let key = FrontendKey { address: wire::octets(*address), ..key.clone() };
            // An explicit frontend of the same address comes before a NodePort.
            expected.entry(key).or_insert_with(|| held.clone());
        }
    }
    expected
}

fn side(view: &View, frontend: &Frontend, target: Option<&Target>) -> Side {
    let target = target.copied().unwrap_or_default();
    let service_port = frontend.service_port.clone().unwrap_or_default();
    let family = frontend.key.as_ref().map_or(Family::Unspecified, FrontendKey::family);
    match view.pool(&service_port, family, target.role()).filter(|pool| !pool.is_empty()) {
        Some(pool) => Side::Forward(Forward {
            endpoints: pool.iter().cloned().collect(),
            masquerade: masquerade(frontend),
            affinity_seconds: programmed_timeout(frontend.affinity_seconds),
        }),
        None if target.when_empty() == Verdict::Drop => Side::Drop,
        None => Side::Reject,
    }
}

/// With policy Local, the rule that distinguishes inside from outside has already decided.
fn masquerade(frontend: &Frontend) -> KernelMasquerade {
    match (frontend.kind(), frontend.outside.unwrap_or_default().role()) {
        (FrontendKind::ClusterIp, _) => KernelMasquerade::ClusterIp,
        (_, Role::Local) => KernelMasquerade::Never,
        _ => KernelMasquerade::Always,
    }
}

/// Returns the permitted sources. If the node's own address is among them, so are the addresses that the load balancer
/// gave the service port: bound on the node, they are the source of its own connections.
fn sources(view: &View, frontend: &Frontend) -> BTreeSet<IpNet> {
    let ipv6 = frontend.key.as_ref().is_some_and(|key| key.family() == Family::Ipv6);
    let of_family = |net: &IpNet| net.addr().is_ipv6() == ipv6;
    let ranges = frontend.source_ranges.iter().filter_map(wire::net);
    let balanced = frontend.kind() == FrontendKind::LoadBalancer;
    let mut sources: BTreeSet<IpNet> = ranges.filter(|range| balanced && of_family(range)).collect();
    let nodes = view.node().into_iter().flat_map(|node| &node.addresses);
    let primary = nodes.filter_map(|octets| wire::address(octets)).find(|address| address.is_ipv6() == ipv6);
    if primary.is_some_and(|primary| sources.iter().any(|range| range.contains(&primary))) {
        let same = |other: &&Frontend| {
            other.kind() == FrontendKind::LoadBalancer && other.service_port == frontend.service_port
        };
        let addresses =
            view.frontends().filter(same).filter_map(|other| wire::address(&other.key.as_ref()?.address));
        sources.extend(addresses.map(IpNet::from).filter(of_family));
    }
    outermost(&sources)
}

/// Without ranges that lie in others.
fn outermost(ranges: &BTreeSet<IpNet>) -> BTreeSet<IpNet> {
    let inner = |range: &IpNet| ranges.iter().any(|other| other != range && other.contains(range));
    ranges.iter().filter(|range| !inner(range)).copied().collect()
}

/// Content read from a kernel.
pub fn found(frontend: &KernelFrontend) -> Held {
    let side = |target: &Option<KernelTarget>| {
        let target = target.clone().unwrap_or_default();
        match target.verdict() {
            KernelVerdict::Forward => {
                let masquerade = target.masquerade();
                let KernelTarget { mut endpoints, affinity_seconds, .. } = target;
                endpoints.sort();
                Side::Forward(Forward { endpoints, masquerade, affinity_seconds })
            }
            KernelVerdict::Reject => Side::Reject,
            KernelVerdict::Drop => Side::Drop,
            KernelVerdict::Broken | KernelVerdict::Unspecified => Side::Broken,
        }
    };
    let allowed = if frontend.restricted { frontend.allowed.as_slice() } else { &[] };
    let sources = allowed.iter().filter_map(|cidr: &Cidr| wire::net(cidr)).collect();
    Held { outside: side(&frontend.outside), inside: side(&frontend.inside), sources }
}

/// Returns the differences of a kernel, one line per frontend, sorted.
pub fn differences(
    expected: &BTreeMap<FrontendKey, Held>,
    found: &BTreeMap<FrontendKey, Held>,
) -> Vec<String> {
    let mut lines = Vec::new();
    for (key, wanted) in expected {
        match found.get(key) {
            None => lines.push(format!("{}: missing in the kernel", names::frontend(key))),
            Some(held) if held == wanted => {}
            Some(held) => lines.push(format!("{}: {}", names::frontend(key), difference(wanted, held))),
        }
    }
    let unknown = found.keys().filter(|key| !expected.contains_key(*key));
    lines.extend(unknown.map(|key| format!("{}: only in the kernel", names::frontend(key))));
    lines.sort();
    lines
}

fn difference(wanted: &Held, held: &Held) -> String {
    let mut parts = Vec::new();
    let both = wanted.outside == wanted.inside && held.outside == held.inside;
    let sides = [("outside: ", &wanted.outside, &held.outside), ("inside: ", &wanted.inside, &held.inside)];
    for (name, wanted, held) in sides.into_iter().take(if both { 1 } else { 2 }) {
        if wanted != held {
            let name = if both { "" } else { name };
            parts.push(format!("{name}{}", of_side(wanted, held)));
        }
    }
    if wanted.sources != held.sources {
        parts.push(format!("open to {}, should be to {}", who(&held.sources), who(&wanted.sources)));
    }
    parts.join("; ")
}

fn of_side(wanted: &Side, held: &Side) -> String {
    let (Side::Forward(wanted), Side::Forward(held)) = (wanted, held) else {
        return format!("{} in the kernel, should be {}", word(held), word(wanted));
    };
    let missing = wanted.endpoints.iter().filter(|endpoint| !held.endpoints.contains(endpoint));
    let extra = held.endpoints.iter().filter(|endpoint| !wanted.endpoints.contains(endpoint));
    let mut parts: Vec<String> =
        missing.map(|endpoint| format!("without {}", names::endpoint(endpoint))).collect();
    parts.extend(extra.map(|endpoint| format!("with {} besides", names::endpoint(endpoint))));
    if wanted.masquerade != held.masquerade {
        parts.push(format!("masquerade {}, should be {}", seen(held.masquerade), seen(wanted.masquerade)));
    }
    if wanted.affinity_seconds != held.affinity_seconds {
        let (held, wanted) = (held.affinity_seconds, wanted.affinity_seconds);
        parts.push(format!("session affinity of {held} s, should be {wanted} s"));
    }
    parts.join(", ")
}

fn word(side: &Side) -> String {
    match side {
        Side::Forward(forward) => format!("forwarded to {}", endpoints(forward, " ")),
        Side::Reject => "refused".to_owned(),
        Side::Drop => "dropped".to_owned(),
        Side::Broken => "broken (a map misses an entry; packets are dropped)".to_owned(),
    }
}

fn endpoints(forward: &Forward, separator: &str) -> String {
    forward.endpoints.iter().map(names::endpoint).collect::<Vec<_>>().join(separator)
}

fn who(sources: &BTreeSet<IpNet>) -> String {
    if sources.is_empty() {
        return "every source".to_owned();
    }
    sources.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn seen(masquerade: KernelMasquerade) -> &'static str {
    match masquerade {
        KernelMasquerade::Never => "of no source",
        KernelMasquerade::ClusterIp => "of all sources but local pods",
        KernelMasquerade::Always => "of all sources",
        KernelMasquerade::Unspecified => "of unknown sources",
    }
}

/// Formats a frontend of a node's kernel as rules in nft syntax, with the maps resolved. The settings of `view`, which are
/// chains in the kernel, determine which connections to a ClusterIP are masqueraded.
pub fn rules(view: &View, frontend: &KernelFrontend) -> Vec<String> {
    let key = frontend.key.clone().unwrap_or_default();
    let family = if key.family() == Family::Ipv6 { "ip6" } else { "ip" };
    let address = wire::address(&key.address).map(|address| address.to_string()).unwrap_or_default();
    let protocol = names::protocol(key.protocol()).to_lowercase();
    let head = format!("{family} daddr {address} {protocol} dport {}", key.port);
    let Held { outside, inside, sources } = found(frontend);
    let rest = tracer::cluster_ip_masquerade(view, key.family());
    let action = |side: &Side| action(side, rest);
    let mut lines = Vec::new();
    if !sources.is_empty() {
        lines.push(format!("{head} {family} saddr != {{ {} }} drop", who(&sources)));
    }
    if outside == inside {
        lines.push(format!("{head} {}", action(&outside)));
    } else {
        lines.push(format!("{head} {} # from the node and its pods", action(&inside)));
        lines.push(format!("{head} {} # from elsewhere", action(&outside)));
    }
    lines
}

fn action(side: &Side, cluster_ip: ClusterIpMasquerade) -> String {
    let Side::Forward(forward) = side else {
        return match side {
            Side::Reject => "reject",
            _ => "drop",
        }
        .to_owned();
    };
    let mark = match forward.masquerade {
        KernelMasquerade::Always => " masquerade",
        KernelMasquerade::ClusterIp => match cluster_ip {
            ClusterIpMasquerade::All => " masquerade",
            ClusterIpMasquerade::NotLocalPods => " masquerade unless from a local pod",
            ClusterIpMasquerade::Never => "",
        },
        _ => "",
    };
    let stay = match forward.affinity_seconds {
        0 => String::new(),
        seconds => format!(" the same for a client for {seconds} s"),
    };
    format!("dnat to {{ {} }}{stay}{mark}", endpoints(forward, ", "))
}
