//! TLS: the CA, the server's certificate, and the accept loop.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::Stream;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration as Span, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::metrics::ServeMetrics;
use crate::bootstrap::CaPem;

/// The name in the server's certificate, which agents pin.
pub const SERVER_NAME: &str = "switchtower-controller";
/// Handshakes at a time.
const HANDSHAKES: usize = 256;
/// Longest handshake: as a whole fleet that comes back at once needs on a busy machine, whose work would be lost else.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// First byte of a TLS record that carries a handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The CA or a certificate could not be made, or the given CA not be read.
    #[error("making the server's certificate; check ca.crt and ca.key")]
    Certificate(#[from] rcgen::Error),
    /// The certificate is not accepted by the TLS library.
    #[error("setting up TLS with the certificate just made")]
    Config(#[from] rustls::Error),
}

/// The server's side of TLS; may be replaced while it is in use, for connections to come.
pub type ServerTls = ArcSwap<ServerConfig>;

/// Makes a CA: ten years, for one purpose.
///
/// # Errors
/// No key could be made.
pub fn generate_ca() -> Result<CaPem, TlsError> {
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named("switchtower-ca");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut parameters, Span::days(3_650));
    let certificate = parameters.self_signed(&key)?;
    Ok(CaPem { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// A configuration with a new certificate of the CA, for one year.
///
/// # Errors
/// The CA cannot be read.
pub fn server_config(ca: &CaPem) -> Result<ServerConfig, TlsError> {
    let issuer = Issuer::from_ca_cert_pem(&ca.certificate, KeyPair::from_pem(&ca.key)?)?;
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    parameters.distinguished_name = named(SERVER_NAME);
    parameters.use_authority_key_identifier_extension = true;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    valid_for(&mut parameters, Span::days(365));
    let certificate = parameters.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// The same for the admin API, which speaks HTTP/1.1.
///
/// # Errors
/// As [`server_config`].
pub fn admin_config(ca: &CaPem) -> Result<ServerConfig, TlsError> {
    let mut config = server_config(ca)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Valid from an hour ago, for clocks that are late.
fn valid_for(parameters: &mut CertificateParams, span: Span) {
    let now = OffsetDateTime::now_utc();
    parameters.not_before = now - Span::hours(1);
    parameters.not_after = now + span;
}

/// Connections after their handshake. What is no TLS is closed and counted.
pub(crate) fn incoming(
    listener: TcpListener,
    tls: Arc<ServerTls>,
    metrics: ServeMetrics,
) -> impl Stream<Item = Result<TlsStream<TcpStream>, std::io::Error>> {
    let (out, connections) = mpsc::channel(64);
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(HANDSHAKES));
        while !out.is_closed() {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = out.closed() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: the loop must not spin.
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (acceptor, out, metrics) = (TlsAcceptor::from(tls.load_full()), out.clone(), metrics.clone());
            tokio::spawn(async move {
                let _slot = slot;
                match tokio::time::timeout(HANDSHAKE, handshake(stream, acceptor)).await {
                    Ok(Ok(stream)) => {
                        // Fails only when the server is gone.
                        let _ = out.send(Ok(stream)).await;
                    }
                    Ok(Err(reason)) => refused(&metrics, reason, peer),
                    Err(_) => refused(&metrics, "handshake_timeout", peer),
                }
            });
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(connections)
}

fn refused(metrics: &ServeMetrics, reason: &'static str, peer: std::net::SocketAddr) {
    metrics.refused(reason);
    tracing::warn!(reason, %peer, "connection refused");
}

async fn handshake(stream: TcpStream, acceptor: TlsAcceptor) -> Result<TlsStream<TcpStream>, &'static str> {
    // Without it small frames wait for an acknowledgement; it is a matter of speed only.
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1) if first[0] == TLS_HANDSHAKE => {}
        Ok(1) => return Err("plaintext"),
        _ => return Err("closed_before_handshake"),
    }
    acceptor.accept(stream).await.map_err(|_| "handshake")
}
