//! Properties over random objects: increments equal a fresh compile, for any order and any garbage.

use proptest::prelude::*;

use super::*;

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)]
}

fn name(prefix: &'static str, count: u8) -> impl Strategy<Value = Arc<str>> {
    (0..count).prop_map(move |number| format!("{prefix}{number}").into())
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..6u8).prop_map(|octet| IpAddr::from([10, 96, 0, octet])),
        (0..6u8).prop_map(|octet| format!("fd00::{octet}").parse().unwrap()),
    ]
}

prop_compose! {
    fn port()(name in name("p", 3), protocol in protocol(), port in prop_oneof![1 => Just(0), 9 => 79..82u16],
              node_port in proptest::option::of(prop_oneof![1 => Just(0), 9 => 30_000..30_003u16])) -> ServicePortSpec {
        ServicePortSpec { name, protocol, port, node_port }
    }
}

prop_compose! {
    fn service()(number in 0..4u8, created in 0..3i64, cluster_ips in proptest::collection::vec(address(), 0..3),
                 ports in proptest::collection::vec(port(), 0..4),
                 external_ips in proptest::collection::vec(address(), 0..3),
                 load_balancer_ips in proptest::collection::vec(address(), 0..2),
                 external_policy in policy(), internal_policy in policy(),
                 affinity_seconds in proptest::option::of(any::<u32>()),
                 health_check_port in proptest::option::of(30_100..30_102u16)) -> Service {
        Service {
            key: object(&format!("s{number}")), uid: format!("u{number}").into(), created, cluster_ips, ports,
            external_ips, load_balancer_ips, source_ranges: vec!["10.0.0.0/8".parse().unwrap()], external_policy,
            internal_policy, affinity_seconds, health_check_port,
        }
    }
}

prop_compose! {
    fn endpoint()(address in address(), ready in any::<bool>(), serving in any::<bool>(),
                  terminating in any::<bool>(), node in proptest::option::of(name("n", 4)),
                  pod in proptest::option::of(name("pod", 3).prop_map(|name| PodId::of("default", &name))),
                  zones in proptest::collection::vec(name("z", 2), 0..2),
                  nodes in proptest::collection::vec(name("n", 4), 0..2)) -> SliceEndpoint {
        SliceEndpoint { address, ready, serving, terminating, node, pod, zones: zones.into(), nodes: nodes.into() }
    }
}

prop_compose! {
    fn slice()(number in 0..6u8, service in name("s", 4), ipv6 in any::<bool>(),
               ports in proptest::collection::vec((name("p", 3), protocol(), 0..4u16), 0..3),
               endpoints in proptest::collection::vec(endpoint(), 0..5)) -> EndpointSlice {
        let ports = ports.into_iter().map(|(name, protocol, port)| SlicePort { name, protocol, port }).collect();
        EndpointSlice { key: object(&format!("e{number}")), service, ipv6, ports, endpoints }
    }
}

fn input() -> impl Strategy<Value = Input> {
    let addresses = proptest::collection::vec(address(), 0..3);
    let node = (name("n", 4), proptest::option::of(name("z", 2)), any::<bool>(), addresses);
    prop_oneof![
        4 => service().prop_map(Input::Service),
        1 => name("s", 4).prop_map(|name| Input::ServiceDeleted(object(&name))),
        6 => slice().prop_map(Input::Slice),
        2 => (0..6u8).prop_map(|number| Input::SliceDeleted(object(&format!("e{number}")))),
        3 => node.prop_map(|(name, zone, eligible, addresses)| {
            Input::Node(Node { eligible, addresses, ..mk_node(&name, zone.as_deref()) })
        }),
        1 => name("n", 4).prop_map(Input::NodeDeleted),
        1 => (0..3u8).prop_map(|octet| Input::ServiceCidrs(vec![format!("10.{octet}.0.0/16").parse().unwrap()])),
    ]
}

/// The last word on each object, in the order of the objects: what a controller that starts now would list.
fn final_objects(inputs: &[Input]) -> Vec<Input> {
    let mut objects: BTreeMap<String, Input> = BTreeMap::new();
    for input in inputs {
        let name = match input {
            Input::Service(service) => format!("s {:?}", service.key),
            Input::ServiceDeleted(key) => format!("s {key:?}"),
            Input::Slice(slice) => format!("e {:?}", slice.key),
            Input::SliceDeleted(key) => format!("e {key:?}"),
            Input::Node(node) => format!("n {}", node.name),
            Input::NodeDeleted(name) => format!("n {name}"),
            Input::ServiceCidrs(_) => "c".to_owned(),
        };
        objects.insert(name, input.clone());
    }
    let gone = |input: &Input| {
        matches!(input, Input::ServiceDeleted(_) | Input::SliceDeleted(_) | Input::NodeDeleted(_))
    };
    objects.into_values().filter(|input| !gone(input)).collect()
}

fn fresh(objects: impl IntoIterator<Item = Input>) -> World {
    let mut compiler = Compiler::new();
    objects.into_iter().for_each(|object| _ = compiler.apply(object));
    let mut world = World::default();
    world.apply(compiler.compile());
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn increments_equal_a_fresh_compile(
        inputs in proptest::collection::vec((input(), any::<bool>()), 0..40),
    ) {
        let mut compiler = Compiler::new();
        let mut world = World::default();
        for (input, compile) in &inputs {
            compiler.apply(input.clone());
            if *compile {
                world.apply(compiler.compile());
            }
        }
        world.apply(compiler.compile());
        let inputs: Vec<_> = inputs.into_iter().map(|(input, _)| input).collect();
        prop_assert_eq!(world, fresh(final_objects(&inputs)));
    }

    #[test]
    fn order_of_objects_irrelevant(inputs in proptest::collection::vec(input(), 0..30)) {
        let objects = final_objects(&inputs);
        prop_assert_eq!(fresh(objects.clone()), fresh(objects.into_iter().rev()));
    }

    #[test]
    fn service_unaffected_by_others(
        inputs in proptest::collection::vec(input(), 0..30), mut own in service(), places in slice(),
    ) {
        own.key = object("own");
        own.cluster_ips = vec!["10.97.0.1".parse().unwrap()];
        (own.external_ips, own.load_balancer_ips, own.health_check_port) = (Vec::new(), Vec::new(), None);
        own.ports.iter_mut().for_each(|port| port.node_port = None);
        let places = EndpointSlice { key: object("own"), service: "own".into(), ..places };
        // Nodes are part of what a Service is compiled from: they are the same with and without the others.
        let nodes: Vec<_> =
            final_objects(&inputs).into_iter().filter(|input| matches!(input, Input::Node(_))).collect();
        let alone = [nodes, vec![Input::Service(own.clone()), Input::Slice(places.clone())]].concat();
        let mut among = final_objects(&inputs);
        among.extend([Input::Service(own), Input::Slice(places)]);
        let of_own = |world: World| {
            let mine = |port: &Option<ServicePort>| port.as_ref().is_some_and(|port| port.name == "own");
            let frontends: Vec<_> =
                world.frontends.into_values().filter(|frontend| mine(&frontend.service_port)).collect();
            let pools: Vec<_> = world.pools.into_iter().filter(|((_, key), _)| mine(&key.service_port)).collect();
            (frontends, pools)
        };
        prop_assert_eq!(of_own(fresh(alone)), of_own(fresh(among)));
    }
}
