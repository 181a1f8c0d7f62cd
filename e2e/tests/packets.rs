//! Services reach their pods: every kind of address, protocol, family and policy, verified by packets.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::ensure;
use serde_json::json;
use switchtower_e2e::lab::http::http_get;
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{self, LongConnection, ProbeResult, Transport};

use switchtower_e2e::scene::{SOON, Scene, WAYS, answered_by, cluster_ip, eventually, node_port};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn every_kind_of_address_reaches_every_pod() {
    let scene = Scene::new("addresses");
    let vips = ["203.0.113.1", "2001:db8:113::1"];
    let external = ["192.0.2.1", "2001:db8:2::1"];
    let service = scene.load_balancer("web", &json!({"externalIPs": external}), &vips);
    scene.endpoints("web", &["a1", "b1", "c1"]);
    let all = ["a1", "b1", "c1"];
    for (transport, ipv6) in WAYS {
        let family = usize::from(ipv6);
        let node = scene.node("beta");
        let targets = [
            ("ClusterIP", cluster_ip(&service, ipv6)),
            ("NodePort", SocketAddr::new(node.net.address(ipv6), node_port(&service, transport))),
            ("LoadBalancer", SocketAddr::new(ip(vips[family]), 80)),
            ("externalIP", SocketAddr::new(ip(external[family]), 80)),
        ];
        for (kind, to) in targets {
            answered_by(kind, scene.pod("b1"), transport, to, &all);
            answered_by(kind, scene.pod("c2"), transport, to, &all);
            answered_by(kind, &node.net.client, transport, to, &all);
            answered_by(kind, &node.net.namespace, transport, to, &all);
        }
    }
}

#[test]
fn sources_are_kept_or_masqueraded_as_kube_proxy_does() {
    let scene = Scene::new("sources");
    let service = scene.load_balancer("web", &json!({}), &["203.0.113.2", "2001:db8:113::2"]);
    scene.endpoints("web", &["a1"]);
    for (transport, ipv6) in WAYS {
        let to = cluster_ip(&service, ipv6);
        let vip = SocketAddr::new(ip(if ipv6 { "2001:db8:113::2" } else { "203.0.113.2" }), 80);
        let sees = |source: IpAddr| move |outcome: &ProbeResult| outcome.source() == Some(source);
        let (c2, gamma) = (scene.pod("c2"), scene.node("gamma"));
        eventually("a pod keeps its address", c2, transport, to, sees(scene.pod_address("c2", ipv6)));
        let node_address = gamma.net.address(ipv6);
        // A pod is masqueraded to a load balancer's address like any client, with the first address of its gateway.
        eventually(
            "an off-cluster client is masqueraded",
            &gamma.net.client,
            transport,
            vip,
            sees(node_address),
        );
        eventually("a host process is masqueraded", &gamma.net.namespace, transport, to, sees(node_address));
        let pod_address = scene.pod_address("a1", ipv6);
        let own = eventually("a pod reaches itself", scene.pod("a1"), transport, to, |outcome| {
            outcome.backend() == Some("a1")
        });
        assert_ne!(own.source(), Some(pod_address), "a hairpin connection must come back through the node");
    }
}

#[test]
fn external_policy_local_keeps_client_and_drops_elsewhere() {
    let scene = Scene::new("etp-local");
    let vips = ["203.0.113.3", "2001:db8:113::3"];
    let service = scene.load_balancer("web", &json!({"externalTrafficPolicy": "Local"}), &vips);
    scene.endpoints("web", &["a1", "b1"]);
    for (transport, ipv6) in WAYS {
        let vip = SocketAddr::new(ip(vips[usize::from(ipv6)]), 80);
        for (name, pod) in [("alpha", "a1"), ("beta", "b1")] {
            let net = &scene.node(name).net;
            let port = SocketAddr::new(net.address(ipv6), node_port(&service, transport));
            for to in [vip, port] {
                let wanted = ProbeResult::Reply { backend: pod.to_owned(), source: net.client_address(ipv6) };
                eventually("from outside", &net.client, transport, to, |outcome| *outcome == wanted);
            }
        }
        let gamma = &scene.node("gamma").net;
        let port = SocketAddr::new(gamma.address(ipv6), node_port(&service, transport));
        for to in [vip, port] {
            let silent = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
            eventually("no local endpoint, from outside", &gamma.client, transport, to, silent);
            answered_by("no local endpoint, from a pod", scene.pod("c1"), transport, to, &["a1", "b1"]);
            answered_by("no local endpoint, from the host", &gamma.namespace, transport, to, &["a1", "b1"]);
        }
        let kept = |outcome: &ProbeResult| outcome.source() == Some(scene.pod_address("c1", ipv6));
        eventually("a pod is not masqueraded", scene.pod("c1"), transport, vip, kept);
    }
}

