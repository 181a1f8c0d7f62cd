//! Services that claim the same address and port, and ports that collide within one Service.

use super::*;
use crate::compiled::{Problem, ProblemObject};
use crate::wire;

fn with_external(name: &str, cluster_ip: &str, external: &str, created: i64) -> Service {
    Service { external_ips: vec![external.parse().unwrap()], created, ..mk_service(name, cluster_ip) }
}

fn owner(world: &World, kind: FrontendKind, octet: u8) -> &str {
    let frontend = world.frontends.values().find(|frontend| {
        frontend.kind() == kind && frontend.key.as_ref().unwrap().address.last() == Some(&octet)
    });
    &frontend.unwrap().service_port.as_ref().unwrap().name
}

#[test]
fn oldest_claimant_wins_and_the_next_takes_over() {
    let mut compiler = Compiler::new();
    let mut world = World::default();
    compiler.apply(Input::Service(with_external("young", "10.96.0.1", "203.0.113.9", 200)));
    world.apply(compiler.compile());
    assert_eq!(owner(&world, FrontendKind::ExternalIp, 9), "young");
    compiler.apply(Input::Service(with_external("old", "10.96.0.2", "203.0.113.9", 100)));
    let compiled = compiler.compile();
    let [problem] = compiled.problems.as_slice() else { panic!("{:?}", compiled.problems) };
    assert_eq!(problem.reason, ProblemReason::AddressConflict);
    assert_eq!(problem.object, crate::compiled::ProblemObject::Service(object("young")));
    assert!(problem.message.contains("203.0.113.9:80/TCP") && problem.message.contains("default/old"));
    world.apply(compiled);
    assert_eq!(owner(&world, FrontendKind::ExternalIp, 9), "old");
    compiler.apply(Input::ServiceDeleted(object("old")));
    world.apply(compiler.compile());
    assert_eq!(owner(&world, FrontendKind::ExternalIp, 9), "young");
}

#[test]
fn losing_claim_reported_once_per_winner() {
    let mut compiler = Compiler::new();
    let mut reported = |input: Input| -> Vec<String> {
        compiler.apply(input);
        compiler.compile().problems.into_iter().map(|problem| problem.message).collect()
    };
    let claim = |name, octet: u8, created| {
        Input::Service(with_external(name, &format!("10.96.0.{octet}"), "203.0.113.9", created))
    };
    assert!(reported(claim("last", 1, 300)).is_empty());
    assert!(matches!(reported(claim("middle", 2, 200)).as_slice(), [one] if one.contains("default/middle")));
    let both = reported(claim("first", 3, 100));
    assert!(both.len() == 2 && both.iter().all(|message| message.contains("default/first")), "{both:?}");
    assert!(reported(claim("later", 4, 400)).len() == 1, "the others know");
    let of_the_next = reported(Input::ServiceDeleted(object("first")));
    assert!(of_the_next.len() == 2 && of_the_next.iter().all(|message| message.contains("default/middle")));
}

#[test]
fn external_address_never_captures_a_cluster_address() {
    let mut compiler = Compiler::new();
    let mut world = World::default();
    compiler.apply(Input::Service(with_external("thief", "10.96.0.1", "10.96.0.2", 1)));
    compiler.apply(Input::Service(mk_service("web", "10.96.0.2")));
    world.apply(compiler.compile());
    assert_eq!(owner(&world, FrontendKind::ClusterIp, 2), "web");
}

#[test]
fn equal_age_is_decided_by_name() {
    for order in [["b", "a"], ["a", "b"]] {
        let mut compiler = Compiler::new();
        let mut world = World::default();
        for name in order {
            let cluster_ip = if name == "a" { "10.96.0.1" } else { "10.96.0.2" };
            compiler.apply(Input::Service(with_external(name, cluster_ip, "203.0.113.9", 5)));
            world.apply(compiler.compile());
        }
        assert_eq!(owner(&world, FrontendKind::ExternalIp, 9), "a");
    }
}

