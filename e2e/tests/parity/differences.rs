//! Deliberate differences, including kube-proxy's behaviour: the table in docs/parity.md.

use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1;
use kube::api::DeleteParams;
use serde_json::json;
use switchtower_e2e::lab::wait;
use switchtower_e2e::parity::case::{Families, Protocol, Service};
use switchtower_e2e::parity::{Kind, Origin, Probe, World, essence};

use crate::support::{P1, REFUSED, agree_in, balancer, cluster_ip, port, ready, unready, world};

const SOON: Duration = Duration::from_secs(30);
/// Timeout for behaviour that kube-proxy delays until its next full sync, up to an hour later.
const WHILE: Duration = Duration::from_secs(3);

fn single(protocol: Protocol) -> Service {
    let mut service = cluster_ip(vec![ready(P1)]);
    service.families = Families::Ipv4;
    service.ports = vec![port(protocol, 80, 8080)];
    service
}

/// Checks that a flow of a local pod to the Service, answered by p1 in both worlds, ends with Switchtower after
/// `change`, while kube-proxy keeps it. A datagram in transit at that moment is lost silently: the final state is
/// checked.
fn ends_here(world: &mut World, end: &str, change: impl FnOnce(&mut World, Service)) {
    let service = single(Protocol::UDP);
    let states = agree_in(world, vec![service.clone()], Vec::new());
    let flow = world.open_flow(&states[0].probe(Origin::LocalPod, Kind::ClusterIP)).unwrap();
    let before = world.ask_flow(&flow).unwrap();
    assert_eq!((before.kube_proxy.as_str(), before.switchtower.as_str()), ("p1", "p1"));
    change(world, service);
    wait::until("the flow ends with Switchtower and not with kube-proxy", SOON, || {
        let now = world.ask_flow(&flow)?;
        ensure!((now.kube_proxy.as_str(), now.switchtower.as_str()) == ("p1", end), "{now:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn udp_flow_ends_with_service_unlike_kube_proxy() {
    ends_here(&mut world(), "no answer", |world, _| drop(agree_in(world, Vec::new(), Vec::new())));
}

#[test]
fn udp_flow_ends_with_last_endpoint_unlike_kube_proxy() {
    ends_here(&mut world(), REFUSED, |world, mut service| {
        service.endpoints = vec![unready(P1)];
        world.apply(&service).unwrap();
    });
}

#[test]
fn udp_flow_ends_with_port_rename_unlike_kube_proxy() {
    // The Service has the new port name, its slices do not have it yet.
    let renamed = |target| {
        let mut service = single(Protocol::UDP);
        service.ports[0].name = "renamed".to_owned();
        service.ports[0].target = target;
        service
    };
    let mut world = world();
    ends_here(&mut world, REFUSED, |world, _| world.apply(&renamed(None)).unwrap());
    let states = agree_in(&mut world, vec![renamed(Some(8080))], Vec::new());
    assert_eq!(states[0].pods(Origin::LocalPod, Kind::ClusterIP), ["p1"]);
}

#[test]
fn health_check_of_other_family_answered_unlike_kube_proxy() {
    let mut world = world();
    let mut service = balancer(vec![ready(P1)]);
    service.families = Families::Ipv4;
    service.external_local = true;
    agree_in(&mut world, vec![service], Vec::new());
    let object: v1::Service = world.kube().get("default", "web").unwrap().unwrap();
    let port = u16::try_from(object.spec.unwrap().health_check_node_port.unwrap()).unwrap();
    let told = wait::until("Switchtower answers", SOON, || {
        let answers = world.ask_node((world.node_address(true), port).into(), "/")?;
        let ours = essence(&answers.switchtower);
        ensure!(!ours.is_empty(), "{answers:?}");
        Ok([essence(&answers.kube_proxy), ours])
    });
    let [theirs, ours] = told.unwrap();
    assert_eq!(theirs, [""; 0]);
    assert_eq!(ours[0], "HTTP/1.1 503 Service Unavailable");
    assert!(ours.contains(&"x-load-balancing-endpoint-weight: 0".to_owned()), "{ours:?}");
}

fn answers(world: &World, probe: &Probe) -> [String; 2] {
    let answers = world.ask_with_pauses(probe, &[Duration::ZERO]).unwrap();
    [answers.kube_proxy.concat(), answers.switchtower.concat()]
}

#[test]
fn deleted_rules_restored_immediately_unlike_kube_proxy() {
    let mut world = world();
    let states = agree_in(&mut world, vec![single(Protocol::TCP)], Vec::new());
    let probe = states[0].probe(Origin::LocalPod, Kind::ClusterIP);
    assert_eq!(answers(&world, &probe), ["p1", "p1"]);
    world.delete_tables().unwrap();
    let after = wait::until("the rules are restored", SOON, || {
        let [theirs, ours] = answers(&world, &probe);
        ensure!(ours == "p1", "Switchtower: {ours}");
        Ok(theirs)
    });
    world.repair_kube_proxy().unwrap();
    assert_ne!(after.unwrap(), "p1");
    agree_in(&mut world, vec![single(Protocol::TCP)], Vec::new());
}

#[test]
fn new_service_cidr_known_immediately_unlike_kube_proxy() {
    const RANGE: &str = "10.222.0.0/24";
    let mut world = world();
    agree_in(&mut world, vec![single(Protocol::TCP)], Vec::new());
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": "differences"}, "spec": {"cidrs": [RANGE]},
    });
    world.kube().apply(&object).unwrap();
    wait::until("Switchtower knows the range", SOON, || {
        ensure!(world.rulesets()?.switchtower.contains(RANGE), "not yet");
        Ok(())
    })
    .unwrap();
    std::thread::sleep(WHILE);
    assert!(!world.rulesets().unwrap().kube_proxy.contains(RANGE));
    let api: kube::Api<k8s_openapi::api::networking::v1::ServiceCIDR> = kube::Api::all(world.kube().client());
    world.kube().block_on(api.delete("differences", &DeleteParams::default())).unwrap();
}
