//! Tables: an object as the API server would send it, and what becomes of it.

use k8s_openapi::api::core::v1::{Node as ApiNode, Service as ApiService};
use k8s_openapi::api::discovery::v1::EndpointSlice as ApiEndpointSlice;
use serde_json::{Value, json};
use switchtower_core::compiled::ProblemReason;
use switchtower_core::model::{EndpointSlice, Input, Node, PodId, Service, TrafficPolicy};
use switchtower_proto::v1::Protocol;

use super::{Fact, Ingested, node, service, slice};

fn ingest_service(spec: &Value, status: &Value) -> Ingested {
    let object = json!({"metadata": {"namespace": "shop", "name": "cart", "uid": "u1",
        "creationTimestamp": "1970-01-01T00:01:00Z"}, "spec": spec, "status": status});
    service(&serde_json::from_value::<ApiService>(object).unwrap())
}

#[track_caller]
fn served(ingested: Ingested) -> Service {
    match ingested.fact {
        Fact::Input(Input::Service(service)) => service,
        other => panic!("not served: {other:?}"),
    }
}

fn reasons(ingested: &Ingested) -> Vec<ProblemReason> {
    ingested.problems.iter().map(|problem| problem.reason).collect()
}

#[test]
fn unserved_services_explained() {
    for spec in [
        json!({"type": "ExternalName", "externalName": "example.org"}),
        json!({"type": "ExternalName", "externalName": "example.org", "clusterIP": "10.96.0.9"}),
        json!({"clusterIP": "None", "clusterIPs": ["None"]}),
        json!({"clusterIP": ""}),
        json!({}),
    ] {
        let ingested = ingest_service(&spec, &json!({}));
        assert!(matches!(ingested.fact, Fact::Input(Input::ServiceDeleted(_))), "{spec}");
        assert!(ingested.problems.is_empty(), "{spec}");
    }
}

#[test]
fn complete_service_is_converted() {
    let ingested = ingest_service(
        &json!({"type": "LoadBalancer", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd96::9", "10.96.0.10"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080},
                      {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 0}],
            "externalIPs": ["192.0.2.010"], "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
            "healthCheckNodePort": 31000, "sessionAffinity": "ClientIP",
            "loadBalancerSourceRanges": [" 198.51.100.7/24 "]}),
        &json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "VIP"},
            {"ip": "203.0.113.3", "ipMode": "Proxy"}, {"hostname": "lb.example.org"}]}}),
    );
    assert!(ingested.problems.is_empty(), "{:?}", ingested.problems);
    let service = served(ingested);
    let text = |list: &[std::net::IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(text(&service.cluster_ips), "10.96.0.9 fd96::9");
    assert_eq!(text(&service.external_ips), "192.0.2.10");
    assert_eq!(text(&service.load_balancer_ips), "203.0.113.1 203.0.113.2");
    assert_eq!(service.source_ranges, ["198.51.100.0/24".parse().unwrap()]);
    assert_eq!(
        (service.external_policy, service.internal_policy),
        (TrafficPolicy::Local, TrafficPolicy::Local)
    );
    assert_eq!((service.affinity_seconds, service.health_check_port), (Some(10_800), Some(31_000)));
    assert_eq!((service.created, &*service.uid), (60, "u1"));
    let ports: Vec<_> =
        service.ports.iter().map(|port| (&*port.name, port.protocol, port.port, port.node_port)).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 80, Some(30_080)), ("dns", Protocol::Udp, 53, None)]);
}

#[test]
fn health_check_port_requires_type_and_policy() {
    for (kind, policy, expected) in [
        ("LoadBalancer", "Local", Some(31_000)),
        ("LoadBalancer", "Cluster", None),
        ("NodePort", "Local", None),
    ] {
        let spec = json!({"type": kind, "clusterIP": "10.96.0.9", "externalTrafficPolicy": policy,
            "healthCheckNodePort": 31000});
        assert_eq!(served(ingest_service(&spec, &json!({}))).health_check_port, expected, "{kind} {policy}");
    }
}

