//! A minimal cloud load balancer for Services of type LoadBalancer: an address in the Service's status, and a route
//! for it in the hub to eligible nodes.
//!
//! Packets are forwarded without address translation. Nodes are selected as a cloud does: all of them, or with
//! externalTrafficPolicy Local those whose health check port answers 200. Connections are spread by addresses and
//! ports; with session affinity all connections go to one node, the same for every client, because the hub is the
//! only client. Its address is outside the nodes' network, like an Internet client's. IPv4 only.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use kube::api::{ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Config, ResourceExt};
use serde_json::{Value, json};

use super::layout::Layout;
use super::shell::{run_line, say};
use crate::lab::api::Kube;

const INTERVAL: Duration = Duration::from_millis(500);
/// Timeout of a node's health check; longer counts as unhealthy.
const HEALTH_LIMIT: Duration = Duration::from_millis(500);
/// The hub's address as a client of VIPs, from a documentation block that no network here uses.
const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// Assigns addresses to Services until stopped.
#[derive(Debug)]
pub struct LoadBalancer {
    layout: Layout,
    kube: Kube,
    /// Assigned addresses by namespace and name of the Service.
    addresses: BTreeMap<(String, String), Ipv4Addr>,
    /// Nodes to which each address is routed.
    routes: BTreeMap<Ipv4Addr, Vec<Ipv4Addr>>,
}

/// Load balancer parameters of one address.
struct Frontend {
    address: Ipv4Addr,
    /// Health check port of every node; without it all nodes are healthy.
    check_port: Option<u16>,
    /// Keeps a client's connections on one node.
    affinity: bool,
}

