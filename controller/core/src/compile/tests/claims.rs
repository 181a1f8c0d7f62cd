//! Services that claim the same address and port, and ports that collide within one Service.

use super::*;

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
fn the_oldest_claimant_wins_and_the_next_takes_over() {
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
fn a_loser_is_told_once_of_each_winner() {
    let mut compiler = Compiler::new();
    let mut told = |input: Input| -> Vec<String> {
        compiler.apply(input);
        compiler.compile().problems.into_iter().map(|problem| problem.message).collect()
    };
    let claim = |name, octet: u8, created| {
        Input::Service(with_external(name, &format!("10.96.0.{octet}"), "203.0.113.9", created))
    };
    assert!(told(claim("last", 1, 300)).is_empty());
    assert!(matches!(told(claim("middle", 2, 200)).as_slice(), [one] if one.contains("default/middle")));
    let both = told(claim("first", 3, 100));
    assert!(both.len() == 2 && both.iter().all(|message| message.contains("default/first")), "{both:?}");
    assert!(told(claim("later", 4, 400)).len() == 1, "the others know");
    let of_the_next = told(Input::ServiceDeleted(object("first")));
    assert!(of_the_next.len() == 2 && of_the_next.iter().all(|message| message.contains("default/middle")));
}

#[test]
fn an_external_address_never_captures_a_cluster_address() {
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
fn duplicate_ports_are_told_and_the_last_one_is_used() {
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
fn ports_of_different_names_with_one_number_are_told_and_the_last_name_is_used() {
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
fn a_port_without_a_number_is_told_and_left_out() {
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
