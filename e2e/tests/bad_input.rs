//! Invalid or inconsistent objects that the API server accepts. They never affect other Services, an Event reports
//! them if a user can fix them, and their valid parts work.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::{Event, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::ListParams;
use serde_json::json;
use switchtower_e2e::lab::http::http_get;
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{ProbeResult, Transport};

use switchtower_e2e::scene::{SOON, Scene, alone, answered_by, cluster_ip, eventually, fleet};

/// Checks that another Service works and follows a change: controller and agents are alive.
fn others_work(scene: &Scene) {
    let name = format!("other-{:08x}", rand::random::<u32>());
    let service = scene.service(&name, &json!({}));
    for pod in ["a1", "c1"] {
        scene.endpoints(&name, &[pod]);
        for ipv6 in [false, true] {
            let to = cluster_ip(&service, ipv6);
            answered_by("another Service", scene.pod("b1"), Transport::Tcp, to, &[pod]);
        }
    }
    fleet().settled(SOON).unwrap();
}

/// Waits for an Event with a reason on an object of this name.
fn event(namespace: &str, object: &str, reason: &str) -> String {
    let api: Api<Event> = Api::all(fleet().kube().client());
    wait::until(&format!("an Event {reason} about {namespace}/{object}"), SOON, || {
        let events = fleet().kube().block_on(api.list(&ListParams::default()))?;
        let found = events.items.into_iter().find(|event| {
            event.reason.as_deref() == Some(reason) && event.involved_object.name.as_deref() == Some(object)
        });
        ensure!(found.is_some(), "there is no such Event");
        Ok(found.and_then(|event| event.message).unwrap_or_default())
    })
    .unwrap()
}

#[test]
fn older_of_two_services_keeps_external_address() {
    let _alone = alone();
    let scene = Scene::new("conflict");
    let spec = json!({"externalIPs": ["192.0.2.41"]});
    scene.service("first", &spec);
    scene.endpoints("first", &["a1"]);
    let to = SocketAddr::new("192.0.2.41".parse().unwrap(), 80);
    answered_by("alone", scene.pod("b1"), Transport::Tcp, to, &["a1"]);
    // Creation times have a resolution of seconds.
    std::thread::sleep(Duration::from_millis(1100));
    scene.service("a-second", &spec);
    scene.endpoints("a-second", &["c1"]);
    event("conflict", "a-second", "AddressConflict");
    answered_by("claimed twice", scene.pod("b1"), Transport::Tcp, to, &["a1"]);
    others_work(&scene);
    scene.fleet.kube().delete::<Service>("conflict", "first").unwrap();
    answered_by("the older one is gone", scene.pod("b1"), Transport::Tcp, to, &["c1"]);
}

#[test]
fn slices_with_odd_ports_keep_the_rest_of_their_service() {
    let _alone = alone();
    let scene = Scene::new("odd-ports");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    let (pod, node) = scene.fleet.pod("c1").unwrap();
    let endpoints = [objects::endpoint(pod, &node.net, false)];
    // A slice whose ports have no number means "all ports" to other consumers, and nothing to a service proxy.
    let mut slice = objects::slice("odd-ports", "web-none", "web", false, &[], &endpoints);
    slice["ports"] = json!([{"name": "tcp", "protocol": "TCP"}]);
    scene.fleet.kube().apply(&slice).unwrap();
    // A port name that the Service lacks.
    let slice = objects::slice("odd-ports", "web-name", "web", false, &[("x", "TCP", 8080)], &endpoints);
    scene.fleet.kube().apply(&slice).unwrap();
    answered_by("the rest", scene.pod("b1"), Transport::Tcp, cluster_ip(&service, false), &["a1"]);
    others_work(&scene);
}

#[test]
fn slice_without_service_has_no_effect() {
    let _alone = alone();
    let scene = Scene::new("orphans");
    let (pod, node) = scene.fleet.pod("c1").unwrap();
    let endpoints = [objects::endpoint(pod, &node.net, false)];
    let ports = [("tcp", "TCP", 8080)];
    let mut slice = objects::slice("orphans", "unlabelled", "web", false, &ports, &endpoints);
    slice["metadata"]["labels"] = json!({});
    scene.fleet.kube().apply(&slice).unwrap();
    scene
        .fleet
        .kube()
        .apply(&objects::slice("orphans", "early", "later", false, &ports, &endpoints))
        .unwrap();
    let mut names = objects::slice("orphans", "names", "web", false, &ports, &[]);
    names["addressType"] = json!("FQDN");
    names["endpoints"] = json!([{"addresses": ["pod.example"]}]);
    scene.fleet.kube().apply(&names).unwrap();
    others_work(&scene);
    // The slice exists before its Service.
    let service = scene.service("later", &json!({}));
    let to = cluster_ip(&service, false);
    answered_by("a slice older than its Service", scene.pod("b1"), Transport::Tcp, to, &["c1"]);
}

