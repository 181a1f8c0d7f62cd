//! The real kube-proxy in a node's namespace, as reference for behaviour and performance.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::lab::control_plane::ControlPlane;
use crate::lab::http::http_get;
use crate::lab::process::Process;
use crate::lab::programs;
use crate::lab::wait;
use crate::lab::{Lab, NodeNet};

/// A running kube-proxy, in mode nftables unless its settings differ.
#[derive(Debug)]
pub struct KubeProxy {
    process: Process,
    kubeconfig: PathBuf,
    directory: PathBuf,
}

impl KubeProxy {
    /// Starts kube-proxy in a node's namespace as that node. `settings` are fields of its configuration.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(control_plane: &ControlPlane, lab: &Lab, node: &NodeNet, settings: &Value) -> Result<Self> {
        let directory = lab.directory().to_owned();
        let forwarded = forward_api_server(control_plane, lab)?;
        let mut text: Value =
            serde_json::from_slice(&fs::read(control_plane.kubeconfig())?).context("the kubeconfig")?;
        let cluster = &mut text["clusters"][0]["cluster"];
        *cluster = json!({"server": format!("https://{forwarded}"), "insecure-skip-tls-verify": true});
        let kubeconfig = directory.join(format!("kube-proxy-{}.kubeconfig", node.name));
        fs::write(&kubeconfig, text.to_string())?;
        let process = run(&directory, &kubeconfig, node, settings)?;
        Ok(Self { process, kubeconfig, directory })
    }

    /// Restarts kube-proxy with other settings.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restart(&mut self, node: &NodeNet, settings: &Value) -> Result<()> {
        self.process.signal(libc::SIGTERM);
        self.process.wait(Duration::from_secs(10))?;
        self.process = run(&self.directory, &self.kubeconfig, node, settings)?;
        Ok(())
    }

    /// Checks in its metrics that kube-proxy has written every change that it received.
    ///
    /// # Errors
    /// It has not, or does not answer.
    pub fn is_idle(&self, node: &NodeNet) -> Result<()> {
        let metrics = node.namespace.run(|| http_get(METRICS.into(), "/metrics"))??;
        check_idle(&metrics)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// Address of kube-proxy's metrics in its node's namespace.
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 10_249);
/// Time when a change was last queued for kube-proxy's writer, and when the writer last finished; by family.
const QUEUED: &str = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";
const WRITTEN: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";

