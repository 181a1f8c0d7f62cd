//! Add-ons of the cluster: DNS, and the real kube-proxy for baseline runs.

use std::time::Duration;

use anyhow::Result;

use super::control_plane::Kubectl;
use super::images::COREDNS;
use super::layout::{DNS_IP, Layout, POD_CIDRS, Tools};
use super::machine::Machine;
use super::shell::wait_until;

/// CoreDNS as on any cluster: pods that reach the API server through a Service, behind a Service. They become ready
/// once a service proxy runs.
const COREDNS_MANIFESTS: &str = include_str!("coredns.yaml");

const KUBE_PROXY_CONFIG: &str = "/var/lib/kube-proxy/config.yaml";

/// Applies CoreDNS without waiting, because it needs a service proxy.
pub fn apply_coredns(kubectl: &Kubectl) -> Result<()> {
    let manifests = COREDNS_MANIFESTS.replace("COREDNS_IMAGE", COREDNS).replace("DNS_IP", DNS_IP);
    kubectl.apply(&manifests).map(|_| ())
}

/// Waits for CoreDNS, which proves that Services work.
pub fn wait_for_coredns(kubectl: &Kubectl) -> Result<()> {
    wait_until("CoreDNS", Duration::from_secs(90), || {
        kubectl.run("--namespace kube-system rollout status deployment/coredns --timeout=5s")
    })?;
    Ok(())
}

/// Starts the real kube-proxy in nftables mode on a node.
pub fn start_kube_proxy(layout: &Layout, tools: &Tools, node: &Machine) -> Result<()> {
    let kubeconfig = std::fs::read_to_string(layout.pki().join("kube-proxy.kubeconfig"))?;
    node.write_var(layout, "/var/lib/kube-proxy/kubeconfig", &kubeconfig)?;
    let config = serde_json::json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": POD_CIDRS,
        "clientConnection": {"kubeconfig": "/var/lib/kube-proxy/kubeconfig"},
        "hostnameOverride": node.name,
        // 0 keeps the machine's own limits.
        "conntrack": {"maxPerCore": 0, "min": 0},
    });
    node.write_var(layout, KUBE_PROXY_CONFIG, &format!("{config:#}\n"))?;
    let mut command = node.command(&tools.control_plane("kube-proxy"));
    command.arg(format!("--config={KUBE_PROXY_CONFIG}"));
    node.spawn("kube-proxy", command)
}
