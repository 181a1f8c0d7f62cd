//! Explains a Service on a node: every address of it, from every kind of source, and what the kernel must hold.
//!
//! It walks the view that the node was sent with the tracer that the compiler is tested with, so that an
//! explanation cannot differ from the rules.

use std::net::IpAddr;

use ipnet::IpNet;
use switchtower_proto::affinity::programmed_timeout;
use switchtower_proto::v1::{Family, Frontend, FrontendKey, FrontendKind, Role};

use crate::names;
use crate::tracer::{Cause, Fate, Packet, Source, Trace, trace};
use crate::view::View;
use crate::wire;
use switchtower_admin_api::codes::{self, Code};
use switchtower_admin_api::{ConnectionOutcome, Finding};

mod group;
mod kernel;

pub use group::{Signature, join, signature};
pub use kernel::{Forward, Held, Side, differences, expected, found, rules};

/// Stands for a client outside the cluster where none is named (RFC 5737, RFC 3849).
const OUTSIDE: (IpAddr, IpAddr) = (
    IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
);

/// Which Service, and which port of it.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// A port's number or name; `None`: all.
    pub port: Option<&'a str>,
}

/// The frontends of a Service in a view, sorted by kind and key.
pub fn frontends<'a>(view: &'a View, subject: Subject<'_>) -> Vec<&'a Frontend> {
    let wanted = |frontend: &&Frontend| {
        let Some(service_port) = &frontend.service_port else { return false };
        let number = frontend.key.as_ref().map(|key| key.port.to_string());
        (service_port.namespace.as_str(), service_port.name.as_str()) == (subject.namespace, subject.name)
            && subject.port.is_none_or(|port| port == service_port.port || Some(port) == number.as_deref())
    };
    let mut found: Vec<&Frontend> = view.frontends().filter(wanted).collect();
    found.sort_by(|a, b| (a.kind, &a.key).cmp(&(b.kind, &b.key)));
    found
}

/// Explains a Service on the view's node. `from`: one source address; without it, each kind of source that the
/// frontend is meant for.
pub fn explain(view: &View, subject: Subject<'_>, from: Option<IpAddr>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for frontend in frontends(view, subject) {
        let Some(destination) = destination(view, frontend) else { continue };
        for (source, who) in sources(view, frontend, destination, from) {
            findings.push(finding(view, frontend, destination, source, who));
        }
    }
    findings
}

/// The address by which a frontend is tried; of a NodePort the first that the node serves it on.
fn destination(view: &View, frontend: &Frontend) -> Option<IpAddr> {
    let key = frontend.key.as_ref()?;
    let ipv6 = key.family() == Family::Ipv6;
    wire::address(&key.address)
        .or_else(|| view.node_port_addresses().into_iter().find(|address| address.is_ipv6() == ipv6))
}

/// Returns the clients to explain: the requested address, or a pod and a process of the node and, if the frontend serves
/// them, clients outside the cluster.
fn sources(
    view: &View,
    frontend: &Frontend,
    destination: IpAddr,
    from: Option<IpAddr>,
) -> Vec<(Source, String)> {
    let same_family = |address: &IpAddr| address.is_ipv6() == destination.is_ipv6();
    if let Some(from) = from {
        let source = Source::of(view, from);
        let what = match source {
            Source::LocalPod(_) => "a local pod",
            Source::Host(_) => "the node itself",
            Source::Other(_) => "not a local pod",
        };
        return Some(from)
            .filter(same_family)
            .map(|from| (source, format!("{from} ({what})")))
            .into_iter()
            .collect();
    }
    let mut sources = Vec::new();
    let node = view.node();
    let cidrs = node.iter().flat_map(|node| &node.pod_cidrs).filter_map(wire::net);
    // The last address that can be a pod's; endpoints are given out from the other end.
    let pod = cidrs.filter(|net| same_family(&net.addr())).find_map(last_host);
    if let Some(pod) = pod {
        sources.push((Source::LocalPod(pod), "a pod on the node".to_owned()));
    }
    let addresses = node.iter().flat_map(|node| &node.addresses);
    if let Some(address) = addresses.filter_map(|octets| wire::address(octets)).find(same_family) {
        sources.push((Source::Host(address), "the node itself".to_owned()));
    }
    if frontend.kind() != FrontendKind::ClusterIp {
        sources.push(outside(frontend, destination.is_ipv6()));
    }
    sources
}

