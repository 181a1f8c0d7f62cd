//! The compiler against kube-proxy's rules, and its increments against a fresh compile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{
    Family, Frontend, FrontendKey, FrontendKind, HealthCheckKey, LocalEndpoint, NodeRecord, PoolKey,
    Protocol, Role, ServicePort, Verdict,
};

use super::Compiler;
use crate::compiled::{Compiled, ProblemReason};
use crate::drain::host_pods::{HostEndpoint, HostPodChange};
use crate::locality::PodChange;
use crate::model::*;

mod claims;
mod endpoints;
mod limits;
mod random;

/// Addresses and ports.
type Members = BTreeSet<(Vec<u8>, u32)>;

/// The items of all layers, as an agent that saw every change would have them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct World {
    frontends: BTreeMap<FrontendKey, Frontend>,
    pools: BTreeMap<(LayerId, PoolKey), Members>,
    nodes: BTreeMap<LayerId, NodeRecord>,
    local: BTreeSet<(LayerId, LocalEndpoint)>,
    health: BTreeMap<(LayerId, HealthCheckKey), (u32, u32, u32)>,
    cidrs: BTreeSet<Vec<u8>>,
    /// In how many slices each ready endpoint stands, by node and address.
    pods: BTreeMap<(Arc<str>, IpAddr), u32>,
    /// Number of Services that have each endpoint of a host-network pod.
    host_pods: BTreeMap<HostEndpoint, u32>,
}

impl World {
    /// Applies a compile; a change that makes no sense against what is there is an error of the compiler.
    #[track_caller]
    fn apply(&mut self, compiled: Compiled) {
        for layer in compiled.removed {
            self.pools.retain(|(other, _), _| *other != layer);
            self.local.retain(|(other, _)| *other != layer);
            self.health.retain(|(other, _), _| *other != layer);
            assert!(self.nodes.remove(&layer).is_some(), "{layer:?} was not there");
        }
        for PodChange { node, address, present } in compiled.pods {
            let count = self.pods.entry((node, address)).or_default();
            *count = if present { *count + 1 } else { count.checked_sub(1).unwrap() };
        }
        self.pods.retain(|_, count| *count > 0);
        for HostPodChange { endpoint, present } in compiled.host_pods {
            let count = self.host_pods.entry(endpoint).or_default();
            *count = if present { *count + 1 } else { count.checked_sub(1).unwrap() };
        }
        self.host_pods.retain(|_, count| *count > 0);
        for (layer, changes) in compiled.changes {
            for change in changes {
                self.apply_one(layer.clone(), change.change.unwrap());
            }
        }
    }

    #[track_caller]
    fn apply_one(&mut self, layer: LayerId, change: Kind) {
        match change {
            Kind::Frontend(frontend) => {
                let key = frontend.key.clone().unwrap();
                assert_ne!(self.frontends.insert(key, frontend.clone()), Some(frontend), "nothing changed");
            }
            Kind::FrontendRemoved(key) => assert!(self.frontends.remove(&key).is_some()),
            Kind::Pool(patch) => {
                assert!(!(patch.added.is_empty() && patch.removed.is_empty()), "an empty patch");
                let pool = self.pools.entry((layer, patch.key.unwrap())).or_default();
                for endpoint in patch.removed {
                    assert!(pool.remove(&(endpoint.address, endpoint.port)));
                }
                for endpoint in patch.added {
                    assert!(pool.insert((endpoint.address, endpoint.port)));
                }
            }
            Kind::PoolRemoved(key) => assert!(self.pools.remove(&(layer, key)).is_some()),
            Kind::Node(record) => drop(self.nodes.insert(layer, record)),
            Kind::LocalEndpoint(endpoint) => assert!(self.local.insert((layer, endpoint))),
            Kind::LocalEndpointRemoved(endpoint) => assert!(self.local.remove(&(layer, endpoint))),
            Kind::HealthCheck(check) => {
                let value = (check.port, check.ready_ipv4, check.ready_ipv6);
                assert_ne!(self.health.insert((layer, check.key.unwrap()), value), Some(value));
            }
            Kind::HealthCheckRemoved(key) => assert!(self.health.remove(&(layer, key)).is_some()),
            Kind::ServiceCidr(cidr) => assert!(self.cidrs.insert(cidr.address)),
            Kind::ServiceCidrRemoved(cidr) => assert!(self.cidrs.remove(&cidr.address)),
            Kind::Settings(_) => panic!("settings never pass the compiler"),
        }
    }