#[test]
fn internal_policy_local_stays_on_the_node_or_is_dropped() {
    let scene = Scene::new("itp-local");
    let service = scene.service("web", &json!({"internalTrafficPolicy": "Local"}));
    scene.endpoints("web", &["a1", "b1"]);
    for (transport, ipv6) in WAYS {
        let to = cluster_ip(&service, ipv6);
        answered_by("local", scene.pod("a2"), transport, to, &["a1"]);
        answered_by("local", scene.pod("b1"), transport, to, &["b1"]);
        let silent = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
        eventually("nothing local", scene.pod("c1"), transport, to, silent);
    }
    scene.endpoints("web", &["a1", "c2"]);
    answered_by("moved", scene.pod("c1"), Transport::Tcp, cluster_ip(&service, false), &["c2"]);
}

#[test]
fn zone_hints_keep_traffic_in_the_zone_until_one_is_missing() {
    let scene = Scene::new("zones");
    let service = scene.service("web", &json!({}));
    let zone = |name: &str| if name.starts_with('c') { "west" } else { "east" };
    let pods = ["a1", "b1", "c1"];
    scene.endpoints_with("web", &pods, |name, endpoint| objects::hinted(endpoint, &[zone(name)]));
    for (transport, ipv6) in WAYS {
        let to = cluster_ip(&service, ipv6);
        answered_by("in the east", scene.pod("a2"), transport, to, &["a1", "b1"]);
        answered_by("in the west", scene.pod("c2"), transport, to, &["c1"]);
    }
    scene.endpoints_with("web", &pods, |name, endpoint| match name {
        "b1" => endpoint,
        _ => objects::hinted(endpoint, &[zone(name)]),
    });
    let to = cluster_ip(&service, false);
    answered_by("one hint is missing", scene.pod("c2"), Transport::Tcp, to, &pods);
    scene.endpoints_with("web", &pods, |_, endpoint| objects::hinted(endpoint, &["east"]));
    answered_by("no hint for the west", scene.pod("c2"), Transport::Tcp, to, &pods);
}

#[test]
fn node_hints_keep_traffic_on_the_node_until_one_is_missing() {
    let scene = Scene::new("node-hints");
    let service = scene.service("web", &json!({}));
    let node = |name: &str| scene.fleet.pod(name).unwrap().1.net.name.clone();
    let pods = ["a1", "b1", "c1"];
    scene.endpoints_with("web", &pods, |name, endpoint| objects::hinted_for_nodes(endpoint, &[&node(name)]));
    for (transport, ipv6) in WAYS {
        let to = cluster_ip(&service, ipv6);
        for (client, pod) in [("a2", "a1"), ("b1", "b1"), ("c2", "c1")] {
            answered_by("on its own node", scene.pod(client), transport, to, &[pod]);
        }
    }
    let to = cluster_ip(&service, false);
    scene.endpoints_with("web", &pods, |name, endpoint| match name {
        "b1" => endpoint,
        _ => objects::hinted_for_nodes(endpoint, &[&node(name)]),
    });
    answered_by("one hint is missing", scene.pod("c2"), Transport::Tcp, to, &pods);
    scene.endpoints_with("web", &pods, |_, endpoint| objects::hinted_for_nodes(endpoint, &["alpha"]));
    answered_by("hinted", scene.pod("a2"), Transport::Tcp, to, &pods);
    answered_by("no hint for gamma", scene.pod("c2"), Transport::Tcp, to, &pods);
}

