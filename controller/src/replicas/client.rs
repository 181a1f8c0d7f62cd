//! Queries other replicas. Connections are kept and reopened when they are needed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde::de::DeserializeOwned;
use switchtower_proto::tls::{SERVER_NAME, client_config};
use switchtower_proto::v1::ReplicaRequest;
use switchtower_proto::v1::replica_client::ReplicaClient;
use tokio::net::TcpStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};

use super::service::{ANSWER, HEADER, ReplicaKey};
use super::{Peer, Replicas};
use crate::authority::Authority;
use crate::sync::lock;

/// Timeout of a connection attempt.
const CONNECT: Duration = Duration::from_secs(2);

/// A query that has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The replica does not answer in time, or refuses the caller.
    #[error("replica {replica} does not answer: {reason}")]
    Unreachable {
        /// The replica.
        replica: String,
        /// Error with its causes.
        reason: String,
    },
    /// The replica answered with a failure.
    #[error("replica {replica} answered {status}")]
    Failed {
        /// The replica.
        replica: String,
        /// Status code of HTTP.
        status: u16,
    },
}

/// Answer of one replica.
#[derive(Debug, Clone)]
pub struct Reply<T> {
    /// The replica.
    pub replica: String,
    /// Its answer.
    pub answer: Result<T, AskError>,
}

/// Certificates and secret for connections to replicas.
struct Credentials {
    tls: tokio_rustls::TlsConnector,
    authorization: MetadataValue<Ascii>,
}

impl Credentials {
    fn new(authority: &Authority) -> anyhow::Result<Self> {
        let config = client_config(authority.roots()?, None)?;
        let mut authorization: MetadataValue<Ascii> = ReplicaKey::new(&authority.signer).header().parse()?;
        authorization.set_sensitive(true);
        Ok(Self { tls: tokio_rustls::TlsConnector::from(Arc::new(config)), authorization })
    }
}

/// Client of all other replicas. Clones share connections.
#[derive(Clone)]
pub struct Client {
    replicas: Replicas,
    /// `None`: there is never another replica.
    credentials: Option<Arc<ArcSwap<Credentials>>>,
    channels: Arc<Mutex<HashMap<Vec<String>, Channel>>>,
}

impl Client {
    /// Creates a client that trusts the CAs.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub fn new(replicas: Replicas, authority: &Authority) -> anyhow::Result<Self> {
        let credentials = ArcSwap::from_pointee(Credentials::new(authority)?);
        Ok(Self { replicas, credentials: Some(Arc::new(credentials)), channels: Arc::default() })
    }

    /// Replaces the CAs. Open connections stay.
    ///
    /// # Errors
    /// A certificate cannot be used; nothing is replaced.
    pub fn trust(&self, authority: &Authority) -> anyhow::Result<()> {
        let made = Credentials::new(authority)?;
        if let Some(credentials) = &self.credentials {
            credentials.store(Arc::new(made));
        }
        Ok(())
    }

    /// A client of a replica that is alone.
    #[must_use]
    pub fn alone() -> Self {
        let replicas = Replicas::new("controller", Duration::from_secs(10));
        Self { replicas, credentials: None, channels: Arc::default() }
    }

    /// The replicas.
    #[must_use]
    pub fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    /// Sends a GET request to all other replicas that are present, and decodes the answers.
    pub async fn ask<T: DeserializeOwned>(&self, path: &str, timeout: Duration) -> Vec<Reply<T>> {
        let Some(credentials) = &self.credentials else { return Vec::new() };
        let asked = self.replicas.peers().into_iter().map(|peer| async move {
            let answer = tokio::time::timeout(timeout, self.get(credentials, &peer, path)).await;
            let unreachable = |reason: String| AskError::Unreachable { replica: peer.name.clone(), reason };
            let answer = match answer {
                Ok(Ok((200, body))) => serde_json::from_slice(&body)
                    .map_err(|error| unreachable(format!("decode the answer: {error}"))),
                Ok(Ok((status, _))) => Err(AskError::Failed { replica: peer.name.clone(), status }),
                Ok(Err(status)) => Err(unreachable(status.message().to_owned())),
                Err(_) => Err(unreachable(format!("no answer within {:.1} s", timeout.as_secs_f64()))),
            };
            Reply { replica: peer.name, answer }
        });
        futures::future::join_all(asked).await
    }

    async fn get(
        &self,
        credentials: &Arc<ArcSwap<Credentials>>,
        peer: &Peer,
        path: &str,
    ) -> Result<(u16, Vec<u8>), tonic::Status> {
        let channel = self.channel(credentials, peer)?;
        let mut client = ReplicaClient::new(channel).max_decoding_message_size(ANSWER + (1 << 10));
        let mut request = tonic::Request::new(ReplicaRequest { path: path.to_owned() });
        request.metadata_mut().insert(HEADER, credentials.load().authorization.clone());
        let answer = client.get(request).await?.into_inner();
        Ok((u16::try_from(answer.status).unwrap_or(500), answer.body))
    }

    fn channel(
        &self,
        credentials: &Arc<ArcSwap<Credentials>>,
        peer: &Peer,
    ) -> Result<Channel, tonic::Status> {
        let mut channels = lock(&self.channels);
        if let Some(channel) = channels.get(&peer.addresses) {
            return Ok(channel.clone());
        }
        let known: Vec<Vec<String>> = self.replicas.peers().into_iter().map(|peer| peer.addresses).collect();
        channels.retain(|addresses, _| known.contains(addresses));
        // The connector provides TLS; for an https URI tonic would add its own.
        let endpoint = Endpoint::from_shared(format!("http://{SERVER_NAME}"))
            .map_err(|error| tonic::Status::internal(error.to_string()))?
            .connect_timeout(CONNECT);
        let (credentials, addresses) = (credentials.clone(), peer.addresses.clone());
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            dial(credentials.clone(), addresses.clone())
        }));
        channels.insert(peer.addresses.clone(), channel.clone());
        Ok(channel)
    }
}

type Connection = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;

/// Connects to the first address that answers.
async fn dial(credentials: Arc<ArcSwap<Credentials>>, addresses: Vec<String>) -> std::io::Result<Connection> {
    let mut last = std::io::Error::other("the replica has no address");
    for address in addresses {
        match tokio::time::timeout(CONNECT, TcpStream::connect(&address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                let name = ServerName::try_from(SERVER_NAME).map_err(std::io::Error::other)?;
                let tls = &credentials.load_full().tls;
                return tls.connect(name, stream).await.map(TokioIo::new);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = std::io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}
