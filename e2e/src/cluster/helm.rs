//! The life of a release of the Helm charts on a cluster without Switchtower: install, upgrade, rejected values, rollback
//! and the documented uninstall. During upgrade and rollback every node keeps connecting to a Service.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::control_plane::{Kubectl, address};
use super::install::{self, NAMESPACE};
use super::layout::{API_SERVER_PORT, Layout, Tools};
use super::machine::Machine;
use super::rolling_update::{connect_until, request};
use super::shell::{Results, finish, print, say, wait_until};
use super::{demo, uninstall};
use crate::lab::programs;

/// Marks the block of commands in the charts' README.
const MARK: &str = "<!-- `hack/cluster.sh helm` runs the next block. -->";
/// Argument that the second revision adds to the agents.
const ARGUMENT: &str = "--log-level=debug";

/// Runs the tests; prints a line for each and the total. Leaves the cluster without Switchtower.
///
/// # Errors
/// Switchtower is installed already, the cluster does not respond, or a check failed.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    let kubectl = Kubectl::new(layout, tools);
    install::ensure_absent(&kubectl)?;
    let lifecycle = Lifecycle::new(layout, tools, kubectl)?;
    say("Helm charts");
    let mut results = Results::default();
    results.add("install", || lifecycle.install())?;
    results.add("upgrade without a lost connection", || lifecycle.upgrade())?;
    results.add("rejected values change nothing", || lifecycle.rejected())?;
    results.add("rollback without a lost connection", || lifecycle.roll_back())?;
    results.add("uninstall with the documented commands", || lifecycle.uninstall())?;
    lifecycle.kubectl.run("delete namespace demo --ignore-not-found --wait=false")?;
    results.end("helm")
}

struct Lifecycle<'a> {
    layout: &'a Layout,
    tools: &'a Tools,
    kubectl: Kubectl,
    nodes: Vec<Machine>,
    helm: PathBuf,
    /// Folder of the repository.
    root: PathBuf,
}

impl<'a> Lifecycle<'a> {
    fn new(layout: &'a Layout, tools: &'a Tools, kubectl: Kubectl) -> Result<Self> {
        let (nodes, root) = (Machine::nodes(layout)?, tools.repository()?);
        Ok(Self { layout, tools, kubectl, nodes, helm: programs::tool("helm")?, root })
    }

    /// The README's commands, with this build's images and this cluster's addresses.
    fn install(&self) -> Result<()> {
        super::images::deliver_switchtower(self.layout, self.tools, &self.nodes)?;
        self.kubectl.run(&format!("create namespace {NAMESPACE}"))?;
        self.kubectl
            .run(&format!("label namespace {NAMESPACE} pod-security.kubernetes.io/enforce=privileged"))?;
        self.helm(&["install", "switchtower-crds", "charts/switchtower-crds"])?;
        self.helm(&["install", "switchtower", "charts/switchtower", "--set", &self.values()])?;
        install::wait_until_ready(&self.kubectl, self.layout, Instant::now())?;
        self.kubectl.apply(demo::MANIFESTS)?;
        self.kubectl.run("rollout status --namespace demo deployment/web --timeout=60s")?;
        let service = self.service()?;
        for node in &self.nodes {
            wait_until("an answer of the Service", Duration::from_secs(30), || {
                node.in_network(|| request(service))?
            })?;
        }
        Ok(())
    }

    /// Adds an argument of the agents and an optional part.
    fn upgrade(&self) -> Result<()> {
        let argument = format!("nodeAgent.extraArgs={{{ARGUMENT}}}");
        let more = ["--set", &argument, "--set", "dashboards.enabled=true"];
        let values = self.values();
        let command = ["upgrade", "switchtower", "charts/switchtower", "--set", &values];
        self.probed(|| self.helm(&[command.as_slice(), &more].concat()))?;
        ensure!(self.arguments()?.contains(ARGUMENT), "the agents lack {ARGUMENT}");
        self.kubectl.run(&format!("get --namespace {NAMESPACE} configmap/switchtower-dashboards"))?;
        ensure!(self.revision()? == "2", "the release has revision {}", self.revision()?);
        Ok(())
    }

    fn rejected(&self) -> Result<()> {
        let before = self.arguments()?;
        for wrong in ["controller.replicas=none", "nodeAgent.extraArg={--log-level=trace}"] {
            let values = self.values();
            let result = self.helm(&[
                "upgrade",
                "switchtower",
                "charts/switchtower",
                "--set",
                &values,
                "--set",
                wrong,
            ]);
            ensure!(result.is_err(), "helm accepted {wrong}");
        }
        ensure!(
            self.arguments()? == before && self.revision()? == "2",
            "rejected values changed the release"
        );
        Ok(())
    }