#[test]
fn health_check_node_port_reports_local_endpoints() {
    let scene = Scene::new("health-check");
    let policy = json!({"externalTrafficPolicy": "Local"});
    let service = scene.load_balancer("web", &policy, &["203.0.113.9", "2001:db8:113::9"]);
    let port = service.spec.as_ref().and_then(|spec| spec.health_check_node_port).unwrap();
    let port = u16::try_from(port).unwrap();
    let expect = |node: &str, ipv6: bool, status: &str, count: u32| {
        let net = &scene.node(node).net;
        wait::until("the health check answers", SOON, || {
            let to = SocketAddr::new(net.address(ipv6), port);
            let answer = net.client.run(|| http_get(to, "/"))??;
            let lower = answer.to_lowercase();
            ensure!(answer.starts_with(&format!("HTTP/1.0 {status}")), "{node}: {answer}");
            ensure!(
                lower.contains(&format!("x-load-balancing-endpoint-weight: {count}\r")),
                "{node}: {answer}"
            );
            ensure!(answer.contains(&format!("\"localEndpoints\":{count}")), "{node}: {answer}");
            Ok(())
        })
        .unwrap();
    };
    scene.endpoints("web", &["a1", "a2", "b1"]);
    for ipv6 in [false, true] {
        expect("alpha", ipv6, "200", 2);
        expect("beta", ipv6, "200", 1);
        expect("gamma", ipv6, "503", 0);
    }
    // A terminating pod serves if it is the last one, but the load balancer must drain the node.
    scene.endpoints_with("web", &["a1", "a2", "b1"], |name, endpoint| match name {
        "a1" => endpoint,
        _ => objects::terminating(endpoint, true),
    });
    expect("alpha", false, "200", 1);
    expect("beta", false, "503", 0);
    let to = SocketAddr::new(ip("203.0.113.9"), 80);
    answered_by("a pod that shuts down", &scene.node("beta").net.client, Transport::Tcp, to, &["b1"]);
}

#[test]
fn terminating_pods_serve_only_while_no_other_does() {
    let scene = Scene::new("terminating");
    let service = scene.service("web", &json!({}));
    let ending = |endings: &'static [(&str, bool)]| {
        move |name: &str, endpoint| match endings.iter().find(|(ending, _)| *ending == name) {
            Some((_, serving)) => objects::terminating(endpoint, *serving),
            None => endpoint,
        }
    };
    let (to, from) = (cluster_ip(&service, false), scene.pod("c2"));
    scene.endpoints_with("web", &["a1", "b1"], ending(&[("a1", true)]));
    answered_by("one is ready", from, Transport::Tcp, to, &["b1"]);
    scene.endpoints_with("web", &["a1", "b1"], ending(&[("a1", true), ("b1", true)]));
    answered_by("none is ready, both serve", from, Transport::Tcp, to, &["a1", "b1"]);
    scene.endpoints_with("web", &["a1", "b1"], ending(&[("a1", true), ("b1", false)]));
    answered_by("one serves", from, Transport::Tcp, to, &["a1"]);
    scene.endpoints_with("web", &["a1", "b1"], ending(&[("a1", false), ("b1", false)]));
    eventually("none serves", from, Transport::Tcp, to, |outcome| *outcome == ProbeResult::Refused);
}

#[test]
fn without_endpoints_clients_are_refused_at_once() {
    let scene = Scene::new("refused");
    let vips = ["203.0.113.4", "2001:db8:113::4"];
    let service = scene.load_balancer("web", &json!({}), &vips);
    let refused = |outcome: &ProbeResult| *outcome == ProbeResult::Refused;
    for (transport, ipv6) in WAYS {
        let node = &scene.node("beta").net;
        let port = SocketAddr::new(node.address(ipv6), node_port(&service, transport));
        for to in [cluster_ip(&service, ipv6), SocketAddr::new(ip(vips[usize::from(ipv6)]), 80), port] {
            eventually("from a pod", scene.pod("c1"), transport, to, refused);
            eventually("from outside", &node.client, transport, to, refused);
            eventually("from the host", &node.namespace, transport, to, refused);
        }
        let mut unused = cluster_ip(&service, ipv6);
        unused.set_port(81);
        eventually("a port that is not defined", scene.pod("c1"), transport, unused, refused);
    }
    let silent = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
    // From the part of the range that the API server does not allocate automatically.
    let nobody = SocketAddr::new(ip("10.96.0.250"), 80);
    eventually("a free address of the ServiceCIDR", scene.pod("c1"), Transport::Tcp, nobody, silent);
}

