//! Concise builders of API objects as JSON.

use serde_json::{Value, json};

use crate::lab::{NodeNet, PodNet};

/// A Service with the given spec.
pub fn service(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    })
}

/// The ClusterIP of one of up to 60,000 Services. The API server's own choice is random, and slow when most addresses of
/// the range are taken.
pub fn cluster_ip(number: usize) -> String {
    format!("10.96.{}.{}", 8 + number / 250, 1 + number % 250)
}

/// Status of a LoadBalancer Service with virtual addresses.
pub fn load_balancer_status(addresses: &[&str]) -> Value {
    let ingress: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
    json!({"loadBalancer": {"ingress": ingress}})
}

/// An EndpointSlice of a Service. `ports` are (name, protocol, number).
pub fn slice(
    namespace: &str,
    name: &str,
    service: &str,
    ipv6: bool,
    ports: &[(&str, &str, u16)],
    endpoints: &[Value],
) -> Value {
    let ports: Vec<_> = ports
        .iter()
        .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if ipv6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    })
}

/// A ready endpoint.
pub fn endpoint(pod: &PodNet, node: &NodeNet, ipv6: bool) -> Value {
    json!({
        "addresses": [pod.address(ipv6).to_string()],
        "nodeName": node.name,
        "conditions": {"ready": true, "serving": true, "terminating": false},
    })
}

/// The endpoint during its pod's shutdown: not ready and terminating, optionally still serving.
pub fn terminating(mut endpoint: Value, serving: bool) -> Value {
    endpoint["conditions"] = json!({"ready": false, "serving": serving, "terminating": true});
    endpoint
}

/// The endpoint with zone hints.
pub fn hinted(mut endpoint: Value, zones: &[&str]) -> Value {
    let zones: Vec<_> = zones.iter().map(|zone| json!({"name": zone})).collect();
    endpoint["hints"] = json!({"forZones": zones});
    endpoint
}

/// The endpoint with node hints.
pub fn hinted_for_nodes(mut endpoint: Value, nodes: &[&str]) -> Value {
    let nodes: Vec<_> = nodes.iter().map(|node| json!({"name": node})).collect();
    endpoint["hints"] = json!({"forNodes": nodes});
    endpoint
}

/// A Node with addresses and pod CIDRs, as a kubelet registers it.
pub fn node(node: &NodeNet, zone: &str) -> Value {
    let cidrs = node.pod_cidrs();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name, "labels": {
            "kubernetes.io/os": "linux",
            "kubernetes.io/hostname": node.name,
            "topology.kubernetes.io/zone": zone,
        }},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": node.address(false).to_string()},
                {"type": "InternalIP", "address": node.address(true).to_string()},
            ],
            // Input of the EndpointSlice controller's zone hints.
            "allocatable": {"cpu": "2", "memory": "4Gi", "pods": "110"},
            "capacity": {"cpu": "2", "memory": "4Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "Laboratory"}],
        },
    })
}

/// A Pod bound to a node.
pub fn pod(namespace: &str, name: &str, node: &str, service_account: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "nodeName": node,
            "serviceAccountName": service_account,
            "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "none"}],
            "tolerations": [{"operator": "Exists"}],
        },
    })
}

/// Status of a running, ready Pod with the addresses of its namespace.
pub fn running(pod: &PodNet, node: &NodeNet) -> Value {
    let mut status = running_on_host(node);
    status["podIP"] = json!(pod.ipv4.to_string());
    status["podIPs"] = json!([{"ip": pod.ipv4.to_string()}, {"ip": pod.ipv6.to_string()}]);
    status
}

/// Status of a running, ready Pod of the host network.
pub fn running_on_host(node: &NodeNet) -> Value {
    let address = node.address(false).to_string();
    json!({
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{
            "name": "main", "image": "none", "imageID": "", "restartCount": 0, "ready": true, "started": true,
            "state": {"running": {"startedAt": null}},
        }],
        "hostIP": address, "podIP": address, "podIPs": [{"ip": address}],
    })
}
