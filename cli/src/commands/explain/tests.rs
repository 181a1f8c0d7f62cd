//! Explanations as text.

use serde_json::json;
use switchtower_admin_api::{Example, NodeStatus};

use super::*;

fn finding(kind: &str, from: &str, outcome: ConnectionOutcome, code: Option<&str>) -> Finding {
    Finding {
        frontend: "10.96.4.2:80/TCP".into(),
        service_port: "shop/cart:http".into(),
        kind: kind.into(),
        from: from.into(),
        source: Some([10, 244, 1, 7].into()),
        outcome,
        code: code.map(str::to_owned),
        why: "because".into(),
        endpoints: match outcome {
            ConnectionOutcome::Forwarded => vec!["10.244.1.5:8080".into()],
            _ => vec![],
        },
        masquerade: false,
        hairpin: None,
        affinity_seconds: 0,
        path: vec![
            "frontends 10.96.4.2:80/TCP (ClusterIP)".into(),
            "slots shop/cart:http Local: none".into(),
        ],
        example: None,
        kernel: None,
    }
}

fn explanation(node: Option<&str>, findings: Vec<Finding>) -> Explanation {
    let names = vec![node.unwrap_or("alpha").to_owned()];
    Explanation {
        service: "shop/cart".into(),
        node: node.map(str::to_owned),
        groups: vec![NodeGroup { nodes: 1, names, findings }],
        not_current: vec![],
        not_current_total: 0,
    }
}

fn found(explanation: Explanation) -> Found {
    let endpoints = EndpointCounts { slices: 2, ready: 3, terminating: 0, unready: 1 };
    Found { explanation, endpoints }
}

#[test]
fn dropped_packet_explained_with_reason_and_fix() {
    let dropped = Finding {
        kernel: Some(KernelCheck::Agrees),
        ..finding("ClusterIP", "10.244.1.7 (a local pod)", ConnectionOutcome::Dropped, Some("ST0202"))
    };
    let found = found(explanation(Some("alpha"), vec![dropped]));
    let wanted = "\
DROPPED  ClusterIP 10.96.4.2:80/TCP on alpha  ST0202
 from    10.244.1.7 (a local pod)
 why     because
 path    frontends 10.96.4.2:80/TCP (ClusterIP) -> slots shop/cart:http Local: none
 kernel  matches
 fix     Run a pod of the Service on the node (a DaemonSet), or set internalTrafficPolicy: Cluster.

endpoints 3 ready, 1 not ready, in 2 EndpointSlices (both address families)
node     alpha holds the latest generation
";
    assert_eq!(text(&found, false, Style::PLAIN), wanted);
    assert!(!is_well(&found.explanation));
}

#[test]
fn failures_first_and_equal_groups_once() {
    let findings = vec![
        finding("ClusterIP", "a pod on the node", ConnectionOutcome::Forwarded, None),
        finding("ClusterIP", "the node itself", ConnectionOutcome::Forwarded, None),
        finding("LoadBalancer", "a client outside", ConnectionOutcome::Dropped, Some("ST0203")),
    ];
    let mut explanation = explanation(None, findings);
    explanation.not_current =
        vec![NodeStatus { node: "beta".into(), connected: false, desired: 9, applied: 7, failure: None }];
    explanation.not_current_total = 1;
    let text = text(&found(explanation), false, Style::PLAIN);
    let first: Vec<&str> = text.lines().filter(|line| line.contains("10.96.4.2:80/TCP on")).collect();
    assert_eq!(first.len(), 2);
    assert!(first[0].starts_with("DROPPED  LoadBalancer") && first[1].starts_with("FORWARDED  ClusterIP"));
    assert!(text.contains("1 more combination with the same outcome"), "{text}");
    assert!(text.contains("beta (agent not connected)"), "{text}");
}

#[test]
fn failing_nodes_listed_before_working_ones() {
    let works = finding("ClusterIP", "a pod on the node", ConnectionOutcome::Forwarded, None);
    let fails = finding("LoadBalancer", "a client outside", ConnectionOutcome::Dropped, Some("ST0203"));
    let example = Example {
        node: "alpha".into(),
        frontend: "10.96.4.2:80/TCP".into(),
        source: None,
        why: String::new(),
        endpoints: vec!["10.244.1.11:8080".into()],
        path: vec!["slots".into()],
    };
    let differs = Finding { endpoints: vec![], path: vec![], example: Some(example), ..works.clone() };
    let mut explanation = explanation(None, vec![works.clone(), differs]);
    explanation.groups.push(NodeGroup {
        nodes: 1,
        names: vec!["gamma".into()],
        findings: vec![works, fails],
    });
    let text = text(&found(explanation), false, Style::PLAIN);
    assert!(text.starts_with("DROPPED  LoadBalancer 10.96.4.2:80/TCP on 1 node (gamma)"), "{text}");
    assert!(text.contains(" such as on alpha: 10.96.4.2:80/TCP to 10.244.1.11:8080; slots\n"), "{text}");
}

#[test]
fn kernel_with_differences_reported() {
    let differs = KernelCheck::Differs("without 10.244.1.5:8080".to_owned());
    let forwarded = finding("ClusterIP", "a pod", ConnectionOutcome::Forwarded, None);
    let one = explanation(Some("alpha"), vec![Finding { kernel: Some(differs), ..forwarded.clone() }]);
    assert!(!is_well(&one));
    assert!(text(&found(one), false, Style::PLAIN).contains("ST0108 differs: without"));
    let unknown = Some(KernelCheck::Unknown("the agent of alpha is not connected".into()));
    assert!(is_well(&explanation(Some("alpha"), vec![Finding { kernel: unknown, ..forwarded }])));
}

fn service(spec: &serde_json::Value, labels: &serde_json::Value) -> Service {
    serde_json::from_value(json!({"metadata": {"name": "cart", "labels": labels}, "spec": spec})).unwrap()
}

#[test]
fn services_for_no_proxy_distinguished() {
    let refused = |spec: serde_json::Value, labels: serde_json::Value, port: Option<&str>| {
        let port = port.map(str::to_owned);
        let subject = ServiceName { namespace: None, name: "cart".into(), port };
        served(&service(&spec, &labels), &subject).map_err(|error| error.message)
    };
    let none = || json!({});
    let ports = || json!({"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]});
    assert!(refused(json!({"type": "ExternalName"}), none(), None).unwrap_err().contains("ExternalName"));
    assert!(refused(json!({"clusterIP": "None"}), none(), None).unwrap_err().contains("headless"));
    let other = json!({"service.kubernetes.io/service-proxy-name": "mesh"});
    assert!(refused(ports(), other, None).unwrap_err().contains("\"mesh\""));
    assert_eq!(
        refused(ports(), none(), Some("https")).unwrap_err(),
        "Service cart has no port https; it has http (80)"
    );
    for port in [None, Some("80"), Some("http")] {
        assert_eq!(refused(ports(), none(), port), Ok(()));
    }
}

#[test]
fn endpoints_counted_by_state() {
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "cart-1"}, "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.0.0.4"]},
        ],
    }))
    .unwrap();
    let wanted = EndpointCounts { slices: 1, ready: 2, terminating: 1, unready: 1 };
    assert_eq!(endpoints(&[slice]), wanted);
    assert!(about_endpoints(EndpointCounts::default()).contains("no EndpointSlice"));
    let empty = EndpointCounts { slices: 1, ..EndpointCounts::default() };
    assert!(about_endpoints(empty).contains("matches no pod"));
}
