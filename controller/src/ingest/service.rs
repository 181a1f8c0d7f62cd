//! Services.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service as ApiService, ServiceSpec};
use switchtower_core::compiled::{ProblemObject, ProblemReason};
use switchtower_core::model::{Input, ObjectKey, Service, ServicePortSpec, TrafficPolicy};

use super::address::{one_per_family, parse_cidr, parse_ip};
use super::{Fact, Findings, Ingested, Origin, object_key, port, protocol};

/// Kubernetes' default for ClientIP affinity, seconds.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// The API's limit for ClientIP affinity, seconds.
const MAXIMUM_AFFINITY_SECONDS: u32 = 86_400;

/// Converts a Service. One that is not served (ExternalName, headless, no cluster IP yet) is a deletion.
#[must_use]
pub fn service(object: &ApiService) -> Ingested {
    let key = object_key(&object.metadata);
    let mut findings = Findings::new(ProblemObject::Service(key.clone()));
    let input = match object.spec.as_ref().filter(|spec| is_served(spec)) {
        Some(spec) => serve(object, spec, key, &mut findings),
        None => Input::ServiceDeleted(key),
    };
    let origin = Origin::of(&object.metadata);
    Ingested { fact: Fact::Input(input), origin, problems: findings.finish() }
}

fn is_served(spec: &ServiceSpec) -> bool {
    spec.type_.as_deref() != Some("ExternalName")
        && !matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"))
}

fn serve(object: &ApiService, spec: &ServiceSpec, key: ObjectKey, findings: &mut Findings) -> Input {
    let cluster_ips = cluster_ips(spec, findings);
    if cluster_ips.is_empty() {
        return Input::ServiceDeleted(key);
    }
    let external_ips = addresses(spec.external_ips.iter().flatten(), "externalIPs", findings);
    let external_policy = match spec.external_traffic_policy.as_deref() {
        Some("Local") if is_externally_accessible(spec) => TrafficPolicy::Local,
        _ => TrafficPolicy::Cluster,
    };
    let internal_policy = match spec.internal_traffic_policy.as_deref() {
        Some("Local") => TrafficPolicy::Local,
        _ => TrafficPolicy::Cluster,
    };
    let health_check_port = (spec.type_.as_deref() == Some("LoadBalancer")
        && external_policy == TrafficPolicy::Local)
        .then(|| spec.health_check_node_port.and_then(port))
        .flatten();
    Input::Service(Service {
        key,
        uid: object.metadata.uid.as_deref().unwrap_or_default().into(),
        created: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        cluster_ips,
        ports: ports(spec, findings),
        external_ips,
        load_balancer_ips: load_balancer_ips(object, findings),
        source_ranges: source_ranges(spec, findings),
        external_policy,
        internal_policy,
        affinity_seconds: affinity(spec),
        health_check_port,
    })
}

/// Returns true if externalTrafficPolicy has a meaning (kube-proxy: `ExternallyAccessible`).
fn is_externally_accessible(spec: &ServiceSpec) -> bool {
    matches!(spec.type_.as_deref(), Some("LoadBalancer" | "NodePort"))
        || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty())
}

/// `clusterIPs`, or `clusterIP` if a client wrote no list; one per family.
fn cluster_ips(spec: &ServiceSpec, findings: &mut Findings) -> Vec<IpAddr> {
    match spec.cluster_ips.as_deref() {
        Some(list) if !list.is_empty() => one_per_family(addresses(list, "clusterIPs", findings)),
        _ => one_per_family(addresses(spec.cluster_ip.iter(), "clusterIP", findings)),
    }
}

fn addresses<'a>(
    texts: impl IntoIterator<Item = &'a String>,
    field: &str,
    findings: &mut Findings,
) -> Vec<IpAddr> {
    texts
        .into_iter()
        .filter_map(|text| {
            let address = parse_ip(text);
            if address.is_none() {
                findings.note(ProblemReason::InvalidAddress, || {
                    format!("{field}: {text:?} is not an IP address; it is left out")
                });
            }
            address
        })
        .collect()
}

/// Entries with an IP whose ipMode is absent or VIP; hostname-only entries need no rules.
fn load_balancer_ips(object: &ApiService, findings: &mut Findings) -> Vec<IpAddr> {
    let ingress =
        object.status.iter().filter_map(|status| status.load_balancer.as_ref()).flat_map(|lb| &lb.ingress);
    let texts = ingress.flatten().filter(|entry| matches!(entry.ip_mode.as_deref(), None | Some("VIP")));
    addresses(
        texts.filter_map(|entry| entry.ip.as_ref()).filter(|ip| !ip.is_empty()),
        "status.loadBalancer.ingress",
        findings,
    )
}

fn source_ranges(spec: &ServiceSpec, findings: &mut Findings) -> Vec<ipnet::IpNet> {
    let texts = spec.load_balancer_source_ranges.iter().flatten();
    texts
        .filter_map(|text| {
            let range = parse_cidr(text);
            if range.is_none() {
                findings.note(ProblemReason::InvalidAddress, || {
                    format!("loadBalancerSourceRanges: {text:?} is not a CIDR; it is left out")
                });
            }
            range
        })
        .collect()
}

fn affinity(spec: &ServiceSpec) -> Option<u32> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds =
        client_ip.and_then(|config| config.timeout_seconds).and_then(|seconds| u32::try_from(seconds).ok());
    Some(
        seconds
            .filter(|seconds| *seconds > 0)
            .unwrap_or(DEFAULT_AFFINITY_SECONDS)
            .min(MAXIMUM_AFFINITY_SECONDS),
    )
}

fn ports(spec: &ServiceSpec, findings: &mut Findings) -> Vec<ServicePortSpec> {
    let mut ports = Vec::with_capacity(spec.ports.as_ref().map_or(0, Vec::len));
    for entry in spec.ports.iter().flatten() {
        let (Some(number), Some(protocol)) = (port(entry.port), protocol(entry.protocol.as_deref())) else {
            findings.note(ProblemReason::InvalidPort, || {
                let name = entry.name.as_deref().unwrap_or_default();
                let protocol = entry.protocol.as_deref().unwrap_or("TCP");
                format!(
                    "port {name:?}: {}/{protocol} is not a port that can be served; it is left out",
                    entry.port
                )
            });
            continue;
        };
        let node_port = entry.node_port.filter(|number| *number != 0);
        if node_port.is_some_and(|number| port(number).is_none()) {
            findings.note(ProblemReason::InvalidPort, || {
                format!("nodePort {} is out of range; it is left out", node_port.unwrap_or_default())
            });
        }
        ports.push(ServicePortSpec {
            name: entry.name.as_deref().unwrap_or_default().into(),
            protocol,
            port: number,
            node_port: node_port.and_then(port),
        });
    }
    ports
}
