//! Runs the uninstall commands of the manifests' README, checks that no object, definition, finalizer, table or file
//! remains, and installs again.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::control_plane::Kubectl;
use super::install::{self, NAMESPACE};
use super::layout::{Layout, Tools};
use super::machine::Machine;
use super::shell::{Results, finish, say, wait_until};

/// A profile in use during the removal, whose finalizer must not block it.
const PROFILE: &str = r#"{"apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "leaving"},
    "spec": {"strategy": {"steps": [{"nodes": "100%"}], "maxUnavailable": "100%", "gates": {"probes": []}}}}"#;
/// Marks the block of commands in the README.
const MARK: &str = "<!-- A test runs the commands of the next block on a real cluster. -->";

/// Runs the tests, and prints a line for each and the total.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    say("uninstall");
    let kubectl = Kubectl::new(layout, tools);
    let nodes = Machine::nodes(layout)?;
    let mut results = Results::default();
    results.add("a profile is in force", || profile_in_force(&kubectl))?;
    results.add("the documented commands end", || {
        run_commands(layout, tools, &install::write_overlay(layout, tools, "overlay", &[])?)
    })?;
    results.add("no object is left in the API server", || nothing_in_the_api_server(&kubectl))?;
    results.add("no table and no file is left on a node", || nothing_on_nodes(&nodes))?;
    results.add("it can be installed again", || install::install(layout, tools))?;
    results.end("uninstall")
}

fn profile_in_force(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(PROFILE)?;
    wait_until("the rollout of the profile", Duration::from_secs(60), || {
        kubectl.run("wait --for=condition=Ready proxyrollout/leaving-1 --timeout=2s")
    })?;
    Ok(())
}

/// The documented commands, with the installed overlay in place of the manifests.
pub(super) fn run_commands(layout: &Layout, tools: &Tools, overlay: &str) -> Result<()> {
    let readme = tools.manifests.join("README.md");
    let text = fs::read_to_string(&readme).with_context(|| format!("reading {}", readme.display()))?;
    let block = text.split_once(MARK).and_then(|(_, rest)| rest.split("```sh\n").nth(1)?.split("```").next());
    let block =
        block.with_context(|| format!("{} has no block of commands to uninstall", readme.display()))?;
    let delete = "delete -k manifests --ignore-not-found\n";
    ensure!(block.contains(delete), "the commands do not delete the manifests: {block}");
    let script = block.replace(delete, &format!("delete -k {overlay} --ignore-not-found --timeout=120s\n"));
    let path = format!("{}:{}", tools.control_plane.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = std::process::Command::new("bash");
    command.args(["-euxo", "pipefail", "-c", &script]).current_dir(tools.repository()?);
    command.env("PATH", path).env("KUBECONFIG", layout.kubeconfig());
    finish(&mut command)?;
    Ok(())
}

pub(super) fn nothing_in_the_api_server(kubectl: &Kubectl) -> Result<()> {
    let all = kubectl
        .run("get customresourcedefinitions,clusterroles,clusterrolebindings,namespaces --output name")?;
    let left: Vec<&str> = all.lines().filter(|line| line.contains("switchtower")).collect();
    ensure!(left.is_empty(), "{left:?} remains");
    ensure!(kubectl.run(&format!("get namespace {NAMESPACE}")).is_err(), "the namespace remains");
    Ok(())
}

pub(super) fn nothing_on_nodes(nodes: &[Machine]) -> Result<()> {
    for node in nodes {
        let tables = finish(node.command(Path::new("nft")).args(["list", "tables"]))?;
        ensure!(!tables.contains("switchtower"), "{tables}");
        let files = finish(node.command(Path::new("find")).args([
            "/var/lib",
            "-maxdepth",
            "1",
            "-name",
            "switchtower",
        ]))?;
        ensure!(files.trim().is_empty(), "{files} remains");
    }
    Ok(())
}
