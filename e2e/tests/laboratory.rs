//! The laboratory itself: its results about packets are correct without Switchtower.

use std::net::SocketAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use switchtower_e2e::lab::Lab;
use switchtower_e2e::lab::control_plane::ControlPlane;
use switchtower_e2e::probe::{self, ProbeResult, Transport};

#[test]
fn pods_exchange_packets_across_nodes_and_see_the_true_source() {
    let lab = Lab::create().unwrap();
    let one = lab.add_node("one", 1, &[]).unwrap();
    let two = lab.add_node("two", 2, &[&one]).unwrap();
    let a = lab.add_pod(&one, "a", 1).unwrap();
    let b = lab.add_pod(&one, "b", 2).unwrap();
    let c = lab.add_pod(&two, "c", 1).unwrap();
    for ipv6 in [false, true] {
        for transport in [Transport::Tcp, Transport::Udp] {
            for (from, to) in [(&a, &c), (&c, &a), (&a, &b)] {
                let address = SocketAddr::new(to.address(ipv6), 8080);
                let expected = ProbeResult::Reply { backend: to.name.clone(), source: from.address(ipv6) };
                switchtower_e2e::lab::wait::until("the pod answers", Duration::from_secs(5), || {
                    let outcome = probe::send(&from.namespace, transport, address)?;
                    anyhow::ensure!(outcome == expected, "{outcome}");
                    Ok(())
                })
                .unwrap();
            }
            let closed = SocketAddr::new(b.address(ipv6), 9);
            assert_eq!(probe::send(&a.namespace, transport, closed).unwrap(), ProbeResult::Refused);
            let host = SocketAddr::new(two.address(ipv6), 9);
            assert_eq!(probe::send(&one.client, transport, host).unwrap(), ProbeResult::Refused);
            let nobody: SocketAddr =
                if ipv6 { "[fd99::1]:9".parse().unwrap() } else { "203.0.113.99:9".parse().unwrap() };
            let patience = Duration::from_millis(300);
            let outcome = probe::send_with_timeout(&one.namespace, transport, nobody, patience).unwrap();
            assert_eq!(
                outcome,
                ProbeResult::Silence,
                "an unused address gives neither an answer nor a refusal"
            );
        }
    }
    let mut connection = probe::LongConnection::open(&a.namespace, (c.ipv4, 8080).into()).unwrap();
    connection.exchange().unwrap();
    c.server.kill();
    assert!(connection.exchange().is_err());
}

#[test]
fn control_plane_serves_kubectl_and_leaves_nothing_behind() {
    let control_plane = ControlPlane::start().unwrap();
    assert!(control_plane.kube().get_cluster::<Namespace>("default").unwrap().is_some());
    assert!(control_plane.kubectl(&["get", "namespaces"]).unwrap().contains("kube-system"));
    let directory = control_plane.directory().to_owned();
    let process = control_plane.api_server().id();
    drop(control_plane);
    assert!(!directory.exists());
    assert!(!std::path::Path::new(&format!("/proc/{process}")).exists());
}
