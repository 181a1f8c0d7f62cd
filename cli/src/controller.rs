//! Client for the controller's admin API: JSON over TLS pinned to its CA and name, with a short-lived token.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use serde::de::DeserializeOwned;
use switchtower_admin_api::codes;
use switchtower_admin_api::{ApiError, SERVER_NAME};
use tokio::net::TcpStream;

use crate::args::Global;
use crate::cluster::Cluster;
use crate::error::{CliError, chain};
use crate::forward::Forward;

/// Timeout of a connection attempt and of a request.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum size of a response, in bytes.
const MAXIMUM_RESPONSE: usize = 64 << 20;

/// An open connection to the controller.
pub(crate) struct Controller {
    sender: SendRequest<Empty<Bytes>>,
    token: String,
    _forward: Option<Forward>,
}

impl Controller {
    /// Connects to a replica of the controller with a token of the ServiceAccount `account`.
    pub(crate) async fn connect(global: &Global, cluster: &Cluster, account: &str) -> Result<Self, CliError> {
        let (token, ca) = tokio::try_join!(cluster.token(account), cluster.controller_ca())?;
        if let Some(address) = &global.controller {
            let sender = reach(address, &ca).await?;
            return Ok(Self { sender, token, _forward: None });
        }
        let mut failure = None;
        for pod in cluster.controller_pods().await? {
            match Self::forward(global, cluster, &pod, &ca).await {
                Ok((sender, forward)) => return Ok(Self { sender, token, _forward: Some(forward) }),
                // Another replica answers for the same nodes.
                Err(error) => failure = Some(error),
            }
        }
        let none =
            || CliError::coded(codes::CONTROLLER_UNREACHABLE, "no controller pod is running".to_owned());
        Err(failure.unwrap_or_else(none))
    }

    async fn forward(
        global: &Global,
        cluster: &Cluster,
        pod: &str,
        ca: &str,
    ) -> Result<(SendRequest<Empty<Bytes>>, Forward), CliError> {
        let forward = Forward::open(global, cluster.system_namespace(), pod).await?;
        Ok((reach(&forward.address, ca).await?, forward))
    }

    /// Sends a GET request and decodes the response.
    pub(crate) async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, CliError> {
        let lost = |reason: String| {
            let message = format!("the controller did not answer: {reason}");
            CliError::coded(codes::CONTROLLER_UNREACHABLE, message)
        };
        let request = Request::get(path)
            .header(header::HOST, SERVER_NAME)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .body(Empty::new())
            .map_err(|error| CliError::new(format!("cannot request {path}: {error}")))?;
        let answer = async {
            self.sender.ready().await.map_err(|error| chain(&error))?;
            let response = self.sender.send_request(request).await.map_err(|error| chain(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAXIMUM_RESPONSE).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            Ok::<_, String>((status, body))
        };
        let answer = tokio::time::timeout(TIMEOUT, answer).await;
        let (status, body) =
            answer.map_err(|_| lost(format!("no response within {} s", TIMEOUT.as_secs())))?.map_err(lost)?;
        read(status, &body)
    }
}

fn read<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, CliError> {
    if status.is_success() {
        return serde_json::from_slice(body).map_err(|error| {
            CliError::new(format!(
                "cannot parse the controller's response ({error}); its version may differ from this plugin's"
            ))
        });
    }
    Err(match serde_json::from_slice::<ApiError>(body) {
        Ok(failure) => CliError {
            code: failure.code.as_deref().and_then(codes::find).copied(),
            message: failure.message,
        },
        Err(_) => CliError::new(format!("the controller answered {status}")),
    })
}

/// Opens a connection within [`TIMEOUT`].
async fn reach(address: &str, ca: &str) -> Result<SendRequest<Empty<Bytes>>, CliError> {
    let unreachable = |reason: String| {
        let message = format!("cannot reach the controller's admin API at {address}: {reason}");
        CliError::coded(codes::CONTROLLER_UNREACHABLE, message)
    };
    let connected = tokio::time::timeout(TIMEOUT, open(address, ca)).await;
    connected
        .map_err(|_| unreachable(format!("no response within {} s", TIMEOUT.as_secs())))?
        .map_err(unreachable)
}

async fn open(address: &str, ca: &str) -> Result<SendRequest<Empty<Bytes>>, String> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        let certificate = certificate.map_err(|error| format!("its CA cannot be parsed: {error}"))?;
        roots.add(certificate).map_err(|error| format!("its CA cannot be used: {error}"))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(SERVER_NAME).map_err(|error| error.to_string())?;
    let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, stream).await.map_err(|error| chain(&error))?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| chain(&error))?;
    // The task ends when the sender is dropped; the sender receives its errors.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// Percent-encodes a value for a path or query.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_decoded_with_their_codes() {
        let body = br#"{"message": "no", "code": "ST0207"}"#;
        let error = read::<u8>(StatusCode::NOT_FOUND, body).unwrap_err();
        assert_eq!((error.message.as_str(), error.code), ("no", Some(codes::NOT_SERVED)));
        let error = read::<u8>(StatusCode::BAD_GATEWAY, b"<html>").unwrap_err();
        assert!(error.message.contains("502"), "{error}");
        assert_eq!(read::<u8>(StatusCode::OK, b"7").unwrap(), 7);
        assert!(read::<u8>(StatusCode::OK, b"{}").is_err());
    }

    #[test]
    fn reserved_characters_are_escaped() {
        assert_eq!(escaped("10.96.0.1:80/TCP a&b"), "10.96.0.1%3A80%2FTCP%20a%26b");
    }
}
