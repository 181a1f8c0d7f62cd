//! Rules of kube-proxy 1.36.3, and comparisons of them.

use super::*;

/// `iptables-save` of a node: an API server, a NodePort with policy Local and no local endpoint, a load balancer with source
/// ranges and affinity, and a Service without endpoints.
const IPTABLES: &str = r#"*filter
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A KUBE-EXTERNAL-SERVICES -p tcp -m comment --comment "shop/web:http has no local endpoints" -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j DROP
-A KUBE-FW-AAAA -s 192.0.2.0/24 -m comment --comment "shop/cart:tcp loadbalancer IP" -j RETURN
-A KUBE-FW-AAAA -m comment --comment "other traffic to shop/cart:tcp will be dropped by KUBE-PROXY-FIREWALL" -j DROP
-A KUBE-PROXY-FIREWALL -d 198.51.100.7/32 -p tcp -m comment --comment "shop/cart:tcp traffic not accepted by KUBE-FW-AAAA" -m tcp --dport 80 -j KUBE-FW-AAAA
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m comment --comment "kube-system/kube-dns:dns has no endpoints" -m udp --dport 53 -j REJECT --reject-with icmp-port-unreachable
COMMIT
*nat
-A KUBE-EXT-WEB -m comment --comment "masquerade traffic for shop/web:http external destinations" -s 10.244.0.0/16 -j KUBE-SVC-WEB
-A KUBE-EXT-WEB -m addrtype --src-type LOCAL -j KUBE-SVC-WEB
-A KUBE-EXT-CART -j KUBE-MARK-MASQ
-A KUBE-EXT-CART -j KUBE-SVC-CART
-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/web:http" -m tcp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-SEP-A -s 10.203.0.1/32 -m comment --comment "default/kubernetes:https" -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -m comment --comment "default/kubernetes:https" -m tcp -j DNAT --to-destination 10.203.0.1:6443
-A KUBE-SEP-B -p tcp -m tcp -j DNAT --to-destination 10.244.1.5:8080
-A KUBE-SEP-C -p tcp -m recent --set --name KUBE-SEP-C --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.244.1.6:8080
-A KUBE-SEP-D -p tcp -m tcp -j DNAT --to-destination 10.244.1.7:8080
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-SVC-API
-A KUBE-SERVICES -d 198.51.100.7/32 -p tcp -m comment --comment "shop/cart:tcp loadbalancer IP" -m tcp --dport 80 -j KUBE-EXT-CART
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-API ! -s 10.244.0.0/16 -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-MARK-MASQ
-A KUBE-SVC-API -j KUBE-SEP-A
-A KUBE-SVC-CART -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-C --mask 255.255.255.255 --rsource -j KUBE-SEP-C
-A KUBE-SVC-CART -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-C
-A KUBE-SVC-CART -j KUBE-SEP-D
-A KUBE-SVC-WEB -j KUBE-SEP-B
COMMIT
"#;

