//! The drain gate of a laboratory, which has no kubelets: sends the requests of hooks in their place.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::lab::wait;
use crate::switchtower::{Fleet, FleetNode};

/// Port of the gate.
pub(crate) const GATE: u16 = 9910;

/// Returns a ProxyProfile that sets the gate on all nodes at once.
pub(crate) fn profile(name: &str) -> Value {
    json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": name},
        "spec": {
            "priority": 10,
            "settings": {"drainGate": {"port": GATE}},
            "strategy": {
                "steps": [{"nodes": "100%"}], "maxUnavailable": "100%",
                "gates": {"probes": [], "windowSeconds": 0},
            },
        },
    })
}

/// Applies a profile with the gate and waits until every node has it.
///
/// # Errors
/// A node does not redirect hooks in time.
pub fn open_gate(fleet: &Fleet) -> Result<()> {
    let profile = profile("default");
    let path = fleet.lab().directory().join("drain-gate.json");
    std::fs::write(&path, profile.to_string())?;
    fleet.control_plane().kubectl(&["apply", "-f", &path.to_string_lossy()])?;
    wait::until("every node redirects hooks", Duration::from_secs(60), || {
        for node in fleet.nodes() {
            let chain =
                node.net.namespace.output("nft", &["list", "chain", "ip", "switchtower", "nat_output"])?;
            ensure!(chain.contains("redirect"), "{}: {chain}", node.net.name);
            let listening = node.net.namespace.run(|| TcpStream::connect(("127.0.0.1", GATE)))?;
            listening.with_context(|| format!("the listener of {}", node.net.name))?;
        }
        Ok(())
    })
}

/// Sends the request of a hook from the node as its kubelet does; returns the body of the response.
///
/// # Errors
/// There is no response with status 200.
pub fn hook(node: &FleetNode, address: IpAddr, path: &str) -> Result<Value> {
    let to = SocketAddr::new(address, GATE);
    let text = node.net.namespace.run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {to}\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    ensure!(text.starts_with("HTTP/1.1 200 "), "{text}");
    let (_, body) = text.split_once("\r\n\r\n").context("no body")?;
    Ok(serde_json::from_str(body)?)
}