#[test]
fn two_services_swap_an_address_in_one_batch() {
    let mut compiler = Compiler::new();
    let mut world = World::default();
    compiler.apply(Input::Service(with_external("a", "10.96.0.1", "203.0.113.1", 1)));
    compiler.apply(Input::Service(with_external("b", "10.96.0.2", "203.0.113.2", 1)));
    world.apply(compiler.compile());
    compiler.apply(Input::Service(with_external("a", "10.96.0.1", "203.0.113.2", 1)));
    compiler.apply(Input::Service(with_external("b", "10.96.0.2", "203.0.113.1", 1)));
    let compiled = compiler.compile();
    assert!(compiled.problems.is_empty());
    world.apply(compiled);
    assert_eq!(owner(&world, FrontendKind::ExternalIp, 2), "a");
    assert_eq!(owner(&world, FrontendKind::ExternalIp, 1), "b");
}

#[test]
fn duplicate_ports_reported_and_last_one_used() {
    let mut service = mk_service("web", "10.96.0.1");
    service.ports.push(ServicePortSpec { port: 81, ..service.ports[0].clone() });
    let mut compiler = Compiler::new();
    compiler.apply(Input::Service(service));
    let compiled = compiler.compile();
    assert_eq!(compiled.problems[0].reason, ProblemReason::DuplicatePort);
    let mut world = World::default();
    world.apply(compiled);
    let ports: Vec<_> = world.frontends.keys().map(|key| key.port).collect();
    assert_eq!(ports, [81]);
}

#[test]
fn ports_with_one_number_reported_and_last_name_used() {
    let mut service = mk_service("web", "10.96.0.1");
    let named = |name: &str| ServicePortSpec {
        name: name.into(),
        node_port: Some(30_080),
        ..service.ports[0].clone()
    };
    service.ports = vec![named("b"), named("a")];
    let mut compiler = Compiler::new();
    compiler.apply(Input::Service(service));
    let compiled = compiler.compile();
    let reasons: Vec<_> = compiled.problems.iter().map(|problem| problem.reason).collect();
    assert_eq!(reasons, [ProblemReason::DuplicatePort; 2], "the port and the node port");
    assert!(compiled.problems[0].message.ends_with("b is used"), "{}", compiled.problems[0].message);
    let mut world = World::default();
    world.apply(compiled);
    let owners: BTreeSet<_> =
        world.frontends.values().map(|frontend| frontend.service_port.clone().unwrap().port).collect();
    assert_eq!(owners, BTreeSet::from(["b".to_owned()]));
}

#[test]
fn port_without_a_number_reported_and_omitted() {
    let mut service = mk_service("web", "10.96.0.1");
    service.ports.push(ServicePortSpec { name: "zero".into(), port: 0, ..service.ports[0].clone() });
    service.ports[0].node_port = Some(0);
    let mut compiler = Compiler::new();
    compiler.apply(Input::Service(service));
    let compiled = compiler.compile();
    assert_eq!(compiled.problems[0].reason, ProblemReason::InvalidPort);
    let mut world = World::default();
    world.apply(compiled);
    let ports: Vec<_> = world.frontends.keys().map(|key| (key.address.len(), key.port)).collect();
    assert_eq!(ports, [(4, 80)], "no port 0 and no node port 0");
}

#[test]
fn tcp_and_udp_share_a_port() {
    let mut service = mk_service("dns", "10.96.0.1");
    let udp = ServicePortSpec { protocol: Protocol::Udp, ..service.ports[0].clone() };
    service.ports.push(udp);
    let mut compiler = Compiler::new();
    compiler.apply(Input::Service(service));
    let compiled = compiler.compile();
    assert!(compiled.problems.is_empty());
    assert_eq!(compiled.changes[&LayerId::Cluster].len(), 2);
}

/// A TCP frontend at an address, or a node port if that is empty.
fn tcp(address: &str, port: u32) -> FrontendKey {
    let address = address.parse().map(wire::octets).unwrap_or_default();
    FrontendKey { family: Family::Ipv4.into(), address, protocol: Protocol::Tcp.into(), port }
}

fn holder<'a>(world: &'a World, key: &FrontendKey) -> Option<&'a str> {
    Some(&world.frontends.get(key)?.service_port.as_ref()?.name)
}

