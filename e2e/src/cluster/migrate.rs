//! The migration from kube-proxy and back with the documented commands, under long-lived connections, UDP flows and a
//! continuous prober, next to a plain restart of kube-proxy.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::control_plane::Kubectl;
use super::install;
use super::layout::{Layout, Tools};
use super::machine::Machine;
use super::shell::{Results, finish, print, say, wait_until};
use super::{addons, images, plugin, uninstall};

mod kube_proxy;
mod traffic;

pub use kube_proxy::Mode;
use traffic::{CONNECTIONS, Phase, Traffic};

/// Rules of another program, which no step may touch.
const FOREIGN: &str = "foreign-to-all-proxies";

/// Runs the migration with kube-proxy in these modes; prints a table, a line for each check, and the total. Leaves the cluster
/// with kube-proxy and without Switchtower.
///
/// # Errors
/// Switchtower is installed already, the cluster does not respond, or a check failed.
pub fn check(layout: &Layout, tools: &Tools, modes: &[Mode]) -> Result<()> {
    let kubectl = Kubectl::new(layout, tools);
    install::ensure_absent(&kubectl)?;
    let nodes = Machine::nodes(layout)?;
    let migration = Migration { layout, tools, kubectl, nodes: &nodes, root: tools.repository()? };
    say("images");
    images::deliver_switchtower(layout, tools, &nodes)?;
    kube_proxy::deliver(layout, tools, &nodes)?;
    for node in &nodes {
        migration.foreign(node)?;
    }
    let mut results = Results::default();
    let mut table = Vec::new();
    for mode in modes {
        migration.run(*mode, &mut results, &mut table)?;
    }
    print(
        "| kube-proxy | step | seconds | connections broken | UDP flows dead | datagrams lost | new connections lost | of 0.9 s and more | longest gap |",
    )?;
    print("|---|---|---|---|---|---|---|---|---|")?;
    table.iter().try_for_each(|line| print(line))?;
    migration.kubectl.run("delete namespace migration --timeout=60s")?;
    for node in &nodes {
        finish(node.command(Path::new("nft")).args(["delete", "table", "ip", FOREIGN]))?;
        finish(node.command(Path::new("iptables-legacy")).args(["-t", "nat", "-X", FOREIGN]))?;
    }
    results.end("migrate")
}

struct Migration<'a> {
    layout: &'a Layout,
    tools: &'a Tools,
    kubectl: Kubectl,
    nodes: &'a [Machine],
    /// Folder of the repository.
    root: PathBuf,
}

