//! The real kube-proxy in a node's namespace: what Switchtower is measured against and compared with.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::control_plane::ControlPlane;
use crate::lab::{Lab, NodeNet};
use crate::process::Process;
use crate::programs;

/// A running kube-proxy (`--proxy-mode=nftables`) with the API server's door that it uses.
#[derive(Debug)]
pub struct KubeProxy {
    /// Its process.
    pub process: Process,
}

impl KubeProxy {
    /// Starts it in a node's namespace as that node. `settings` is appended to its configuration file.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(control_plane: &ControlPlane, lab: &Lab, node: &NodeNet, settings: &str) -> Result<Self> {
        let directory = lab.directory();
        let door = open_door(control_plane, lab)?;
        let mut kubeconfig: serde_json::Value =
            serde_json::from_slice(&fs::read(control_plane.kubeconfig())?).context("the kubeconfig")?;
        let cluster = &mut kubeconfig["clusters"][0]["cluster"];
        *cluster = serde_json::json!({"server": format!("https://{door}"), "insecure-skip-tls-verify": true});
        let path = directory.join(format!("kube-proxy-{}.kubeconfig", node.name));
        fs::write(&path, kubeconfig.to_string())?;
        let config = directory.join(format!("kube-proxy-{}.yaml", node.name));
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
             hostnameOverride: {}\nclientConnection:\n  kubeconfig: {}\n  qps: 1000\n  burst: 1000\n\
             detectLocalMode: NodeCIDR\nconntrack:\n  maxPerCore: 0\n  min: 0\n  tcpEstablishedTimeout: 0s\n  \
             tcpCloseWaitTimeout: 0s\n{settings}",
            node.name,
            path.display()
        );
        fs::write(&config, text)?;
        let mut command = Command::new(programs::control_plane("kube-proxy")?);
        command.arg("--config").arg(&config).arg("--v=2");
        node.namespace.wrap(&mut command);
        let log = directory.join(format!("kube-proxy-{}.log", node.name));
        Ok(Self { process: Process::start("kube-proxy", command, &log)? })
    }
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