fn at_port(mut service: Service, port: u16) -> Input {
    service.ports[0].port = port;
    Input::Service(service)
}

fn at_node_port(name: &str, cluster_ip: &str, node_port: u16) -> Input {
    let mut service = mk_service(name, cluster_ip);
    service.ports[0].node_port = Some(node_port);
    Input::Service(service)
}

/// Compiles, and returns the Events' reasons with the Services they are about.
fn step(compiler: &mut Compiler, world: &mut World, inputs: Vec<Input>) -> Vec<(ProblemReason, ObjectKey)> {
    inputs.into_iter().for_each(|input| _ = compiler.apply(input));
    let compiled = compiler.compile();
    let of_service = |problem: &Problem| match &problem.object {
        ProblemObject::Service(key) => Some((problem.reason, key.clone())),
        _ => None,
    };
    let problems = compiled.problems.iter().filter_map(of_service).collect();
    world.apply(compiled);
    problems
}

#[test]
fn control_plane_keeps_its_addresses() {
    let mut compiler = Compiler::new().reserving(["198.51.100.1:9443".parse().unwrap()]);
    let mut world = World::default();
    let mut api_server = mk_slice("kubernetes", "kubernetes", &["7 -"]);
    api_server.ports[0].port = 6_443;
    let inputs = vec![Input::Node(mk_node("n1", None)), Input::Slice(api_server)];
    step(&mut compiler, &mut world, inputs);
    let reserved =
        [("198.51.100.1", 9_443), ("10.244.0.7", 6_443), ("192.0.2.1", 10_250), ("192.0.2.1", 10_256)];
    for (number, (address, port)) in reserved.into_iter().enumerate() {
        let name = format!("taker-{number}");
        let service = with_external(&name, &format!("10.96.0.{}", number + 1), address, 1);
        let reported = step(&mut compiler, &mut world, vec![at_port(service, port)]);
        assert_eq!(reported, [(ProblemReason::ControlPlaneAddress, object(&name))], "{address}:{port}");
        assert_eq!(holder(&world, &tcp(address, port.into())), None);
        let cluster_ip = tcp(&format!("10.96.0.{}", number + 1), port.into());
        assert_eq!(holder(&world, &cluster_ip), Some(&*name), "the rest is served");
    }
    for (address, port) in [("198.51.100.1", 443), ("198.51.100.2", 9_443), ("203.0.113.1", 10_250)] {
        let service = with_external("other", "10.96.0.9", address, 1);
        assert_eq!(step(&mut compiler, &mut world, vec![at_port(service, port)]), []);
        assert_eq!(holder(&world, &tcp(address, port.into())), Some("other"));
    }
}

#[test]
fn reservation_ends_with_its_owner() {
    let mut compiler = Compiler::new();
    let mut world = World::default();
    let service = with_external("web", "10.96.0.1", "192.0.2.1", 1);
    assert_eq!(step(&mut compiler, &mut world, vec![at_port(service, 10_250)]), []);
    let kubelet = tcp("192.0.2.1", 10_250);
    assert_eq!(holder(&world, &kubelet), Some("web"));
    let reported = step(&mut compiler, &mut world, vec![Input::Node(mk_node("n1", None))]);
    assert_eq!(reported, [(ProblemReason::ControlPlaneAddress, object("web"))]);
    assert_eq!(holder(&world, &kubelet), None);
    step(&mut compiler, &mut world, vec![Input::NodeDeleted("n1".into())]);
    assert_eq!(holder(&world, &kubelet), Some("web"));

    let mut api_server = mk_slice("kubernetes", "kubernetes", &["7 -"]);
    api_server.ports[0].port = 6_443;
    let service = with_external("web", "10.96.0.1", "10.244.0.7", 1);
    assert_eq!(step(&mut compiler, &mut world, vec![at_port(service, 6_443)]), []);
    let reported = step(&mut compiler, &mut world, vec![Input::Slice(api_server)]);
    assert_eq!(reported, [(ProblemReason::ControlPlaneAddress, object("web"))]);
    step(&mut compiler, &mut world, vec![Input::SliceDeleted(object("kubernetes"))]);
    assert_eq!(holder(&world, &tcp("10.244.0.7", 6_443)), Some("web"));
}