    fn roll_back(&self) -> Result<()> {
        self.probed(|| self.helm(&["rollback", "switchtower", "1"]))?;
        ensure!(!self.arguments()?.contains(ARGUMENT), "the agents still have {ARGUMENT}");
        let dashboards = format!("get --namespace {NAMESPACE} configmap/switchtower-dashboards");
        ensure!(self.kubectl.run(&dashboards).is_err(), "the dashboards of revision 2 remain");
        Ok(())
    }

    fn uninstall(&self) -> Result<()> {
        let readme = self.root.join("charts/README.md");
        let text = fs::read_to_string(&readme).with_context(|| format!("reading {}", readme.display()))?;
        let block =
            text.split_once(MARK).and_then(|(_, rest)| rest.split("```sh\n").nth(1)?.split("```").next());
        let script = block.with_context(|| format!("{} has no block to uninstall", readme.display()))?;
        let mut command = Command::new("bash");
        command.args(["-euxo", "pipefail", "-c", script]);
        self.finish(&mut command)?;
        uninstall::nothing_in_the_api_server(&self.kubectl)?;
        uninstall::nothing_on_nodes(&self.nodes)
    }

    /// Changes the release while every node keeps connecting to the Service; no connection may fail.
    fn probed(&self, change: impl FnOnce() -> Result<String>) -> Result<()> {
        let service = [self.service()?];
        let (ended, count, losses) = (AtomicBool::new(false), AtomicUsize::new(0), Mutex::new(Vec::new()));
        let (ended, count, losses, service) = (&ended, &count, &losses, &service);
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .nodes
                .iter()
                .map(|node| {
                    scope.spawn(move || {
                        node.in_network(|| {
                            connect_until(ended, service, count, |loss| {
                                if let Ok(mut losses) = losses.lock() {
                                    losses.push(format!("{} {loss}", node.name));
                                }
                            });
                        })
                    })
                })
                .collect();
            let changed =
                change().and_then(|_| install::wait_until_ready(&self.kubectl, self.layout, Instant::now()));
            ended.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().unwrap_or_else(|_| bail!("a thread panicked"))?;
            }
            changed
        })?;
        let losses = losses.lock().map(|losses| losses.clone()).unwrap_or_default();
        let count = count.load(Ordering::Relaxed);
        print(&format!("  {count} connections, {} failed", losses.len()))?;
        ensure!(count > 0 && losses.is_empty(), "{:?}", losses.iter().take(5).collect::<Vec<_>>());
        Ok(())
    }

    fn service(&self) -> Result<SocketAddr> {
        let service = self.kubectl.json("get service web --namespace demo")?;
        Ok(SocketAddr::new(address(&service["spec"]["clusterIP"])?, 80))
    }

    /// Arguments of the agents' container.
    fn arguments(&self) -> Result<String> {
        self.kubectl.run(&format!(
            "get --namespace {NAMESPACE} daemonset/switchtower-node-agent \
             --output jsonpath={{.spec.template.spec.containers[0].args}}"
        ))
    }

    fn revision(&self) -> Result<String> {
        let text = self.helm(&["status", "switchtower", "--output", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&text).context("reading helm's output")?;
        Ok(status["version"].to_string())
    }

    /// Values of every revision of the release, for `--set`.
    fn values(&self) -> String {
        // Only a machine's initial network namespace may change the limit per core.
        format!(
            "apiServer.host={},apiServer.port={API_SERVER_PORT},imageTag=dev,conntrackSysctls.enabled=true,\
             conntrackSysctls.extraArgs={{--max-per-core=0}}",
            self.layout.hub_ip()
        )
    }

    fn helm(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.helm);
        command.args(arguments).args(["--namespace", NAMESPACE]);
        self.finish(&mut command)
    }

    /// Runs a command with this cluster's kubeconfig and none of the user's settings of helm.
    fn finish(&self, command: &mut Command) -> Result<String> {
        let home = tempfile::tempdir().context("creating a temporary folder")?;
        let tools = self.helm.parent().unwrap_or(Path::new("."));
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{}:{path}", self.tools.control_plane.display(), tools.display());
        command.current_dir(&self.root).env("PATH", path).env("KUBECONFIG", self.layout.kubeconfig());
        for variable in ["HOME", "HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, home.path());
        }
        finish(command)
    }
}
