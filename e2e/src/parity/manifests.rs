//! API objects for a case's Services.

use serde_json::{Value, json};

use super::case::{Endpoint, Families, PODS, Port, Protocol, Service, ServiceType};

const NAMESPACE: &str = "default";

fn protocol(port: &Port) -> &'static str {
    match port.protocol {
        Protocol::TCP => "TCP",
        Protocol::UDP => "UDP",
        Protocol::SCTP => "SCTP",
    }
}

/// All objects of a state as one list for `kubectl apply`; the status contains the load balancers' addresses.
pub(super) fn list<'a>(services: impl Iterator<Item = &'a Service>) -> Value {
    let objects = |one: &'a Service| {
        let mut object = service(one);
        if one.service_type == ServiceType::LoadBalancer {
            object["status"] = status(one)["status"].clone();
        }
        [object].into_iter().chain(slices(one))
    };
    json!({"apiVersion": "v1", "kind": "List", "items": services.flat_map(objects).collect::<Vec<_>>()})
}

/// The Service, without its status.
pub(super) fn service(service: &Service) -> Value {
    let (families, policy) = match service.families {
        Families::Ipv4 => (json!(["IPv4"]), "SingleStack"),
        Families::Ipv6 => (json!(["IPv6"]), "SingleStack"),
        Families::Dual => (json!(["IPv4", "IPv6"]), "RequireDualStack"),
    };
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| {
            let mut value = json!({
                "name": port.name, "protocol": protocol(port), "port": port.port,
                "targetPort": port.target.unwrap_or(9),
            });
            if let Some(node_port) = port.node_port {
                value["nodePort"] = json!(node_port);
            }
            value
        })
        .collect();
    let local = |local| if local { "Local" } else { "Cluster" };
    let mut spec = json!({
        "type": format!("{:?}", service.service_type),
        "ipFamilies": families,
        "ipFamilyPolicy": policy,
        "ports": ports,
        "internalTrafficPolicy": local(service.internal_local),
    });
    if service.service_type != ServiceType::ClusterIP || !service.external_ips.is_empty() {
        spec["externalTrafficPolicy"] = json!(local(service.external_local));
    }
    if service.without_node_ports {
        spec["allocateLoadBalancerNodePorts"] = json!(false);
    }
    if !service.external_ips.is_empty() {
        spec["externalIPs"] = json!(service.external_ips);
    }
    if !service.source_ranges.is_empty() {
        spec["loadBalancerSourceRanges"] = json!(service.source_ranges);
    }
    if let Some(seconds) = service.affinity_seconds {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    }
    let labels: serde_json::Map<_, _> =
        service.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": service.name, "namespace": NAMESPACE, "labels": labels},
        "spec": spec,
    })
}

/// The status that a load balancer controller writes.
pub(super) fn status(service: &Service) -> Value {
    let mode = if service.load_balancer_proxy { "Proxy" } else { "VIP" };
    let one = |ip| json!({"ip": ip, "ipMode": mode});
    let ingress: Vec<_> = service.load_balancer_ips.iter().map(one).collect();
    json!({"status": {"loadBalancer": {"ingress": ingress}}})
}

/// The Service's slices: one or two per family.
pub(super) fn slices(service: &Service) -> Vec<Value> {
    let of = |ipv6: bool, second: bool| {
        let ports: Vec<_> = service
            .ports
            .iter()
            .filter_map(|port| {
                let target = port.target?;
                Some(json!({"name": port.name, "protocol": protocol(port), "port": target}))
            })
            .collect();
        let endpoints = service.endpoints.iter().filter(|endpoint| endpoint.second == second);
        let endpoints: Vec<_> = endpoints.map(|endpoint| one(endpoint, ipv6)).collect();
        let mut labels = json!({"kubernetes.io/service-name": service.name});
        for (key, value) in &service.labels {
            // The EndpointSlice controller mirrors the Service's labels.
            labels[key] = json!(value);
        }
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": slice_name(&service.name, ipv6, second),
                "namespace": NAMESPACE, "labels": labels,
            },
            "addressType": if ipv6 { "IPv6" } else { "IPv4" },
            "ports": ports,
            "endpoints": endpoints,
        })
    };
    let families: &[bool] = match service.families {
        Families::Ipv4 => &[false],
        Families::Ipv6 => &[true],
        Families::Dual => &[false, true],
    };
    let parts: &[bool] = if has_second(service) { &[false, true] } else { &[false] };
    families.iter().flat_map(|ipv6| parts.iter().map(|second| of(*ipv6, *second))).collect()
}

/// Checks whether the Service has two slices per family.
pub(super) fn has_second(service: &Service) -> bool {
    service.endpoints.iter().any(|endpoint| endpoint.second)
}

pub(super) fn slice_name(service: &str, ipv6: bool, second: bool) -> String {
    format!("{service}-{}{}", if ipv6 { "v6" } else { "v4" }, if second { "-second" } else { "" })
}

fn one(endpoint: &Endpoint, ipv6: bool) -> Value {
    let pod = PODS[endpoint.pod];
    let node = pod.node.trim_start_matches('n');
    let address = if ipv6 {
        format!("fd00:244:{node}::{:x}", pod.number)
    } else {
        format!("10.244.{node}.{}", pod.number)
    };
    let Endpoint { ready, serving, terminating, .. } = *endpoint;
    let mut conditions = json!({});
    for (name, value, absent) in
        [("ready", ready, true), ("serving", serving, true), ("terminating", terminating, false)]
    {
        if !(endpoint.bare && value == absent) {
            conditions[name] = json!(value);
        }
    }
    let mut value = json!({"addresses": [address], "conditions": conditions});
    if !endpoint.nowhere {
        value["nodeName"] = json!(pod.node);
    }
    let names = |names: &[String]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
    if !endpoint.zones.is_empty() {
        value["hints"]["forZones"] = json!(names(&endpoint.zones));
    }
    if !endpoint.nodes.is_empty() {
        value["hints"]["forNodes"] = json!(names(&endpoint.nodes));
    }
    value
}
