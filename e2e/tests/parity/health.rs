//! Health responses of both proxies over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1;
use serde_json::{Value, json};
use switchtower_e2e::lab::wait;
use switchtower_e2e::parity::case::{Endpoint, Step};
use switchtower_e2e::parity::{Kind, Origin, World, essence};

use crate::support::{P1, P2, P3, P5, agree_in, balancer, ready, terminating, world, zones};

const SOON: Duration = Duration::from_secs(30);

/// Waits until both proxies give the same response, with this beginning.
#[track_caller]
fn both_answer(world: &World, to: SocketAddr, path: &str, beginning: &str) -> Vec<String> {
    wait::until(&format!("GET {path} of {to}: {beginning}"), SOON, || {
        let answers = world.ask_node(to, path)?;
        let (theirs, ours) = (essence(&answers.kube_proxy), essence(&answers.switchtower));
        ensure!(theirs == ours, "kube-proxy: {theirs:?}, Switchtower: {ours:?}");
        ensure!(ours.iter().any(|line| line.starts_with(beginning)), "{ours:?}");
        Ok(ours)
    })
    .unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn health_check_node_ports_count_ready_local_endpoints() {
    let mut world = world();
    let service = |endpoints: Vec<Endpoint>| {
        let mut service = balancer(endpoints);
        service.external_local = true;
        service
    };
    let cases = [
        (vec![ready(P1), ready(P2), ready(P3)], "HTTP/1.1 200", "x-load-balancing-endpoint-weight: 2"),
        (vec![ready(P1), terminating(P2, true)], "HTTP/1.1 200", "x-load-balancing-endpoint-weight: 1"),
        (vec![terminating(P2, true)], "HTTP/1.1 503", "x-load-balancing-endpoint-weight: 0"),
        (vec![ready(P3)], "HTTP/1.1 503", "x-load-balancing-endpoint-weight: 0"),
    ];
    for (endpoints, status, weight) in cases {
        agree_in(&mut world, vec![service(endpoints)], Vec::new());
        let object: v1::Service = world.kube().get("default", "web").unwrap().unwrap();
        let port = u16::try_from(object.spec.unwrap().health_check_node_port.unwrap()).unwrap();
        let to = SocketAddr::new(world.node_address(false), port);
        let answer = both_answer(&world, to, "/", status);
        assert!(answer.contains(&weight.to_owned()), "{answer:?}");
    }
}

#[test]
fn health_check_node_ports_come_and_go_with_type_and_policy() {
    let mut world = world();
    let mut local = balancer(vec![ready(P1)]);
    local.external_local = true;
    agree_in(&mut world, vec![local.clone()], Vec::new());
    let object: v1::Service = world.kube().get("default", "web").unwrap().unwrap();
    let port = u16::try_from(object.spec.unwrap().health_check_node_port.unwrap()).unwrap();
    let to = SocketAddr::new(world.node_address(false), port);
    both_answer(&world, to, "/any/path", "HTTP/1.1 200");
    agree_in(&mut world, vec![local], vec![Step::Apply(balancer(vec![ready(P1)]))]);
    wait::until("the port is closed", SOON, || {
        let answers = world.ask_node(to, "/")?;
        let told = |answer: &str| answer.starts_with("HTTP");
        ensure!(!told(&answers.kube_proxy) && !told(&answers.switchtower), "{answers:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn node_removed_by_autoscaler_is_alive_and_not_healthy() {
    let world = world();
    let to = SocketAddr::new(world.node_address(false), 10_256);
    both_answer(&world, to, "/healthz", "HTTP/1.1 200");
    let taint = |taints: Value| {
        let patch = json!({"spec": {"taints": taints}});
        let api: kube::Api<v1::Node> = kube::Api::all(world.kube().client());
        let (parameters, patch) = (kube::api::PatchParams::default(), kube::api::Patch::Merge(&patch));
        world.kube().block_on(api.patch("n1", &parameters, &patch)).unwrap();
    };
    taint(json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]));
    both_answer(&world, to, "/healthz", "HTTP/1.1 503");
    both_answer(&world, to, "/livez", "HTTP/1.1 200");
    taint(Value::Null);
    both_answer(&world, to, "/healthz", "HTTP/1.1 200");
}

#[test]
fn node_being_deleted_is_alive_and_not_healthy() {
    const FINALIZER: &str = "example.com/kept-for-a-moment";
    let mut world = world();
    let to = SocketAddr::new(world.node_address(false), 10_256);
    both_answer(&world, to, "/healthz", "HTTP/1.1 200");
    let finalizers = |world: &World, finalizers: Value| {
        let patch = json!({"metadata": {"finalizers": finalizers}});
        let api: kube::Api<v1::Node> = kube::Api::all(world.kube().client());
        let (parameters, patch) = (kube::api::PatchParams::default(), kube::api::Patch::Merge(&patch));
        world.kube().block_on(api.patch("n1", &parameters, &patch)).unwrap();
    };
    finalizers(&world, json!([FINALIZER]));
    world.kube().delete_cluster::<v1::Node>("n1").unwrap();
    let answer = both_answer(&world, to, "/healthz", "HTTP/1.1 503");
    assert!(answer.last().unwrap().contains(r#""nodeEligible":false"#), "{answer:?}");
    both_answer(&world, to, "/livez", "HTTP/1.1 200");
    // Packets are served as before, while the Node is deleted and after it was created again.
    let service =
        balancer(vec![zones(ready(P1), &["a"]), zones(ready(P3), &["a"]), zones(ready(P5), &["b"])]);
    agree_in(&mut world, vec![service.clone()], Vec::new());
    finalizers(&world, json!([]));
    world.make_node_again().unwrap();
    both_answer(&world, to, "/healthz", "HTTP/1.1 200");
    let states = agree_in(&mut world, vec![service], Vec::new());
    assert_eq!(states[0].pods(Origin::LocalPod, Kind::ClusterIP), ["p1", "p3"]);
}

#[test]
fn proxy_mode_reported() {
    let world = world();
    both_answer(&world, ([127, 0, 0, 1], 10_249).into(), "/proxyMode", "HTTP/1.1 200");
}