#[test]
fn node_port_is_not_captured_by_an_external_address() {
    let on_node = tcp("192.0.2.1", 30_080);
    let thief = || at_port(with_external("thief", "10.96.0.1", "192.0.2.1", 1), 30_080);
    let node = || Input::Node(mk_node("n1", None));
    let owner = || at_node_port("owner", "10.96.0.2", 30_080);
    let conflict = (ProblemReason::AddressConflict, object("thief"));
    for order in [[thief(), node(), owner()], [owner(), thief(), node()], [node(), owner(), thief()]] {
        let mut compiler = Compiler::new();
        let mut world = World::default();
        let mut reported = Vec::new();
        for input in order {
            reported.extend(step(&mut compiler, &mut world, vec![input]));
        }
        assert_eq!(reported, std::slice::from_ref(&conflict));
        assert_eq!(holder(&world, &on_node), None, "the node port serves it");
        assert_eq!(holder(&world, &tcp("", 30_080)), Some("owner"));
        assert_eq!(step(&mut compiler, &mut world, vec![Input::ServiceDeleted(object("owner"))]), []);
        assert_eq!(holder(&world, &on_node), Some("thief"), "it takes over");
        step(&mut compiler, &mut world, vec![owner()]);
        assert_eq!(holder(&world, &on_node), None);
        step(&mut compiler, &mut world, vec![Input::NodeDeleted("n1".into())]);
        assert_eq!(holder(&world, &on_node), Some("thief"), "no node has the address any more");
    }
}

#[test]
fn service_may_claim_its_own_node_port() {
    let mut service = with_external("web", "10.96.0.1", "192.0.2.1", 1);
    service.ports[0].port = 30_080;
    service.ports[0].node_port = Some(30_080);
    let mut compiler = Compiler::new();
    let mut world = World::default();
    let inputs = vec![Input::Node(mk_node("n1", None)), Input::Service(service)];
    assert_eq!(step(&mut compiler, &mut world, inputs), []);
    assert_eq!(holder(&world, &tcp("192.0.2.1", 30_080)), Some("web"));
}

#[test]
fn cost_of_a_node_follows_claims_on_its_address() {
    let mut compiler = Compiler::new();
    let mut world = World::default();
    for number in 1..=100_u8 {
        let service = with_external(&format!("s{number}"), &format!("10.96.0.{number}"), "203.0.113.9", 1);
        compiler.apply(at_port(service, 1_000 + u16::from(number)));
    }
    step(&mut compiler, &mut world, vec![]);
    compiler.apply(Input::Node(mk_node("n1", None)));
    assert_eq!(compiler.claims_touched(), 0);
    let node = Node { addresses: vec!["203.0.113.9".parse().unwrap()], ..mk_node("n2", None) };
    compiler.apply(Input::Node(node));
    assert_eq!(compiler.claims_touched(), 100);
}

#[test]
fn address_of_a_replica_that_comes_later_is_reserved() {
    let mut compiler = Compiler::new().reserving(["198.51.100.1:9443".parse().unwrap()]);
    let mut world = World::default();
    let service = with_external("web", "10.96.0.1", "198.51.100.2", 1);
    assert_eq!(step(&mut compiler, &mut world, vec![at_port(service, 9_443)]), []);
    let standby = tcp("198.51.100.2", 9_443);
    assert_eq!(holder(&world, &standby), Some("web"));
    let both = ["198.51.100.1:9443".parse().unwrap(), "198.51.100.2:9443".parse().unwrap()];
    compiler.reserve(both.into());
    let reported = step(&mut compiler, &mut world, vec![]);
    assert_eq!(reported, [(ProblemReason::ControlPlaneAddress, object("web"))]);
    assert_eq!(holder(&world, &standby), None);
    compiler.reserve([both[0]].into());
    assert_eq!(step(&mut compiler, &mut world, vec![]), []);
    assert_eq!(holder(&world, &standby), Some("web"), "the replica is gone");
}
