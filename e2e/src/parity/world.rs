//! Two laboratories around one API server.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::json;
use switchtower_crds::ProxyProfile;

use super::case::{PODS, Service, ServiceType};
use super::manifests;
use super::probes::{ORIGINS, Origin, Probe};
use super::settings::Settings;
use crate::lab::api::Kube;
use crate::lab::kube_proxy::KubeProxy;
use crate::lab::namespace::Namespace;
use crate::lab::wait;
use crate::lab::{Lab, NodeNet, PodNet};
use crate::probe::ProbeResult;
use crate::probe::volley::Shot;
use crate::switchtower::{Fleet, NodeSpec};

/// One of the two laboratories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    KubeProxy,
    Switchtower,
}

/// Networks of virtual addresses and of n1's secondary address, which other nodes route through n1.
const VIRTUAL: [&str; 8] = [
    "203.0.113.0/24",
    "198.51.100.0/24",
    "10.96.0.0/16",
    "10.77.0.0/24",
    "fd00:cb::/32",
    "fd00:c6::/32",
    "fd96::/112",
    "fd00:77::/64",
];
/// First source port of probes, above those of node ports. Each port recurs after 32,000 probes of an origin, long
/// after the kernel has forgotten the earlier connection.
const FIRST_SOURCE_PORT: u16 = 33_000;
/// Addresses of the client pod of node n2.
const REMOTE_POD: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 244, 2, 13), Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, 13));
/// ProxyProfile with node n1's settings.
const PROFILE: &str = "differential";
/// The client's own address, as a backend sees it.
pub(super) const OWN: &str = "the client's own address";
/// Timeout of both proxies for a change or new settings, on a busy machine.
const SETTLED: Duration = Duration::from_secs(60);
/// Prefixes of the addresses of each Service that [`World::settle`] creates, and of its endpoint.
const SETTLE: [[&str; 2]; 2] = [["192.0.2.", "10.99.0."], ["fd00:c0::", "fd00:99::"]];

#[derive(Debug)]
pub struct World {
    pub(super) fleet: Fleet,
    // Drop order: the proxy, pods, nodes, the laboratory.
    proxy: KubeProxy,
    pods: Vec<PodNet>,
    nodes: Vec<NodeNet>,
    _lab: Lab,
    services: BTreeMap<String, Service>,
    settings: Settings,
    settled: u16,
    source_ports: [[AtomicU16; ORIGINS.len()]; 2],
}

