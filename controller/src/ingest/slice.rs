//! EndpointSlices.

use std::sync::Arc;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice as ApiEndpointSlice};
use switchtower_core::compiled::{ProblemObject, ProblemReason};
use switchtower_core::model::{EndpointSlice, Input, PodId, SliceEndpoint, SlicePort};

use super::address::parse_ip;
use super::{Fact, Findings, Ingested, Origin, object_key, port, protocol};

/// The label that names a slice's Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Converts an EndpointSlice. One without a Service's name, or of address type FQDN, is a deletion.
#[must_use]
pub fn slice(object: &ApiEndpointSlice) -> Ingested {
    let key = object_key(&object.metadata);
    let mut findings = Findings::new(ProblemObject::EndpointSlice(key.clone()));
    let service = object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
    let ipv6 = match object.address_type.as_str() {
        "IPv4" => Some(false),
        "IPv6" => Some(true),
        _ => None,
    };
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let input = match (service.filter(|name| !name.is_empty()), ipv6) {
        (Some(service), Some(ipv6)) => Input::Slice(EndpointSlice {
            key,
            service: service.as_str().into(),
            ipv6,
            ports: ports(object, &mut findings),
            endpoints: object
                .endpoints
                .iter()
                .filter_map(|endpoint| convert_endpoint(endpoint, ipv6, namespace, &mut findings))
                .collect(),
        }),
        _ => Input::SliceDeleted(key),
    };
    let origin = Origin::of(&object.metadata);
    Ingested { fact: Fact::Input(input), origin, problems: findings.finish() }
}

/// Ports without a name or number mean "not served" to kube-proxy; a number out of range is an error.
fn ports(object: &ApiEndpointSlice, findings: &mut Findings) -> Vec<SlicePort> {
    let mut ports = Vec::with_capacity(object.ports.as_ref().map_or(0, Vec::len));
    for entry in object.ports.iter().flatten() {
        let Some(name) = entry.name.as_deref() else { continue };
        let Some(number) = entry.port else { continue };
        let (Some(number), Some(protocol)) = (port(number), protocol(entry.protocol.as_deref())) else {
            findings.note(ProblemReason::InvalidPort, || {
                let protocol = entry.protocol.as_deref().unwrap_or("TCP");
                format!("port {name:?}: {number}/{protocol} is not a port that can be served; it is left out")
            });
            continue;
        };
        ports.push(SlicePort { name: name.into(), protocol, port: number });
    }
    ports
}

/// Only the first address counts; the API calls the others meaningless.
fn convert_endpoint(
    endpoint: &Endpoint,
    ipv6: bool,
    namespace: &str,
    findings: &mut Findings,
) -> Option<SliceEndpoint> {
    let text = endpoint.addresses.first().map(String::as_str).unwrap_or_default();
    let Some(address) = parse_ip(text) else {
        findings.note(ProblemReason::InvalidAddress, || {
            format!("endpoint address {text:?} is not an IP address; the endpoint is left out")
        });
        return None;
    };
    if address.is_ipv6() != ipv6 {
        findings.note(ProblemReason::InvalidAddress, || {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            format!("endpoint address {text:?} is not of the slice's address type {family}; the endpoint is left out")
        });
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
    Some(SliceEndpoint {
        address,
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        node: endpoint.node_name.as_deref().filter(|name| !name.is_empty()).map(Arc::from),
        pod: endpoint.target_ref.as_ref().and_then(|reference| pod(reference, namespace)),
        zones: zones.iter().map(|zone| Arc::from(zone.name.as_str())).collect(),
        nodes: nodes.iter().map(|node| Arc::from(node.name.as_str())).collect(),
    })
}

/// A reference without a namespace is to the slice's own. Pods of other namespaces are not accepted.
fn pod(reference: &ObjectReference, namespace: &str) -> Option<PodId> {
    let own = reference.namespace.as_deref().is_none_or(|other| other.is_empty() || other == namespace);
    let name = reference.name.as_deref().filter(|name| !name.is_empty())?;
    (own && reference.kind.as_deref() == Some("Pod")).then(|| PodId::of(namespace, name))
}
