//! Which endpoints a node uses: the rows of kube-proxy's topology and endpoint tests.

use super::*;

fn web() -> Service {
    mk_service("web", "10.96.0.10")
}

fn balancer() -> Service {
    Service { load_balancer_ips: vec!["198.51.100.1".parse().unwrap()], ..web() }
}

/// Endpoints that n1, n2 (zone a) and n3 (zone b) use for policy Cluster.
#[track_caller]
fn check_cluster(endpoints: &[&str], n1: &[u8], n2: &[u8], n3: &[u8]) {
    let world = compiled(web(), endpoints);
    let seen = |node, zone| world.seen(node, zone, Role::Cluster);
    assert_eq!((seen("n1", "a"), seen("n2", "a"), seen("n3", "b")), (n1.into(), n2.into(), n3.into()));
}

#[test]
fn zone_hints_on_all_select_the_zone() {
    check_cluster(&["1 n1 z=a", "2 n2 z=a", "3 n3 z=b"], &[1, 2], &[1, 2], &[3]);
}

#[test]
fn one_endpoint_without_a_zone_hint_undoes_them_all() {
    check_cluster(&["1 n1 z=a", "2 n2", "3 n3 z=b"], &[1, 2, 3], &[1, 2, 3], &[1, 2, 3]);
}

#[test]
fn zone_without_hints_uses_all() {
    check_cluster(&["1 n1 z=a", "2 n2 z=a"], &[1, 2], &[1, 2], &[1, 2]);
    let world = compiled(web(), &["1 n1 z=a", "2 n3 z=b"]);
    assert_eq!(world.seen("n9", "", Role::Cluster), [1, 2], "a node without a zone");
}

#[test]
fn several_zones_per_endpoint_match_any() {
    check_cluster(&["1 n1 z=a z=b", "2 n3 z=b"], &[1], &[1], &[1, 2]);
}

#[test]
fn unready_endpoints_count_neither_for_hints_nor_for_traffic() {
    check_cluster(&["1 n1 unready z=a", "2 n2 z=a", "3 n3 z=b"], &[2], &[2], &[3]);
    check_cluster(&["1 n1 unready z=a", "3 n3 z=b"], &[3], &[3], &[3]);
    check_cluster(&["1 n1 unready", "2 n2 z=a", "3 n3 z=b"], &[2], &[2], &[3]);
}

#[test]
fn node_hints_come_before_zone_hints_before_all() {
    let lines = ["1 n1 n=n1 z=a", "2 n2 n=n2 z=a", "3 n3 n=n3 z=b"];
    check_cluster(&lines, &[1], &[2], &[3]);
    check_cluster(&["1 n1 n=n1 z=a", "3 n3 n=n3 z=b"], &[1], &[1], &[3]);
    check_cluster(&["1 n1 n=n1", "3 n3 n=n3"], &[1], &[1, 3], &[3]);
    check_cluster(&["1 n1 unready n=n1 z=a", "2 n2 n=n2 z=a", "3 n3 n=n3 z=b"], &[2], &[2], &[3]);
}

#[test]
fn terminating_endpoints_serve_only_while_nothing_is_ready() {
    check_cluster(&["1 n1 terminating z=a", "3 n3 terminating"], &[1, 3], &[1, 3], &[1, 3]);
    check_cluster(&["1 n1 terminating", "3 n3"], &[3], &[3], &[3]);
    check_cluster(&["1 n1 terminating unserving", "3 n3 terminating"], &[3], &[3], &[3]);
    check_cluster(&["1 n1 terminating unserving"], &[], &[], &[]);
    check_cluster(&["1 n1 unready"], &[], &[], &[]);
}

#[test]
fn external_policy_local_ignores_topology_hints() {
    let service = Service { external_policy: TrafficPolicy::Local, ..balancer() };
    let world = compiled(service, &["1 n1 z=b", "2 n2 z=a", "3 n3 z=b"]);
    assert_eq!(world.seen("n1", "a", Role::Local), [1]);
    assert_eq!(world.seen("n1", "a", Role::Cluster), [2]);
    let frontend = world.frontend(FrontendKind::LoadBalancer);
    assert_eq!(frontend.outside.unwrap().role(), Role::Local);
    assert_eq!(frontend.inside.unwrap().role(), Role::Cluster);
    assert_eq!(world.frontend(FrontendKind::ClusterIp).outside.unwrap().role(), Role::Cluster);
}

