//! Scenes about acknowledgements: when every kernel holds a change, and which node is stale.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;

use super::packets::{cluster_ip_of, service, wait_for_backends};
use super::terminal::Terminal;
use crate::lab::wait;
use crate::switchtower::plugin;
use crate::switchtower::{Fleet, FleetNode};

/// Deletes a pod and shows stage by stage when all kernels hold the change.
pub(super) fn one_change(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    terminal.title("When did the last node stop sending to a deleted pod?");
    fleet.settled(Duration::from_secs(10))?;
    let deleted = Instant::now();
    terminal.command("kubectl delete pod web-a2");
    fleet.kube().delete::<Pod>("default", "web-a2")?;
    let to = cluster_ip_of(&service(fleet, "web")?, false)?;
    wait_for_backends(fleet, "web-b1", to, 3)?;
    let answered = deleted.elapsed();
    run(terminal, fleet, &["wait", "default/web", "--for=change"], 0)?;
    run(terminal, fleet, &["trace", "default/web", "--last", "1"], 0)?;
    terminal.checked(&format!(
        "{:.1} s after the deletion no node sends to web-a2; every kernel has acknowledged it",
        answered.as_secs_f64()
    ));
    Ok(())
}

/// Stops one agent, makes a change, and shows that the node is reported as stale.
pub(super) fn stopped_agent(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    terminal.title("Which node is stale?");
    let gamma = fleet.nodes().last().context("no nodes")?;
    terminal.line("  gamma's agent is stopped (SIGSTOP), then a Service changes ...");
    signal(fleet, gamma, libc::SIGSTOP);
    fleet.control_plane().kubectl(&["patch", "service", "web", "--type=merge", "-p", AFFINITY])?;
    wait::until("gamma's row is no longer Synced", Duration::from_secs(20), || {
        let row = fleet.row("gamma")?;
        ensure!(row.state != "Synced" && row.generation.desired > row.generation.applied, "{}", row.state);
        Ok(())
    })?;
    terminal.command("kubectl get proxystatus");
    terminal.output(&fleet.control_plane().kubectl(&["get", "proxystatus"])?);
    run(terminal, fleet, &["status"], 1)?;
    signal(fleet, gamma, libc::SIGCONT);
    let took = fleet.settled(Duration::from_secs(20))?;
    terminal.line("\n  gamma's agent continues:");
    terminal.command("kubectl get proxystatus");
    terminal.output(&fleet.control_plane().kubectl(&["get", "proxystatus"])?);
    terminal.checked(&format!(
        "{:.1} s later all three kernels hold the latest generation, read back with nft",
        took.as_secs_f64()
    ));
    Ok(())
}

const AFFINITY: &str = r#"{"spec": {"sessionAffinity": "ClientIP"}}"#;

fn run(terminal: &Terminal, fleet: &Fleet, arguments: &[&str], code: i32) -> Result<()> {
    let answer = plugin::run(fleet, arguments)?;
    terminal.command(&format!("kubectl switchtower {}", arguments.join(" ")));
    terminal.output(&answer.text);
    ensure!(answer.code == code, "exit code {} instead of {code}: {}", answer.code, answer.errors);
    Ok(())
}

fn signal(fleet: &Fleet, node: &FleetNode, signal: i32) {
    if let Some(agent) = fleet.agent_id(node).and_then(|id| i32::try_from(id).ok()) {
        // SAFETY: a signal to a child of this process.
        unsafe { libc::kill(agent, signal) };
    }
}
