//! The measured Services: one of each kind for each node, with the node's server pod as only endpoint.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::lab::objects;
use crate::switchtower::{Fleet, FleetNode};

/// Port of the socket that only receives, and of the listener for connections.
pub(super) const SINK: u16 = 9_000;
/// Port of the server pod's own server.
pub(super) const ECHO: u16 = 8_080;
const NAMESPACE: &str = "default";

/// A way to the server pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Without a Service: what the rules cost all other traffic.
    Pod,
    ClusterIp,
    /// Cost of session affinity.
    Affinity,
    /// Cost of the masquerade: the client is not in the cluster.
    Masqueraded,
    NodePort,
    /// A load balancer's address, with `externalTrafficPolicy: Local`.
    Local,
    /// A load balancer's address that eleven source ranges may use.
    SourceRanges,
}

impl Target {
    pub(super) const ALL: [Self; 7] = [
        Self::Pod,
        Self::ClusterIp,
        Self::Affinity,
        Self::Masqueraded,
        Self::NodePort,
        Self::Local,
        Self::SourceRanges,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod, no Service",
            Self::ClusterIp => "ClusterIP",
            Self::Affinity => "ClusterIP, affinity",
            Self::Masqueraded => "ClusterIP, masqueraded",
            Self::NodePort => "NodePort",
            Self::Local => "load balancer, policy Local",
            Self::SourceRanges => "load balancer, source ranges",
        }
    }

    /// The client is outside of the cluster.
    pub(super) fn is_from_outside(self) -> bool {
        !matches!(self, Self::Pod | Self::ClusterIp | Self::Affinity)
    }

    pub(super) fn address(self, node: &FleetNode) -> SocketAddr {
        let index = node.net.index;
        match self {
            Self::Pod => SocketAddr::new(node.pods[1].address(false), SINK),
            Self::ClusterIp | Self::Masqueraded => SocketAddr::new(cluster_ip(index, 1), SINK),
            Self::Affinity => SocketAddr::new(cluster_ip(index, 2), SINK),
            Self::NodePort => SocketAddr::new(node.net.address(false), node_port(index)),
            Self::Local => SocketAddr::new(balancer(index, 1), SINK),
            Self::SourceRanges => SocketAddr::new(balancer(index, 2), SINK),
        }
    }
}

fn cluster_ip(node: u8, number: u8) -> IpAddr {
    // Static addresses: the lower part of the range.
    Ipv4Addr::new(10, 96, 0, 100 + node * 5 + number).into()
}

fn balancer(node: u8, number: u8) -> IpAddr {
    Ipv4Addr::new(203, 0, 113, node * 5 + number).into()
}

fn node_port(node: u8) -> u16 {
    30_000 + u16::from(node)
}

/// Creates the Services of a node.
pub(super) fn create(fleet: &Fleet, node: &FleetNode) -> Result<()> {
    let index = node.net.index;
    let ports = json!([
        {"name": "sink", "protocol": "UDP", "port": SINK, "targetPort": SINK},
        {"name": "echo", "protocol": "UDP", "port": ECHO, "targetPort": ECHO},
        {"name": "web", "protocol": "TCP", "port": SINK, "targetPort": SINK},
    ]);
    let one = json!([{"name": "sink", "protocol": "UDP", "port": SINK, "targetPort": SINK}]);
    let mut by_node = one.clone();
    by_node[0]["nodePort"] = json!(node_port(index));
    let ranges: Vec<_> = (0..10).map(|number| format!("192.0.2.{}/28", number * 16)).collect();
    let ranges = [ranges, vec![format!("{}/32", node.net.client_address(false))]].concat();
    let balanced = |number| Some(balancer(index, number).to_string());
    let all = [
        ("cluster", json!({"clusterIP": cluster_ip(index, 1), "ports": ports}), None),
        (
            "affinity",
            json!({"clusterIP": cluster_ip(index, 2), "ports": one, "sessionAffinity": "ClientIP"}),
            None,
        ),
        ("nodeport", json!({"type": "NodePort", "ports": by_node}), None),
        (
            "local",
            json!({"type": "LoadBalancer", "ports": one, "externalTrafficPolicy": "Local"}),
            balanced(1),
        ),
        (
            "ranges",
            json!({"type": "LoadBalancer", "ports": one, "loadBalancerSourceRanges": ranges}),
            balanced(2),
        ),
    ];
    all.iter().try_for_each(|(kind, spec, address)| create_one(fleet, node, kind, spec, address.as_deref()))
}

fn create_one(
    fleet: &Fleet,
    node: &FleetNode,
    kind: &str,
    spec: &Value,
    address: Option<&str>,
) -> Result<()> {
    let name = format!("{kind}-{}", node.net.name);
    fleet.kube().apply(&objects::service(NAMESPACE, &name, spec))?;
    let mut ports = vec![("sink", "UDP", SINK)];
    if kind == "cluster" {
        ports.extend([("echo", "UDP", ECHO), ("web", "TCP", SINK)]);
    }
    let endpoint = objects::endpoint(&node.pods[1], &node.net, false);
    fleet.kube().apply(&objects::slice(
        NAMESPACE,
        &format!("{name}-1"),
        &name,
        false,
        &ports,
        &[endpoint],
    ))?;
    if let Some(address) = address {
        let status = json!({"status": objects::load_balancer_status(&[address])});
        let status = Patch::Merge(status);
        let services: Api<Service> = Api::namespaced(fleet.kube().client(), NAMESPACE);
        fleet.kube().block_on(services.patch_status(&name, &PatchParams::default(), &status))?;
    }
    Ok(())
}