#[test]
fn session_affinity_holds_a_client_to_its_pod() {
    let scene = Scene::new("affinity");
    let spec = json!({
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
    });
    let service = scene.service("web", &spec);
    scene.endpoints("web", &["a1", "b1", "c1"]);
    for (transport, ipv6) in WAYS {
        let (to, from) = (cluster_ip(&service, ipv6), scene.pod("c2"));
        let first = eventually("answers", from, transport, to, |outcome| outcome.backend().is_some());
        let spread = probe::spread(from, transport, to, 30).unwrap();
        let wanted = BTreeMap::from([(first.backend().unwrap().to_owned(), 30)]);
        assert_eq!(spread, wanted, "{transport:?} to {to}");
    }
    // The client's pod is removed: another one answers, and keeps the client from then on.
    let (to, from) = (cluster_ip(&service, false), scene.pod("c2"));
    let held = probe::send(from, Transport::Tcp, to).unwrap().backend().unwrap().to_owned();
    let rest: Vec<_> = ["a1", "b1", "c1"].into_iter().filter(|pod| *pod != held).collect();
    scene.endpoints("web", &rest);
    eventually("another pod", from, Transport::Tcp, to, |outcome| {
        outcome.backend().is_some_and(|backend| rest.contains(&backend))
    });
    assert_eq!(probe::spread(from, Transport::Tcp, to, 20).unwrap().len(), 1);
}

#[test]
fn source_ranges_guard_the_load_balancer_and_nothing_else() {
    let scene = Scene::new("ranges");
    let (alpha, beta) = (&scene.node("alpha").net, &scene.node("beta").net);
    let ranges =
        [format!("{}/32", alpha.client_address(false)), format!("{}/128", alpha.client_address(true))];
    let vips = ["203.0.113.5", "2001:db8:113::5"];
    let spec = json!({"loadBalancerSourceRanges": ranges});
    let service = scene.load_balancer("web", &spec, &vips);
    scene.endpoints("web", &["c1"]);
    for (transport, ipv6) in WAYS {
        let vip = SocketAddr::new(ip(vips[usize::from(ipv6)]), 80);
        let silent = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
        let answers = |outcome: &ProbeResult| outcome.backend() == Some("c1");
        eventually("allowed", &alpha.client, transport, vip, answers);
        eventually("not allowed", &beta.client, transport, vip, silent);
        eventually("pods are not exempt", scene.pod("b1"), transport, vip, silent);
        let port = SocketAddr::new(beta.address(ipv6), node_port(&service, transport));
        eventually("a NodePort is not guarded", &beta.client, transport, port, answers);
    }
}

#[test]
fn udp_flow_leaves_removed_pod_and_tcp_connection_stays() {
    let scene = Scene::new("flows");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    let (to, from) = (cluster_ip(&service, false), scene.pod("c2"));
    eventually("answers", from, Transport::Tcp, to, |outcome| outcome.backend() == Some("a1"));
    let mut connection = LongConnection::open(from, to).unwrap();
    let socket = from.run(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap().unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let ask = || -> anyhow::Result<String> {
        socket.send(b"?")?;
        let mut answer = [0; 100];
        let length = socket.recv(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer[..length])
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned())
    };
    wait::until("the UDP flow is a1's", SOON, || {
        anyhow::ensure!(ask()? == "a1");
        Ok(())
    })
    .unwrap();
    scene.endpoints("web", &["b1"]);
    wait::until("the UDP flow moves to b1", SOON, || {
        anyhow::ensure!(ask()? == "b1", "still a1");
        Ok(())
    })
    .unwrap();
    eventually("new connections", from, Transport::Tcp, to, |outcome| outcome.backend() == Some("b1"));
    connection.exchange().unwrap();
    assert_eq!(connection.backend(), "a1");
}

#[test]
fn deleted_service_no_longer_answers() {
    let scene = Scene::new("gone");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1", "c1"]);
    let to = cluster_ip(&service, false);
    answered_by("at first", scene.pod("b1"), Transport::Tcp, to, &["a1", "c1"]);
    scene.fleet.kube().delete::<k8s_openapi::api::core::v1::Service>("gone", "web").unwrap();
    eventually("gone", scene.pod("b1"), Transport::Tcp, to, |outcome| outcome.backend().is_none());
}