impl Migration<'_> {
    fn run(&self, mode: Mode, results: &mut Results, table: &mut Vec<String>) -> Result<()> {
        let named = |what: &str| format!("{}: {what}", mode.name());
        say(&format!("kube-proxy in {} mode", mode.name()));
        kube_proxy::apply(&self.kubectl, self.layout, self.tools, mode)?;
        addons::wait_for_coredns(&self.kubectl)?;
        let original = self.daemon_set()?.context("no DaemonSet")?;
        let mut traffic = Traffic::open(&self.kubectl, self.layout, self.nodes)?;

        let mut step = |what: &str, action: &dyn Fn() -> Result<()>| {
            results.add(&named(what), || {
                ensure!(traffic.connections() == CONNECTIONS, "only {} connections", traffic.connections());
                let phase = traffic.during(action)?;
                table.push(line(mode, what, &phase));
                ensure!(phase.broken == 0, "{} connections broke", phase.broken);
                ensure!(phase.dead == 0, "{} UDP flows are dead", phase.dead);
                Ok(())
            })
        };
        step("restart of kube-proxy", &|| kube_proxy::restart(&self.kubectl))?;
        step("installation in mode Shadow", &|| self.install())?;
        step("migrate plan, start", &|| self.start())?;
        step("migrate finish", &|| self.finish())?;
        step("migrate back", &|| self.back(&original))?;
        step("uninstallation", &|| self.uninstall())
    }

    /// The documented command, with the ConfigMap that the manifests' README asks for.
    fn install(&self) -> Result<()> {
        self.kubectl.apply(&install::prerequisites(self.layout))?;
        self.kubectl.run(&format!("apply -k {}", self.root.join("examples/shadow").display()))?;
        install::wait_until_agents_run(&self.kubectl)?;
        self.states("Shadow")?;
        self.nodes.iter().try_for_each(|node| self.plugin(&["compare", &node.name]))
    }

    fn start(&self) -> Result<()> {
        self.migrate(&["plan"])?;
        let first = &self.nodes[0].name;
        self.migrate(&["start", first])?;
        ensure!(!kube_proxy::has_rules(&self.nodes[0])?, "kube-proxy's rules remain on {first}");
        ensure!(kube_proxy::has_rules(&self.nodes[1])?, "kube-proxy's rules are gone on the next node");
        self.migrate(&["start"])?;
        self.migrate(&["status"])?;
        self.states("Synced")?;
        self.nodes.iter().try_for_each(|node| {
            ensure!(!kube_proxy::has_rules(node)?, "kube-proxy's rules remain on {}", node.name);
            self.foreign_is_there(node)
        })
    }

    fn finish(&self) -> Result<()> {
        self.migrate(&["finish"])?;
        ensure!(self.daemon_set()?.is_none(), "kube-proxy's DaemonSet exists");
        Ok(())
    }

    fn back(&self, original: &Value) -> Result<()> {
        self.migrate(&["back"])?;
        self.states("Shadow")?;
        let restored = self.daemon_set()?.context("no DaemonSet")?;
        ensure!(restored == *original, "the DaemonSet differs: {restored:#}");
        for node in self.nodes {
            ensure!(kube_proxy::has_rules(node)?, "no rules of kube-proxy on {}", node.name);
            self.foreign_is_there(node)?;
        }
        Ok(())
    }

    fn uninstall(&self) -> Result<()> {
        let overlay = self.root.join("examples/shadow");
        uninstall::run_commands(self.layout, self.tools, &overlay.to_string_lossy())?;
        uninstall::nothing_in_the_api_server(&self.kubectl)?;
        uninstall::nothing_on_nodes(self.nodes)?;
        self.nodes.iter().try_for_each(|node| self.foreign_is_there(node))
    }

    fn migrate(&self, arguments: &[&str]) -> Result<()> {
        self.plugin(&[&["migrate"], arguments].concat())
    }

    /// Runs `kubectl switchtower`.
    fn plugin(&self, arguments: &[&str]) -> Result<()> {
        say(&format!("kubectl switchtower {}", arguments.join(" ")));
        plugin::output(self.layout, self.tools, arguments).map(drop)
    }

    /// Fields of kube-proxy's DaemonSet that the migration changes.
    fn daemon_set(&self) -> Result<Option<Value>> {
        let all =
            self.kubectl.json("get daemonsets --namespace kube-system --selector k8s-app=kube-proxy")?;
        let Some(object) = all["items"].as_array().and_then(|items| items.first()) else { return Ok(None) };
        let mut spec = object["spec"].clone();
        // Set by each restart.
        spec["template"]["metadata"]["annotations"] = Value::Null;
        Ok(Some(spec))
    }

    fn states(&self, expected: &str) -> Result<()> {
        wait_until(&format!("state {expected} of every node"), Duration::from_secs(120), || {
            for node in self.nodes {
                let row = self.kubectl.json(&format!("get proxystatus {}", node.name))?;
                let state = &row["status"]["state"];
                ensure!(state == expected, "{} has {state}: {}", node.name, row["status"]["conditions"]);
            }
            Ok(())
        })
    }

    /// Adds rules of another program to a node.
    fn foreign(&self, node: &Machine) -> Result<()> {
        finish(node.command(Path::new("nft")).args(["add", "table", "ip", FOREIGN]))?;
        finish(node.command(Path::new("iptables-legacy")).args(["-t", "nat", "-N", FOREIGN])).map(drop)
    }

    fn foreign_is_there(&self, node: &Machine) -> Result<()> {
        finish(node.command(Path::new("nft")).args(["list", "table", "ip", FOREIGN]))?;
        finish(node.command(Path::new("iptables-legacy")).args(["-t", "nat", "-S", FOREIGN])).map(drop)
    }
}

/// Row of the table.
fn line(mode: Mode, step: &str, phase: &Phase) -> String {
    format!(
        "| {} | {step} | {:.0} | {} of {CONNECTIONS} | {} | {} of {} | {} of {} | {} | {:.2} s |",
        mode.name(),
        phase.duration.as_secs_f64(),
        phase.broken,
        phase.dead,
        phase.datagrams.1,
        phase.datagrams.0,
        phase.attempts.1,
        phase.attempts.0,
        phase.slow,
        phase.gap.as_secs_f64()
    )
}