impl LoadBalancer {
    /// Creates a load balancer for this cluster without changing anything.
    ///
    /// # Errors
    /// The kubeconfig is unusable.
    pub fn new(layout: &Layout) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("creating the load balancer's runtime")?;
        let kubeconfig =
            Kubeconfig::read_from(layout.kubeconfig()).context("reading the cluster's kubeconfig")?;
        let config =
            runtime.block_on(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()))?;
        Ok(Self {
            layout: layout.clone(),
            kube: Kube::new(config, Arc::new(runtime))?,
            addresses: BTreeMap::new(),
            routes: BTreeMap::new(),
        })
    }

    /// Runs until stopped. Failures are printed once and retried.
    pub fn run(mut self, stop: &AtomicBool) {
        let mut said = String::new();
        if let Err(error) = self.prepare() {
            say(&format!("load balancer: {error:#}"));
        }
        while !stop.load(Ordering::Relaxed) {
            if let Err(error) = self.step() {
                let text = format!("load balancer: {error:#}");
                if text != said {
                    say(&text);
                    said = text;
                }
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Configures the client's address and a blackhole for unassigned addresses: as with a cloud, packets to them
    /// vanish, whereas the tests would not expect an ICMP error. The gateway is an unused address.
    fn prepare(&self) -> Result<()> {
        let hub = self.layout.hub();
        run_line(&format!("ip -n {hub} address replace {CLIENT}/32 dev lo"))?;
        run_line(&format!(
            "ip -n {hub} neighbour replace 10.203.0.250 lladdr 02:00:00:00:00:fa dev br0 nud permanent"
        ))?;
        run_line(&format!("ip -n {hub} route replace 10.203.1.0/24 via 10.203.0.250 src {CLIENT}"))?;
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let api: Api<Service> = Api::all(self.kube.client());
        let list = self.kube.block_on(api.list(&ListParams::default())).context("listing Services")?;
        let mut wanted = BTreeMap::new();
        for service in &list.items {
            let key = (service.namespace().unwrap_or_default(), service.name_any());
            let spec = service.spec.clone().unwrap_or_default();
            let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
            let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref());
            if spec.type_.as_deref() != Some("LoadBalancer") || spec.load_balancer_class.is_some() {
                if ingress.is_some() {
                    self.write_status(&key, &Value::Null)?;
                }
                continue;
            }
            let address = self.address_of(&key)?;
            let told = ingress.and_then(|all| all.first()).and_then(|first| first.ip.as_deref());
            if told != Some(address.to_string().as_str()) {
                self.write_status(&key, &json!([{"ip": address.to_string()}]))?;
            }
            wanted.insert(key, Frontend::new(address, &spec));
        }
        self.addresses.retain(|key, _| wanted.contains_key(key));
        self.route(wanted.into_values().collect())
    }

    fn address_of(&mut self, key: &(String, String)) -> Result<Ipv4Addr> {
        if let Some(address) = self.addresses.get(key) {
            return Ok(*address);
        }
        let mut candidates = (1..=254).map(|host| Ipv4Addr::new(10, 203, 1, host));
        let free = candidates
            .find(|address| !self.addresses.values().any(|taken| taken == address))
            .context("all 254 addresses are taken")?;
        self.addresses.insert(key.clone(), free);
        Ok(free)
    }

    fn write_status(&self, (namespace, name): &(String, String), ingress: &Value) -> Result<()> {
        let api: Api<Service> = Api::namespaced(self.kube.client(), namespace);
        let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&status));
        let written = api.patch_status(name, &parameters, &patch);
        self.kube.block_on(written).with_context(|| format!("writing the status of {namespace}/{name}"))?;
        Ok(())
    }

    fn route(&mut self, frontends: Vec<Frontend>) -> Result<()> {
        let hub = self.layout.hub();
        let mut routes = BTreeMap::new();
        for frontend in frontends {
            let address = frontend.address;
            let healthy = (1..=self.layout.nodes)
                .map(|number| self.layout.node_ips(number).0)
                .filter(|node| frontend.check_port.is_none_or(|port| is_healthy(*node, port)))
                .collect();
            let before = self.routes.get(&address).map_or(&[][..], Vec::as_slice);
            let nodes = targets(healthy, frontend.affinity, before);
            if before != nodes {
                let target: String = nodes.iter().map(|node| format!(" nexthop via {node}")).collect();
                let line = if nodes.is_empty() {
                    format!("ip -n {hub} route delete {address}/32")
                } else {
                    format!("ip -n {hub} route replace {address}/32 src {CLIENT}{target}")
                };
                run_line(&line)?;
            }
            routes.insert(address, nodes);
        }
        for (gone, nodes) in self.routes.iter().filter(|(address, _)| !routes.contains_key(*address)) {
            if !nodes.is_empty() {
                run_line(&format!("ip -n {hub} route delete {gone}/32"))?;
            }
        }
        self.routes = routes;
        Ok(())
    }
}

impl Frontend {
    fn new(address: Ipv4Addr, spec: &ServiceSpec) -> Self {
        let check_port = match spec.external_traffic_policy.as_deref() {
            Some("Local") => spec.health_check_node_port,
            _ => None,
        };
        Self {
            address,
            check_port: check_port.and_then(|port| u16::try_from(port).ok()),
            affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        }
    }
}

/// Nodes that receive the traffic. With affinity it is one, the same as before while it is healthy.
fn targets(healthy: Vec<Ipv4Addr>, affinity: bool, before: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    if !affinity {
        return healthy;
    }
    let kept = before.iter().find(|node| healthy.contains(node)).copied();
    kept.or_else(|| healthy.first().copied()).into_iter().collect()
}

fn is_healthy(node: Ipv4Addr, port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((node, port)), HEALTH_LIMIT)?;
        stream.set_read_timeout(Some(HEALTH_LIMIT))?;
        write!(stream, "GET /healthz HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n")?;
        let mut start = [0_u8; 12];
        stream.read_exact(&mut start)?;
        Ok(start.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinity_keeps_one_healthy_node() {
        let [a, b, c] = [1, 2, 3].map(|host| Ipv4Addr::new(192, 0, 2, host));
        assert_eq!(targets(vec![a, b, c], false, &[b]), [a, b, c]);
        assert_eq!(targets(vec![a, b, c], true, &[b]), [b]);
        assert_eq!(targets(vec![a, c], true, &[b]), [a], "its node is no longer healthy");
        assert!(targets(vec![], true, &[b]).is_empty());
    }
}
