//! A synthetic cluster: Service `n` has the ClusterIP 10.0.0.0 + `n`, and its endpoints are spread over the nodes.

use std::net::IpAddr;
use std::sync::Arc;

use switchtower_core::compile::Compiler;
use switchtower_core::layer::{Layers, LogLimits};
use switchtower_core::model::{
    EndpointSlice, Input, Node, ObjectKey, Service, ServicePortSpec, SliceEndpoint, SlicePort,
};
use switchtower_proto::v1::{Protocol, Source};

use super::Size;

pub(super) fn node_name(number: u32) -> Arc<str> {
    format!("n{number}").into()
}

pub(super) fn zone_of(node: u32, zones: u32) -> Arc<str> {
    format!("z{}", node % zones).into()
}

fn address(first: u8, number: u32) -> IpAddr {
    let [_, b, c, d] = number.to_be_bytes();
    IpAddr::from([first, b, c, d])
}

fn key(number: u32, suffix: &str) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: format!("s{number}{suffix}").into() }
}

fn service(number: u32) -> Service {
    Service {
        key: key(number, ""),
        uid: format!("u{number}").into(),
        created: i64::from(number),
        cluster_ips: vec![address(10, number)],
        ports: vec![ServicePortSpec { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        ..Service::default()
    }
}

/// The last endpoint's address depends on `round`.
fn slice(number: u32, size: Size, round: u32) -> EndpointSlice {
    let endpoint = |index: u32| {
        let node = (number * size.endpoints + index) % size.nodes;
        let moved = if index + 1 == size.endpoints { round % 2 * 128 } else { 0 };
        let zones = if size.zones > 1 { [zone_of(node, size.zones)].into() } else { Box::default() };
        SliceEndpoint {
            address: address((20 + index % 100 + moved) as u8, number * (1 + index / 100)),
            ready: true,
            serving: true,
            terminating: false,
            node: Some(node_name(node)),
            pod: None,
            zones,
            nodes: Box::default(),
        }
    };
    EndpointSlice {
        key: key(number, "-1"),
        service: key(number, "").name,
        ipv6: false,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (0..size.endpoints).map(endpoint).collect(),
    }
}

/// A compiler with everything pending.
pub(super) fn compiler(size: Size) -> Compiler {
    let mut compiler = Compiler::new();
    for number in 0..size.nodes {
        compiler.apply(Input::Node(Node {
            name: node_name(number),
            addresses: vec![address(192, number)],
            pod_cidrs: Vec::new(),
            zone: Some(zone_of(number, size.zones)),
            eligible: true,
        }));
    }
    for number in 0..size.services {
        compiler.apply(Input::Service(service(number)));
        compiler.apply(Input::Slice(slice(number, size, 0)));
    }
    compiler
}

/// A published cluster.
pub(super) struct Cluster {
    compiler: Compiler,
    pub(super) layers: Layers,
    size: Size,
}

impl Cluster {
    pub(super) fn new(size: Size) -> Self {
        let mut cluster = Self { compiler: compiler(size), layers: Layers::new(LogLimits::default()), size };
        cluster.publish();
        cluster
    }

    /// Changes one endpoint of each of [`Size::changes`] Services.
    pub(super) fn change(&mut self, round: u32) {
        for number in 0..self.size.changes {
            let service = (number * 97 + 5) % self.size.services;
            self.compiler.apply(Input::Slice(slice(service, self.size, round + 1)));
        }
    }

    pub(super) fn publish(&mut self) {
        let compiled = self.compiler.compile();
        self.layers.apply(compiled.changes, &compiled.removed, Vec::new(), Source::default());
    }
}
