//! Starts a cluster.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::control_plane::{self, Kubectl};
use super::down::down;
use super::interrupt::{self, Then};
use super::layout::{Layout, STARTER, Tools};
use super::machine::Machine;
use super::shell::{on_each, say, wait_until};
use super::{addons, images, network, node, pki};
use crate::lab::cleanup;

/// File in the cluster's folder with its number of nodes.
const NODES: &str = "nodes";

/// Number of nodes of a started cluster.
pub fn recorded_nodes(layout: &Layout) -> Result<u8> {
    let path = layout.dir.join(NODES);
    let text = fs::read_to_string(&path).with_context(|| {
        format!("there is no cluster in {}: `make cluster` starts one", layout.dir.display())
    })?;
    text.trim().parse().with_context(|| format!("{} does not contain a number", path.display()))
}

/// Service proxy of a new cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    /// None; it is installed later.
    None,
    /// The real kube-proxy, the baseline.
    KubeProxy,
}

/// Starts the cluster; removes the remains of an interrupted one first. An interrupt removes the incomplete cluster.
pub fn up(layout: &Layout, tools: &Tools, proxy: Proxy) -> Result<()> {
    let kubectl = Kubectl::new(layout, tools);
    if layout.dir.exists() && kubectl.run("get --raw /readyz --request-timeout=2s").is_ok() {
        say(&format!("cluster {} runs already; `make cluster-down` removes it", layout.name));
        return Ok(());
    }
    if let Some(other) = other_cluster(layout)? {
        bail!(
            "cluster {other} runs and has the same addresses; remove it first: SWITCHTOWER_CLUSTER_NAME={other} make \
             cluster-down"
        );
    }
    interrupt::watch(Then::Remove(layout.clone()))?;
    down(layout).context("removing the remains of an earlier cluster")?;
    let start = Instant::now();
    fs::create_dir_all(&layout.dir).with_context(|| format!("making {}", layout.dir.display()))?;
    fs::write(layout.dir.join(STARTER), cleanup::run_id()).context("recording the starting process")?;
    fs::write(layout.dir.join(NODES), layout.nodes.to_string()).context("recording the number of nodes")?;
    say("images");
    let archives = images::assemble_all(tools, &images::base_images(tools))?;
    say(&format!("control plane ({:.1} s)", start.elapsed().as_secs_f32()));
    let hub = Machine::start(layout, &layout.hub())?;
    network::prepare_hub(layout, &hub)?;
    pki::write(layout)?;
    fs::copy(layout.pki().join("admin.kubeconfig"), layout.kubeconfig()).context("placing the kubeconfig")?;
    control_plane::start(layout, tools, &hub, &kubectl)?;
    say(&format!("{} nodes ({:.1} s)", layout.nodes, start.elapsed().as_secs_f32()));
    let nodes = start_nodes(layout, tools, &hub, &archives)?;
    join_pod_networks(layout, &kubectl, &hub, &nodes)?;
    wait_until("all nodes Ready", Duration::from_secs(60), || {
        kubectl.run("wait --for=condition=Ready nodes --all --timeout=5s")
    })?;
    say(&format!("all nodes are Ready ({:.1} s)", start.elapsed().as_secs_f32()));
    addons::apply_coredns(&kubectl)?;
    if proxy == Proxy::KubeProxy {
        for node in &nodes {
            addons::start_kube_proxy(layout, tools, node)?;
        }
        addons::wait_for_coredns(&kubectl)?;
        say(&format!("kube-proxy and CoreDNS work ({:.1} s)", start.elapsed().as_secs_f32()));
    }
    Ok(())
}

/// Name of another cluster whose hub exists.
fn other_cluster(layout: &Layout) -> Result<Option<String>> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(None) };
    for entry in entries {
        let file = entry.context("reading /run/netns")?.file_name().to_string_lossy().into_owned();
        if let Some(name) = file.strip_suffix("-hub").filter(|name| *name != layout.name) {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// Starts all nodes in parallel: importing images takes the most time.
fn start_nodes(layout: &Layout, tools: &Tools, hub: &Machine, archives: &[PathBuf]) -> Result<Vec<Machine>> {
    let mut nodes = Vec::new();
    for (number, name) in (1..).zip(layout.node_names()) {
        let node = Machine::start(layout, &name)?;
        network::prepare_node(layout, hub, &node, number)?;
        nodes.push(node);
    }
    let numbered: Vec<_> = (1..).zip(&nodes).collect();
    on_each(&numbered, |(number, machine)| node::start(layout, tools, machine, *number, archives))?;
    Ok(nodes)
}

fn join_pod_networks(layout: &Layout, kubectl: &Kubectl, hub: &Machine, nodes: &[Machine]) -> Result<()> {
    let mut machines = vec![hub.clone()];
    machines.extend(nodes.iter().cloned());
    for (number, node) in (1..).zip(nodes) {
        let cidrs = node::configure_pod_network(layout, kubectl, node)?;
        network::route_pods(layout, &machines, &node.name, number, &cidrs)?;
    }
    Ok(())
}
