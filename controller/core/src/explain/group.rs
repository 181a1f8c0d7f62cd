//! Findings that hold on every node of a group: what differs between its nodes is left out and shown for one of them.

use switchtower_admin_api::codes;
use switchtower_admin_api::{ConnectionOutcome, Example, Finding};

/// Key of nodes on which a Service behaves alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Signature(Vec<Line>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Line {
    service_port: String,
    frontend: Option<String>,
    from: String,
    outcome: ConnectionOutcome,
    code: Option<String>,
    masquerade: bool,
    hairpin: bool,
}

/// The signature of a node's findings. Addresses of the node and which endpoints are its own do not count.
#[must_use]
pub fn signature(findings: &[Finding]) -> Signature {
    let line = |finding: &Finding| Line {
        service_port: finding.service_port.clone(),
        frontend: (finding.kind != NODE_PORT).then(|| finding.frontend.clone()),
        from: finding.from.clone(),
        outcome: finding.outcome,
        code: finding.code.clone(),
        masquerade: finding.masquerade,
        hairpin: finding.hairpin.is_some(),
    };
    Signature(findings.iter().map(line).collect())
}

const NODE_PORT: &str = "NodePort";

/// Takes another node with the same signature into a group of which `first` is a member.
pub fn join(group: &mut [Finding], first: &str, other: &[Finding]) {
    for (known, other) in group.iter_mut().zip(other) {
        join_one(known, first, other);
    }
}

fn join_one(known: &mut Finding, first: &str, other: &Finding) {
    let example = known.example.take().unwrap_or_else(|| Example {
        node: first.to_owned(),
        frontend: known.frontend.clone(),
        source: known.source,
        why: known.why.clone(),
        endpoints: known.endpoints.clone(),
        path: known.path.clone(),
    });
    if example.frontend != other.frontend {
        known.frontend = of_every_node(&example.frontend);
    }
    if example.source != other.source {
        known.source = None;
    }
    if example.endpoints != other.endpoints {
        known.endpoints = Vec::new();
    }
    if example.path != other.path {
        known.path = Vec::new();
    }
    if known.hairpin != other.hairpin {
        known.hairpin = None;
    }
    if example.why != other.why || example.endpoints != other.endpoints {
        known.why = why(known);
    }
    let same = (&known.frontend, known.source, &known.why, &known.endpoints, &known.path)
        == (&example.frontend, example.source, &example.why, &example.endpoints, &example.path);
    if !same {
        known.example = Some(example);
    }
}

/// `198.18.0.11:31507/TCP` on one node is `NODE:31507/TCP` on several.
fn of_every_node(frontend: &str) -> String {
    let port = frontend.rfind(':').map_or("", |colon| &frontend[colon..]);
    format!("NODE{port}")
}

/// A reason without what only one node has.
fn why(finding: &Finding) -> String {
    if finding.outcome == ConnectionOutcome::Forwarded {
        let sees = if finding.masquerade { "the node's address" } else { "the client's address" };
        return format!("to endpoints that differ from node to node; the endpoint sees {sees}");
    }
    let code = finding.code.as_deref().and_then(codes::find);
    code.map_or_else(
        || "for a reason that differs from node to node".to_owned(),
        |code| code.title.to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(kind: &str, frontend: &str, outcome: ConnectionOutcome, endpoints: &[&str]) -> Finding {
        Finding {
            frontend: frontend.into(),
            service_port: "shop/cart:http".into(),
            kind: kind.into(),
            from: "a pod on the node".into(),
            source: Some([10, 244, 1, 254].into()),
            outcome,
            code: (outcome == ConnectionOutcome::Dropped).then(|| "ST0203".into()),
            why: format!("to {} endpoints", endpoints.len()),
            endpoints: endpoints.iter().map(|&endpoint| endpoint.to_owned()).collect(),
            masquerade: false,
            hairpin: None,
            affinity_seconds: 0,
            path: vec![format!("frontends {frontend}")],
            example: None,
            kernel: None,
        }
    }

    #[test]
    fn node_differences_shown_as_examples() {
        let balanced = |endpoint| {
            finding("LoadBalancer", "203.0.113.10:80/TCP", ConnectionOutcome::Forwarded, &[endpoint])
        };
        let port = |address: &str| {
            finding(
                "NodePort",
                &format!("{address}:31507/TCP"),
                ConnectionOutcome::Forwarded,
                &["10.244.1.11:8080"],
            )
        };
        let alpha = [balanced("10.244.1.11:8080"), port("198.18.0.11")];
        let beta = [balanced("10.244.2.11:8080"), port("198.18.0.12")];
        assert_eq!(signature(&alpha), signature(&beta));
        let mut group = alpha.to_vec();
        join(&mut group, "alpha", &beta);
        assert!(
            group[0].endpoints.is_empty() && group[0].why.contains("differ from node to node"),
            "{group:?}"
        );
        assert_eq!(group[0].frontend, "203.0.113.10:80/TCP");
        let example = group[0].example.as_ref().unwrap();
        assert_eq!((&*example.node, &*example.endpoints[0]), ("alpha", "10.244.1.11:8080"));
        assert_eq!((&*group[1].frontend, &*group[1].endpoints[0]), ("NODE:31507/TCP", "10.244.1.11:8080"));
        assert_eq!(group[1].example.as_ref().unwrap().frontend, "198.18.0.11:31507/TCP");
        // A third node that is like the first changes nothing.
        let before = group.clone();
        join(&mut group, "alpha", &alpha);
        assert_eq!(group, before);
    }

    #[test]
    fn equal_nodes_need_no_example() {
        let one =
            [finding("ClusterIP", "10.96.0.1:80/TCP", ConnectionOutcome::Forwarded, &["10.244.1.11:8080"])];
        let mut group = one.to_vec();
        join(&mut group, "alpha", &one);
        assert_eq!(group, one);
        let dropped = [finding("ClusterIP", "10.96.0.1:80/TCP", ConnectionOutcome::Dropped, &[])];
        assert_ne!(signature(&one), signature(&dropped));
    }
}