impl World {
    /// Builds both laboratories and starts a proxy on each node n1.
    ///
    /// # Errors
    /// A part does not start.
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
        // The Node object has the addresses of one laboratory. The other's node gets them too, on loopback, so that
        // neither is chosen as a source.
        let twin = nodes.first().context("no node")?;
        for ipv6 in [false, true] {
            let (address, length) = (first.net.address(ipv6), if ipv6 { 128 } else { 32 });
            twin.namespace.ip(&format!("addr add {address}/{length} dev lo\n"))?;
            for node in &nodes[1..] {
                let via = twin.address(ipv6);
                node.namespace.ip(&format!("route add {address}/{length} via {via} dev eth0\n"))?;
            }
            for node in [twin, &first.net] {
                let address = secondary_address(ipv6);
                node.namespace.ip(&format!("addr add {address}/{length} dev lo\n"))?;
            }
        }
        send_through_first(fleet.nodes().iter().map(|node| &node.net))?;
        send_through_first(nodes.iter())?;
        answer_through_first(&fleet.nodes().iter().map(|node| &node.net).collect::<Vec<_>>())?;
        answer_through_first(&nodes.iter().collect::<Vec<_>>())?;
        fleet.start_controller()?;
        fleet.start_agent(first)?;
        let settings = Settings::default();
        let proxy = KubeProxy::start(fleet.control_plane(), &lab, twin, &settings.kube_proxy())?;
        let source_ports =
            std::array::from_fn(|_| std::array::from_fn(|_| AtomicU16::new(FIRST_SOURCE_PORT)));
        let services = BTreeMap::new();
        Ok(Self { fleet, proxy, pods, nodes, _lab: lab, services, settings, settled: 0, source_ports })
    }

    /// Applies settings to both proxies: to kube-proxy by its configuration file and a restart, to Switchtower by a
    /// ProxyProfile.
    pub(super) fn set(&mut self, settings: &Settings) -> Result<()> {
        if self.settings == *settings {
            return Ok(());
        }
        self.restart_kube_proxy(settings)?;
        self.fleet.kube().apply(&json!({
            "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile",
            "metadata": {"name": PROFILE},
            "spec": {
                // The other nodes have no agent.
                "nodeSelector": {"matchLabels": {"kubernetes.io/hostname": "n1"}},
                "settings": settings.profile(),
                "strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []}},
            },
        }))?;
        wait::until("node n1 has the new settings", SETTLED, || {
            let profile: ProxyProfile = self.kube().get_cluster(PROFILE)?.context("no profile")?;
            let status = profile.status.unwrap_or_default();
            ensure!(
                status.observed_generation == profile.metadata.generation,
                "its revision is not in force yet"
            );
            ensure!(status.stable_revision == status.target_revision, "rolling out {}", status.target_name);
            let revision = self.fleet.row("n1")?.profile.map(|profile| profile.revision_name);
            ensure!(revision.as_ref() == Some(&status.stable_name), "n1 has {revision:?}");
            Ok(())
        })?;
        self.settings = settings.clone();
        Ok(())
    }

    /// Restarts kube-proxy, which then writes all its rules again.
    pub(super) fn restart_kube_proxy(&mut self, settings: &Settings) -> Result<()> {
        self.proxy.restart(self.nodes.first().context("no node")?, &settings.kube_proxy())
    }

    /// The current settings of both proxies.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Address of node n1 in both worlds.
    pub fn node_address(&self, ipv6: bool) -> IpAddr {
        self.fleet.nodes()[0].net.address(ipv6)
    }

    /// Another address of node n1, not in the Node object.
    pub(super) fn secondary_address(&self, ipv6: bool) -> IpAddr {
        secondary_address(ipv6)
    }

    /// Address of node n1 that is its pods' gateway.
    pub(super) fn gateway_address(&self, ipv6: bool) -> IpAddr {
        if ipv6 {
            Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 1).into()
        } else {
            Ipv4Addr::new(10, 244, 1, 1).into()
        }
    }

    /// Replaces the state of the previous case.
    pub(super) fn reset(&mut self, services: &[Service]) -> Result<()> {
        let old = std::mem::take(&mut self.services);
        let this = &*self;
        in_parallel(old.keys().map(|name| move || this.remove(name)))?;
        in_parallel(services.iter().map(|service| move || this.write(None, service)))?;
        self.services = services.iter().map(|service| (service.name.clone(), service.clone())).collect();
        Ok(())
    }

    /// Creates or changes a Service with its slices, without comparing.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn apply(&mut self, service: &Service) -> Result<()> {
        self.write(self.services.get(&service.name), service)?;
        self.services.insert(service.name.clone(), service.clone());
        Ok(())
    }

    pub(super) fn delete(&mut self, name: &str) -> Result<()> {
        self.services.remove(name);
        self.remove(name)
    }

    fn write(&self, old: Option<&Service>, service: &Service) -> Result<()> {
        // The families of a Service are immutable.
        if old.is_some_and(|old| old.families != service.families) {
            self.remove(&service.name)?;
        }
        let mut object = manifests::service(service);
        if service.service_type == ServiceType::LoadBalancer {
            object["status"] = manifests::status(service)["status"].clone();
        }
        self.kube().apply(&object)?;
        manifests::slices(service).iter().try_for_each(|slice| self.kube().apply(slice).map(drop))?;
        if old.is_some_and(manifests::has_second) && !manifests::has_second(service) {
            self.remove_slices(&service.name, true)?;
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.remove_slices(name, false)?;
        self.remove_slices(name, true)?;
        self.kube().delete::<v1::Service>("default", name)
    }

    fn remove_slices(&self, name: &str, second: bool) -> Result<()> {
        let delete =
            |ipv6| self.kube().delete::<EndpointSlice>("default", &manifests::slice_name(name, ipv6, second));
        delete(false)?;
        delete(true)
    }

    /// Waits until both kernels hold everything written so far. A dedicated Service changes last; its addresses and
    /// endpoints of both families must appear in both rulesets. Services and slices arrive through separate watches,
    /// each in order, and kube-proxy writes each family in separate transactions. Then kube-proxy's queue must be
    /// empty: other input that it received, such as its zone, makes it write all rules again, and packets in between
    /// may match only half of them.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.settled = self.settled % 250 + 1;
        let marks = SETTLE.map(|prefixes| prefixes.map(|prefix| format!("{prefix}{}", self.settled)));
        let [[address, endpoint], [address6, endpoint6]] = marks.clone();
        self.kube().apply(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "settle", "namespace": "default"},
            "spec": {"ports": [{"port": 7, "name": "p"}], "externalIPs": [address, address6],
                     "ipFamilyPolicy": "RequireDualStack"},
        }))?;
        for (family, endpoint) in [("IPv4", endpoint), ("IPv6", endpoint6)] {
            self.kube().apply(&json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": format!("settle-{}", family.to_lowercase()), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": "settle"}},
                "addressType": family, "ports": [{"name": "p", "port": 7, "protocol": "TCP"}],
                "endpoints": [{"addresses": [endpoint], "conditions": {"ready": true}}],
            }))?;
        }
        for side in [Side::KubeProxy, Side::Switchtower] {
            wait::until(&format!("{side:?} programs all changes"), SETTLED, || {
                self.proxy.process().check_running()?;
                let rules = self.ruleset(side)?;
                let missing = marks.iter().flatten().find(|mark| !rules.contains(&format!("{mark} ")));
                ensure!(missing.is_none(), "{missing:?} is missing");
                Ok(())
            })?;
        }
        let twin = self.nodes.first().context("no node")?;
        wait::until("kube-proxy's queue is empty", SETTLED, || self.proxy.is_idle(twin))
    }

    pub fn kube(&self) -> &Kube {
        self.fleet.kube()
    }

    /// All nf_tables objects on node n1, as `nft` prints them.
    pub(super) fn ruleset(&self, side: Side) -> Result<String> {
        self.namespace(side, Origin::Host).output("nft", &["list", "ruleset"])
    }

    /// The next shot of a probe, from the least recently used source port.
    pub(super) fn shot(&self, side: Side, probe: &Probe) -> Shot {
        let Probe { origin, transport, to, .. } = *probe;
        Shot { transport, to, source_port: self.source_port(side, origin) }
    }

    pub(super) fn source_port(&self, side: Side, origin: Origin) -> u16 {
        let counter = &self.source_ports[side as usize][origin as usize];
        let next = |port: u16| Some(port.checked_add(1).unwrap_or(FIRST_SOURCE_PORT));
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or(FIRST_SOURCE_PORT)
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

    /// Formats an outcome so that both worlds' outcomes compare equal.
    pub(super) fn describe(&self, side: Side, probe: &Probe, outcome: &ProbeResult) -> String {
        let ProbeResult::Reply { backend, source } = outcome else { return outcome.to_string() };
        let seen = if self.own_address(side, probe.origin, source.is_ipv6()) == Some(*source) {
            OWN.to_owned()
        } else {
            self.common(side, *source)
        };
        format!("{backend} sees {seen}")
    }

    /// Address of a client that is not on the node itself.
    fn own_address(&self, side: Side, origin: Origin, ipv6: bool) -> Option<IpAddr> {
        let pod = |name: &str| match side {
            Side::Switchtower => self.fleet.pod(name).ok().map(|(pod, _)| pod.address(ipv6)),
            Side::KubeProxy => self.pods.iter().find(|pod| pod.name == name).map(|pod| pod.address(ipv6)),
        };
        match origin {
            Origin::Host => None,
            Origin::LocalPod => pod("c1"),
            Origin::EndpointPod => pod("p1"),
            Origin::RemotePod => pod("c2"),
            Origin::Client => Some(match side {
                Side::Switchtower => self.fleet.nodes()[0].net.client_address(ipv6),
                Side::KubeProxy => self.nodes[0].client_address(ipv6),
            }),
        }
    }

    /// Removes the laboratory's own number from an address.
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

fn secondary_address(ipv6: bool) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1).into()
    } else {
        Ipv4Addr::new(10, 77, 0, 1).into()
    }
}

