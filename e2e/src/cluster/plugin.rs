//! `kubectl switchtower` as users run it on a real cluster: found by kubectl in PATH, with only a kubeconfig, and a
//! port-forward through API server, kubelet and container runtime to the controller's pod.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::control_plane::Kubectl;
use super::layout::{DNS_IP, Layout, Tools};
use super::shell::{Results, say, wait_until};

/// A dedicated Service: the controller remembers only the latest changes.
const SERVICE: &str = "default/plugin-test";
const MANIFEST: &str = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "plugin-test", "namespace": "default"},
    "spec": {"ports": [{"port": 80}]}}"#;

/// Timeout of a command while changes are still in progress after upstream's tests.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the commands, and prints a line for each and the total. Each must exit with code 0 and print the expected
/// text.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    say("kubectl switchtower");
    let node = layout.node_names().pop().context("the cluster has no nodes")?;
    let connected = format!("{0} of {0} nodes connected", layout.nodes);
    let commands: [(&[&str], &str); 8] = [
        (&["wait", SERVICE], ""),
        (&["status"], &connected),
        (&["explain", "kube-system/kube-dns:dns"], "FORWARDED"),
        (&["explain", "kube-system/kube-dns:dns", "--node", &node], "kernel  matches"),
        (&["diff", &node], ""),
        (&["rules", &node, "--filter", DNS_IP], DNS_IP),
        (&["trace", SERVICE], SERVICE),
        (&["check", "--post"], "0 failed"),
    ];
    let kubectl = Kubectl::new(layout, tools);
    kubectl.apply(MANIFEST)?;
    let mut results = Results::default();
    for (arguments, expected) in commands {
        let name = format!("kubectl switchtower {}", arguments.join(" "));
        results.add(&name, || wait_until(&name, TIMEOUT, || run(layout, tools, arguments, expected)))?;
    }
    kubectl.run("delete --namespace default service/plugin-test")?;
    results.end("plugin")
}

/// Runs `kubectl switchtower` with these arguments and returns its standard output.
///
/// # Errors
/// It does not start, or fails; the error contains its output.
pub(super) fn output(layout: &Layout, tools: &Tools, arguments: &[&str]) -> Result<String> {
    let mut path = vec![tools.control_plane.clone(), tools.switchtower.clone()];
    let known = env::var_os("PATH").unwrap_or_default();
    path.extend(env::split_paths(&known).collect::<Vec<PathBuf>>());
    let output = Command::new(tools.control_plane("kubectl"))
        .arg("switchtower")
        .args(arguments)
        .env("PATH", env::join_paths(path).context("a folder's name in PATH")?)
        .env("KUBECONFIG", layout.kubeconfig())
        .stdin(Stdio::null())
        .output()
        .context("kubectl could not be started")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {text} {errors}", output.status);
    Ok(text.into_owned())
}

fn run(layout: &Layout, tools: &Tools, arguments: &[&str], expected: &str) -> Result<()> {
    let text = output(layout, tools, arguments)?;
    ensure!(text.contains(expected), "{text:?} lacks {expected:?}");
    Ok(())
}
