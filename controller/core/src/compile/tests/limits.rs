//! One Service cannot make a view that no node takes.

use std::net::Ipv4Addr;

use super::*;
use crate::compile::{MAX_FRONTENDS, MAX_SERVICE_MEMBERS};

fn ports(count: u16) -> Vec<ServicePortSpec> {
    (1..=count)
        .map(|number| ServicePortSpec {
            name: format!("p{number:05}").into(),
            protocol: Protocol::Tcp,
            port: number,
            node_port: None,
        })
        .collect()
}

fn compile(service: Service, slice: EndpointSlice) -> (World, Vec<String>) {
    let mut compiler = Compiler::new();
    compiler.apply(Input::Slice(slice));
    compiler.apply(Input::Service(service));
    let mut compiled = compiler.compile();
    let problems = std::mem::take(&mut compiled.problems);
    assert!(problems.iter().all(|problem| problem.reason == ProblemReason::LimitExceeded));
    let mut world = World::default();
    world.apply(compiled);
    (world, problems.into_iter().map(|problem| problem.message).collect())
}

#[test]
fn frontends_are_bounded_and_every_port_keeps_its_cluster_ip() {
    let external_ips = (0..2_001).map(|index| IpAddr::from(Ipv4Addr::from(0xc612_0000 + index))).collect();
    let balancer: IpAddr = "203.0.113.9".parse().unwrap();
    let service = Service {
        ports: ports(100),
        external_ips,
        load_balancer_ips: vec![balancer],
        ..mk_service("web", "10.96.0.1")
    };
    let (world, problems) = compile(service, mk_slice("web-1", "web", &["1 n1"]));
    assert_eq!(problems, ["2002 external addresses of 100 ports: 98 are used"]);
    let of = |kind| world.frontends.values().filter(|frontend| frontend.kind() == kind).count();
    assert_eq!(of(FrontendKind::ClusterIp), 100);
    assert_eq!((of(FrontendKind::LoadBalancer), of(FrontendKind::ExternalIp)), (100, 9_700));

    let service = Service { ports: ports(5_001), ..mk_service("web", "10.96.0.1") };
    let (world, problems) = compile(service, mk_slice("web-1", "web", &["1 n1"]));
    assert_eq!(problems, ["5001 ports: the first 5000 in the order of their names are used"]);
    assert!(world.frontends.len() <= MAX_FRONTENDS && world.frontends.len() == 5_000);
}

#[test]
fn members_of_all_pools_of_a_service_are_bounded() {
    let mut slice = mk_slice("web-1", "web", &[]);
    slice.ports = ports(5)
        .into_iter()
        .map(|port| SlicePort { name: port.name, protocol: port.protocol, port: port.port })
        .collect();
    let mut endpoint = mk_endpoint("1 -");
    slice.endpoints = (0..50_000_u32)
        .map(|index| {
            endpoint.address = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + index));
            endpoint.clone()
        })
        .collect();
    let service = Service { ports: ports(5), ..mk_service("web", "10.96.0.1") };
    let (world, problems) = compile(service, slice);
    assert_eq!(problems, ["more than 200000 endpoints of all ports: the others are left out"]);
    assert_eq!(world.pools.values().map(BTreeSet::len).sum::<usize>(), MAX_SERVICE_MEMBERS);
    assert_eq!(world.frontends.len(), 5, "the port without endpoints answers as one that has none");
}