#[test]
fn external_policy_needs_an_external_address() {
    let cluster_ip = json!({"clusterIP": "10.96.0.9", "externalTrafficPolicy": "Local"});
    assert_eq!(served(ingest_service(&cluster_ip, &json!({}))).external_policy, TrafficPolicy::Cluster);
    let external =
        json!({"clusterIP": "10.96.0.9", "externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"]});
    assert_eq!(served(ingest_service(&external, &json!({}))).external_policy, TrafficPolicy::Local);
}

#[test]
fn affinity_has_a_default_and_a_ceiling() {
    for (config, expected) in [
        (json!(null), 10_800),
        (json!({"clientIP": {"timeoutSeconds": 30}}), 30),
        (json!({"clientIP": {"timeoutSeconds": 0}}), 10_800),
        (json!({"clientIP": {"timeoutSeconds": -5}}), 10_800),
        (json!({"clientIP": {"timeoutSeconds": 100_000}}), 86_400),
    ] {
        let spec =
            json!({"clusterIP": "10.96.0.9", "sessionAffinity": "ClientIP", "sessionAffinityConfig": config});
        assert_eq!(served(ingest_service(&spec, &json!({}))).affinity_seconds, Some(expected));
    }
}

#[test]
fn bad_values_are_left_out_and_the_rest_is_served() {
    let ingested = ingest_service(
        &json!({"clusterIP": "10.96.0.9", "externalIPs": ["nonsense", "192.0.2.1", "more"],
            "ports": [{"port": 0}, {"port": 70000, "name": "b"}, {"port": 443, "name": "c"},
                      {"port": 1, "protocol": "ICMP", "name": "d"}],
            "loadBalancerSourceRanges": ["10.0.0.0/99"]}),
        &json!({}),
    );
    assert_eq!(reasons(&ingested), [ProblemReason::InvalidAddress, ProblemReason::InvalidPort]);
    assert!(ingested.problems[0].message.contains("nonsense"), "{:?}", ingested.problems);
    assert!(ingested.problems[0].message.ends_with("(and 2 more like it)"), "{:?}", ingested.problems);
    let service = served(ingested);
    assert_eq!((service.external_ips.len(), service.ports.len(), service.source_ranges.len()), (1, 1, 0));
}

fn ingest_slice(labels: &Value, kind: &str, ports: &Value, endpoints: &Value) -> Ingested {
    let object = json!({"metadata": {"namespace": "shop", "name": "cart-x7", "labels": labels}, "addressType": kind,
        "ports": ports, "endpoints": endpoints});
    slice(&serde_json::from_value::<ApiEndpointSlice>(object).unwrap())
}

#[track_caller]
fn slice_of(ingested: Ingested) -> EndpointSlice {
    match ingested.fact {
        Fact::Input(Input::Slice(slice)) => slice,
        other => panic!("not a slice: {other:?}"),
    }
}

#[test]
fn unused_slices_explained() {
    for (labels, kind) in [
        (json!({}), "IPv4"),
        (json!({"kubernetes.io/service-name": ""}), "IPv4"),
        (json!({"kubernetes.io/service-name": "cart"}), "FQDN"),
    ] {
        let ingested = ingest_slice(&labels, kind, &json!([]), &json!([]));
        assert!(matches!(ingested.fact, Fact::Input(Input::SliceDeleted(_))), "{labels} {kind}");
    }
}