/// Checks that both families' writers have processed their queue.
fn check_idle(metrics: &str) -> Result<()> {
    let of = |name: &str, family: &str| -> Option<f64> {
        let series = format!("{name}{{ip_family=\"{family}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&series))?.trim().parse().ok()
    };
    for family in ["IPv4", "IPv6"] {
        let (queued, written) = (of(QUEUED, family), of(WRITTEN, family));
        ensure!(
            written.is_some() && written >= queued,
            "{family}: last change queued at {queued:?}, last written at {written:?}"
        );
    }
    Ok(())
}

/// kube-proxy's log lines when its Node handlers are registered, and when it knows its node's zone.
const NODE_HANDLERS: &str = "Starting node config controller";
const ZONE_KNOWN: &str = "Calling handler.OnTopologyChange";
/// Maximum number of starts until kube-proxy knows its zone; one of many starts misses it.
const STARTS: usize = 5;

/// Starts kube-proxy until it knows its node's zone. kube-proxy 1.36.3 watches its Node before it registers the
/// handler for the Node's labels: if the first event is faster, it ignores zone hints until the labels change.
fn run(directory: &Path, kubeconfig: &Path, node: &NodeNet, settings: &Value) -> Result<Process> {
    for _ in 0..STARTS {
        let logged = fs::read_to_string(log_path(directory, node)).unwrap_or_default().len();
        let process = start(directory, kubeconfig, node, settings)?;
        let says = |what: &str, deadline| {
            wait::until(&format!("kube-proxy logs '{what}'"), deadline, || {
                process.check_running()?;
                let text = process.log_text();
                ensure!(text.get(logged..).is_some_and(|text| text.contains(what)), "not yet");
                Ok(())
            })
        };
        says(NODE_HANDLERS, Duration::from_secs(60))?;
        // It happens immediately or never; the rest of the timeout is for a busy machine.
        if says(ZONE_KNOWN, Duration::from_secs(3)).is_ok() {
            return Ok(process);
        }
    }
    bail!("kube-proxy has not learned its zone in {STARTS} starts")
}

fn log_path(directory: &Path, node: &NodeNet) -> PathBuf {
    directory.join(format!("kube-proxy-{}.log", node.name))
}

fn start(directory: &Path, kubeconfig: &Path, node: &NodeNet, settings: &Value) -> Result<Process> {
    let mut configuration = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables", "hostnameOverride": node.name, "detectLocalMode": "NodeCIDR",
        "clientConnection": {"kubeconfig": kubeconfig, "qps": 1000, "burst": 1000},
        // These settings are global to the machine.
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    });
    for (field, value) in settings.as_object().into_iter().flatten() {
        configuration[field] = value.clone();
    }
    let config = directory.join(format!("kube-proxy-{}.yaml", node.name));
    fs::write(&config, configuration.to_string())?;
    let mut command = Command::new(programs::control_plane("kube-proxy")?);
    command.arg("--config").arg(&config).args(["--v=2", "--vmodule=config=4"]);
    if configuration["mode"] == "iptables" {
        command.env("PATH", legacy_iptables(directory)?);
    }
    node.namespace.wrap(&mut command);
    Process::start("kube-proxy", command, &log_path(directory, node))
}

/// A search path on which `iptables` is the legacy program: not every kernel has the extensions of iptables for nf_tables.
fn legacy_iptables(directory: &Path) -> Result<String> {
    let programs = directory.join("iptables-legacy");
    fs::create_dir_all(&programs)?;
    for name in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let link = programs.join(format!("{name}{suffix}"));
            let target = format!("/usr/sbin/{name}-legacy{suffix}");
            ensure!(
                Path::new(&target).exists(),
                "{target} does not exist: install the Debian package iptables"
            );
            if !link.exists() {
                symlink(&target, &link).with_context(|| format!("linking {}", link.display()))?;
            }
        }
    }
    Ok(format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default()))
}

/// Forwards connections from the laboratory's own address to the API server on loopback, which nodes cannot reach,
/// for the lifetime of this process.
pub fn forward_api_server(control_plane: &ControlPlane, lab: &Lab) -> Result<SocketAddr> {
    let server = control_plane.address();
    let listener =
        TcpListener::bind((lab.root_address(), 0)).context("listening for connections of kube-proxy")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(server) else { continue };
            for stream in [&client, &server] {
                // Failure only costs latency.
                let _ = stream.set_nodelay(true);
            }
            let (Ok(client2), Ok(server2)) = (client.try_clone(), server.try_clone()) else { continue };
            std::thread::spawn(move || carry(client, server));
            std::thread::spawn(move || carry(server2, client2));
        }
    });
    Ok(address)
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    // Shut down one side after the other ends.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_when_both_families_are_written() {
        let metrics = |queued: [&str; 2], written: [&str; 2]| {
            let line =
                |name: &str, family: &str, value: &str| format!("{name}{{ip_family=\"{family}\"}} {value}\n");
            let of = |name, [ipv4, ipv6]: [&str; 2]| line(name, "IPv4", ipv4) + &line(name, "IPv6", ipv6);
            of(QUEUED, queued) + &of(WRITTEN, written)
        };
        let idle = |queued, written| check_idle(&metrics(queued, written)).is_ok();
        assert!(idle(["1.795e+09", "5"], ["1.7950000001e+09", "6"]));
        assert!(!idle(["1.7950000001e+09", "5"], ["1.795e+09", "6"]));
        assert!(!idle(["5", "7"], ["6", "6"]));
        assert!(check_idle("").is_err());
    }
}
