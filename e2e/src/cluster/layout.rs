//! Names, paths and addresses of a cluster, all determined before it exists.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Pod CIDRs of both families; not routed outside the cluster.
pub const POD_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
/// ClusterIP ranges of both families.
pub const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/112";
/// ClusterIP of the cluster's DNS, the kubelets' `clusterDNS`.
pub const DNS_IP: &str = "10.96.0.10";
/// ClusterIP of the API server (the first of the range).
pub const API_SERVER_VIP: &str = "10.96.0.1";
/// Port of the API server on the hub's address.
pub const API_SERVER_PORT: u16 = 6443;

/// File in the cluster's folder with the id of the process that starts it.
pub(super) const STARTER: &str = "starter";

/// Path of [`Layout::pki`] inside the hub.
pub const HUB_PKI: &str = "/var/pki";

/// Parameters of one cluster, from which all names, paths and addresses follow.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Prefix of the namespaces and control groups, at most 9 characters (it becomes part of a device name).
    pub name: String,
    /// Folder of the cluster's whole state.
    pub dir: PathBuf,
    /// Number of nodes with a kubelet, 1 to 99.
    pub nodes: u8,
}

/// Folders with programs, filled by the set-up script.
#[derive(Debug, Clone)]
pub struct Tools {
    /// etcd, kube-apiserver, kube-controller-manager, kube-proxy, kubectl.
    pub control_plane: PathBuf,
    /// kubelet, kube-scheduler, agnhost, e2e.test, ginkgo, coredns, pause, and the test image's root.
    pub cluster: PathBuf,
    /// Cache of assembled images.
    pub images: PathBuf,
    /// The manifests that install Switchtower.
    pub manifests: PathBuf,
    /// The programs of this build.
    pub switchtower: PathBuf,
    /// The images of this build, as OCI archives.
    pub switchtower_images: PathBuf,
}

impl Tools {
    /// Folder of the repository, which contains the manifests.
    ///
    /// # Errors
    /// The manifests do not exist.
    pub fn repository(&self) -> Result<PathBuf> {
        let manifests = fs::canonicalize(&self.manifests).context("resolving the manifests' folder")?;
        manifests.parent().map(Path::to_owned).context("the manifests' folder has no parent")
    }
}

impl Layout {
    pub fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    /// Names of the nodes, which are also their host names and Node objects.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|number| format!("{}-node-{number}", self.name)).collect()
    }

    pub fn machine_dir(&self, machine: &str) -> PathBuf {
        self.dir.join(machine)
    }

    /// The machine's `/var` on the host.
    pub fn machine_var(&self, machine: &str) -> PathBuf {
        self.machine_dir(machine).join("var")
    }

    /// Administrator's kubeconfig, usable from the host.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Logs of all long-running programs.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Certificates, keys and tokens; the hub sees the folder as [`HUB_PKI`].
    pub fn pki(&self) -> PathBuf {
        self.machine_var(&self.hub()).join("pki")
    }

    /// The host's end of the link into the cluster's network.
    pub fn host_link(&self) -> String {
        format!("{}-host", self.name)
    }

    /// Control group of the whole cluster, relative to a hierarchy's root.
    pub fn cgroup(&self) -> PathBuf {
        Path::new("switchtower-cluster").join(&self.name)
    }

    /// Address of the hub and of the API server.
    pub fn hub_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 203, 0, 1)
    }

    /// IPv6 address of the hub.
    pub fn hub_ip6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x203, 0, 0, 0, 0, 0, 1)
    }

    /// Address of the host on the cluster's network.
    pub fn host_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 203, 0, 254)
    }

    /// Addresses of a node by its number (from 1).
    pub fn node_ips(&self, number: u8) -> (Ipv4Addr, Ipv6Addr) {
        let host = 10 + number;
        (Ipv4Addr::new(10, 203, 0, host), Ipv6Addr::new(0xfd00, 0x203, 0, 0, 0, 0, 0, u16::from(host)))
    }

    /// URL of the API server.
    pub fn api_server(&self) -> String {
        format!("https://{}:{API_SERVER_PORT}", self.hub_ip())
    }

    /// Zone of a node by its number: three zones, in turn.
    pub fn zone(&self, number: u8) -> &'static str {
        match number % 3 {
            1 => "zone-a",
            2 => "zone-b",
            _ => "zone-c",
        }
    }
}

impl Tools {
    /// Path of a program of the control plane.
    pub fn control_plane(&self, program: &str) -> PathBuf {
        self.control_plane.join(program)
    }

    /// Path of a program outside the control plane.
    pub fn cluster(&self, program: &str) -> PathBuf {
        self.cluster.join(program)
    }
}

/// Roots of the control groups: one with version 2, one per controller with version 1, both if mixed.
pub fn cgroup_hierarchies() -> Result<Vec<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.procs").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(root).context("reading /sys/fs/cgroup")? {
        let path = entry.context("reading /sys/fs/cgroup")?.path();
        if path.join("cgroup.procs").exists() && !path.is_symlink() {
            found.push(path);
        }
    }
    if found.is_empty() {
        bail!("no control groups at /sys/fs/cgroup: mount them and retry");
    }
    Ok(found)
}