#[test]
fn internal_policy_local_alone_has_no_cluster_pool() {
    let service = Service { internal_policy: TrafficPolicy::Local, ..web() };
    let world = compiled(service.clone(), &["1 n1", "3 n3"]);
    assert_eq!(world.seen("n1", "a", Role::Local), [1]);
    assert!(world.pools.keys().all(|(layer, _)| *layer != LayerId::Cluster));
    assert_eq!(world.verdicts(FrontendKind::ClusterIp), (Verdict::Drop, Verdict::Drop));
    let world = compiled(service, &[]);
    assert_eq!(world.verdicts(FrontendKind::ClusterIp), (Verdict::Reject, Verdict::Reject));
}

#[test]
fn local_lists_prefer_ready_and_fall_back_per_node() {
    let service = Service { internal_policy: TrafficPolicy::Local, ..web() };
    let world =
        compiled(service, &["1 n1", "2 n1 terminating", "3 n2 terminating", "4 n3 terminating unserving"]);
    let seen = |node| world.seen(node, "", Role::Local);
    assert_eq!((seen("n1"), seen("n2"), seen("n3")), (vec![1], vec![3], vec![]));
}

#[test]
fn both_policies_local_and_all_terminating_elsewhere() {
    let service = Service {
        internal_policy: TrafficPolicy::Local,
        external_policy: TrafficPolicy::Local,
        ..balancer()
    };
    let world = compiled(service, &["3 n3 terminating"]);
    assert_eq!(world.seen("n1", "a", Role::Cluster), [3]);
    assert!(world.seen("n1", "a", Role::Local).is_empty());
    assert_eq!(world.verdicts(FrontendKind::ClusterIp).0, Verdict::Drop);
    assert_eq!(world.verdicts(FrontendKind::LoadBalancer), (Verdict::Drop, Verdict::Reject));
}

#[test]
fn external_policy_of_a_pure_cluster_ip_service_is_ignored() {
    let service = Service { external_policy: TrafficPolicy::Local, ..web() };
    let world = compiled(service, &["1 n1"]);
    assert!(world.seen("n1", "a", Role::Local).is_empty());
    assert_eq!(world.frontend(FrontendKind::ClusterIp).outside.unwrap().role(), Role::Cluster);
}

#[test]
fn address_in_two_slices_terminates_only_if_both_do() {
    let mut compiler = Compiler::new();
    let mut world = World::default();
    compiler.apply(Input::Slice(mk_slice("a", "web", &["1 n1"])));
    compiler.apply(Input::Slice(mk_slice("b", "web", &["1 n1 terminating"])));
    compiler.apply(Input::Service(web()));
    world.apply(compiler.compile());
    assert_eq!(world.seen("n1", "a", Role::Cluster), [1]);
}

#[test]
fn slices_of_other_families_and_ports_ignored() {
    let mut compiler = Compiler::new();
    let mut other = mk_slice("a", "web", &["1 n1"]);
    other.ipv6 = true;
    compiler.apply(Input::Slice(other));
    let mut named = mk_slice("b", "web", &["2 n1"]);
    named.ports[0].name = "admin".into();
    compiler.apply(Input::Slice(named));
    compiler.apply(Input::Service(web()));
    let mut world = World::default();
    world.apply(compiler.compile());
    assert!(world.pools.is_empty());
    assert_eq!(world.verdicts(FrontendKind::ClusterIp).0, Verdict::Reject);
}

#[test]
fn udp_ports_carry_all_serving_endpoints_for_conntrack() {
    let mut service = web();
    service.ports[0].protocol = Protocol::Udp;
    let mut slice = mk_slice("web-1", "web", &["1 n1", "2 n1 terminating", "3 n1 terminating unserving"]);
    slice.ports[0].protocol = Protocol::Udp;
    let mut compiler = Compiler::new();
    compiler.apply(Input::Slice(slice));
    compiler.apply(Input::Service(service));
    let mut world = World::default();
    world.apply(compiler.compile());
    let serving = world.pools.iter().find(|((_, key), _)| key.role() == Role::Serving).unwrap().1;
    assert_eq!(serving.len(), 2);
}

