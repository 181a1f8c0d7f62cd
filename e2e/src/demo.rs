//! The demonstration behind `make demo`: a real control plane, three nodes in two zones, real packets.
//!
//! Invariant: every scene checks what it shows, and fails the demonstration if its text does not match the facts.

mod canary;
mod explore;
mod packets;
mod stale;
mod terminal;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use crate::lab::cleanup;
use crate::lab::objects;
use crate::lab::{NodeNet, PodNet};
use crate::switchtower::{Fleet, NodeSpec};

use terminal::Terminal;

/// Runs the demonstration. `keep` then waits for Ctrl-C; `svg` also writes the output to that file.
pub fn main(keep: bool, svg: Option<&Path>) -> ExitCode {
    let terminal = Terminal::default();
    let shown = run(&terminal, keep, svg);
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // An interrupted run fails because its parts are being removed; this is not an error.
            cleanup::check_interrupted();
            terminal.failure(&format!("The demonstration failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(terminal: &Terminal, keep: bool, svg: Option<&Path>) -> Result<()> {
    let start = Instant::now();
    terminal
        .line("Starting etcd, kube-apiserver, kube-controller-manager, the Switchtower controller and three");
    terminal.line("nodes, each with an agent, in network namespaces of this machine ...");
    let fleet = start_fleet()?;
    terminal.line(&format!("Ready after {:.1} s.\n", start.elapsed().as_secs_f64()));
    show_nodes(terminal, &fleet);
    let shown = scenes(terminal, &fleet);
    if shown.is_err() {
        cleanup::check_interrupted();
        show_controller_log(terminal, &fleet);
    }
    terminal.line(&format!("\nAll of this took {:.1} s.", start.elapsed().as_secs_f64()));
    if let Some(path) = svg {
        terminal.write_svg(path)?;
    }
    if keep {
        if let Err(error) = &shown {
            terminal.failure(&format!("{error:#}"));
        }
        explore::print(terminal, &fleet)?;
        loop {
            std::thread::park();
        }
    }
    shown
}

fn start_fleet() -> Result<Fleet> {
    let fleet = Fleet::start(&[
        NodeSpec::new("alpha", "east", &["web-a1", "web-a2"]),
        NodeSpec::new("beta", "east", &["web-b1"]),
        NodeSpec::new("gamma", "west", &["web-c1"]),
    ])?;
    for node in fleet.nodes() {
        for pod in &node.pods {
            create_pod(&fleet, pod, &node.net)?;
        }
    }
    Ok(fleet)
}

fn scenes(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    packets::cluster_ip(terminal, fleet)?;
    packets::dropped_packet(terminal, fleet)?;
    canary::bad_change(terminal, fleet)?;
    stale::one_change(terminal, fleet)?;
    stale::stopped_agent(terminal, fleet)
}

fn create_pod(fleet: &Fleet, pod: &PodNet, node: &NodeNet) -> Result<()> {
    let mut object = objects::pod("default", &pod.name, &node.name, "default");
    object["metadata"]["labels"] = json!({"app": "web"});
    object["status"] = objects::running(pod, node);
    fleet.kube().apply(&object).map(drop)
}

fn show_nodes(terminal: &Terminal, fleet: &Fleet) {
    terminal.line(&format!("{:<8} {:<6} {:<16} PODS", "NODE", "ZONE", "ADDRESS"));
    for node in fleet.nodes() {
        let pods: Vec<_> = node.pods.iter().map(|pod| format!("{} {}", pod.name, pod.ipv4)).collect();
        let (name, address) = (&node.net.name, node.net.address(false).to_string());
        terminal.line(&format!("{name:<8} {:<6} {address:<16} {}", node.zone, pods.join(", ")));
    }
}

fn show_controller_log(terminal: &Terminal, fleet: &Fleet) {
    let log = fleet.controller_log();
    let lines: Vec<_> = log.lines().collect();
    terminal.line("\nThe controller's log ends:");
    for line in &lines[lines.len().saturating_sub(15)..] {
        terminal.line(line);
    }
}
