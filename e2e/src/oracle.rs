//! The real kube-proxy in a node's namespace: what Switchtower is measured against and compared with.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::control_plane::ControlPlane;
use crate::lab::{Lab, NodeNet};
use crate::process::Process;
use crate::{programs, wait};

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

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }
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
        says(NODE_HANDLERS, Duration::from_secs(30))?;
        if says(ZONE_KNOWN, Duration::from_secs(1)).is_ok() {
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
    let listener =
        TcpListener::bind((lab.root_address(false), 0)).context("opening a door for kube-proxy")?;
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
