//! Starts etcd, API server, controller manager and scheduler inside the hub.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::layout::{API_SERVER_PORT, HUB_PKI, Layout, POD_CIDRS, SERVICE_CIDRS, Tools};
use super::machine::Machine;
use super::shell::{finish, finish_with_input, wait_until};

/// `kubectl` on the host with administrator rights.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: std::path::PathBuf,
    kubeconfig: std::path::PathBuf,
}

/// Parses an address in an object.
///
/// # Errors
/// The value is none.
pub(super) fn address(value: &Value) -> Result<IpAddr> {
    value.as_str().unwrap_or_default().parse().with_context(|| format!("{value} is not an address"))
}

impl Kubectl {
    pub fn new(layout: &Layout, tools: &Tools) -> Self {
        Self { program: tools.control_plane("kubectl"), kubeconfig: layout.kubeconfig() }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(line.split_whitespace());
        command
    }

    /// Runs kubectl with arguments split at blanks and returns its output.
    pub fn run(&self, line: &str) -> Result<String> {
        finish(&mut self.command(line))
    }

    /// Runs kubectl with arguments split at blanks and `--output json`.
    pub fn json(&self, line: &str) -> Result<Value> {
        let text = self.run(&format!("{line} --output json"))?;
        serde_json::from_str(&text).with_context(|| format!("`kubectl {line}` did not print JSON"))
    }

    /// Runs kubectl with arguments that may contain blanks.
    pub fn run_arguments(&self, arguments: &[&str]) -> Result<String> {
        finish(self.command("").args(arguments))
    }

    /// Applies manifests given as text.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        finish_with_input(&mut self.command("apply -f -"), manifests)
    }
}

/// Starts the control plane and returns when the API server is ready.
pub fn start(layout: &Layout, tools: &Tools, hub: &Machine, kubectl: &Kubectl) -> Result<()> {
    spawn(hub, &tools.control_plane("etcd"), &etcd())?;
    spawn(hub, &tools.control_plane("kube-apiserver"), &api_server(layout))?;
    wait_until("the API server", Duration::from_secs(60), || kubectl.run("get --raw /readyz"))?;
    spawn(hub, &tools.control_plane("kube-controller-manager"), &controller_manager())?;
    spawn(hub, &tools.cluster("kube-scheduler"), &scheduler())?;
    wait_until("the default ServiceAccount", Duration::from_secs(60), || {
        kubectl.run("get serviceaccount default --output name")
    })?;
    Ok(())
}

fn spawn(hub: &Machine, program: &Path, arguments: &[String]) -> Result<()> {
    let label = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut command = hub.command(program);
    command.args(arguments);
    hub.spawn(&label, command)
}

fn flags(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|&line| line.to_owned()).collect()
}

fn etcd() -> Vec<String> {
    // The laboratory need not survive a power loss, so etcd need not sync to disk.
    flags(&["--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--log-level=warn"])
}

fn api_server(layout: &Layout) -> Vec<String> {
    let pki = HUB_PKI;
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        "--cert-dir=/var/lib/kube-apiserver".into(),
        "--bind-address=0.0.0.0".into(),
        format!("--secure-port={API_SERVER_PORT}"),
        format!("--advertise-address={}", layout.hub_ip()),
        format!("--tls-cert-file={pki}/apiserver.crt"),
        format!("--tls-private-key-file={pki}/apiserver.key"),
        format!("--client-ca-file={pki}/ca.crt"),
        format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
        format!("--kubelet-client-key={pki}/kubelet-client.key"),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--service-account-key-file={pki}/service-account.pub"),
        format!("--service-account-signing-key-file={pki}/service-account.key"),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-cluster-ip-range={SERVICE_CIDRS}"),
        format!("--token-auth-file={pki}/tokens.csv"),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged".into(),
    ]
}

fn controller_manager() -> Vec<String> {
    let pki = HUB_PKI;
    vec![
        format!("--kubeconfig={pki}/kube-controller-manager.kubeconfig"),
        format!("--root-ca-file={pki}/ca.crt"),
        format!("--service-account-private-key-file={pki}/service-account.key"),
        "--use-service-account-credentials".into(),
        "--allocate-node-cidrs".into(),
        format!("--cluster-cidr={POD_CIDRS}"),
        format!("--service-cluster-ip-range={SERVICE_CIDRS}"),
        "--node-cidr-mask-size-ipv4=24".into(),
        "--node-cidr-mask-size-ipv6=64".into(),
        "--leader-elect=false".into(),
    ]
}

fn scheduler() -> Vec<String> {
    vec![format!("--kubeconfig={HUB_PKI}/kube-scheduler.kubeconfig"), "--leader-elect=false".into()]
}
