//! Publishes the data with which agents find and trust the controller: the CA, and the ConfigMap
//! `switchtower-bootstrap`.
//!
//! The CA is generated once. If several controllers start at the same time, one creates the Secret and the others read
//! it. The leader writes the ConfigMap, and again after a replica came or went, or another client changed it. The
//! manifests do not contain it, so that applying them does not reset it.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt as _;
use http::uri::Authority;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use serde_json::json;

use crate::errors::Chain;
use crate::lease::Fence;
use crate::peers::Peers;

/// The Secret that holds the CA.
pub const CA_SECRET: &str = "switchtower-ca";
/// The ConfigMap that agents mount.
pub const BOOTSTRAP_CONFIG_MAP: &str = "switchtower-bootstrap";
/// Field manager of everything that is applied.
const MANAGER: &str = "switchtower-controller";
/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Minimum interval between two writes of the ConfigMap, in case another client keeps changing it.
const INTERVAL: Duration = Duration::from_secs(2);

/// A CA in PEM format.
#[derive(Clone, PartialEq, Eq)]
pub struct CaPem {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// Errors of the bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The Secret could not be read or created.
    #[error(
        "cannot read or create the Secret {namespace}/{CA_SECRET}; check that the namespace exists and that the \
         controller may get and create Secrets in it, or use --tls-dir"
    )]
    Secret {
        /// Namespace of the Secret.
        namespace: String,
        /// Error of the API server.
        #[source]
        source: Box<kube::Error>,
    },
    /// The Secret exists and is incomplete.
    #[error(
        "the Secret {namespace}/{CA_SECRET} has no usable {field}; repair it, or delete it and restart the controller to generate a new CA"
    )]
    Incomplete {
        /// Namespace of the Secret.
        namespace: String,
        /// The missing key of its data.
        field: &'static str,
    },
    /// A file of --tls-dir could not be read or written.
    #[error("cannot read or write {path} (--tls-dir)")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        #[source]
        source: std::io::Error,
    },
    /// The CA could not be generated.
    #[error("cannot generate a CA")]
    Generate(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Reads the CA from a directory, or generates it there.
///
/// # Errors
/// A file cannot be read or written, or `generate` fails.
pub fn ca_from_directory<E>(
    directory: &Path,
    generate: impl FnOnce() -> Result<CaPem, E>,
) -> Result<CaPem, BootstrapError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (certificate, key) = (directory.join("ca.crt"), directory.join("ca.key"));
    if certificate.exists() || key.exists() {
        return Ok(CaPem { certificate: read(&certificate)?, key: read(&key)? });
    }
    let made = generate().map_err(|error| BootstrapError::Generate(error.into()))?;
    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| BootstrapError::File { path, source }
    };
    std::fs::create_dir_all(directory).map_err(file_error(directory))?;
    write_private(&key, &made.key).map_err(file_error(&key))?;
    std::fs::write(&certificate, &made.certificate).map_err(file_error(&certificate))?;
    Ok(made)
}

fn read(path: &Path) -> Result<String, BootstrapError> {
    std::fs::read_to_string(path).map_err(|source| BootstrapError::File { path: path.to_owned(), source })
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Reads the CA from the Secret, or generates and stores it. The first of several controllers wins.
///
/// # Errors
/// The API server refuses, the Secret is incomplete, or `generate` fails.
pub async fn ca_from_secret<E>(
    client: &Client,
    namespace: &str,
    generate: impl FnOnce() -> Result<CaPem, E>,
) -> Result<CaPem, BootstrapError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let refused = |source: kube::Error| BootstrapError::Secret {
        namespace: namespace.to_owned(),
        source: Box::new(source),
    };
    if let Some(secret) = api.get_opt(CA_SECRET).await.map_err(refused)? {
        return ca_of(&secret, namespace);
    }
    let made = generate().map_err(|error| BootstrapError::Generate(error.into()))?;
    let data = [("ca.crt", &made.certificate), ("ca.key", &made.key)];
    let secret = Secret {
        metadata: ObjectMeta { name: Some(CA_SECRET.to_owned()), ..ObjectMeta::default() },
        data: Some(data.map(|(name, text)| (name.to_owned(), ByteString(text.clone().into_bytes()))).into()),
        ..Secret::default()
    };
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => Ok(made),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            ca_of(&api.get(CA_SECRET).await.map_err(refused)?, namespace)
        }
        Err(error) => Err(refused(error)),
    }
}