#[test]
fn endpoint_in_two_slices_counts_once() {
    let _alone = alone();
    let scene = Scene::new("twice");
    let service = scene.service("web", &json!({}));
    scene.endpoints("web", &["a1"]);
    let (pod, node) = scene.fleet.pod("a1").unwrap();
    let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
    let endpoints = [objects::endpoint(pod, &node.net, false)];
    scene.fleet.kube().apply(&objects::slice("twice", "again", "web", false, &ports, &endpoints)).unwrap();
    let to = cluster_ip(&service, false);
    answered_by("twice", scene.pod("b1"), Transport::Tcp, to, &["a1"]);
    scene.fleet.kube().delete::<EndpointSlice>("twice", "again").unwrap();
    fleet().settled(SOON).unwrap();
    answered_by("once", scene.pod("b1"), Transport::Tcp, to, &["a1"]);
    scene.fleet.kube().delete::<EndpointSlice>("twice", "web-4").unwrap();
    let refused = |outcome: &ProbeResult| *outcome == ProbeResult::Refused;
    eventually("not at all", scene.pod("b1"), Transport::Tcp, to, refused);
}

#[test]
fn bare_node_has_a_row_and_disturbs_no_other() {
    let _alone = alone();
    let scene = Scene::new("bare-node");
    let bare = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "bare"}});
    scene.fleet.kube().apply(&bare).unwrap();
    wait::until("bare has a row", SOON, || {
        let row = scene.fleet.row("bare")?;
        ensure!(row.state == "Absent", "its state is {}", row.state);
        Ok(())
    })
    .unwrap();
    others_work(&scene);
    scene.fleet.kube().delete_cluster::<Node>("bare").unwrap();
    wait::until("bare's row is gone", SOON, || {
        ensure!(scene.fleet.row("bare").is_err(), "it is still there");
        Ok(())
    })
    .unwrap();
}

#[test]
fn thousand_endpoints_do_not_stop_the_rest() {
    let _alone = alone();
    let scene = Scene::new("many");
    let service = scene.service("web", &json!({}));
    let (pod, node) = scene.fleet.pod("c1").unwrap();
    for slice in 0..10 {
        // Addresses without a host on any node: this test is about programming them.
        let endpoints: Vec<_> = (0..100)
            .map(|index| {
                json!({"addresses": [format!("10.99.{slice}.{index}")], "conditions": {"ready": true}})
            })
            .collect();
        let name = format!("web-{slice}");
        let ports = [("udp", "UDP", 8080)];
        scene.fleet.kube().apply(&objects::slice("many", &name, "web", false, &ports, &endpoints)).unwrap();
    }
    let endpoints = [objects::endpoint(pod, &node.net, false)];
    let ports = [("tcp", "TCP", 8080)];
    scene.fleet.kube().apply(&objects::slice("many", "web-tcp", "web", false, &ports, &endpoints)).unwrap();
    answered_by("its other port", scene.pod("b1"), Transport::Tcp, cluster_ip(&service, false), &["c1"]);
    others_work(&scene);
}

#[test]
fn taken_health_check_node_port_reported_and_retried() {
    let _alone = alone();
    let scene = Scene::new("taken");
    let net = &scene.node("beta").net;
    // From the part of the range that the API server does not allocate automatically.
    let port = 30_045;
    let to = SocketAddr::new(net.address(false), port);
    let squatter = net.namespace.run(|| TcpListener::bind(to)).unwrap().unwrap();
    let extra = json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": port});
    scene.load_balancer("web", &extra, &["203.0.113.31"]);
    scene.endpoints("web", &["b1"]);
    let message = event("taken", "web", "FailedToStartServiceHealthcheck");
    assert!(message.contains("node beta") && message.contains(&to.to_string()), "{message}");
    let virtual_address = SocketAddr::new("203.0.113.31".parse().unwrap(), 80);
    answered_by("the Service", &net.client, Transport::Tcp, virtual_address, &["b1"]);
    others_work(&scene);
    drop(squatter);
    wait::until("the health check answers", SOON, || {
        let answer = net.client.run(|| http_get(to, "/"))??;
        ensure!(answer.contains(" 200 "), "{answer}");
        Ok(())
    })
    .unwrap();
}