#[test]
fn endpoints_conditions_hints_and_ports() {
    let labels = json!({"kubernetes.io/service-name": "cart"});
    let ingested = ingest_slice(
        &labels,
        "IPv4",
        &json!([{"name": "", "port": 8080}, {"port": 1}, {"name": "x"}, {"name": "z", "port": 0}]),
        &json!([
            {"addresses": ["10.2.0.04", "10.2.0.5"], "nodeName": "n1",
             "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "n1"}]}},
            {"addresses": ["10.2.0.6"], "conditions": {"ready": false, "serving": false, "terminating": true}},
            {"addresses": ["fd00::1"]}, {"addresses": ["bogus"]}, {"addresses": []},
        ]),
    );
    assert_eq!(reasons(&ingested), [ProblemReason::InvalidPort, ProblemReason::InvalidAddress]);
    let slice = slice_of(ingested);
    assert_eq!((&*slice.service, slice.ipv6, slice.ports.len()), ("cart", false, 1));
    let [first, second] = &slice.endpoints[..] else { panic!("{:?}", slice.endpoints) };
    assert_eq!(
        (first.address.to_string().as_str(), first.ready, first.serving, first.terminating),
        ("10.2.0.4", true, true, false)
    );
    assert_eq!((first.node.as_deref(), &*first.zones[0], &*first.nodes[0]), (Some("n1"), "a", "n1"));
    assert_eq!(
        (second.ready, second.serving, second.terminating, second.node.as_deref()),
        (false, false, true, None)
    );
}

#[test]
fn endpoints_refer_to_pods_of_their_namespace() {
    let labels = json!({"kubernetes.io/service-name": "cart"});
    let reference = |kind: &str, namespace: &Value, name: &str| json!({"addresses": ["10.2.0.4"], "targetRef": {"kind": kind, "namespace": namespace, "name": name}});
    let endpoints = [
        reference("Pod", &json!("shop"), "cart-0"),
        reference("Pod", &json!(null), "cart-0"),
        reference("Pod", &json!("bank"), "cart-0"),
        reference("Node", &json!("shop"), "cart-0"),
        reference("Pod", &json!("shop"), ""),
        json!({"addresses": ["10.2.0.4"]}),
    ];
    let slice = slice_of(ingest_slice(&labels, "IPv4", &json!([]), &json!(endpoints)));
    let pods: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.pod).collect();
    let cart = Some(PodId::of("shop", "cart-0"));
    assert_eq!(pods, [cart, cart, None, None, None, None]);
}

fn ingest_node(object: &Value) -> (Node, Vec<ProblemReason>) {
    let ingested = node(&serde_json::from_value::<ApiNode>(object.clone()).unwrap());
    let found = reasons(&ingested);
    match ingested.fact {
        Fact::Node(node, _) => (node, found),
        other => panic!("not a node: {other:?}"),
    }
}

#[test]
fn internal_addresses_come_before_external_ones() {
    let (node, problems) = ingest_node(&json!({
        "metadata": {"name": "n1", "uid": "u", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDR": "10.2.0.0/24", "podCIDRs": ["10.2.0.0/24", "fd02::/64"]},
        "status": {"addresses": [{"type": "Hostname", "address": "n1"}, {"type": "ExternalIP", "address": "fd00::9"},
            {"type": "ExternalIP", "address": "203.0.113.9"}, {"type": "InternalIP", "address": "10.0.0.1"},
            {"type": "InternalIP", "address": "10.0.0.2"}]}}));
    let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
    assert_eq!((addresses, problems), (vec!["10.0.0.1".to_owned(), "fd00::9".to_owned()], vec![]));
    assert_eq!((node.zone.as_deref(), node.pod_cidrs.len(), node.eligible), (Some("a"), 2, true));
}

#[test]
fn empty_node_is_kept() {
    let (node, problems) =
        ingest_node(&json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": ""}}}));
    assert_eq!(problems, []);
    assert_eq!((node.zone, node.addresses.len(), node.eligible), (None, 0, true));
}

#[test]
fn deleted_node_is_not_eligible() {
    let tainted = json!({"metadata": {"name": "n1"},
        "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}});
    let deleted = json!({"metadata": {"name": "n1", "deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let cordoned = json!({"metadata": {"name": "n1"}, "spec": {"unschedulable": true}});
    assert!(!ingest_node(&tainted).0.eligible);
    assert!(!ingest_node(&deleted).0.eligible);
    assert!(ingest_node(&cordoned).0.eligible);
}