/// A client outside; where only some may come, one of them.
fn outside(frontend: &Frontend, ipv6: bool) -> (Source, String) {
    let ranges = frontend.source_ranges.iter().filter_map(wire::net);
    match ranges.filter(|range| range.addr().is_ipv6() == ipv6).find_map(|range| range.hosts().next()) {
        Some(allowed) => (Source::Other(allowed), "a client in the source ranges".to_owned()),
        None => {
            let client = if ipv6 { OUTSIDE.1 } else { OUTSIDE.0 };
            (Source::Other(client), "a client outside".to_owned())
        }
    }
}

fn last_host(net: IpNet) -> Option<IpAddr> {
    net.hosts().next_back()
}

fn finding(view: &View, frontend: &Frontend, destination: IpAddr, source: Source, who: String) -> Finding {
    let key = frontend.key.clone().unwrap_or_default();
    let concrete = FrontendKey { address: wire::octets(destination), ..key };
    let port = u16::try_from(concrete.port).unwrap_or_default();
    let packet = Packet { source, destination, protocol: concrete.protocol(), port };
    let Trace { fate, path } = trace(view, &packet);
    let service_port = frontend.service_port.clone().unwrap_or_default();
    let anywhere = view.pool(&service_port, concrete.family(), Role::Cluster).map_or(0, |pool| pool.len());
    let (outcome, code) = outcome(&fate);
    let (endpoints, masquerade, hairpin) = match &fate {
        Fate::Forward { endpoints, masquerade, hairpin } => (
            endpoints.iter().map(names::endpoint).collect(),
            *masquerade,
            hairpin.as_ref().map(names::endpoint),
        ),
        _ => (Vec::new(), false, None),
    };
    let why = why(&fate, &source, anywhere, frontend);
    Finding {
        frontend: names::frontend(&concrete),
        service_port: names::service_port(&service_port),
        kind: names::kind(frontend.kind()).to_owned(),
        from: who,
        source: Some(source.address()),
        outcome,
        code: code.map(|code| code.code.to_owned()),
        why,
        endpoints,
        masquerade,
        hairpin,
        affinity_seconds: programmed_timeout(frontend.affinity_seconds),
        path,
        example: None,
        kernel: None,
    }
}

fn outcome(fate: &Fate) -> (ConnectionOutcome, Option<Code>) {
    let code = |cause: &Cause| match cause {
        Cause::NoEndpoints => codes::NO_ENDPOINTS,
        Cause::NoLocalEndpointsInside => codes::NO_LOCAL_ENDPOINTS_INSIDE,
        Cause::NoLocalEndpointsOutside => codes::NO_LOCAL_ENDPOINTS_OUTSIDE,
        Cause::SourceRange => codes::SOURCE_RANGE,
        Cause::UndefinedPort => codes::UNDEFINED_PORT,
        Cause::UnallocatedAddress => codes::UNALLOCATED_ADDRESS,
    };
    match fate {
        Fate::Forward { .. } => (ConnectionOutcome::Forwarded, None),
        Fate::Reject(cause) => (ConnectionOutcome::Refused, Some(code(cause))),
        Fate::Drop(cause) => (ConnectionOutcome::Dropped, Some(code(cause))),
        Fate::Pass => (ConnectionOutcome::NotServed, Some(codes::NOT_SERVED)),
    }
}

fn why(fate: &Fate, source: &Source, anywhere: usize, frontend: &Frontend) -> String {
    let endpoints =
        |count: usize| if count == 1 { "1 endpoint".to_owned() } else { format!("{count} endpoints") };
    match fate {
        Fate::Forward { endpoints: chosen, masquerade, .. } => {
            let of = if chosen.len() < anywhere { format!(" of {anywhere}") } else { String::new() };
            let sees = if *masquerade { "the node's address" } else { "the client's address" };
            format!("to {}{of}; the endpoint sees {sees}", endpoints(chosen.len()))
        }
        Fate::Reject(Cause::UndefinedPort) => "the ClusterIP has no such port".to_owned(),
        Fate::Reject(_) => "the Service has no usable endpoint".to_owned(),
        Fate::Drop(Cause::NoLocalEndpointsInside) => {
            "internalTrafficPolicy is Local, and no endpoint is on this node".to_owned()
        }
        Fate::Drop(Cause::NoLocalEndpointsOutside) => {
            "externalTrafficPolicy is Local, and no endpoint is on this node".to_owned()
        }
        Fate::Drop(Cause::SourceRange) => {
            let ranges = frontend.source_ranges.iter().filter_map(wire::net).map(|range| range.to_string());
            let ranges: Vec<String> = ranges.collect();
            format!("{} is in none of loadBalancerSourceRanges ({})", source.address(), ranges.join(", "))
        }
        Fate::Drop(_) => "no Service has this address".to_owned(),
        Fate::Pass => "the node serves no Service at this address".to_owned(),
    }
}

#[cfg(test)]
mod tests;
