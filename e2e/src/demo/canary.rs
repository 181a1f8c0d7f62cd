//! A harmful change of settings: it reaches one canary node, fails a probe there and is rolled back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use switchtower_crds::ProxyRollout;

use super::packets::{apply_service, eventually};
use super::terminal::Terminal;
use crate::lab::wait;
use crate::probe::{self, Transport};
use crate::switchtower::plugin;
use crate::switchtower::{Fleet, FleetNode};

const PROFILE: &str = "\
apiVersion: switchtower.dev/v1alpha1
kind: ProxyProfile
metadata: {name: default}
spec:
  changeCause: NodePorts only on the storage network
  settings:
    nodePortAddresses: [203.0.113.0/24]      # no node has an address there
  strategy:
    steps: [{name: canary, nodes: 1}, {name: rest, nodes: \"100%\"}]
    gates:
      windowSeconds: 2
      probes:
      - name: node-port
        type: NodePort
        service: {namespace: default, name: web-port, port: tcp}
";

/// Results of one node's off-cluster client during the rollout.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    sent: usize,
    failed: usize,
    /// Time from the first failed probe to the next answer.
    outage: Duration,
}

/// Applies a harmful profile and shows the affected nodes.
pub(super) fn bad_change(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    terminal.title("A bad change of settings stops at one node");
    let service = apply_service(fleet, "web-port", &json!({"type": "NodePort"}))?;
    let ports = service.spec.and_then(|spec| spec.ports).context("a Service without ports")?;
    let port = u16::try_from(ports.first().and_then(|port| port.node_port).context("no NodePort")?)?;
    for node in fleet.nodes() {
        eventually(node, node_port(node, port), |outcome| outcome.backend().is_some())?;
    }
    let path = fleet.lab().directory().join("profile.yaml");
    std::fs::write(&path, PROFILE)?;
    terminal.command("cat profile.yaml");
    terminal.output(PROFILE);
    let (seen, applied) = during_rollout(fleet, port, || {
        let applied = fleet.control_plane().kubectl(&["apply", "-f", &path.to_string_lossy()])?;
        wait::until("the rollout fails", Duration::from_secs(30), || {
            let rollout: Option<ProxyRollout> = fleet.kube().get_cluster("default-1")?;
            let state = rollout.and_then(|rollout| rollout.status).map(|status| status.state);
            ensure!(state.as_deref() == Some("Failed"), "state {state:?}");
            Ok(())
        })?;
        Ok(applied)
    })?;
    terminal.command("kubectl apply -f profile.yaml");
    terminal.output(&applied);
    let answer = plugin::run(fleet, &["rollout", "status", "default-1"])?;
    terminal.command("kubectl switchtower rollout status default-1");
    terminal.output(&answer.text);
    show(terminal, fleet, port, &seen)
}

fn show(terminal: &Terminal, fleet: &Fleet, port: u16, seen: &[Seen]) -> Result<()> {
    terminal.line("");
    for (node, seen) in fleet.nodes().iter().zip(seen) {
        let Seen { sent, failed, outage } = seen;
        let to = node_port(node, port).to_string();
        let outage = if *failed > 0 { format!(", for {:.1} s", outage.as_secs_f64()) } else { String::new() };
        terminal.line(&format!(
            "  {:<6} NodePort {to:<22} {sent:>4} probes, {failed:>2} failed{outage}",
            node.net.name
        ));
    }
    let hit = seen.iter().filter(|seen| seen.failed > 0).count();
    ensure!(hit <= 1, "the change reached {hit} nodes: {seen:?}");
    let failed = seen.iter().map(|seen| seen.outage).max().unwrap_or_default();
    terminal.checked(&format!(
        "two nodes never got the change; the canary detected it and rolled back within {:.1} s",
        failed.as_secs_f64()
    ));
    Ok(())
}

fn node_port(node: &FleetNode, port: u16) -> SocketAddr {
    SocketAddr::new(node.net.address(false), port)
}

/// Probes the NodePort of every node while `action` runs, and shortly afterwards.
fn during_rollout<T>(fleet: &Fleet, port: u16, action: impl FnOnce() -> Result<T>) -> Result<(Vec<Seen>, T)> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let over = &over;
        let probers: Vec<_> = fleet
            .nodes()
            .iter()
            .map(|node| scope.spawn(move || probe_until(over, node, node_port(node, port))))
            .collect();
        let done = action();
        over.store(true, Ordering::Relaxed);
        let seen: Result<Vec<_>> = probers
            .into_iter()
            .map(|prober| prober.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        Ok((seen?, done?))
    })
}

fn probe_until(over: &AtomicBool, node: &FleetNode, to: SocketAddr) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut broken_since: Option<Instant> = None;
    while !over.load(Ordering::Relaxed) {
        let start = Instant::now();
        let outcome =
            probe::send_with_timeout(&node.net.client, Transport::Tcp, to, Duration::from_millis(300))?;
        seen.sent += 1;
        if outcome.backend().is_none() {
            seen.failed += 1;
            broken_since.get_or_insert(start);
        } else if let Some(since) = broken_since.take() {
            seen.outage += since.elapsed();
        }
        std::thread::sleep(Duration::from_millis(40));
    }
    Ok(seen)
}
