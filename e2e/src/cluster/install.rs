//! Installs Switchtower as a user does: images, one ConfigMap, `kubectl apply -k` of an overlay.
//!
//! The overlay includes the component for connection tracking, because kube-proxy sets those limits too.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::control_plane::Kubectl;
use super::layout::{API_SERVER_PORT, Layout, Tools};
use super::machine::Machine;
use super::shell::{say, wait_until};
use super::{addons, images};

pub const NAMESPACE: &str = "switchtower-system";

/// Timeout of a rollout. An agent that starts before the controller has written the bootstrap ConfigMap sees it when the
/// kubelet next syncs the Pod: after 60 to 90 seconds.
const ROLLOUT: Duration = Duration::from_secs(180);

/// Delivers this build's images, applies the manifests, and waits until every node is Ready and CoreDNS, which needs
/// Services, works. A repeated call replaces the running images with this build's.
pub fn install(layout: &Layout, tools: &Tools) -> Result<()> {
    let start = Instant::now();
    let kubectl = Kubectl::new(layout, tools);
    let nodes = Machine::nodes(layout)?;
    say("images of controller and agent");
    images::deliver_switchtower(layout, tools, &nodes)?;
    let overlay = write_overlay(layout, tools, "overlay", &[])?;
    say(&format!("kubectl apply -k {overlay} ({:.1} s)", start.elapsed().as_secs_f32()));
    let installed =
        kubectl.run(&format!("get --namespace {NAMESPACE} daemonset/switchtower-node-agent")).is_ok();
    kubectl.apply(&prerequisites(layout))?;
    kubectl.run(&format!("apply -k {overlay}"))?;
    if installed {
        // The tag is unchanged, so only a restart runs the new images.
        kubectl.run(&format!(
            "rollout restart --namespace {NAMESPACE} deployment/switchtower-controller daemonset/switchtower-node-agent"
        ))?;
    }
    wait_until_ready(&kubectl, layout, start)
}

/// Fails if Switchtower is installed.
pub(super) fn ensure_absent(kubectl: &Kubectl) -> Result<()> {
    ensure!(
        kubectl.run(&format!("get namespace {NAMESPACE}")).is_err(),
        "Switchtower is installed: this part needs a new cluster (hack/cluster.sh down, then up)"
    );
    Ok(())
}

/// Waits until controller and agents run.
pub(super) fn wait_until_agents_run(kubectl: &Kubectl) -> Result<()> {
    wait_for_rollout(kubectl)?;
    // A change of the Pod makes the kubelet refresh its volumes now; otherwise an agent that started before the
    // controller wrote switchtower-bootstrap gets it after up to a minute and a half.
    kubectl.run(&format!(
        "annotate pods --namespace {NAMESPACE} --selector app.kubernetes.io/name=switchtower-node-agent \
         switchtower.dev/look-again=yes --overwrite"
    ))?;
    Ok(())
}

/// Waits until controller and agents run, every node is Ready, and CoreDNS works; reports the time since `start`.
pub(super) fn wait_until_ready(kubectl: &Kubectl, layout: &Layout, start: Instant) -> Result<()> {
    wait_until_agents_run(kubectl)?;
    say(&format!("controller and agents run ({:.1} s)", start.elapsed().as_secs_f32()));
    wait_until("a Ready ProxyStatus for every node", Duration::from_secs(120), || {
        for name in layout.node_names() {
            kubectl.run(&format!("wait --for=condition=Ready proxystatus/{name} --timeout=2s"))?;
        }
        Ok(())
    })?;
    say(&format!("every node is Ready ({:.1} s)", start.elapsed().as_secs_f32()));
    addons::wait_for_coredns(kubectl)?;
    say(&format!("CoreDNS works ({:.1} s)", start.elapsed().as_secs_f32()));
    Ok(())
}

/// Writes an overlay and returns its folder: the manifests, these components, and the component for connection
/// tracking without the setting that only a machine's initial network namespace may change.
pub(super) fn write_overlay(
    layout: &Layout,
    tools: &Tools,
    name: &str,
    components: &[&str],
) -> Result<String> {
    let folder = layout.dir.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let folder = fs::canonicalize(&folder).context("resolving the overlay's folder")?;
    let manifests = fs::canonicalize(&tools.manifests)
        .with_context(|| format!("the manifests {}", tools.manifests.display()))?;
    let base = relative(&folder, &manifests).context("the manifests' path is not UTF-8")?;
    let arguments = json!([{
        "op": "replace",
        "path": "/spec/template/spec/initContainers/0/args",
        "value": ["sysctl", "--max-per-core=0"],
    }]);
    let all = ["conntrack-sysctls"].iter().chain(components);
    let components: Vec<String> = all.map(|component| format!("{base}/components/{component}")).collect();
    let overlay = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [base],
        "components": components,
        "patches": [{
            "target": {"kind": "DaemonSet", "name": "switchtower-node-agent"},
            "patch": arguments.to_string(),
        }],
    });
    let file = folder.join("kustomization.yaml");
    fs::write(&file, format!("{overlay:#}\n")).with_context(|| format!("writing {}", file.display()))?;
    Ok(folder.to_str().context("the overlay's path is not UTF-8")?.to_owned())
}

/// The relative path from one absolute folder to another, because kustomize rejects absolute paths.
fn relative(from: &Path, to: &Path) -> Option<String> {
    let up = "../".repeat(from.components().count().saturating_sub(1));
    Some(format!("{up}{}", to.strip_prefix("/").ok()?.to_str()?))
}

fn wait_for_rollout(kubectl: &Kubectl) -> Result<()> {
    for object in ["deployment/switchtower-controller", "daemonset/switchtower-node-agent"] {
        wait_until(object, ROLLOUT, || {
            kubectl.run(&format!("rollout status --namespace {NAMESPACE} {object} --timeout=5s"))
        })?;
    }
    Ok(())
}

/// The ConfigMap that the manifests' README asks users to create first: the API server's real address.
pub(super) fn prerequisites(layout: &Layout) -> String {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    let address = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "switchtower-api-server", "namespace": NAMESPACE},
        "data": {"host": layout.hub_ip().to_string(), "port": API_SERVER_PORT.to_string()},
    });
    format!("{namespace}\n---\n{address}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_path_between_folders() {
        let way = relative(Path::new("/var/lib/x"), Path::new("/home/me/manifests"));
        assert_eq!(way.as_deref(), Some("../../../home/me/manifests"));
    }
}
