//! Checks before the installation.

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use switchtower_admin_api::codes;
use switchtower_crds::kube_proxy;

use super::proxies::{self, Surroundings};
use super::{Check, builtin};
use crate::cluster::{Cluster, KUBE_PROXY_LABELS, is_windows};
use crate::error::CliError;
use crate::output::{count, names};

/// Minimum version of the API server.
const API_VERSION: (u32, u32) = (1, 33);
/// Minimum supported kernel version; see the README.
const KERNEL: (u32, u32) = (6, 1);

pub(super) async fn run(cluster: &Cluster) -> Result<Vec<Check>, CliError> {
    let mut checks = vec![api_version(cluster.version().await?)];
    let mut missing = Missing::default();
    let nodes = missing.or_default(cluster.nodes().await);
    let found = look(cluster, &mut missing).await;
    if !nodes.is_empty() {
        checks.extend(about_nodes(&nodes, builtin::by_pod_cidrs(found.kube_proxy_config.as_ref())));
    }
    let kubeadm = missing.or_default(cluster.find(kube_proxy::NAMESPACE, "kubeadm-config").await);
    // Report absence only if everything could be read.
    if missing.0.is_empty() {
        checks.extend(proxies::kube_proxy(&found, &nodes));
        checks.push(proxies::ports(&found, cluster.system_namespace()));
        checks.extend(builtin::before(found.kube_proxy_config.as_ref(), kubeadm.as_ref()));
    } else {
        let findings = proxies::kube_proxy(&found, &nodes).into_iter();
        let findings = findings.chain([proxies::ports(&found, cluster.system_namespace())]);
        let settings =
            found.kube_proxy_config.as_ref().map(|map| builtin::before(Some(map), kubeadm.as_ref()));
        checks.extend(findings.filter(|check| !check.has_passed()).chain(settings.into_iter().flatten()));
    }
    checks.extend(proxies::plugins(&found));
    let system = cluster.system_namespace();
    match cluster.exists::<ConfigMap>(system, "switchtower-api-server").await {
        Ok(true) => checks.push(Check::passed(
            "the controller reaches the API server without a Service (ConfigMap switchtower-api-server)",
        )),
        Ok(false) => {
            let what = format!("ConfigMap switchtower-api-server not found in {system}");
            checks.push(Check::warning(codes::API_SERVER_BY_SERVICE, what));
        }
        Err(error) => missing.0.push(Check::not_seen(&error)),
    }
    checks.extend(missing.0);
    Ok(checks)
}

/// Objects that could not be read.
#[derive(Default)]
struct Missing(Vec<Check>);

impl Missing {
    fn or_default<T: Default>(&mut self, read: Result<T, CliError>) -> T {
        read.unwrap_or_else(|error| {
            self.0.push(Check::not_seen(&error));
            T::default()
        })
    }
}

async fn look(cluster: &Cluster, missing: &mut Missing) -> Surroundings {
    let system = kube_proxy::NAMESPACE;
    let mut pods = Vec::new();
    for label in KUBE_PROXY_LABELS {
        pods.extend(missing.or_default(cluster.pods_labelled(system, label).await));
    }
    Surroundings {
        daemon_sets: missing.or_default(cluster.daemon_sets().await),
        pods,
        kube_proxy_config: missing.or_default(cluster.find(system, kube_proxy::CONFIG_MAP).await),
        cilium: missing.or_default(cluster.find(system, "cilium-config").await),
        antrea: missing.or_default(cluster.find(system, "antrea-config").await),
        felix: missing.or_default(cluster.felix_configuration().await),
    }
}

fn api_version(version: (u32, u32)) -> Check {
    let what = format!("the API server has version {}.{}", version.0, version.1);
    if version >= API_VERSION {
        Check::passed(what)
    } else {
        let needed = format!("{what}, older than {}.{}", API_VERSION.0, API_VERSION.1);
        Check::failed(codes::API_SERVER_TOO_OLD, needed)
    }
}

fn about_nodes(nodes: &[Node], by_pod_cidrs: bool) -> Vec<Check> {
    let name = |node: &&Node| node.metadata.name.clone().unwrap_or_default();
    let linux: Vec<&Node> = nodes.iter().filter(|node| !is_windows(node)).collect();
    let old: Vec<String> =
        linux.iter().filter(|node| kernel(node).is_some_and(|kernel| kernel < KERNEL)).map(name).collect();
    let without = |what: fn(&Node) -> bool| -> Vec<String> {
        linux.iter().filter(|node| !what(node)).map(name).collect()
    };
    let no_address = without(has_address);
    let no_cidr = without(|node| node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.is_some()));
    let mut checks = Vec::new();
    checks.push(if old.is_empty() {
        Check::passed(format!(
            "kernel {}.{} or newer on {}",
            KERNEL.0,
            KERNEL.1,
            count(linux.len(), "Linux node")
        ))
    } else {
        let what = format!("older kernel on {}: {}", count(old.len(), "node"), names(&old, old.len(), 5));
        Check::warning(codes::KERNEL_TOO_OLD, what)
    });
    checks.push(if no_address.is_empty() {
        Check::passed("every node has an InternalIP for NodePorts")
    } else {
        let what = format!("without InternalIP: {}", names(&no_address, no_address.len(), 5));
        Check::warning(codes::NODE_WITHOUT_ADDRESS, what)
    });
    if by_pod_cidrs && !no_cidr.is_empty() {
        let what = format!("without podCIDR: {}", names(&no_cidr, no_cidr.len(), 5));
        checks.push(Check::warning(codes::NODE_WITHOUT_POD_CIDR, what));
    }
    checks
}

/// Returns `None` if the kubelet has not reported a version.
fn kernel(node: &Node) -> Option<(u32, u32)> {
    let release = &node.status.as_ref()?.node_info.as_ref()?.kernel_version;
    let mut numbers = release.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn has_address(node: &Node) -> bool {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses.into_iter().any(|address| address.type_ == "InternalIP")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Verdict, codes_of};
    use super::*;

    fn node(name: &str, kernel: &str, cidr: bool) -> Node {
        let spec = if cidr { json!({"podCIDR": "10.244.0.0/24"}) } else { json!({}) };
        let info = json!({
            "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": kernel,
            "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "linux",
            "osImage": "", "systemUUID": "",
        });
        serde_json::from_value(json!({
            "metadata": {"name": name}, "spec": spec,
            "status": {"nodeInfo": info, "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        }))
        .unwrap()
    }

    #[test]
    fn kernels_addresses_and_pod_cidrs_are_checked() {
        assert_eq!(codes_of(&about_nodes(&[node("a", "6.18.5-amd64", true)], true)), [None, None]);
        let nodes = [node("a", "5.15.0-25-amd64", true), node("b", "6.18.0", false)];
        assert_eq!(codes_of(&about_nodes(&nodes, false)), [Some("ST0403"), None]);
        let checks = about_nodes(&nodes, true);
        assert_eq!(codes_of(&checks), [Some("ST0403"), None, Some("ST0408")]);
        assert!(checks[0].what.contains("older kernel on 1 node: a"), "{checks:?}");
        assert_eq!(api_version((1, 36)).verdict, Verdict::Passed);
        assert_eq!(api_version((1, 32)).verdict, Verdict::Failed);
    }
}
