//! Starts a node: containerd, the kubelet, and the pods' network.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::control_plane::Kubectl;
use super::images::{self, PAUSE};
use super::layout::{DNS_IP, Layout, Tools, cgroup_hierarchies};
use super::machine::Machine;
use super::shell::{finish, wait_until};

/// Folder of the container runtime's network configuration.
const CNI_CONFIG: &str = "/var/lib/cni/net.d";
const CONTAINERD_CONFIG: &str = "/var/lib/containerd.toml";
const KUBELET_CONFIG: &str = "/var/lib/kubelet/config.yaml";
const KUBELET_KUBECONFIG: &str = "/var/lib/kubelet/kubeconfig";
const KUBELET_CA: &str = "/var/lib/kubelet/ca.crt";
const RESOLV_CONF: &str = "/var/lib/kubelet/resolv.conf";

/// Starts containerd and the kubelet, and imports the images: the first, which the kubelet needs, before it starts,
/// the others while it registers the node.
pub fn start(layout: &Layout, tools: &Tools, node: &Machine, number: u8, archives: &[PathBuf]) -> Result<()> {
    let group = prepare_cgroups(layout, &node.name)?;
    write_files(layout, node, &group)?;
    let mut containerd = node.command(Path::new("containerd"));
    containerd.arg("--config").arg(CONTAINERD_CONFIG);
    node.spawn("containerd", containerd)?;
    wait_until(&format!("containerd of {}", node.name), Duration::from_secs(30), || {
        finish(node.command(Path::new("ctr")).arg("version"))
    })?;
    let (first, others) = archives.split_first().context("no images to import")?;
    images::import(layout, node, first)?;
    start_kubelet(layout, tools, node, number)?;
    others.iter().try_for_each(|archive| images::import(layout, node, archive))
}

/// Writes the pods' network configuration once the node has its pod ranges, and returns them.
pub fn configure_pod_network(layout: &Layout, kubectl: &Kubectl, node: &Machine) -> Result<Vec<String>> {
    let cidrs = wait_until(&format!("the pod ranges of {}", node.name), Duration::from_secs(60), || {
        let printed =
            kubectl.run(&format!("get node {} --output jsonpath={{.spec.podCIDRs[*]}}", node.name))?;
        let cidrs: Vec<String> = printed.split_whitespace().map(str::to_owned).collect();
        if cidrs.is_empty() {
            bail!("the controller manager has not assigned any");
        }
        Ok(cidrs)
    })?;
    node.write_var(layout, &format!("{CNI_CONFIG}/10-pods.conflist"), &format!("{:#}\n", cni(&cidrs)))?;
    Ok(cidrs)
}

/// Creates the node's control group, which the kubelet expects, in every hierarchy.
fn prepare_cgroups(layout: &Layout, node: &str) -> Result<PathBuf> {
    let group = layout.cgroup().join(node);
    for hierarchy in cgroup_hierarchies()? {
        let path = hierarchy.join(&group);
        fs::create_dir_all(&path).with_context(|| format!("making the control group {}", path.display()))?;
        // A cpuset of version 1 starts empty and rejects processes until it is filled, from the top down.
        for folder in [hierarchy.join("switchtower-cluster"), hierarchy.join(layout.cgroup()), path] {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (Some(parent), target) = (folder.parent(), folder.join(file)) else { continue };
                if hierarchy.join("cgroup.controllers").exists() || !target.exists() {
                    continue;
                }
                let value = fs::read_to_string(parent.join(file)).context("reading the parent's cpuset")?;
                fs::write(&target, value.trim()).with_context(|| format!("filling {}", target.display()))?;
            }
        }
    }
    Ok(group)
}

fn write_files(layout: &Layout, node: &Machine, group: &Path) -> Result<()> {
    let pki = layout.pki();
    let ca = fs::read_to_string(pki.join("ca.crt")).context("reading the authority's certificate")?;
    let kubeconfig = pki.join(format!("{}.kubeconfig", node.name));
    let kubeconfig = fs::read_to_string(kubeconfig).context("reading the node's kubeconfig")?;
    node.write_var(layout, KUBELET_CA, &ca)?;
    node.write_var(layout, KUBELET_KUBECONFIG, &kubeconfig)?;
    // There is no resolver outside the cluster.
    node.write_var(layout, RESOLV_CONF, "nameserver 127.0.0.1\n")?;
    node.write_var(layout, CONTAINERD_CONFIG, &containerd_config())?;
    node.write_var(layout, KUBELET_CONFIG, &format!("{:#}\n", kubelet_config(group)))
}

fn containerd_config() -> String {
    // restrict_oom_score_adj: a machine without CAP_SYS_RESOURCE may not lower scores.
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{CNI_CONFIG}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "runc"
        SystemdCgroup = false
"#
    )
}

fn kubelet_config(group: &Path) -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true}, "x509": {"clientCAFile": KUBELET_CA}},
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": Path::new("/").join(group),
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_IP],
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "resolvConf": RESOLV_CONF,
        // The disk is shared with the rest of the machine.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        // Imported images cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    })
}

/// Starts the kubelet, or restarts a killed one.
pub fn start_kubelet(layout: &Layout, tools: &Tools, node: &Machine, number: u8) -> Result<()> {
    let (ip, ip6) = layout.node_ips(number);
    let zone = layout.zone(number);
    let mut kubelet = node.command(&tools.cluster("kubelet"));
    kubelet.args([
        format!("--config={KUBELET_CONFIG}"),
        format!("--kubeconfig={KUBELET_KUBECONFIG}"),
        "--root-dir=/var/lib/kubelet".into(),
        format!("--node-ip={ip},{ip6}"),
        format!("--hostname-override={}", node.name),
        format!("--node-labels=topology.kubernetes.io/region=laboratory,topology.kubernetes.io/zone={zone}"),
    ]);
    node.spawn("kubelet", kubelet)
}

fn cni(cidrs: &[String]) -> serde_json::Value {
    let ranges: Vec<_> = cidrs.iter().map(|cidr| json!([{"subnet": cidr}])).collect();
    let routes: Vec<_> = cidrs
        .iter()
        .map(|cidr| json!({"dst": if cidr.contains(':') { "::/0" } else { "0.0.0.0/0" }}))
        .collect();
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": false,
                // A pod may reach itself through its Service.
                "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        ],
    })
}
