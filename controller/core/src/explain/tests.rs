//! Explanations of small views.

use std::collections::BTreeMap;

use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{
    Change, Cidr, Endpoint, KernelFrontend, KernelMasquerade, KernelTarget, KernelVerdict, LayerKind,
    LocalDetection, Settings,
};

use super::*;
use crate::compile::Compiler;
use crate::model::{
    EndpointSlice, Input, LayerId, Node, ObjectKey, Service, ServicePortSpec, SliceEndpoint, SlicePort,
    TrafficPolicy,
};

const SHOP: Subject<'_> = Subject { namespace: "shop", name: "cart", port: None };

fn service() -> Service {
    Service {
        key: ObjectKey { namespace: "shop".into(), name: "cart".into() },
        uid: "u".into(),
        created: 1,
        cluster_ips: vec![IpAddr::from([10, 96, 0, 10])],
        ports: vec![ServicePortSpec {
            name: "http".into(),
            protocol: switchtower_proto::v1::Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        ..Service::default()
    }
}

/// The view of node n1; endpoints are (last octet, node).
fn view(service: Service, endpoints: &[(u8, &str)]) -> View {
    let mut compiler = Compiler::new();
    for (index, name) in [(1, "n1"), (2, "n2")] {
        compiler.apply(Input::Node(Node {
            name: name.into(),
            addresses: vec![IpAddr::from([192, 0, 2, index])],
            pod_cidrs: vec![format!("10.244.{index}.0/24").parse().unwrap()],
            zone: None,
            eligible: true,
        }));
    }
    let endpoint = |(octet, node): &(u8, &str)| SliceEndpoint {
        address: IpAddr::from([10, 244, u8::from(*node != "n1") + 1, *octet]),
        ready: true,
        serving: true,
        terminating: false,
        node: Some((*node).into()),
        pod: None,
        zones: Box::default(),
        nodes: Box::default(),
    };
    compiler.apply(Input::Slice(EndpointSlice {
        key: ObjectKey { namespace: "shop".into(), name: "cart-1".into() },
        service: "cart".into(),
        ipv6: false,
        ports: vec![SlicePort {
            name: "http".into(),
            protocol: switchtower_proto::v1::Protocol::Tcp,
            port: 8080,
        }],
        endpoints: endpoints.iter().map(endpoint).collect(),
    }));
    compiler.apply(Input::Service(service));
    let mut view = View::default();
    let settings = Settings { local_detection: LocalDetection::NodeCidr.into(), ..Settings::default() };
    view.apply(LayerKind::Settings, &Change { change: Some(Kind::Settings(settings)) });
    for (layer, changes) in compiler.compile().changes {
        let kind = match &layer {
            LayerId::Cluster => LayerKind::Cluster,
            LayerId::Node(node) if &**node == "n1" => LayerKind::Node,
            _ => continue,
        };
        changes.iter().for_each(|change| view.apply(kind, change));
    }
    view
}

fn summary(findings: &[Finding]) -> Vec<String> {
    let line = |finding: &Finding| {
        let code = finding.code.clone().unwrap_or_default();
        format!("{} from {}: {:?} {code}", finding.kind, finding.from, finding.outcome)
    };
    findings.iter().map(line).collect()
}

#[test]
fn ordinary_service_explained() {
    let findings = explain(&view(service(), &[(5, "n1"), (6, "n2")]), SHOP, None);
    let wanted =
        ["ClusterIP from a pod on the node: Forwarded ", "ClusterIP from the node itself: Forwarded "];
    assert_eq!(summary(&findings), wanted);
    assert_eq!(findings[0].frontend, "10.96.0.10:80/TCP");
    assert_eq!(findings[0].endpoints, ["10.244.1.5:8080", "10.244.2.6:8080"]);
    assert_eq!(findings[0].why, "to 2 endpoints; the endpoint sees the client's address");
    assert_eq!(findings[0].path.len(), 2);
    let none = Subject { port: Some("https"), ..SHOP };
    assert_eq!(explain(&view(service(), &[]), none, None), []);
}

#[test]
fn local_policy_without_local_endpoints() {
    let local = Service { internal_policy: TrafficPolicy::Local, ..service() };
    let findings = explain(&view(local, &[(6, "n2")]), SHOP, Some(IpAddr::from([10, 244, 1, 7])));
    assert_eq!(summary(&findings), ["ClusterIP from 10.244.1.7 (a local pod): Dropped ST0202"]);
    assert_eq!(findings[0].why, "internalTrafficPolicy is Local, and no endpoint is on this node");
}

#[test]
fn no_endpoints_and_source_ranges() {
    let refused = explain(&view(service(), &[]), Subject { port: Some("80"), ..SHOP }, None);
    assert!(refused.iter().all(|finding| finding.code.as_deref() == Some("ST0201")), "{refused:?}");
    let balanced = Service {
        load_balancer_ips: vec![IpAddr::from([198, 51, 100, 1])],
        source_ranges: vec!["203.0.113.0/24".parse().unwrap()],
        ..service()
    };
    let view = view(balanced, &[(5, "n1")]);
    let findings = explain(&view, SHOP, None);
    let outside: Vec<_> = findings.iter().filter(|finding| finding.kind == "LoadBalancer").collect();
    assert_eq!(outside.last().unwrap().from, "a client in the source ranges");
    assert_eq!(outside.last().unwrap().outcome, ConnectionOutcome::Forwarded);
    let stranger = explain(&view, SHOP, Some(IpAddr::from([203, 0, 114, 9])));
    let last = stranger.last().unwrap();
    assert_eq!((last.outcome, last.code.as_deref()), (ConnectionOutcome::Dropped, Some("ST0204")));
    assert_eq!(last.why, "203.0.114.9 is in none of loadBalancerSourceRanges (203.0.113.0/24)");
}

/// Answer of an agent whose kernel holds exactly this.
fn kernel_of(key: &FrontendKey, held: &Held) -> KernelFrontend {
    let target = |side: &Side| {
        let verdict =
            |verdict: KernelVerdict| KernelTarget { verdict: verdict.into(), ..KernelTarget::default() };
        Some(match side {
            Side::Forward(forward) => KernelTarget {
                endpoints: forward.endpoints.clone(),
                masquerade: forward.masquerade.into(),
                affinity_seconds: forward.affinity_seconds,
                ..verdict(KernelVerdict::Forward)
            },
            Side::Reject => verdict(KernelVerdict::Reject),
            Side::Drop => verdict(KernelVerdict::Drop),
            Side::Broken => verdict(KernelVerdict::Broken),
        })
    };
    let cidr =
        |net: &IpNet| Cidr { address: wire::octets(net.addr()), prefix_length: net.prefix_len().into() };
    KernelFrontend {
        key: Some(key.clone()),
        outside: target(&held.outside),
        inside: target(&held.inside),
        restricted: !held.sources.is_empty(),
        allowed: held.sources.iter().map(cidr).collect(),
    }
}

/// The differences after `change` of what the kernel holds of the first address of a kind.
fn changed(view: &View, kind: FrontendKind, change: impl FnOnce(&mut Held)) -> Vec<String> {
    let frontends = frontends(view, SHOP);
    let expected = expected(view, frontends.iter().copied().filter(|frontend| frontend.kind() == kind));
    let (key, held) = expected.iter().next().unwrap();
    let mut held = held.clone();
    change(&mut held);
    let found = BTreeMap::from([(key.clone(), found(&kernel_of(key, &held)))]);
    differences(&expected, &found)
}

fn forward(side: &mut Side) -> &mut Forward {
    match side {
        Side::Forward(forward) => forward,
        other => panic!("{other:?} is not forwarded"),
    }
}

#[test]
fn kernel_is_compared_with_the_view() {
    let view = view(service(), &[(5, "n1"), (6, "n2")]);
    let only = |change: fn(&mut Forward)| {
        changed(&view, FrontendKind::ClusterIp, |held| {
            change(forward(&mut held.outside));
            change(forward(&mut held.inside));
        })
    };
    let name = "10.96.0.10:80/TCP";
    assert_eq!(changed(&view, FrontendKind::ClusterIp, |_| ()), Vec::<String>::new());
    assert_eq!(only(|way| drop(way.endpoints.pop())), [format!("{name}: without 10.244.2.6:8080")]);
    let more = only(|way| way.endpoints.push(Endpoint { address: vec![10, 244, 1, 9], port: 1 }));
    assert_eq!(more, [format!("{name}: with 10.244.1.9:1 besides")]);
    let masquerade = only(|way| way.masquerade = KernelMasquerade::Always);
    assert_eq!(
        masquerade,
        [format!("{name}: masquerade of all sources, should be of all sources but local pods")]
    );
    let affinity = only(|way| way.affinity_seconds = 60);
    assert_eq!(affinity, [format!("{name}: session affinity of 60 s, should be 0 s")]);
    let broken = changed(&view, FrontendKind::ClusterIp, |held| held.inside = Side::Broken);
    assert!(broken[0].starts_with(&format!("{name}: inside: broken")), "{broken:?}");

    let expected = expected(&view, frontends(&view, SHOP).into_iter());
    assert_eq!(differences(&expected, &BTreeMap::new()), [format!("{name}: missing in the kernel")]);
    assert_eq!(differences(&BTreeMap::new(), &expected), [format!("{name}: only in the kernel")]);
}

/// A balancer's address with policy Local, a range around the node's own address, and affinity.
fn balanced() -> View {
    let balanced = Service {
        load_balancer_ips: vec![IpAddr::from([198, 51, 100, 1])],
        source_ranges: vec!["192.0.2.0/24".parse().unwrap(), "192.0.2.128/25".parse().unwrap()],
        external_policy: TrafficPolicy::Local,
        affinity_seconds: Some(600),
        ..service()
    };
    view(balanced, &[(5, "n1"), (6, "n2")])
}

#[test]
fn sources_affinity_and_policy_are_compared_too() {
    let view = balanced();
    let of = |change: fn(&mut Held)| changed(&view, FrontendKind::LoadBalancer, change);
    let name = "198.51.100.1:80/TCP";
    assert_eq!(of(|_| ()), Vec::<String>::new());
    let open = of(|held| held.sources.clear());
    assert_eq!(open, [format!("{name}: open to every source, should be to 192.0.2.0/24, 198.51.100.1/32")]);
    let affinity = of(|held| forward(&mut held.outside).affinity_seconds = 1);
    assert_eq!(affinity, [format!("{name}: outside: session affinity of 1 s, should be 600 s")]);
    let masquerade = of(|held| forward(&mut held.inside).masquerade = KernelMasquerade::Always);
    assert_eq!(masquerade, [format!("{name}: inside: masquerade of all sources, should be of no source")]);
}

#[test]
fn frontend_rendered_as_rules() {
    let lines = |view: &View, kind| -> Vec<String> {
        let frontends = frontends(view, SHOP);
        let of_kind = frontends.iter().copied().filter(|frontend| frontend.kind() == kind);
        expected(view, of_kind).iter().flat_map(|(key, held)| rules(view, &kernel_of(key, held))).collect()
    };
    let plain = view(service(), &[(5, "n1"), (6, "n2")]);
    let forwarded = "ip daddr 10.96.0.10 tcp dport 80 dnat to { 10.244.1.5:8080, 10.244.2.6:8080 }";
    let with = |settings: Settings| {
        let mut view = plain.clone();
        view.apply(LayerKind::Settings, &Change { change: Some(Kind::Settings(settings)) });
        lines(&view, FrontendKind::ClusterIp)
    };
    assert_eq!(
        lines(&plain, FrontendKind::ClusterIp),
        [format!("{forwarded} masquerade unless from a local pod")]
    );
    let all = Settings { masquerade_all: true, ..Settings::default() };
    assert_eq!(with(all), [format!("{forwarded} masquerade")]);
    let undetected = Settings { local_detection: LocalDetection::None.into(), ..Settings::default() };
    assert_eq!(with(undetected), [forwarded]);
    assert_eq!(
        lines(&view(service(), &[]), FrontendKind::ClusterIp),
        ["ip daddr 10.96.0.10 tcp dport 80 reject"]
    );
    let head = "ip daddr 198.51.100.1 tcp dport 80";
    let wanted = [
        format!("{head} ip saddr != {{ 192.0.2.0/24, 198.51.100.1/32 }} drop"),
        format!(
            "{head} dnat to {{ 10.244.1.5:8080, 10.244.2.6:8080 }} the same for a client for 600 s # from the node and \
             its pods"
        ),
        format!("{head} dnat to {{ 10.244.1.5:8080 }} the same for a client for 600 s # from elsewhere"),
    ];
    assert_eq!(lines(&balanced(), FrontendKind::LoadBalancer), wanted);
}