#[test]
fn health_check_counts_only_reach_nodes_with_endpoints() {
    let mut service = Service { health_check_port: Some(30_100), ..balancer() };
    service.external_policy = TrafficPolicy::Local;
    let second = ServicePortSpec { name: "admin".into(), port: 81, ..service.ports[0].clone() };
    service.ports.push(second);
    let mut slice = mk_slice("web-1", "web", &["1 n1", "2 n1 terminating", "3 n2"]);
    slice.ports.push(SlicePort { name: "admin".into(), protocol: Protocol::Tcp, port: 9090 });
    let mut compiler = Compiler::new();
    three_nodes(&mut compiler);
    compiler.apply(Input::Slice(slice));
    let (key, changed) = (service.key.clone(), service.clone());
    compiler.apply(Input::Service(service));
    let mut world = World::default();
    world.apply(compiler.compile());
    let counts = |world: &World| -> Vec<_> {
        world.health.iter().map(|((layer, _), check)| (layer.clone(), *check)).collect()
    };
    let node = |name: &str| LayerId::Node(name.into());
    let shared = |port| (LayerId::HealthChecks, (port, 0, 0));
    // Two ports of one address count once.
    assert_eq!(counts(&world), [(node("n1"), (30_100, 1, 0)), (node("n2"), (30_100, 1, 0)), shared(30_100)]);
    // A Node that comes later only needs the layer of all nodes.
    compiler.apply(Input::Node(mk_node("n4", None)));
    let compiled = compiler.compile();
    assert_eq!(compiled.changes.keys().collect::<Vec<_>>(), [&node("n4")]);
    world.apply(compiled);
    // The endpoint of n2 moves to n1, and the port changes.
    let moved = mk_slice("web-1", "web", &["1 n1", "3 n1"]);
    compiler.apply(Input::Slice(moved));
    world.apply(compiler.compile());
    assert_eq!(counts(&world), [(node("n1"), (30_100, 2, 0)), shared(30_100)]);
    compiler.apply(Input::Service(Service { health_check_port: Some(30_101), ..changed }));
    world.apply(compiler.compile());
    assert_eq!(counts(&world), [(node("n1"), (30_101, 2, 0)), shared(30_101)]);
    // Deleted and created again in one batch: its layer starts empty.
    compiler.apply(Input::NodeDeleted("n1".into()));
    compiler.apply(Input::Node(mk_node("n1", None)));
    world.apply(compiler.compile());
    assert_eq!(counts(&world), [(node("n1"), (30_101, 2, 0)), shared(30_101)]);
    compiler.apply(Input::ServiceDeleted(key));
    world.apply(compiler.compile());
    assert_eq!(counts(&world), []);
}

#[test]
fn late_node_gets_and_loses_its_local_items() {
    let service = Service { external_policy: TrafficPolicy::Local, ..balancer() };
    let mut compiler = Compiler::new();
    let mut world = World::default();
    compiler.apply(Input::Service(service));
    compiler.apply(Input::Slice(mk_slice("web-1", "web", &["1 n1"])));
    world.apply(compiler.compile());
    assert!(world.seen("n1", "", Role::Local).is_empty());
    compiler.apply(Input::Node(mk_node("n1", None)));
    world.apply(compiler.compile());
    assert_eq!(world.seen("n1", "", Role::Local), [1]);
    assert_eq!(world.local.len(), 1);
    // Deleted and created again in one batch.
    compiler.apply(Input::NodeDeleted("n1".into()));
    compiler.apply(Input::Node(mk_node("n1", None)));
    world.apply(compiler.compile());
    assert_eq!((world.seen("n1", "", Role::Local), world.local.len()), (vec![1], 1));
    compiler.apply(Input::NodeDeleted("n1".into()));
    world.apply(compiler.compile());
    assert!(world.local.is_empty() && world.nodes.is_empty());
}

