//! Names of the view's things as people read and write them.

use switchtower_proto::v1::{Endpoint, FrontendKey, FrontendKind, Protocol, Role, ServicePort};

use crate::wire;

/// `10.96.0.10:80/TCP`, `[fd96::10]:80/TCP`, or `:30080/TCP` for a NodePort.
pub fn frontend(key: &FrontendKey) -> String {
    let protocol = protocol(key.protocol());
    match wire::address(&key.address) {
        Some(address) => format!("{}/{protocol}", socket(address, key.port)),
        None => format!(":{}/{protocol}", key.port),
    }
}

/// `10.244.1.5:8080`; empty if its address is impossible.
pub fn endpoint(endpoint: &Endpoint) -> String {
    wire::address(&endpoint.address).map_or_else(String::new, |address| socket(address, endpoint.port))
}

fn socket(address: std::net::IpAddr, port: u32) -> String {
    if address.is_ipv6() { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// `TCP`, `UDP`, `SCTP`.
pub fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
        Protocol::Unspecified => "?",
    }
}

/// `namespace/name:port`, without the port's name where it has none.
pub fn service_port(service_port: &ServicePort) -> String {
    let ServicePort { namespace, name, port, .. } = service_port;
    if port.is_empty() { format!("{namespace}/{name}") } else { format!("{namespace}/{name}:{port}") }
}

/// The word of the Service API.
pub fn kind(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::ExternalIp => "externalIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::Unspecified => "?",
    }
}

/// Which endpoints a pool holds.
pub fn role(role: Role) -> &'static str {
    match role {
        Role::Local => "Local",
        Role::Serving => "Serving",
        Role::Cluster | Role::Unspecified => "Cluster",
    }
}