/// Runs all closures in parallel and returns the first error.
fn in_parallel<W: FnOnce() -> Result<()> + Send>(work: impl Iterator<Item = W>) -> Result<()> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = work.map(|work| scope.spawn(work)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            worker.join().map_err(|_| anyhow::anyhow!("a writing thread panicked"))?
        };
        workers.into_iter().map(join).fold(Ok(()), Result::and)
    })
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

/// Routes virtual addresses of all nodes through n1, the only node with a proxy.
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

/// Routes answers of endpoints on other nodes through n1, even without masquerading: only n1 can reverse the
/// translation.
fn answer_through_first(nodes: &[&NodeNet]) -> Result<()> {
    let (first, others) = nodes.split_first().context("no node")?;
    for (ipv6, family) in [(false, "-4"), (true, "-6")] {
        let (via, client) = (first.address(ipv6), first.client_address(ipv6));
        let pod: IpAddr = if ipv6 { REMOTE_POD.1.into() } else { REMOTE_POD.0.into() };
        for node in others {
            let ip = |line: &str| {
                let arguments: Vec<_> = [family].into_iter().chain(line.split(' ')).collect();
                node.namespace.output("ip", &arguments).map(drop)
            };
            ip(&format!("route add {client} via {via} dev eth0"))?;
            ip(&format!("route add {pod} via {via} dev eth0 table 100"))?;
            for device in ["pod1", "pod2"] {
                ip(&format!("rule add iif {device} to {pod} lookup 100"))?;
            }
        }
    }
    Ok(())
}
