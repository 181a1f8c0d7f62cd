//! Publishes the ConfigMap `switchtower-bootstrap`, with which agents find and trust the controllers.
//!
//! The leader writes the ConfigMap, and again after a replica came or went, the CAs changed, or another client changed it.
//! The manifests do not contain it, so that applying them does not reset it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::StreamExt as _;
use http::uri;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::authority::Authority;
use crate::authority::rotation::Published;
use crate::errors::Chain;
use crate::lease::Fence;
use crate::peers::Peers;

/// The ConfigMap that agents mount.
pub const BOOTSTRAP_CONFIG_MAP: &str = "switchtower-bootstrap";
/// Field manager of everything that is applied.
const MANAGER: &str = "switchtower-controller";
/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Minimum interval between two writes of the ConfigMap, in case another client keeps changing it.
const INTERVAL: Duration = Duration::from_secs(2);

/// Content of the ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// Certificates of the CAs, in PEM format.
    pub ca_certificates: String,
    /// `host:port` of every replica, sorted: it does not depend on the leader.
    pub controllers: Vec<String>,
}

impl Bootstrap {
    /// Returns the data of the ConfigMap: the certificates, and the controllers, one per line.
    fn data(&self) -> [(&'static str, String); 2] {
        [("ca.crt", self.ca_certificates.clone()), ("controllers", self.controllers.join("\n") + "\n")]
    }

    /// Returns true if the ConfigMap contains this data. Other keys are ignored.
    fn is_in(&self, map: &ConfigMap) -> bool {
        let data = map.data.as_ref();
        self.data().iter().all(|(key, text)| data.and_then(|data| data.get(*key)) == Some(text))
    }

    /// Writes the ConfigMap.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn publish(&self, client: &Client, namespace: &str) -> Result<(), kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": BOOTSTRAP_CONFIG_MAP},
            "data": serde_json::Map::from_iter(self.data().map(|(key, text)| (key.to_owned(), text.into()))),
        });
        let params = PatchParams::apply(MANAGER).force();
        api.patch(BOOTSTRAP_CONFIG_MAP, &params, &Patch::Apply(&object)).await.map(drop)
    }

    /// Waits until the ConfigMap is deleted or changed. Retries a failed watch.
    pub async fn is_lost(&self, client: &Client, namespace: &str) {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        let seen = watcher::watch_object(api, BOOTSTRAP_CONFIG_MAP).default_backoff();
        futures::pin_mut!(seen);
        while let Some(event) = seen.next().await {
            match event {
                Ok(Some(map)) if self.is_in(&map) => {}
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(%error, "failed to watch the ConfigMap; retrying");
                }
            }
        }
    }
}

/// Returns the addresses under which agents reach this controller: those of the flags, otherwise the address of
/// --listen. If that is unspecified, uses the source address of connections to the API server.
///
/// # Errors
/// The kernel has no source address for the API server. Sends no packets.
pub fn advertised(
    flags: &[String],
    listen: SocketAddr,
    api_server: &uri::Authority,
) -> std::io::Result<Vec<String>> {
    if !flags.is_empty() {
        return Ok(flags.to_vec());
    }
    let address = if listen.ip().is_unspecified() { local_address(api_server)? } else { listen.ip() };
    Ok(vec![SocketAddr::new(address, listen.port()).to_string()])
}

/// Returns the source address to a peer. Connecting a UDP socket makes the kernel choose it without sending a packet.
fn local_address(peer: &uri::Authority) -> std::io::Result<IpAddr> {
    use std::net::ToSocketAddrs as _;
    let port = peer.port_u16().unwrap_or(443);
    let host = peer.host().trim_matches(['[', ']']);
    let peer = (host, port).to_socket_addrs()?.next().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
    let any: IpAddr = if peer.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

/// Data of the ConfigMap, and reports about it.
pub struct Sources {
    /// The CAs.
    pub authority: watch::Receiver<Authority>,
    /// Addresses of all replicas.
    pub peers: Peers,
    /// Receives the bundle that the ConfigMap contains.
    pub published: watch::Sender<Option<Published>>,
}

impl Sources {
    fn take_current(&mut self) -> Bootstrap {
        let mut controllers = self.peers.take_current();
        controllers.sort_unstable();
        Bootstrap { ca_certificates: self.authority.borrow_and_update().bundle(), controllers }
    }

    fn published(&self, bundle: &str) {
        self.published.send_if_modified(|known| {
            let is_other = known.as_ref().is_none_or(|known| known.bundle != bundle);
            if is_other {
                *known = Some(Published { bundle: bundle.to_owned(), since: Instant::now() });
            }
            is_other
        });
    }

    async fn changed(&mut self) {
        tokio::select! {
            () = self.peers.changed() => {}
            // Fails only if the process ends.
            _ = self.authority.changed() => {}
        }
    }
}

/// Keeps the ConfigMap current while this replica is the leader. `client` refuses writes otherwise. Running agents already
/// know the controllers; only new agents wait for a missing ConfigMap.
pub async fn keep(client: Client, namespace: String, mut sources: Sources, fence: Fence) {
    loop {
        fence.opened().await;
        let bootstrap = sources.take_current();
        match tokio::time::timeout(TIMEOUT, bootstrap.publish(&client, &namespace)).await {
            Ok(Ok(())) => {
                let controllers = &bootstrap.controllers;
                tracing::info!(?controllers, %namespace, "wrote the ConfigMap switchtower-bootstrap");
                sources.published(&bootstrap.ca_certificates);
                tokio::select! {
                    () = bootstrap.is_lost(&client, &namespace) => {
                        sources.published.send_replace(None);
                        tracing::warn!(%namespace, "the ConfigMap switchtower-bootstrap was deleted or changed; the leader writes it again");
                    }
                    () = sources.changed() => {}
                }
            }
            Err(_) => {
                tracing::warn!(%namespace, "writing the ConfigMap switchtower-bootstrap timed out; retrying");
            }
            Ok(Err(error)) => {
                tracing::warn!(error = %Chain(&error), %namespace, "failed to write the ConfigMap switchtower-bootstrap; new agents wait for it; retrying");
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_config_map_is_detected() {
        let bootstrap = Bootstrap {
            ca_certificates: "certificate".into(),
            controllers: vec!["192.0.2.1:9443".into(), "192.0.2.2:9443".into()],
        };
        let map = |pairs: &[(&str, &str)]| ConfigMap {
            data: Some(pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()),
            ..ConfigMap::default()
        };
        let good = [("ca.crt", "certificate"), ("controllers", "192.0.2.1:9443\n192.0.2.2:9443\n")];
        assert!(bootstrap.is_in(&map(&good)));
        assert!(bootstrap.is_in(&map(&[good[0], good[1], ("note", "of another client")])));
        for bad in [vec![], vec![good[0]], vec![good[0], ("controllers", "garbage")]] {
            assert!(!bootstrap.is_in(&map(&bad)), "{bad:?}");
        }
        assert!(!bootstrap.is_in(&ConfigMap::default()));
    }

    #[test]
    fn advertised_addresses() {
        let api_server = "127.0.0.1:6443".parse().unwrap();
        let flags = ["tower.example:9443".to_owned()];
        let listen = |text: &str| text.parse().unwrap();
        assert_eq!(advertised(&flags, listen("0.0.0.0:9443"), &api_server).unwrap(), flags);
        assert_eq!(advertised(&[], listen("192.0.2.1:9443"), &api_server).unwrap(), ["192.0.2.1:9443"]);
        assert_eq!(advertised(&[], listen("0.0.0.0:9000"), &api_server).unwrap(), ["127.0.0.1:9000"]);
    }
}
