//! Objects of clusters of any size: Service `n` has the ClusterIP 10.0.0.0 + `n` and three endpoints.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "each test file is a crate of its own")]

use std::net::IpAddr;

use switchtower_core::compile::Compiler;
use switchtower_core::model::*;
use switchtower_proto::v1::Protocol;

fn object(number: u32, suffix: &str) -> ObjectKey {
    ObjectKey { namespace: "default".into(), name: format!("s{number}{suffix}").into() }
}

pub fn address(first: u8, number: u32) -> IpAddr {
    let [_, b, c, d] = number.to_be_bytes();
    IpAddr::from([first, b, c, d])
}

pub fn service(number: u32) -> Service {
    Service {
        key: object(number, ""),
        uid: format!("u{number}").into(),
        created: i64::from(number),
        cluster_ips: vec![address(10, number)],
        ports: vec![ServicePortSpec { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        ..Service::default()
    }
}

/// Three endpoints; the last one's address depends on `round`.
pub fn slice(number: u32, round: u32) -> EndpointSlice {
    let endpoint = |address| SliceEndpoint {
        address,
        ready: true,
        serving: true,
        terminating: false,
        node: Some(format!("n{}", number % 100).into()),
        pod: None,
        zones: Box::default(),
        nodes: Box::default(),
    };
    let addresses = [address(11, number), address(12, number), address(13, number * 2 + round % 2)];
    EndpointSlice {
        key: object(number, "-1"),
        service: object(number, "").name,
        ipv6: false,
        ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: addresses.into_iter().map(endpoint).collect(),
    }
}

/// A compiler that has seen these nodes and Services.
pub fn cluster(nodes: u32, services: u32) -> Compiler {
    let mut compiler = Compiler::new();
    for number in 0..nodes {
        compiler.apply(Input::Node(Node {
            name: format!("n{number}").into(),
            addresses: vec![address(192, number)],
            pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
            zone: None,
            eligible: true,
        }));
    }
    for number in 0..services {
        compiler.apply(Input::Service(service(number)));
        compiler.apply(Input::Slice(slice(number, 0)));
    }
    compiler
}
