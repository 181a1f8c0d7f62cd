//! The objects of the API server, and their random changes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use rand::Rng as _;
use rand::rngs::StdRng;
use switchtower_core::model::{
    EndpointSlice, Input, Node, ObjectKey, Service, ServicePortSpec, SliceEndpoint, SlicePort, TrafficPolicy,
};
use switchtower_proto::v1::Protocol;

const ZONES: [&str; 2] = ["east", "west"];

/// Objects by a name that is unique across kinds.
pub type Objects = BTreeMap<Arc<str>, Arc<Input>>;

pub fn node_name(number: usize) -> Arc<str> {
    format!("n{number}").into()
}

fn key(number: u32) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: format!("s{number}").into() }
}

/// The objects, and a backup of them.
pub struct Cluster {
    pub objects: Arc<Objects>,
    /// Increases with each change, as a resourceVersion does.
    pub version: u64,
    backup: (Arc<Objects>, u64),
    nodes: usize,
    services: u32,
    next_address: u32,
}

impl Cluster {
    pub fn new(nodes: usize, services: u32, random: &mut StdRng) -> Self {
        let mut cluster = Self {
            objects: Arc::default(),
            version: 1,
            backup: Default::default(),
            nodes,
            services,
            next_address: 0,
        };
        for number in 0..nodes {
            let node = Node {
                name: node_name(number),
                addresses: vec![IpAddr::from([192, 0, 2, number as u8 + 1])],
                pod_cidrs: Vec::new(),
                zone: Some(ZONES[number % 2].into()),
                eligible: true,
            };
            cluster.insert(format!("node {number}"), Input::Node(node));
        }
        let cidrs = Input::ServiceCidrs(vec!["10.96.0.0/16".parse().unwrap()]);
        cluster.insert("cidrs".into(), cidrs);
        for number in 0..services {
            cluster.set_service(number, random);
            cluster.set_slice(number, random);
        }
        cluster.back_up();
        cluster
    }

    fn insert(&mut self, name: String, object: Input) {
        Arc::make_mut(&mut self.objects).insert(name.into(), Arc::new(object));
    }

    fn remove(&mut self, name: &str) {
        Arc::make_mut(&mut self.objects).remove(name);
    }

    fn set_service(&mut self, number: u32, random: &mut StdRng) {
        let local = random.random_ratio(1, 6);
        let [_, _, high, low] = number.to_be_bytes();
        let service = Service {
            key: key(number),
            uid: format!("u{number}").into(),
            created: i64::from(number),
            cluster_ips: vec![IpAddr::from(Ipv4Addr::new(10, 96, high, low))],
            ports: vec![ServicePortSpec {
                name: "".into(),
                protocol: if number.is_multiple_of(3) { Protocol::Udp } else { Protocol::Tcp },
                port: 80,
                node_port: random.random_ratio(1, 5).then_some(30_000 + number as u16),
            }],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            external_policy: TrafficPolicy::Cluster,
            internal_policy: if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
            affinity_seconds: random.random_ratio(1, 8).then_some(60),
            health_check_port: None,
        };
        self.insert(format!("service {number}"), Input::Service(service));
    }

    fn set_slice(&mut self, number: u32, random: &mut StdRng) {
        let hinted = random.random_ratio(1, 4);
        let endpoints = (0..random.random_range(1..4)).map(|_| {
            // A pod address is rarely reused.
            if !random.random_ratio(1, 10) {
                self.next_address += 1;
            }
            let [_, a, b, c] = self.next_address.to_be_bytes();
            let node = random.random_range(0..self.nodes);
            SliceEndpoint {
                address: IpAddr::from([10, 128 | a, b, c]),
                ready: random.random_ratio(9, 10),
                serving: true,
                terminating: false,
                node: Some(node_name(node)),
                pod: None,
                zones: if hinted { [ZONES[node % 2].into()].into() } else { [].into() },
                nodes: [].into(),
            }
        });
        let protocol = if number.is_multiple_of(3) { Protocol::Udp } else { Protocol::Tcp };
        let slice = EndpointSlice {
            key: key(number),
            service: key(number).name,
            ipv6: false,
            ports: vec![SlicePort { name: "".into(), protocol, port: 8080 }],
            endpoints: endpoints.collect(),
        };
        self.insert(format!("slice {number}"), Input::Slice(slice));
    }

    /// One ordinary change.
    pub fn change(&mut self, random: &mut StdRng) {
        let number = random.random_range(0..self.services);
        self.version += 1;
        match random.random_range(0..10) {
            0 => self.set_service(number, random),
            1 => self.remove(&format!("service {number}")),
            2 => self.remove(&format!("slice {number}")),
            _ => self.set_slice(number, random),
        }
    }

    /// Deletes most slices, and some of their Services.
    pub fn delete_most(&mut self, random: &mut StdRng) {
        let services = random.random_ratio(1, 2);
        self.version += 1;
        Arc::make_mut(&mut self.objects).retain(|name, _| {
            let gone = name.starts_with("slice") || services && name.starts_with("service");
            !gone || random.random_ratio(1, 20)
        });
    }

    pub fn back_up(&mut self) {
        self.backup = (self.objects.clone(), self.version);
    }

    /// Objects and versions go back, as after a restore of etcd.
    pub fn restore(&mut self) {
        (self.objects, self.version) = self.backup.clone();
    }
}

/// Returns the events that lead from one set of objects to another: first deletions, then everything else.
pub fn difference(from: &Objects, to: &Objects) -> Vec<Input> {
    let (mut gone, mut new) = (Vec::new(), Vec::new());
    let mut known = from.iter().peekable();
    for (name, object) in to {
        while let Some((_, before)) = known.next_if(|(before, _)| *before < name) {
            gone.push(deleted(before));
        }
        let before = known.next_if(|(before, _)| *before == name);
        if before.is_none_or(|(_, before)| !Arc::ptr_eq(before, object) && before != object) {
            new.push(Input::clone(object));
        }
    }
    gone.extend(known.map(|(_, before)| deleted(before)));
    gone.append(&mut new);
    gone
}

fn deleted(object: &Input) -> Input {
    match object {
        Input::Service(service) => Input::ServiceDeleted(service.key.clone()),
        Input::Slice(slice) => Input::SliceDeleted(slice.key.clone()),
        Input::Node(node) => Input::NodeDeleted(node.name.clone()),
        other => other.clone(),
    }
}
