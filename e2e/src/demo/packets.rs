//! Scenes with packets: a ClusterIP spreads connections; `explain` names the reason of a dropped packet.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use super::terminal::Terminal;
use crate::lab::objects;
use crate::lab::wait;
use crate::probe::{self, ProbeResult, Transport};
use crate::switchtower::plugin;
use crate::switchtower::{Fleet, FleetNode};

const TIMEOUT: Duration = Duration::from_secs(20);

/// Applies a dual-stack Service with ports `tcp` and `udp` on port 80; kube-controller-manager creates the
/// EndpointSlices.
pub(super) fn apply_service(fleet: &Fleet, name: &str, spec: &Value) -> Result<Service> {
    let mut full = json!({
        "selector": {"app": "web"},
        "ipFamilyPolicy": "RequireDualStack",
        "ports": [
            {"name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080},
            {"name": "udp", "protocol": "UDP", "port": 80, "targetPort": 8080},
        ],
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        full[key] = value.clone();
    }
    fleet.kube().apply(&objects::service("default", name, &full))?;
    service(fleet, name)
}

/// Reads a Service of namespace `default`.
pub(super) fn service(fleet: &Fleet, name: &str) -> Result<Service> {
    fleet.kube().get("default", name)?.with_context(|| format!("there is no Service {name}"))
}

/// The Service's ClusterIP of a family, port 80.
pub(super) fn cluster_ip_of(service: &Service, ipv6: bool) -> Result<SocketAddr> {
    let spec = service.spec.as_ref().context("the Service has no spec")?;
    let mut addresses = spec.cluster_ips.iter().flatten().filter_map(|text| text.parse::<IpAddr>().ok());
    let address = addresses.find(|address| address.is_ipv6() == ipv6);
    Ok(SocketAddr::new(address.context("the Service has no address of the family")?, 80))
}

/// Waits until exactly `count` pods answer probes from `pod` to `to`.
pub(super) fn wait_for_backends(fleet: &Fleet, pod: &str, to: SocketAddr, count: usize) -> Result<()> {
    let (from, _) = fleet.pod(pod)?;
    wait::until(&format!("{to} answers from {count} pods"), TIMEOUT, || {
        let spread = probe::spread(&from.namespace, Transport::Tcp, to, 12)?;
        ensure!(spread.len() == count && spread.keys().all(|name| name.starts_with("web")), "{spread:?}");
        Ok(())
    })
}

/// Waits until a probe of the node's off-cluster client has the expected outcome.
pub(super) fn eventually(
    node: &FleetNode,
    to: SocketAddr,
    wanted: impl Fn(&ProbeResult) -> bool,
) -> Result<ProbeResult> {
    wait::until(&format!("{to} through {}", node.net.name), TIMEOUT, || {
        let outcome = probe::send(&node.net.client, Transport::Tcp, to)?;
        ensure!(wanted(&outcome), "{outcome}");
        Ok(outcome)
    })
}

/// A ClusterIP spreads TCP and UDP over all pods, in both families.
pub(super) fn cluster_ip(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    terminal.title("A ClusterIP spreads connections over all pods");
    let service = apply_service(fleet, "web", &json!({}))?;
    let (from, _) = fleet.pod("web-a1")?;
    for (ipv6, transport) in [(false, Transport::Tcp), (true, Transport::Udp)] {
        let to = cluster_ip_of(&service, ipv6)?;
        wait_for_backends(fleet, "web-a1", to, 4)?;
        let spread = probe::spread(&from.namespace, transport, to, 200)?;
        let counts: Vec<_> = spread.iter().map(|(name, count)| format!("{name} {count:>3}")).collect();
        let label = format!("200 × {transport:?} from web-a1 to {to}");
        terminal.line(&format!("  {label:<42} {}", counts.join("   ")));
        ensure!(spread.len() == 4, "200 connections reached {} of 4 pods", spread.len());
    }
    terminal.checked("4 pods on 3 nodes answer, over IPv4 and IPv6");
    Ok(())
}

/// A load balancer's address with externalTrafficPolicy Local: one node has no endpoint, which `explain` reports.
pub(super) fn dropped_packet(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    terminal.title("Why does this packet get no answer?");
    let to = load_balancer(fleet)?;
    for node in fleet.nodes() {
        let client = node.net.client_address(false);
        let outcome = eventually(node, to, |outcome| match node.net.name.as_str() {
            "gamma" => *outcome == ProbeResult::Silence,
            _ => outcome.source() == Some(client),
        })?;
        let name = &node.net.name;
        terminal.line(&format!("  client {client:<14} through {name:<6} to {to}   {outcome}"));
    }
    let arguments = ["explain", "default/web-lb:tcp", "--node", "gamma"];
    let answer = plugin::run(fleet, &arguments)?;
    terminal.command(&format!("kubectl switchtower {}", arguments.join(" ")));
    let first = answer.text.split("\n\n").next().unwrap_or_default();
    terminal.output(first);
    ensure!(
        answer.text.contains("DROPPED") && answer.code == 1,
        "explain does not name the drop: {answer:?}"
    );
    terminal.checked("the reason comes from the node's view and from its kernel");
    Ok(())
}

/// Creates `web-lb` with two endpoints, on alpha and beta, and returns its address.
fn load_balancer(fleet: &Fleet) -> Result<SocketAddr> {
    for name in ["web-a1", "web-b1"] {
        let mut labelled = objects::pod("default", name, &fleet.pod(name)?.1.net.name, "default");
        labelled["metadata"]["labels"] = json!({"app": "web", "tier": "front"});
        fleet.kube().apply(&labelled)?;
    }
    let vip = "203.0.113.10";
    apply_service(
        fleet,
        "web-lb",
        &json!({
            "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "selector": {"app": "web", "tier": "front"},
        }),
    )?;
    let status = json!({"status": objects::load_balancer_status(&[vip])}).to_string();
    let patch = ["patch", "service", "web-lb", "--subresource=status", "--type=merge", "-p", &status];
    fleet.control_plane().kubectl(&patch)?;
    Ok(SocketAddr::new(vip.parse()?, 80))
}
