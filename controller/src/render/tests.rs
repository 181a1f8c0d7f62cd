//! Manifests and the text that `render` prints for them.

use super::manifests;
use super::{RenderError, compile, text};

const MANIFESTS: &str = r#"
{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: a}},
 spec: {podCIDR: 10.2.1.0/24}, status: {addresses: [{type: InternalIP, address: 10.0.0.1}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: n2, labels: {topology.kubernetes.io/zone: b}},
 spec: {podCIDR: 10.2.2.0/24}, status: {addresses: [{type: InternalIP, address: 10.0.0.2}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, uid: u1},
 spec: {type: LoadBalancer, clusterIP: 10.96.0.9, externalTrafficPolicy: Local, sessionAffinity: ClientIP,
        loadBalancerSourceRanges: [198.51.100.0/24], ports: [{name: http, port: 80, nodePort: 30080}]},
 status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
 metadata: {name: web-x, labels: {kubernetes.io/service-name: web}},
 ports: [{name: http, port: 8080}],
 endpoints: [{addresses: [10.2.1.4], nodeName: n1}, {addresses: [10.2.2.4], nodeName: n2}, {addresses: [bogus]}]}
"#;

#[test]
fn view_has_local_endpoints_and_those_of_the_cluster() {
    let view = compile(manifests::from_text(MANIFESTS).unwrap(), "n2").unwrap();
    let expected = "\
node n2, zone b: 3 frontends
10.96.0.9:80/TCP  ClusterIP  default/web:http  affinity 10800s
    -> 10.2.1.4:8080 10.2.2.4:8080 (cluster)
203.0.113.1:80/TCP  LoadBalancer  default/web:http  affinity 10800s  from 198.51.100.0/24
    outside -> 10.2.2.4:8080 (local)
    inside  -> 10.2.1.4:8080 10.2.2.4:8080 (cluster)
node(IPv4):30080/TCP  NodePort  default/web:http  affinity 10800s
    outside -> 10.2.2.4:8080 (local)
    inside  -> 10.2.1.4:8080 10.2.2.4:8080 (cluster)
";
    let text = text(&view);
    assert!(text.starts_with(expected), "{text}");
    assert!(text.contains("InvalidAddress") && text.contains("bogus"), "{text}");
}

#[test]
fn unknown_node_is_an_error() {
    let error = compile(manifests::from_text(MANIFESTS).unwrap(), "n9").unwrap_err();
    assert!(matches!(error, RenderError::UnknownNode(name) if name == "n9"));
}
