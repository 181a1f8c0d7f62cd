//! Nodes and ServiceCIDRs.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node as ApiNode;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use switchtower_core::compiled::{ProblemObject, ProblemReason};
use switchtower_core::model::Node;

use super::address::{one_per_family, parse_cidr, parse_ip};
use super::{Fact, Findings, Ingested, NodeIdentity, Origin};

/// Label with a Node's zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Taint by which the cluster autoscaler announces the removal of a Node (KEP-3836).
const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Converts a Node. The compiler reports missing addresses and pod CIDRs.
#[must_use]
pub fn node(object: &ApiNode) -> Ingested {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let mut findings = Findings::new(ProblemObject::Node(name.to_owned()));
    let addresses = primary_addresses(object, &mut findings);
    let spec = object.spec.as_ref();
    let pod_cidrs = spec.and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
    let single = spec.and_then(|spec| spec.pod_cidr.as_ref()).filter(|_| pod_cidrs.is_empty());
    let pod_cidrs: Vec<_> = pod_cidrs
        .iter()
        .chain(single)
        .filter_map(|text| {
            let network = parse_cidr(text);
            if network.is_none() {
                findings.note(ProblemReason::InvalidAddress, || {
                    format!("spec.podCIDRs: {text:?} is not a CIDR; ignored")
                });
            }
            network
        })
        .collect();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
    let node = Node {
        name: name.into(),
        addresses,
        pod_cidrs,
        zone: zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into()),
        eligible: object.metadata.deletion_timestamp.is_none()
            && !taints.iter().any(|taint| taint.key == AUTOSCALER_TAINT),
    };
    let identity = NodeIdentity {
        name: node.name.clone(),
        uid: object.metadata.uid.as_deref().unwrap_or_default().into(),
        kubelet_lost: kubelet_lost(object),
        labels: object.metadata.labels.clone().unwrap_or_default().into(),
    };
    let origin = Origin::of(&object.metadata);
    Ingested { fact: Fact::Node(node, identity), origin, problems: findings.finish() }
}

/// The node lifecycle controller sets a Node's Ready condition to Unknown when its kubelet goes silent.
fn kubelet_lost(object: &ApiNode) -> Option<Arc<str>> {
    let conditions = object.status.as_ref()?.conditions.as_deref()?;
    let ready = conditions.iter().find(|known| known.type_ == "Ready" && known.status == "Unknown")?;
    Some(ready.message.as_deref().unwrap_or("its Ready condition is Unknown").into())
}

/// InternalIPs before ExternalIPs, the first of each family (kube-proxy: `GetNodeHostIPs`).
fn primary_addresses(object: &ApiNode, findings: &mut Findings) -> Vec<std::net::IpAddr> {
    let listed = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let internal = listed.iter().filter(|entry| entry.type_ == "InternalIP");
    let external = listed.iter().filter(|entry| entry.type_ == "ExternalIP");
    let parsed: Vec<_> = internal
        .chain(external)
        .filter_map(|entry| {
            let address = parse_ip(&entry.address);
            if address.is_none() {
                findings.note(ProblemReason::InvalidAddress, || {
                    format!("status.addresses: {:?} is not an IP address; it is left out", entry.address)
                });
            }
            address
        })
        .collect();
    one_per_family(parsed)
}

/// Converts a ServiceCIDR. A CIDR that cannot be parsed is left out: there is no Event for this kind, and the
/// API server refuses such objects.
#[must_use]
pub fn service_cidr(object: &ServiceCIDR) -> Ingested {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let cidrs = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let fact = Fact::ServiceCidr(name.into(), cidrs.iter().filter_map(|text| parse_cidr(text)).collect());
    Ingested { fact, origin: Origin::of(&object.metadata), problems: Vec::new() }
}
