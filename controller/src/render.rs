//! `render`: compiles manifests offline and prints the view of one node.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message as _;
use serde::Serialize;
use switchtower_core::compile::Compiler;
use switchtower_core::compiled::{Compiled, Problem};
use switchtower_core::model::{Input, LayerId};
use switchtower_core::wire::address;
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{
    Endpoint, Family, Frontend, FrontendKind, PoolKey, Protocol, Role, ServicePort, Target, Verdict,
};

use crate::cli::{RenderArgs, RenderFormat};
use crate::ingest::{Fact, Ingested};

mod manifests;

pub use manifests::ManifestError;

#[cfg(test)]
mod tests;

/// Errors of `render`.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The manifests could not be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The manifests do not contain the node.
    #[error("the manifests do not contain the Node {0:?}; add it with its labels and status")]
    UnknownNode(String),
    /// The output could not be written.
    #[error("cannot write the output")]
    Write(#[from] std::io::Error),
    /// The output could not be encoded.
    #[error("cannot encode the output as JSON")]
    Json(#[from] serde_json::Error),
}

/// The view of one node.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct View {
    node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<String>,
    frontends: Vec<FrontendView>,
    problems: Vec<String>,
}

/// A frontend and its targets.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct FrontendView {
    /// `address:port/PROTOCOL`; the address of a NodePort is `node` with its family.
    frontend: String,
    kind: &'static str,
    service: String,
    outside: TargetView,
    inside: TargetView,
    #[serde(skip_serializing_if = "is_zero")]
    affinity_seconds: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ranges: Vec<String>,
}

/// Endpoints, or the verdict if there are none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct TargetView {
    role: &'static str,
    endpoints: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<&'static str>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// Prints to standard output.
