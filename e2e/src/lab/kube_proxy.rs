//! The real kube-proxy in a node's namespace: what Switchtower is measured against and compared with.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
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

/// A running kube-proxy (`--proxy-mode=nftables`) with the API server's door that it uses.
#[derive(Debug)]
pub struct KubeProxy {
    process: Process,
    kubeconfig: PathBuf,
    directory: PathBuf,
}

impl KubeProxy {
    /// Starts it in a node's namespace as that node. `settings` are fields of its configuration.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(control_plane: &ControlPlane, lab: &Lab, node: &NodeNet, settings: &Value) -> Result<Self> {
        let directory = lab.directory().to_owned();
        let door = open_door(control_plane, lab)?;
        let mut text: Value =
            serde_json::from_slice(&fs::read(control_plane.kubeconfig())?).context("the kubeconfig")?;
        let cluster = &mut text["clusters"][0]["cluster"];
        *cluster = json!({"server": format!("https://{door}"), "insecure-skip-tls-verify": true});
        let kubeconfig = directory.join(format!("kube-proxy-{}.kubeconfig", node.name));
        fs::write(&kubeconfig, text.to_string())?;
        let process = run(&directory, &kubeconfig, node, settings)?;
        Ok(Self { process, kubeconfig, directory })
    }

    /// Ends it and starts it again with other settings, as an operator changes them.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restart(&mut self, node: &NodeNet, settings: &Value) -> Result<()> {
        self.process.signal(libc::SIGTERM);
        self.process.wait(Duration::from_secs(10))?;
        self.process = run(&self.directory, &self.kubeconfig, node, settings)?;
        Ok(())
    }

    /// Whether it has written all that it has heard, by its own metrics.
    ///
    /// # Errors
    /// It has not, or does not answer.
    pub fn is_idle(&self, node: &NodeNet) -> Result<()> {
        let metrics = node.namespace.run(|| http_get(METRICS.into(), "/metrics"))??;
        check_idle(&metrics)
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// Where kube-proxy tells its metrics, in its node's namespace.
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 10_249);
/// When a change was last handed to kube-proxy's writer, and when the writer last finished; by family.
const QUEUED: &str = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";
const WRITTEN: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";

/// Whether both families' writers have finished what they were handed.
fn check_idle(metrics: &str) -> Result<()> {
    let of = |name: &str, family: &str| -> Option<f64> {
        let series = format!("{name}{{ip_family=\"{family}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&series))?.trim().parse().ok()
    };
    for family in ["IPv4", "IPv6"] {
        let (queued, written) = (of(QUEUED, family), of(WRITTEN, family));
        ensure!(
            written.is_some() && written >= queued,
            "{family}: changes of {queued:?}, written {written:?}"
        );
    }
    Ok(())
}

/// What kube-proxy logs when it has its handlers for Nodes, and when it has learned its node's zone.
const NODE_HANDLERS: &str = "Starting node config controller";
const ZONE_KNOWN: &str = "Calling handler.OnTopologyChange";
/// Starts until it knows its zone; one of many starts misses it.
const STARTS: usize = 5;

/// Starts it, until it knows its node's zone. kube-proxy 1.36.3 watches its Node before it registers the handler of
/// the Node's labels: where the first event is faster, it ignores zone hints until the labels change.
fn run(directory: &Path, kubeconfig: &Path, node: &NodeNet, settings: &Value) -> Result<Process> {
    for _ in 0..STARTS {
        let logged = fs::read_to_string(log_path(directory, node)).unwrap_or_default().len();
        let process = start(directory, kubeconfig, node, settings)?;
        let says = |what: &str, deadline| {
            wait::until(&format!("kube-proxy says '{what}'"), deadline, || {
                process.check_running()?;
                let text = process.log_text();
                ensure!(text.get(logged..).is_some_and(|text| text.contains(what)), "not yet");
                Ok(())
            })
        };
        says(NODE_HANDLERS, Duration::from_secs(60))?;
        // At once, if at all; the rest is for a busy machine.
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
        // These belong to the whole machine.
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
    node.namespace.wrap(&mut command);
    Process::start("kube-proxy", command, &log_path(directory, node))
}

/// The API server listens on loopback, which the nodes cannot reach: connections to the laboratory's own
/// address are handed through, for as long as this process lives.
fn open_door(control_plane: &ControlPlane, lab: &Lab) -> Result<SocketAddr> {
    let server = control_plane.address();
    let listener = TcpListener::bind((lab.root_address(), 0)).context("opening a door for kube-proxy")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(server) else { continue };
            for stream in [&client, &server] {
                // Only latency is lost where it fails.
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
    // Whichever side ends, the other is told.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_idle_when_both_families_are_written() {
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
