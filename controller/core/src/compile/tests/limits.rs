//! Bounds of one Service, of a namespace and of all Services.

use std::net::Ipv4Addr;

use super::*;
use crate::compile::{Bound, Limits, Usage};

/// Bounds of one Service that these tests exceed.
const SERVICE: Usage = Usage { frontends: 10_000, endpoints: 200_000 };

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
    let mut compiler = Compiler::new().limited(Limits { service: SERVICE, ..Limits::default() });
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
    assert!(world.frontends.len() <= SERVICE.frontends && world.frontends.len() == 5_000);
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
    assert_eq!(world.pools.values().map(BTreeSet::len).sum::<usize>(), SERVICE.endpoints);
    assert_eq!(world.frontends.len(), 5, "the port without endpoints answers as one that has none");
}

/// Three endpoints for each Service, so that two Services fit.
const SMALL: Limits = Limits {
    service: Usage { frontends: 10, endpoints: 5 },
    namespace: Usage { frontends: 100, endpoints: 6 },
    total: Usage { frontends: 100, endpoints: 9 },
};

fn service_in(namespace: &str, name: &str, created: i64, cluster_ip: &str) -> Service {
    let mut service = mk_service(name, cluster_ip);
    service.key.namespace = namespace.into();
    Service { created, ..service }
}

fn slice_in(namespace: &str, name: &str, endpoints: usize) -> EndpointSlice {
    let lines = ["1 n1", "2 n1", "3 n1", "4 n1"];
    let mut slice = mk_slice(&format!("{name}-1"), name, &lines[..endpoints]);
    slice.key.namespace = namespace.into();
    slice
}

fn served(world: &World) -> Vec<String> {
    let names = world.frontends.values().filter_map(|frontend| frontend.service_port.as_ref());
    let mut names: Vec<_> = names.map(|port| format!("{}/{}", port.namespace, port.name)).collect();
    names.sort();
    names
}

#[test]
fn newest_services_beyond_a_namespace_bound_are_refused() {
    let inputs: Vec<Input> = [("a", 1, "10.96.0.1"), ("b", 3, "10.96.0.2"), ("c", 2, "10.96.0.3")]
        .into_iter()
        .flat_map(|(name, created, cluster_ip)| {
            [
                Input::Service(service_in("tenant", name, created, cluster_ip)),
                Input::Slice(slice_in("tenant", name, 3)),
            ]
        })
        .chain([
            Input::Service(service_in("other", "web", 9, "10.96.0.4")),
            Input::Slice(slice_in("other", "web", 3)),
        ])
        .collect();
    // The result does not depend on the order of arrival.
    for rotation in 0..inputs.len() {
        let mut compiler = Compiler::new().limited(SMALL);
        let mut world = World::default();
        for input in inputs.iter().cycle().skip(rotation).take(inputs.len()) {
            compiler.apply(input.clone());
            world.apply(compiler.compile());
        }
        assert_eq!(served(&world), ["other/web", "tenant/a", "tenant/c"], "rotation {rotation}");
        assert_eq!(compiler.bounded(Bound::Namespace), 1);
        // A Service that shrinks makes room for the one that was refused.
        compiler.apply(Input::Slice(slice_in("tenant", "a", 0)));
        world.apply(compiler.compile());
        assert_eq!(served(&world), ["other/web", "tenant/a", "tenant/b", "tenant/c"]);
        compiler.apply(Input::Slice(slice_in("tenant", "a", 3)));
        world.apply(compiler.compile());
        compiler.apply(Input::ServiceDeleted(object_in("tenant", "c")));
        world.apply(compiler.compile());
        assert_eq!(served(&world), ["other/web", "tenant/a", "tenant/b"]);
        assert_eq!(compiler.bounded(Bound::Namespace), 0);
    }
}

fn object_in(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey { namespace: namespace.into(), name: name.into() }
}

#[test]
fn total_bound_refuses_the_newest_of_all_namespaces() {
    let mut compiler = Compiler::new().limited(SMALL);
    let mut world = World::default();
    for (index, namespace) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let created = 10 - index as i64;
        compiler.apply(Input::Service(service_in(namespace, "web", created, &format!("10.96.0.{index}"))));
        compiler.apply(Input::Slice(slice_in(namespace, "web", 3)));
    }
    let compiled = compiler.compile();
    let problems: Vec<_> = compiled.problems.iter().map(|problem| problem.message.clone()).collect();
    world.apply(compiled);
    assert_eq!(served(&world), ["b/web", "c/web", "d/web"]);
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert!(problem.starts_with("not programmed: the cluster has more than 100"), "{problem}");
    assert_eq!(Bound::ALL.map(|bound| compiler.bounded(bound)), [0, 0, 1]);
    // Its own bound: a Service that is served in part counts, until it is gone.
    compiler.apply(Input::Service(Service { ports: ports(11), ..service_in("d", "web", 7, "10.96.0.3") }));
    world.apply(compiler.compile());
    assert_eq!(Bound::ALL.map(|bound| compiler.bounded(bound)), [1, 0, 2]);
    compiler.apply(Input::ServiceDeleted(object_in("d", "web")));
    world.apply(compiler.compile());
    assert_eq!(Bound::ALL.map(|bound| compiler.bounded(bound)), [0, 0, 0]);
}

#[test]
fn source_ranges_are_bounded_by_the_number_of_frontends() {
    let ranges = (0..100).map(|index| format!("198.51.{index}.0/24").parse().unwrap()).collect();
    let service = Service {
        ports: ports(50),
        load_balancer_ips: vec!["203.0.113.9".parse().unwrap()],
        source_ranges: ranges,
        ..mk_service("web", "10.96.0.1")
    };
    let limits = Limits { service: Usage { frontends: 200, endpoints: 1_000 }, ..Limits::default() };
    let mut compiler = Compiler::new().limited(limits);
    compiler.apply(Input::Service(service));
    let compiled = compiler.compile();
    let messages: Vec<_> = compiled.problems.iter().map(|problem| &*problem.message).collect();
    assert_eq!(messages, ["100 loadBalancerSourceRanges: the first 20 are used"]);
}