fn ca_of(secret: &Secret, namespace: &str) -> Result<CaPem, BootstrapError> {
    let text = |field: &'static str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(field));
        bytes
            .and_then(|bytes| String::from_utf8(bytes.0.clone()).ok())
            .filter(|text| !text.is_empty())
            .ok_or_else(|| BootstrapError::Incomplete { namespace: namespace.to_owned(), field })
    };
    Ok(CaPem { certificate: text("ca.crt")?, key: text("ca.key")? })
}

/// Content of the ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// Certificate of the CA, in PEM format.
    pub ca_certificate: String,
    /// `host:port` of every replica, sorted: it does not depend on the leader.
    pub controllers: Vec<String>,
}

impl Bootstrap {
    /// Returns the data of the ConfigMap: the certificate, and the controllers, one per line.
    fn data(&self) -> [(&'static str, String); 2] {
        [("ca.crt", self.ca_certificate.clone()), ("controllers", self.controllers.join("\n") + "\n")]
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
    api_server: &Authority,
) -> std::io::Result<Vec<String>> {
    if !flags.is_empty() {
        return Ok(flags.to_vec());
    }
    let address = if listen.ip().is_unspecified() { local_address(api_server)? } else { listen.ip() };
    Ok(vec![SocketAddr::new(address, listen.port()).to_string()])
}

/// Returns the source address to a peer. Connecting a UDP socket makes the kernel choose it without sending a packet.
fn local_address(peer: &Authority) -> std::io::Result<IpAddr> {
    use std::net::ToSocketAddrs as _;
    let port = peer.port_u16().unwrap_or(443);
    let host = peer.host().trim_matches(['[', ']']);
    let peer = (host, port).to_socket_addrs()?.next().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
    let any: IpAddr = if peer.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

/// Keeps the ConfigMap current while this replica is the leader. `client` refuses writes otherwise. Running agents already know the controllers; only new
/// agents wait for a missing ConfigMap.
pub async fn keep(client: Client, namespace: String, ca_certificate: String, mut peers: Peers, fence: Fence) {
    loop {
        fence.opened().await;
        let mut controllers = peers.take_current();
        controllers.sort_unstable();
        let bootstrap = Bootstrap { ca_certificate: ca_certificate.clone(), controllers };
        match tokio::time::timeout(TIMEOUT, bootstrap.publish(&client, &namespace)).await {
            Ok(Ok(())) => {
                let controllers = &bootstrap.controllers;
                tracing::info!(?controllers, %namespace, "wrote the ConfigMap switchtower-bootstrap");
                tokio::select! {
                    () = bootstrap.is_lost(&client, &namespace) => {
                        tracing::warn!(%namespace, "the ConfigMap switchtower-bootstrap was deleted or changed; the leader writes it again");
                    }
                    () = peers.changed() => {}
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

    fn made() -> Result<CaPem, std::io::Error> {
        Ok(CaPem { certificate: "certificate".into(), key: "key".into() })
    }

    #[test]
    fn directory_gets_its_ca_once() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tls");
        let first = ca_from_directory(&path, made).unwrap();
        assert!(first == made().unwrap());
        let mode = std::fs::metadata(path.join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = ca_from_directory(&path, || Err::<CaPem, _>(std::io::Error::other("not asked")));
        assert!(again.unwrap() == first);
        std::fs::remove_file(path.join("ca.key")).unwrap();
        assert!(ca_from_directory(&path, made).is_err(), "a certificate without its key is not replaced");
    }

    #[test]
    fn changed_config_map_is_detected() {
        let bootstrap = Bootstrap {
            ca_certificate: "certificate".into(),
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