    /// Last octets of the pool that a node sees: its own layer before its zone's before the cluster's.
    fn seen(&self, node: &str, zone: &str, role: Role) -> Vec<u8> {
        let layers = [LayerId::Node(node.into()), LayerId::Zone(zone.into()), LayerId::Cluster];
        let pool = layers.into_iter().find_map(|layer| self.pools.get(&(layer, pool_key(role))));
        pool.into_iter().flatten().map(|(address, _)| *address.last().unwrap()).collect()
    }

    fn frontend(&self, kind: FrontendKind) -> &Frontend {
        self.frontends.values().find(|frontend| frontend.kind() == kind).unwrap()
    }

    fn verdicts(&self, kind: FrontendKind) -> (Verdict, Verdict) {
        let frontend = self.frontend(kind);
        (frontend.outside.unwrap().when_empty(), frontend.inside.unwrap().when_empty())
    }
}

fn pool_key(role: Role) -> PoolKey {
    let service_port = ServicePort {
        namespace: "default".into(),
        name: "web".into(),
        port: "http".into(),
        protocol: Protocol::Tcp.into(),
    };
    PoolKey { service_port: Some(service_port), family: Family::Ipv4.into(), role: role.into() }
}

fn object(name: &str) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: name.into() }
}

fn mk_service(name: &str, cluster_ip: &str) -> Service {
    Service {
        key: object(name),
        uid: format!("uid-{name}").into(),
        created: 100,
        cluster_ips: vec![cluster_ip.parse().unwrap()],
        ports: vec![ServicePortSpec {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        ..Service::default()
    }
}

fn mk_node(name: &str, zone: Option<&str>) -> Node {
    Node {
        name: name.into(),
        addresses: vec!["192.0.2.1".parse().unwrap()],
        pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
        zone: zone.map(Into::into),
        eligible: true,
    }
}

/// An endpoint from a line: `<last octet> <node> [unready] [terminating] [unserving] [z=a] [n=n1]`.
fn mk_endpoint(line: &str) -> SliceEndpoint {
    let mut words = line.split_whitespace();
    let octet: u8 = words.next().unwrap().parse().unwrap();
    let node = words.next().unwrap();
    let words: Vec<_> = words.collect();
    let hints = |prefix: &str| -> Box<[Arc<str>]> {
        words.iter().filter_map(|word| word.strip_prefix(prefix)).map(Into::into).collect()
    };
    let terminating = words.contains(&"terminating");
    SliceEndpoint {
        address: IpAddr::from([10, 244, 0, octet]),
        ready: !terminating && !words.contains(&"unready"),
        serving: !words.contains(&"unserving"),
        terminating,
        node: (node != "-").then(|| node.into()),
        pod: None,
        zones: hints("z="),
        nodes: hints("n="),
    }
}

/// An endpoint of pod `pod` on a node, with the address of the host.
fn mk_host_endpoint(node: &str, address: &str) -> SliceEndpoint {
    let pod = Some(PodId::of("default", "pod"));
    SliceEndpoint { address: address.parse().unwrap(), pod, ..mk_endpoint(&format!("1 {node}")) }
}

fn mk_slice(name: &str, service: &str, endpoints: &[&str]) -> EndpointSlice {
    EndpointSlice {
        key: object(name),
        service: service.into(),
        ipv6: false,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: endpoints.iter().map(|line| mk_endpoint(line)).collect(),
    }
}

/// Three nodes: n1 and n2 in zone a, n3 in zone b.
fn three_nodes(compiler: &mut Compiler) {
    for (name, zone) in [("n1", "a"), ("n2", "a"), ("n3", "b")] {
        compiler.apply(Input::Node(mk_node(name, Some(zone))));
    }
}

fn compiled(service: Service, endpoints: &[&str]) -> World {
    let mut compiler = Compiler::new();
    three_nodes(&mut compiler);
    compiler.apply(Input::Slice(mk_slice("web-1", "web", endpoints)));
    compiler.apply(Input::Service(service));
    let mut world = World::default();
    world.apply(compiler.compile());
    world
}