///
/// # Errors
/// The manifests cannot be read, or the node is not among them.
pub fn run(args: &RenderArgs) -> Result<(), RenderError> {
    let view = compile(manifests::read(&args.from)?, &args.node)?;
    let text = match args.format {
        RenderFormat::Json => serde_json::to_string_pretty(&view)? + "\n",
        RenderFormat::Text => text(&view),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn compile(ingested: Vec<Ingested>, node: &str) -> Result<View, RenderError> {
    let mut compiler = Compiler::new();
    let mut service_cidrs = Vec::new();
    let mut problems: Vec<Problem> = Vec::new();
    for Ingested { fact, origin: _, problems: found } in ingested {
        problems.extend(found);
        match fact {
            Fact::Input(input) => _ = compiler.apply(input),
            Fact::Node(node, _) => _ = compiler.apply(Input::Node(node)),
            Fact::NodeDeleted(name) => _ = compiler.apply(Input::NodeDeleted(name)),
            Fact::ServiceCidr(_, cidrs) => service_cidrs.extend(cidrs),
            Fact::ServiceCidrDeleted(_) => {}
        }
    }
    compiler.apply(Input::ServiceCidrs(service_cidrs));
    if !compiler.has_node(node) {
        return Err(RenderError::UnknownNode(node.to_owned()));
    }
    let zone = compiler.zone_of(node);
    let mut compiled = compiler.compile();
    problems.append(&mut compiled.problems);
    let layers = [Some(LayerId::Cluster), zone.clone().map(LayerId::Zone), Some(LayerId::Node(node.into()))];
    let (frontends, pools) = merge(compiled, layers.into_iter().flatten());
    let mut frontends: Vec<_> = frontends.iter().map(|frontend| show(frontend, &pools)).collect();
    frontends.sort();
    Ok(View {
        node: node.to_owned(),
        zone: zone.map(|zone| zone.to_string()),
        frontends,
        problems: problems
            .iter()
            .map(|problem| format!("{:?}: {:?}: {}", problem.object, problem.reason, problem.message))
            .collect(),
    })
}

type Pools = HashMap<Vec<u8>, Vec<String>>;

/// From the least to the most specific layer: a later pool replaces an earlier one as a whole.
fn merge(mut compiled: Compiled, layers: impl Iterator<Item = LayerId>) -> (Vec<Frontend>, Pools) {
    let (mut frontends, mut pools) = (BTreeMap::new(), Pools::new());
    for layer in layers {
        let mut own = Pools::new();
        for change in compiled.changes.remove(&layer).unwrap_or_default() {
            match change.change {
                Some(Op::Frontend(frontend)) => {
                    let key = frontend.key.as_ref().map(prost::Message::encode_to_vec);
                    frontends.insert(key, frontend);
                }
                Some(Op::Pool(patch)) => {
                    let key = patch.key.unwrap_or_default().encode_to_vec();
                    own.entry(key).or_default().extend(patch.added.iter().map(endpoint));
                }
                _ => {}
            }
        }
        pools.extend(own);
    }
    (frontends.into_values().collect(), pools)
}

fn show(frontend: &Frontend, pools: &Pools) -> FrontendView {
    let key = frontend.key.clone().unwrap_or_default();
    let family = key.family();
    let address = match (address(&key.address), family) {
        (Some(IpAddr::V6(address)), _) => format!("[{address}]"),
        (Some(address), _) => address.to_string(),
        (None, Family::Ipv6) => "node(IPv6)".to_owned(),
        (None, _) => "node(IPv4)".to_owned(),
    };
    let service_port = frontend.service_port.clone().unwrap_or_default();
    let target = |target: Option<&Target>| show_target(target, &service_port, family, pools);
    FrontendView {
        frontend: format!("{address}:{}/{}", key.port, protocol(key.protocol())),
        kind: match frontend.kind() {
            FrontendKind::ClusterIp => "ClusterIP",
            FrontendKind::ExternalIp => "ExternalIP",
            FrontendKind::LoadBalancer => "LoadBalancer",
            FrontendKind::NodePort => "NodePort",
            FrontendKind::Unspecified => "Unknown",
        },
        service: match service_port.port.as_str() {
            "" => format!("{}/{}", service_port.namespace, service_port.name),
            port => format!("{}/{}:{port}", service_port.namespace, service_port.name),
        },
        outside: target(frontend.outside.as_ref()),
        inside: target(frontend.inside.as_ref()),
        affinity_seconds: frontend.affinity_seconds,
        source_ranges: frontend
            .source_ranges
            .iter()
            .filter_map(|cidr| {
                IpNet::new(self::address(&cidr.address)?, cidr.prefix_length.try_into().ok()?).ok()
            })
            .map(|range| range.to_string())
            .collect(),
    }
}

fn show_target(target: Option<&Target>, port: &ServicePort, family: Family, pools: &Pools) -> TargetView {
    let target = target.copied().unwrap_or_default();
    let key = PoolKey { service_port: Some(port.clone()), family: family as i32, role: target.role };
    let mut endpoints = pools.get(&key.encode_to_vec()).cloned().unwrap_or_default();
    endpoints.sort();
    let verdict = match target.when_empty() {
        Verdict::Drop => "drop",
        Verdict::Reject | Verdict::Unspecified => "reject",
    };
    TargetView {
        role: if target.role() == Role::Local { "local" } else { "cluster" },
        verdict: endpoints.is_empty().then_some(verdict),
        endpoints,
    }
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
        Protocol::Unspecified => "?",
    }
}

fn endpoint(endpoint: &Endpoint) -> String {
    let port = u16::try_from(endpoint.port).unwrap_or(0);
    address(&endpoint.address).map_or_else(String::new, |ip| std::net::SocketAddr::new(ip, port).to_string())
}

fn text(view: &View) -> String {
    let zone = view.zone.as_deref().map_or_else(String::new, |zone| format!(", zone {zone}"));
    let mut lines = vec![format!("node {}{zone}: {} frontends", view.node, view.frontends.len())];
    for frontend in &view.frontends {
        let mut line = format!("{}  {}  {}", frontend.frontend, frontend.kind, frontend.service);
        if frontend.affinity_seconds > 0 {
            line += &format!("  affinity {}s", frontend.affinity_seconds);
        }
        if !frontend.source_ranges.is_empty() {
            line += &format!("  from {}", frontend.source_ranges.join(","));
        }
        lines.push(line);
        if frontend.outside == frontend.inside {
            lines.push(format!("    -> {}", target(&frontend.outside)));
        } else {
            lines.push(format!("    outside -> {}", target(&frontend.outside)));
            lines.push(format!("    inside  -> {}", target(&frontend.inside)));
        }
    }
    lines.extend(view.problems.iter().map(|problem| format!("problem: {problem}")));
    lines.join("\n") + "\n"
}

fn target(target: &TargetView) -> String {
    match target.verdict {
        Some(verdict) => format!("{verdict} (no {} endpoint)", target.role),
        None => format!("{} ({})", target.endpoints.join(" "), target.role),
    }
}
