//! One fleet for all tests of a test program: three nodes in two zones. Each test has its own namespace of the
//! API, its own Services and virtual addresses.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::lab::namespace::Namespace;
use crate::lab::objects;
use crate::lab::wait;
use crate::probe::{self, ProbeResult, Transport};
use crate::switchtower::{Fleet, FleetNode, NodeSpec};
use anyhow::ensure;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

/// Timeout for a change to show in packets, on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);
/// Every transport with every family.
pub const WAYS: [(Transport, bool); 4] =
    [(Transport::Tcp, false), (Transport::Udp, false), (Transport::Tcp, true), (Transport::Udp, true)];

/// The nodes of a fleet: alpha and beta in zone east, gamma in west.
pub fn nodes() -> [NodeSpec; 3] {
    [
        NodeSpec::new("alpha", "east", &["a1", "a2"]),
        NodeSpec::new("beta", "east", &["b1"]),
        NodeSpec::new("gamma", "west", &["c1", "c2"]),
    ]
}

/// The shared fleet, started on first use.
pub fn fleet() -> &'static Fleet {
    static FLEET: OnceLock<Fleet> = OnceLock::new();
    FLEET.get_or_init(|| Fleet::start(&nodes()).unwrap_or_else(|error| panic!("{error:#}")))
}

/// Serializes tests that disturb the fleet or count events in it. A failed test does not poison the lock.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn node<'a>(fleet: &'a Fleet, name: &str) -> &'a FleetNode {
    fleet.nodes().iter().find(|node| node.net.name == name).unwrap()
}

/// A test's own API namespace.
pub struct Scene {
    pub fleet: &'static Fleet,
    pub namespace: String,
}

impl Scene {
    /// Creates the namespace on the shared fleet.
    pub fn new(namespace: &str) -> Self {
        Self::of(fleet(), namespace)
    }

    /// Creates the namespace on another fleet.
    pub fn of(fleet: &'static Fleet, namespace: &str) -> Self {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        fleet.kube().apply(&object).unwrap();
        Self { fleet, namespace: namespace.to_owned() }
    }

    /// Applies a dual-stack Service without a selector, with port 80 for TCP and UDP; `extra` overrides the defaults.
    pub fn service(&self, name: &str, extra: &Value) -> Service {
        let mut spec = json!({
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "tcp", "protocol": "TCP", "port": 80},
                {"name": "udp", "protocol": "UDP", "port": 80},
            ],
        });
        for (key, value) in extra.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        self.fleet.kube().apply(&objects::service(&self.namespace, name, &spec)).unwrap();
        self.fleet.kube().get(&self.namespace, name).unwrap().unwrap()
    }

    /// Applies a LoadBalancer Service and sets the addresses in its status.
    pub fn load_balancer(&self, name: &str, extra: &Value, addresses: &[&str]) -> Service {
        let mut spec = json!({"type": "LoadBalancer"});
        for (key, value) in extra.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        let service = self.service(name, &spec);
        let status = json!({"status": objects::load_balancer_status(addresses)});
        let api: kube::Api<Service> = kube::Api::namespaced(self.fleet.kube().client(), &self.namespace);
        let (parameters, patch) = (kube::api::PatchParams::default(), kube::api::Patch::Merge(&status));
        self.fleet.kube().block_on(api.patch_status(name, &parameters, &patch)).unwrap();
        service
    }

    /// Applies ready endpoints on pods, for both families.
    pub fn endpoints(&self, service: &str, pods: &[&str]) {
        self.endpoints_with(service, pods, |_, endpoint| endpoint);
    }

    /// Applies endpoints on pods, each modified by `change`, for both families.
    pub fn endpoints_with(&self, service: &str, pods: &[&str], change: impl Fn(&str, Value) -> Value) {
        let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
        for ipv6 in [false, true] {
            let endpoint = |name: &&str| {
                let (pod, node) = self.fleet.pod(name).unwrap();
                change(name, objects::endpoint(pod, &node.net, ipv6))
            };
            let endpoints: Vec<_> = pods.iter().map(endpoint).collect();
            let name = format!("{service}-{}", if ipv6 { 6 } else { 4 });
            let slice = objects::slice(&self.namespace, &name, service, ipv6, &ports, &endpoints);
            self.fleet.kube().apply(&slice).unwrap();
        }
    }

    pub fn pod(&self, name: &str) -> &'static Namespace {
        &self.fleet.pod(name).unwrap().0.namespace
    }

    pub fn pod_address(&self, name: &str, ipv6: bool) -> IpAddr {
        self.fleet.pod(name).unwrap().0.address(ipv6)
    }

    pub fn node(&self, name: &str) -> &'static FleetNode {
        node(self.fleet, name)
    }
}

/// The ClusterIP of a family, port 80.
pub fn cluster_ip(service: &Service, ipv6: bool) -> SocketAddr {
    let all = service.spec.as_ref().unwrap().cluster_ips.iter().flatten();
    let mut all = all.map(|text| text.parse::<IpAddr>().unwrap());
    SocketAddr::new(all.find(|address| address.is_ipv6() == ipv6).unwrap(), 80)
}

pub fn node_port(service: &Service, transport: Transport) -> u16 {
    let name = match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    };
    let ports = service.spec.as_ref().unwrap().ports.as_ref().unwrap();
    let port = ports.iter().find(|port| port.protocol.as_deref() == Some(name)).unwrap();
    u16::try_from(port.node_port.unwrap()).unwrap()
}

/// Waits until a probe has the outcome that `wanted` accepts.
pub fn eventually(
    what: &str,
    from: &Namespace,
    transport: Transport,
    to: SocketAddr,
    wanted: impl Fn(&ProbeResult) -> bool,
) -> ProbeResult {
    let what = format!("{what}: {transport:?} from {} to {to}", from.name());
    wait::until(&what, SOON, || {
        let outcome = probe::send(from, transport, to)?;
        ensure!(wanted(&outcome), "{outcome}");
        Ok(outcome)
    })
    .unwrap_or_else(|error| panic!("{error:#}"))
}

/// Waits until a run of probes is answered by exactly these pods.
pub fn answered_by(what: &str, from: &Namespace, transport: Transport, to: SocketAddr, pods: &[&str]) {
    let what = format!("{what}: {transport:?} from {} to {to}", from.name());
    let wanted: BTreeSet<_> = pods.iter().map(|&pod| pod.to_owned()).collect();
    wait::until(&what, SOON, || {
        eventually_backend(from, transport, to)?;
        let spread = probe::spread(from, transport, to, 10 + 14 * pods.len())?;
        ensure!(spread.keys().cloned().collect::<BTreeSet<_>>() == wanted, "{spread:?}, not {wanted:?}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}"));
}

fn eventually_backend(from: &Namespace, transport: Transport, to: SocketAddr) -> anyhow::Result<()> {
    let outcome = probe::send_with_timeout(from, transport, to, Duration::from_millis(300))?;
    ensure!(outcome.backend().is_some(), "{outcome}");
    Ok(())
}