/// The same Services, as `nft --json` prints them.
const NFTABLES: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
{"map": {"family": "ip", "name": "service-ips", "table": "kube-proxy", "elem": [
  [{"concat": ["10.96.0.1", "tcp", 443]}, {"goto": {"target": "service-2QRHZV4L-default/kubernetes/tcp/https"}}],
  [{"concat": ["198.51.100.7", "tcp", 80]}, {"goto": {"target": "external-CART-shop/cart/tcp/tcp"}}]]}},
{"map": {"family": "ip", "name": "service-nodeports", "table": "kube-proxy", "elem": [
  [{"concat": ["tcp", 30080]}, {"goto": {"target": "external-WEB-shop/web/tcp/http"}}]]}},
{"map": {"family": "ip", "name": "no-endpoint-services", "table": "kube-proxy", "elem": [
  [{"elem": {"val": {"concat": ["10.96.0.10", "udp", 53]}, "comment": "kube-system/kube-dns:dns"}}, {"goto": {"target": "reject-chain"}}]]}},
{"map": {"family": "ip", "name": "no-endpoint-nodeports", "table": "kube-proxy", "elem": [
  [{"concat": ["tcp", 30080]}, {"drop": null}]]}},
{"map": {"family": "ip", "name": "firewall-ips", "table": "kube-proxy", "elem": [
  [{"concat": ["198.51.100.7", "tcp", 80]}, {"goto": {"target": "firewall-CART-shop/cart/tcp/tcp"}}]]}},
{"rule": {"chain": "service-2QRHZV4L-default/kubernetes/tcp/https", "expr": [
  {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}},
  {"dnat": {"family": "ip", "addr": {"map": {"key": {"numgen": {"mode": "random", "mod": 1, "offset": 0}},
    "data": {"set": [[0, {"concat": ["10.203.0.1", 6443]}]]}}}}}]}},
{"rule": {"chain": "external-WEB-shop/web/tcp/http", "expr": [
  {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.244.0.0", "len": 16}}}},
  {"goto": {"target": "service-WEB-shop/web/tcp/http"}}]}},
{"rule": {"chain": "external-WEB-shop/web/tcp/http", "expr": [
  {"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["saddr"]}}, "right": "local"}},
  {"goto": {"target": "service-WEB-shop/web/tcp/http"}}]}},
{"rule": {"chain": "service-WEB-shop/web/tcp/http", "expr": [
  {"dnat": {"family": "ip", "addr": {"concat": ["10.244.1.5", 8080]}}}]}},
{"rule": {"chain": "external-CART-shop/cart/tcp/tcp", "expr": [
  {"mangle": {"key": {"meta": {"key": "mark"}}, "value": 16384}}]}},
{"rule": {"chain": "external-CART-shop/cart/tcp/tcp", "expr": [{"goto": {"target": "service-CART-shop/cart/tcp/tcp"}}]}},
{"rule": {"chain": "service-CART-shop/cart/tcp/tcp", "expr": [
  {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "@affinity-C-shop/cart/tcp/tcp__10.244.1.6/8080"}},
  {"goto": {"target": "endpoint-C-shop/cart/tcp/tcp__10.244.1.6/8080"}}]}},
{"rule": {"chain": "service-CART-shop/cart/tcp/tcp", "expr": [
  {"vmap": {"key": {"numgen": {"mode": "random", "mod": 2, "offset": 0}}, "data": {"set": [
    [0, {"goto": {"target": "endpoint-C-shop/cart/tcp/tcp__10.244.1.6/8080"}}],
    [1, {"goto": {"target": "endpoint-D-shop/cart/tcp/tcp__10.244.1.7/8080"}}]]}}}]}},
{"rule": {"chain": "endpoint-C-shop/cart/tcp/tcp__10.244.1.6/8080", "expr": [
  {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.244.1.6"}},
  {"mangle": {"key": {"meta": {"key": "mark"}}, "value": 16384}}]}},
{"rule": {"chain": "endpoint-C-shop/cart/tcp/tcp__10.244.1.6/8080", "expr": [
  {"dnat": {"family": "ip", "addr": "10.244.1.6", "port": 8080}}]}},
{"rule": {"chain": "endpoint-D-shop/cart/tcp/tcp__10.244.1.7/8080", "expr": [
  {"dnat": {"family": "ip", "addr": "10.244.1.7", "port": 8080}}]}},
{"rule": {"chain": "firewall-CART-shop/cart/tcp/tcp", "expr": [
  {"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"set": [{"prefix": {"addr": "192.0.2.0", "len": 24}}]}}},
  {"drop": null}]}}
]}"#;

fn endpoints(all: &[&str]) -> Destination {
    Destination::Endpoints(all.iter().map(|one| (*one).to_owned()).collect())
}

fn expected() -> Frontends {
    let frontend = |name: &str, service: &str, inside: Destination, outside: Destination| FrontendTreatment {
        frontend: name.to_owned(),
        service_port: service.to_owned(),
        inside,
        outside,
        affinity: false,
        sources: Vec::new(),
    };
    let same = |name: &str, service: &str, to: Destination| frontend(name, service, to.clone(), to);
    let cart =
        same("198.51.100.7:80/TCP", "shop/cart:tcp", endpoints(&["10.244.1.6:8080", "10.244.1.7:8080"]));
    let all = [
        same("10.96.0.1:443/TCP", "default/kubernetes:https", endpoints(&["10.203.0.1:6443"])),
        same("10.96.0.10:53/UDP", "kube-system/kube-dns:dns", Destination::Refused),
        frontend("0.0.0.0:30080/TCP", "shop/web:http", endpoints(&["10.244.1.5:8080"]), Destination::Dropped),
        FrontendTreatment { affinity: true, sources: vec!["192.0.2.0/24".to_owned()], ..cart },
    ];
    all.into_iter().map(|frontend| (frontend.frontend.clone(), frontend)).collect()
}

#[test]
fn rules_of_both_modes_have_the_same_meaning() {
    let numbers = NFTABLES.replace("\"udp\", 53", "17, 53").replace("\"tcp\", ", "6, ");
    for rules in [IPTABLES, NFTABLES, &numbers] {
        let parsed = parse(&[rules.to_owned()]).unwrap();
        assert_eq!(parsed.keys().collect::<Vec<_>>(), expected().keys().collect::<Vec<_>>());
        assert_eq!(compare(&parsed, &expected()), []);
    }
    assert!(parse(&["*nat\nCOMMIT\n".to_owned()]).is_err(), "no Service");
    assert!(parse(&["{".to_owned()]).is_err());
}

#[test]
fn differences_name_aspect_and_both_treatments() {
    let ours = expected();
    let mut theirs = ours.clone();
    theirs.remove("10.96.0.10:53/UDP");
    let changed = theirs.get_mut("198.51.100.7:80/TCP").unwrap();
    changed.outside = endpoints(&["10.244.1.6:8080"]);
    changed.affinity = false;
    let differences = compare(&theirs, &ours);
    let aspects: Vec<_> = differences.iter().map(|one| (one.frontend.as_str(), one.aspect)).collect();
    assert_eq!(
        aspects,
        [
            ("10.96.0.10:53/UDP", "frontend"),
            ("198.51.100.7:80/TCP", "outside"),
            ("198.51.100.7:80/TCP", "affinity")
        ]
    );
    let comparison = Comparison { node: "alpha", frontends: 4, differences };
    let text = text(&comparison, Style::PLAIN);
    assert!(
        text.contains("kube-proxy   10.244.1.6:8080\n    Switchtower  10.244.1.6:8080 10.244.1.7:8080"),
        "{text}"
    );
    assert!(text.contains("ST0421"), "{text}");
    assert!(
        super::text(&Comparison { node: "alpha", frontends: 4, differences: Vec::new() }, Style::PLAIN)
            .contains("equally")
    );
}
