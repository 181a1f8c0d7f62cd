//! `make demo KEEP=1`: commands to explore the running cluster.

use anyhow::{Context as _, Result};

use super::packets::{cluster_ip_of, service};
use super::terminal::Terminal;
use crate::lab::programs;
use crate::switchtower::Fleet;

/// Writes a file with the environment and prints commands to try.
pub(super) fn print(terminal: &Terminal, fleet: &Fleet) -> Result<()> {
    let (kubectl, plugin) =
        (programs::control_plane("kubectl")?, programs::workspace("kubectl-switchtower")?);
    let parent = |path: &std::path::Path| path.parent().map(|folder| folder.display().to_string());
    let folders = [parent(&kubectl), parent(&plugin)].map(Option::unwrap_or_default).join(":");
    let environment = fleet.lab().directory().join("environment");
    let kubeconfig = fleet.control_plane().kubeconfig();
    let text = format!(
        "export KUBECONFIG={}\nexport PATH={folders}:$PATH\nexport SWITCHTOWER_ADMIN_CONTROLLER={}\n",
        kubeconfig.display(),
        fleet.admin_address()
    );
    std::fs::write(&environment, text).with_context(|| format!("writing {}", environment.display()))?;

    let near = fleet.nodes().first().context("no nodes")?;
    let pod = near.pods.first().context("no pods")?;
    let web = cluster_ip_of(&service(fleet, "web")?, false)?;
    terminal.title("Explore");
    for line in [
        format!(". {}", environment.display()),
        "kubectl get proxystatus,proxyrollouts,nodes,services,pods -A".to_owned(),
        "kubectl switchtower status".to_owned(),
        "kubectl switchtower rules alpha default/web:tcp".to_owned(),
        "kubectl switchtower explain default/web-lb".to_owned(),
        format!("ip netns exec {} bash -c 'head -1 </dev/tcp/{}/80'", pod.namespace.name(), web.ip()),
        format!("ip netns exec {} nft list table ip switchtower", near.net.namespace.name()),
        format!("tail -f {}/*.log", fleet.lab().directory().display()),
    ] {
        terminal.line(&format!("  {line}"));
    }
    let id = std::process::id();
    terminal.line(&format!("\nThe cluster runs until Ctrl-C (or: kill {id}), which removes everything."));
    Ok(())
}
