//! kube-proxy as a DaemonSet, and its rules on a node.
//!
//! The image consists of the cluster's kube-proxy and this machine's `nft`, `iptables` (legacy) and `conntrack` with their
//! libraries.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::super::control_plane::Kubectl;
use super::super::images::{self, Image, Layer};
use super::super::layout::{API_SERVER_PORT, Layout, POD_CIDRS, Tools};
use super::super::machine::Machine;
use super::super::shell::{finish, on_each, run};

const IMAGE: &str = "switchtower.dev/cluster/kube-proxy:1";
const MANIFESTS: &str = include_str!("kube-proxy.yaml");
/// Commands of kube-proxy that one program implements.
const IPTABLES: [&str; 6] =
    ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"];
const PROTOCOLS: &str = "tcp 6 TCP\nudp 17 UDP\nsctp 132 SCTP\n";
const LEGACY: &str = "/usr/sbin/xtables-legacy-multi";

/// Mode of kube-proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    /// Value of the field `mode`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// Delivers the image to all nodes.
///
/// # Errors
/// A program is missing, or an image cannot be imported.
pub(super) fn deliver(layout: &Layout, tools: &Tools, nodes: &[Machine]) -> Result<()> {
    let work = tempfile::tempdir().context("creating a temporary folder")?;
    let root = work.path().join("root");
    let program = root.join("usr/local/bin/kube-proxy");
    place(&tools.control_plane("kube-proxy"), &program)?;
    let mut programs = extensions()?;
    programs.extend(["/usr/sbin/nft", "/usr/sbin/conntrack", LEGACY].map(PathBuf::from));
    let libraries = libraries(&programs)?;
    for file in programs.iter().chain(&libraries) {
        place(file, &root.join(file.strip_prefix("/").unwrap_or(file)))?;
    }
    for name in IPTABLES {
        symlink("xtables-legacy-multi", root.join("usr/sbin").join(name)).context(name)?;
    }
    fs::create_dir_all(root.join("tmp")).context("making /tmp")?;
    // Without it nft prints numbers, and kube-proxy deletes the elements of its maps at every second start.
    fs::create_dir_all(root.join("etc")).context("making /etc")?;
    fs::write(root.join("etc/protocols"), PROTOCOLS).context("writing /etc/protocols")?;
    let layer = work.path().join("kube-proxy-root.tar");
    images::tar(&root, &layer, &["."])?;
    let image = Image {
        name: "kube-proxy",
        tags: vec![IMAGE.to_owned()],
        layer: Layer::Tar(layer),
        entrypoint: vec!["/usr/local/bin/kube-proxy".into()],
        arguments: Vec::new(),
        user: "",
    };
    let archive = images::assemble(&image, work.path())?;
    on_each(nodes, |node| images::import(layout, node, &archive))
}

fn place(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copying {}", from.display())).map(drop)
}

/// The libraries of programs and extensions, and the dynamic linker.
fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let lines = run("ldd", programs)?;
    // `/usr/sbin/nft:` precedes the libraries of a program.
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(lines.lines().filter(|line| !line.ends_with(':')).filter_map(path).collect())
}

/// The matches and targets of iptables.
fn extensions() -> Result<Vec<PathBuf>> {
    let found = run("find", ["/usr/lib", "-path", "*/xtables/*.so"])?;
    ensure!(!found.is_empty(), "the package iptables is not installed");
    Ok(found.lines().map(PathBuf::from).collect())
}

/// Replaces the DaemonSet by one in this mode, and waits until it runs on every node.
///
/// # Errors
/// It does not run.
pub(super) fn apply(kubectl: &Kubectl, layout: &Layout, tools: &Tools, mode: Mode) -> Result<()> {
    kubectl.run("delete --namespace kube-system daemonset/kube-proxy --ignore-not-found")?;
    for node in Machine::nodes(layout)? {
        // The rules of another mode.
        finish(node.command(&tools.control_plane("kube-proxy")).arg("--cleanup"))?;
    }
    let server = format!("{}:{API_SERVER_PORT}", layout.hub_ip());
    let manifests = MANIFESTS
        .replace("MODE", mode.name())
        .replace("POD_CIDRS", POD_CIDRS)
        .replace("KUBE_PROXY_IMAGE", IMAGE)
        .replace("API_SERVER", &server);
    kubectl.apply(&manifests)?;
    rolled_out(kubectl)
}

/// Restarts kube-proxy on all nodes, and waits until it runs.
///
/// # Errors
/// It does not run.
pub(super) fn restart(kubectl: &Kubectl) -> Result<()> {
    kubectl.run("rollout restart --namespace kube-system daemonset/kube-proxy")?;
    rolled_out(kubectl)
}

fn rolled_out(kubectl: &Kubectl) -> Result<()> {
    kubectl.run("rollout status --namespace kube-system daemonset/kube-proxy --timeout=120s").map(drop)
}

/// Returns whether kube-proxy's rules of any mode are on the node.
///
/// # Errors
/// The rules cannot be read.
pub(super) fn has_rules(node: &Machine) -> Result<bool> {
    let tables = finish(node.command(Path::new("nft")).args(["list", "tables"]))?;
    let mut chains = String::new();
    for family in ["iptables-save", "ip6tables-save"] {
        chains += &finish(node.command(Path::new(LEGACY)).arg(family))?;
    }
    // Both the kubelet and kube-proxy create these; `kube-proxy --cleanup` leaves them.
    let shared = [":KUBE-FIREWALL ", ":KUBE-KUBELET-CANARY ", ":KUBE-MARK-DROP "];
    let own = |line: &str| line.starts_with(":KUBE-") && !shared.iter().any(|chain| line.starts_with(chain));
    let services = chains.lines().any(own);
    Ok(tables.contains("kube-proxy") || services)
}
