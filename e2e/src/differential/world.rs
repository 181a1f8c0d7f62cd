//! Two laboratories around one API server.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::json;

use super::case::{PODS, Service};
use super::manifests;
use super::plan::{Origin, Probe};
use crate::api::Kube;
use crate::lab::{Lab, NodeNet, PodNet};
use crate::namespace::Namespace;
use crate::oracle::KubeProxy;
use crate::probe::Outcome;
use crate::switchtower::{Fleet, NodeSpec};
use crate::wait;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// kube-proxy programs the node.
    KubeProxy,
    /// Switchtower does.
    Switchtower,
}

/// Networks of virtual addresses, which other nodes send through n1.
const VIRTUAL: [&str; 6] =
    ["203.0.113.0/24", "198.51.100.0/24", "10.96.0.0/16", "fd00:cb::/32", "fd00:c6::/32", "fd96::/112"];

/// Both laboratories.
#[derive(Debug)]
pub struct World {
    fleet: Fleet,
    // In the order of dropping: the proxy, pods, nodes, the laboratory.
    proxy: KubeProxy,
    pods: Vec<PodNet>,
    nodes: Vec<NodeNet>,
    _lab: Lab,
    services: Vec<String>,
    settled: u16,
}

impl World {
    /// Builds both and starts both proxies on their node n1.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start() -> Result<Self> {
        let specs = specs();
        let fleet = Fleet::build(&specs)?;
        fleet.install()?;
        let lab = Lab::create()?;
        let (mut nodes, mut pods) = (Vec::<NodeNet>::new(), Vec::new());
        for (index, spec) in (1..).zip(&specs) {
            let others: Vec<_> = nodes.iter().collect();
            let node = lab.add_node(&spec.name, index, &others)?;
            for (index, name) in (1..).zip(&spec.pods) {
                pods.push(lab.add_pod(&node, name, index)?);
            }
            nodes.push(node);
        }
        let first = fleet.nodes().first().context("no node")?;
        // The Node object has the addresses of one laboratory: the other's node has them too, on loopback, so
        // that none is chosen as a source.
        let twin = nodes.first().context("no node")?;
        for ipv6 in [false, true] {
            let (address, length) = (first.net.address(ipv6), if ipv6 { 128 } else { 32 });
            twin.namespace.ip(&format!("addr add {address}/{length} dev lo\n"))?;
            for node in &nodes[1..] {
                let via = twin.address(ipv6);
                node.namespace.ip(&format!("route add {address}/{length} via {via} dev eth0\n"))?;
            }
        }
        send_through_first(fleet.nodes().iter().map(|node| &node.net))?;
        send_through_first(nodes.iter())?;
        fleet.start_controller()?;
        fleet.start_agent(first)?;
        let settings = "nftables:\n  minSyncPeriod: 0s\n  syncPeriod: 30s\n";
        let proxy = KubeProxy::start(fleet.control_plane(), &lab, twin, settings)?;
        Ok(Self { fleet, proxy, pods, nodes, _lab: lab, services: Vec::new(), settled: 0 })
    }

    pub(super) fn kube(&self) -> &Kube {
        self.fleet.kube()
    }

    /// The address of node n1 in both worlds.
    pub(super) fn node_address(&self, ipv6: bool) -> IpAddr {
        self.fleet.nodes()[0].net.address(ipv6)
    }

    /// Removes what the case before left.
    pub(super) fn reset(&mut self) -> Result<()> {
        std::mem::take(&mut self.services).iter().try_for_each(|name| self.remove(name))
    }

    /// Creates or replaces a Service with its slices.
    pub(super) fn apply(&mut self, service: &Service) -> Result<()> {
        // Ports, families and types cannot all be changed in place: a new object is as good a change.
        self.delete(&service.name)?;
        self.kube().apply(&manifests::service(service))?;
        if !service.load_balancer_ips.is_empty() {
            let mut with_status = manifests::service(service);
            with_status["status"] = manifests::status(service)["status"].clone();
            self.kube().apply(&with_status)?;
        }
        for slice in manifests::slices(service) {
            self.kube().apply(&slice)?;
        }
        self.services.push(service.name.clone());
        Ok(())
    }

    pub(super) fn delete(&mut self, name: &str) -> Result<()> {
        self.services.retain(|other| other != name);
        self.remove(name)
    }

    fn remove(&self, name: &str) -> Result<()> {
        for family in ["v4", "v6"] {
            self.kube().delete::<EndpointSlice>("default", &format!("{name}-{family}"))?;
        }
        self.kube().delete::<v1::Service>("default", name)
    }

    /// Waits until both kernels hold everything that was written so far: a Service of its own changes last, and
    /// both its address and its endpoint are looked for in both rulesets.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.settled += 1;
        let (high, low) = (self.settled / 250, self.settled % 250 + 1);
        let (address, endpoint) = (format!("192.0.2.{low}"), format!("10.99.{high}.{low}"));
        self.kube().apply(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "settle", "namespace": "default"},
            "spec": {"ports": [{"port": 7, "name": "p"}], "externalIPs": [address]},
        }))?;
        self.kube().apply(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "settle", "namespace": "default",
                         "labels": {"kubernetes.io/service-name": "settle"}},
            "addressType": "IPv4", "ports": [{"name": "p", "port": 7, "protocol": "TCP"}],
            "endpoints": [{"addresses": [endpoint], "conditions": {"ready": true}}],
        }))?;
        for side in [Side::KubeProxy, Side::Switchtower] {
            let namespace = self.namespace(side, Origin::Host);
            wait::until(&format!("{side:?} programs what was written"), Duration::from_secs(20), || {
                self.proxy.process.check_running()?;
                let rules = namespace.output("nft", &["list", "ruleset"])?;
                ensure!(rules.contains(&format!("{address} ")), "{address} is not there");
                ensure!(rules.contains(&format!("{endpoint} ")), "{endpoint} is not there");
                Ok(())
            })?;
        }
        // Services and slices come by separate watches, and the families in separate transactions.
        std::thread::sleep(Duration::from_millis(400));
        Ok(())
    }

    pub(super) fn namespace(&self, side: Side, origin: Origin) -> &Namespace {
        let net = |index: usize| match side {
            Side::Switchtower => &self.fleet.nodes()[index].net,
            Side::KubeProxy => &self.nodes[index],
        };
        let pod = |name: &str| match side {
            Side::Switchtower => {
                let mut pods = self.fleet.nodes().iter().flat_map(|node| &node.pods);
                pods.find(|pod| pod.name == name)
            }
            Side::KubeProxy => self.pods.iter().find(|pod| pod.name == name),
        };
        match origin {
            Origin::Host => &net(0).namespace,
            Origin::Client => &net(0).client,
            Origin::LocalPod => pod("c1").map_or(&net(0).namespace, |pod| &pod.namespace),
            Origin::EndpointPod => pod("p1").map_or(&net(0).namespace, |pod| &pod.namespace),
            Origin::RemotePod => pod("c2").map_or(&net(0).namespace, |pod| &pod.namespace),
        }
    }

    /// An outcome in words that are the same in both worlds.
    pub(super) fn describe(&self, side: Side, probe: &Probe, outcome: &Outcome) -> String {
        let Outcome::Reply { backend, source } = outcome else { return outcome.to_string() };
        let itself = probe.origin == Origin::EndpointPod && backend == "p1";
        format!("{backend} sees {}{}", self.common(side, *source), if itself { " (itself)" } else { "" })
    }

    /// The laboratory's own number is taken out of an address.
    fn common(&self, side: Side, address: IpAddr) -> String {
        let node = match side {
            Side::Switchtower => self.fleet.nodes()[0].net.address(address.is_ipv6()),
            Side::KubeProxy => self.nodes[0].address(address.is_ipv6()),
        };
        match (address, node) {
            (IpAddr::V4(address), IpAddr::V4(node)) => {
                let (a, n) = (address.octets(), node.octets());
                if a[..3] == n[..3] { format!("lan .{}", a[3]) } else { address.to_string() }
            }
            (IpAddr::V6(address), IpAddr::V6(node)) if same_network(address, node) => {
                format!("lan ::{:x}", address.segments()[7])
            }
            (address, _) => address.to_string(),
        }
    }
}

fn same_network(address: Ipv6Addr, node: Ipv6Addr) -> bool {
    address.segments()[..4] == node.segments()[..4]
}

/// Nodes n1 (zone a, with a client pod c1), n2 (zone a, with a client pod c2) and n3 (zone b).
fn specs() -> Vec<NodeSpec> {
    let pods = |node: &str, client: Option<&'static str>| -> Vec<&'static str> {
        PODS.iter().filter(|pod| pod.node == node).map(|pod| pod.name).chain(client).collect()
    };
    vec![
        NodeSpec::new("n1", "a", &pods("n1", Some("c1"))),
        NodeSpec::new("n2", "a", &pods("n2", Some("c2"))),
        NodeSpec::new("n3", "b", &pods("n3", None)),
    ]
}

/// Only n1 has a proxy: virtual addresses are reached through it from everywhere.
fn send_through_first<'a>(mut nodes: impl Iterator<Item = &'a NodeNet>) -> Result<()> {
    let first = nodes.next().context("no node")?;
    for node in nodes {
        for network in VIRTUAL {
            let via = first.address(network.contains(':'));
            node.namespace.ip(&format!("route add {network} via {via} dev eth0\n"))?;
        }
    }
    Ok(())
}