#[test]
fn endpoint_change_touches_its_pool_only() {
    let mut compiler = Compiler::new();
    three_nodes(&mut compiler);
    compiler.apply(Input::Service(web()));
    compiler.apply(Input::Slice(mk_slice("web-1", "web", &["1 -", "2 -"])));
    compiler.compile();
    compiler.apply(Input::Slice(mk_slice("web-1", "web", &["1 -", "3 -"])));
    let compiled = compiler.compile();
    assert_eq!(compiled.changes.keys().collect::<Vec<_>>(), [&LayerId::Cluster]);
    let [change] = compiled.changes[&LayerId::Cluster].as_slice() else { panic!("{compiled:?}") };
    let Some(Kind::Pool(patch)) = &change.change else { panic!("{change:?}") };
    assert_eq!((patch.added.len(), patch.removed.len()), (1, 1));
    // The same objects again are no change.
    compiler.apply(Input::Slice(mk_slice("web-1", "web", &["1 -", "3 -"])));
    assert_eq!(compiler.compile(), Compiled::default());
}

#[test]
fn addresses_of_a_foreign_family_omitted_and_reported_once() {
    let mut slice = mk_slice("web-1", "web", &["1 n1", "2 n1"]);
    slice.endpoints[0].address = "fd00::1".parse().unwrap();
    let mut compiler = Compiler::new();
    compiler.apply(Input::Service(web()));
    compiler.apply(Input::Slice(slice.clone()));
    let compiled = compiler.compile();
    let [problem] = compiled.problems.as_slice() else { panic!("{:?}", compiled.problems) };
    assert_eq!(problem.reason, ProblemReason::InvalidAddress);
    assert_eq!(problem.object, crate::compiled::ProblemObject::EndpointSlice(object("web-1")));
    let mut world = World::default();
    world.apply(compiled);
    assert_eq!(world.seen("n1", "a", Role::Cluster), [2]);
    slice.endpoints.pop();
    compiler.apply(Input::Slice(slice));
    assert!(compiler.compile().problems.is_empty());
}

#[test]
fn host_network_endpoints_follow_slices_and_nodes() {
    let mut compiler = Compiler::new();
    let mut slice = mk_slice("web-1", "web", &["1 n1"]);
    slice.endpoints.extend([mk_host_endpoint("n1", "192.0.2.1"), mk_host_endpoint("n2", "192.0.2.1")]);
    slice.endpoints.push(SliceEndpoint { pod: None, ..mk_host_endpoint("n1", "192.0.2.3") });
    compiler.apply(Input::Slice(slice.clone()));
    compiler.apply(Input::Service(web()));
    let mut world = World::default();
    let mut hosts = |compiler: &mut Compiler| {
        world.apply(compiler.compile());
        let socket = |endpoint: &HostEndpoint| {
            (endpoint.node.to_string(), endpoint.socket.address.to_string(), endpoint.ready)
        };
        world.host_pods.keys().map(socket).collect::<Vec<_>>()
    };
    assert_eq!(hosts(&mut compiler), [], "no Node yet");
    let host = |ready| [("n1".to_owned(), "192.0.2.1".to_owned(), ready)];
    let node = |address: &str| Node { addresses: vec![address.parse().unwrap()], ..mk_node("n1", None) };
    compiler.apply(Input::Node(node("192.0.2.1")));
    // One entry for each address and port: the last endpoint wins.
    assert_eq!(hosts(&mut compiler), []);
    slice.endpoints.remove(2);
    compiler.apply(Input::Slice(slice.clone()));
    assert_eq!(hosts(&mut compiler), host(true));
    slice.endpoints[1].ready = false;
    compiler.apply(Input::Slice(slice.clone()));
    assert_eq!(hosts(&mut compiler), host(false));
    compiler.apply(Input::Node(node("192.0.2.9")));
    assert_eq!(hosts(&mut compiler), [], "the Node has another address");
    compiler.apply(Input::Node(node("192.0.2.1")));
    assert_eq!(hosts(&mut compiler), host(false));
    compiler.apply(Input::NodeDeleted("n1".into()));
    assert_eq!(hosts(&mut compiler), []);
}