#[test]
fn service_of_another_proxy_is_ignored() {
    let scene = Scene::new("foreign");
    let spec = json!({"ports": [{"name": "tcp", "protocol": "TCP", "port": 80}]});
    let mut object = objects::service("foreign", "web", &spec);
    object["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
    scene.fleet.kube().apply(&object).unwrap();
    let (pod, node) = scene.fleet.pod("a1").unwrap();
    let endpoints = [objects::endpoint(pod, &node.net, false)];
    let mut slice = objects::slice("foreign", "web-4", "web", false, &[("tcp", "TCP", 8080)], &endpoints);
    slice["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = json!("other");
    scene.fleet.kube().apply(&slice).unwrap();
    let ours = scene.service("ours", &json!({}));
    scene.endpoints("ours", &["a1"]);
    let (to, from) = (cluster_ip(&ours, false), scene.pod("b1"));
    eventually("ours", from, Transport::Tcp, to, |outcome| outcome.backend().is_some());
    let foreign: k8s_openapi::api::core::v1::Service =
        scene.fleet.kube().get("foreign", "web").unwrap().unwrap();
    let outcome = probe::send(from, Transport::Tcp, cluster_ip(&foreign, false)).unwrap();
    assert_eq!(outcome.backend(), None);
}

#[test]
fn internal_policy_local_on_the_host_network() {
    let scene = Scene::new("host-network");
    let service = scene.service("web", &json!({"internalTrafficPolicy": "Local"}));
    let beta = &scene.node("beta").net;
    let _server = scene.fleet.lab().start_server(&beta.namespace, "host").unwrap();
    for ipv6 in [false, true] {
        let endpoint = json!({
            "addresses": [beta.address(ipv6).to_string()], "nodeName": "beta", "conditions": {"ready": true},
        });
        let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
        let name = format!("web-{}", if ipv6 { 6 } else { 4 });
        let slice = objects::slice(&scene.namespace, &name, "web", ipv6, &ports, &[endpoint]);
        scene.fleet.kube().apply(&slice).unwrap();
    }
    for (transport, ipv6) in WAYS {
        let to = cluster_ip(&service, ipv6);
        answered_by("on the node", &beta.namespace, transport, to, &["host"]);
        let silent = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
        eventually("elsewhere", &scene.node("alpha").net.namespace, transport, to, silent);
    }
}

/// An endpoint as the EndpointSlice controller writes it: an unready endpoint counts as ready if the Service
/// publishes unready addresses, and disappears once its pod is evicted.
#[test]
fn publish_not_ready_addresses_until_eviction() {
    let scene = Scene::new("not-ready");
    let service = scene.service("web", &json!({"publishNotReadyAddresses": true}));
    scene.endpoints_with("web", &["a1"], |_, mut endpoint| {
        endpoint["conditions"] = json!({"ready": true, "serving": false, "terminating": false});
        endpoint
    });
    for ipv6 in [false, true] {
        answered_by("not ready", scene.pod("c1"), Transport::Tcp, cluster_ip(&service, ipv6), &["a1"]);
    }
    scene.endpoints("web", &[]);
    let refused = |outcome: &ProbeResult| *outcome == ProbeResult::Refused;
    eventually("evicted", scene.pod("c1"), Transport::Tcp, cluster_ip(&service, false), refused);
}

#[test]
fn external_name_and_back_releases_and_regains_address() {
    let scene = Scene::new("external-name");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    let to = cluster_ip(&service, false);
    answered_by("at first", scene.pod("c1"), Transport::Tcp, to, &["a1"]);
    let name = json!({"type": "ExternalName", "externalName": "example.org"});
    scene.fleet.kube().apply(&objects::service(&scene.namespace, "web", &name)).unwrap();
    let silent = |outcome: &ProbeResult| *outcome == ProbeResult::Silence;
    eventually("an external name", scene.pod("c1"), Transport::Tcp, to, silent);
    let service = scene.service("web", &json!({}));
    answered_by("again", scene.pod("c1"), Transport::Tcp, cluster_ip(&service, false), &["a1"]);
}
