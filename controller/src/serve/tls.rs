//! TLS: the server's certificate, and the accept loop.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::Stream;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{Acceptor, VerifierBuilderError, WebPkiClientVerifier};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
pub use switchtower_proto::tls::SERVER_NAME;
use time::Duration as Span;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::connection::Connection;
use super::gate::{Gate, Rejection, Stage, Ticket};
use crate::authority::nodes::Certified;
use crate::authority::{Authority, CaPem, named, valid_for};

/// First byte of a TLS record that carries a handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// Validity of a server certificate.
pub const VALIDITY: Span = Span::days(365);

/// Error of the TLS setup.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Creating a certificate or reading the CA failed.
    #[error("create the server certificate; check ca.crt and ca.key")]
    Certificate(#[from] rcgen::Error),
    /// The certificate is not accepted by the TLS library.
    #[error("set up TLS with the new certificate")]
    Config(#[from] rustls::Error),
    /// Clients' certificates cannot be verified with the CAs.
    #[error("set up the verification of client certificates")]
    Verifier(#[from] VerifierBuilderError),
}

/// TLS configuration of the server; may be replaced at any time for new connections.
pub type ServerTls = ArcSwap<ServerConfig>;

/// Creates a configuration for agents and replicas, with a new certificate of the signer. Clients may present a certificate of
/// the authority.
///
/// # Errors
/// The authority cannot be used.
pub fn server_config(authority: &Authority) -> Result<ServerConfig, TlsError> {
    let roots = Arc::new(authority.roots()?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let verifier = verifier.allow_unauthenticated().build()?;
    config(&authority.signer, b"h2", verifier)
}

/// Creates a configuration as [`server_config`] does, for the admin API with HTTP/1.1 and without client certificates.
///
/// # Errors
/// As [`server_config`].
pub fn admin_config(authority: &Authority) -> Result<ServerConfig, TlsError> {
    config(&authority.signer, b"http/1.1", WebPkiClientVerifier::no_client_auth())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn config(
    ca: &CaPem,
    protocol: &[u8],
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<ServerConfig, TlsError> {
    let issuer = Issuer::from_ca_cert_pem(&ca.certificate, KeyPair::from_pem(&ca.key)?)?;
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    parameters.distinguished_name = named(SERVER_NAME);
    parameters.use_authority_key_identifier_extension = true;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    valid_for(&mut parameters, VALIDITY);
    let certificate = parameters.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.der().clone()], key)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

/// Returns connections after their handshake. The gate limits their number and duration.
pub(crate) fn incoming(
    listener: TcpListener,
    tls: Arc<ServerTls>,
    gate: Arc<Gate>,
) -> impl Stream<Item = Result<Connection<TlsStream<TcpStream>>, std::io::Error>> {
    let (out, connections) = mpsc::channel(64);
    tokio::spawn(async move {
        let watch = gate.clone().watch();
        tokio::select! {
            () = accept(listener, &tls, &gate, &out) => {}
            () = watch => {}
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(connections)
}

type Out = mpsc::Sender<Result<Connection<TlsStream<TcpStream>>, std::io::Error>>;

async fn accept(listener: TcpListener, tls: &ServerTls, gate: &Arc<Gate>, out: &Out) {
    loop {
        let accepted = tokio::select! {
            accepted = next(&listener, gate) => accepted,
            () = out.closed() => return,
        };
        let (tls, out) = (tls.load_full(), out.clone());
        tokio::spawn(async move {
            let Accepted { stream, ticket, mut closed } = accepted;
            let stream = tokio::select! {
                biased;
                // Counted where it was closed.
                _ = &mut closed => return,
                shaken = handshake(stream, tls, &ticket) => match shaken {
                    Ok(stream) => stream,
                    Err(HandshakeError::Rejection) => return,
                    Err(HandshakeError::Peer(reason, detail)) => return ticket.refused(reason, detail),
                },
            };
            let certified =
                stream.get_ref().1.peer_certificates().and_then(|chain| Certified::of(chain.first()?));
            // Fails only if the server has ended.
            let _ = out.send(Ok(Connection::new(stream, ticket, closed).certified(certified))).await;
        });
    }
}

/// A connection that the gate admitted.
pub(crate) struct Accepted {
    pub(crate) stream: TcpStream,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) closed: oneshot::Receiver<Rejection>,
}

/// Returns the next connection that the gate admits.
pub(crate) async fn next(listener: &TcpListener, gate: &Arc<Gate>) -> Accepted {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let local = stream.local_addr().ok().map(|local| local.ip());
                if let Ok((ticket, closed)) = gate.enter(peer.ip(), local) {
                    return Accepted { stream, ticket, closed };
                }
            }
            Err(error) => {
                // Out of file descriptors, most likely: the loop must not spin.
                tracing::warn!(%error, "accepting a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Reason for a failed handshake.
enum HandshakeError {
    /// Refused and counted by the gate.
    Rejection,
    /// Caused by the peer: metric label and message.
    Peer(&'static str, Option<String>),
}

async fn handshake(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    ticket: &Ticket,
) -> Result<TlsStream<TcpStream>, HandshakeError> {
    // Without TCP_NODELAY small frames wait for an acknowledgement. A failure only costs latency.
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1) if first[0] == TLS_HANDSHAKE => {}
        Ok(1) => return Err(HandshakeError::Peer("plaintext", None)),
        _ => return Err(HandshakeError::Peer("closed_before_handshake", None)),
    }
    let failed =
        |error: std::io::Error| HandshakeError::Peer(handshake_reason(&error), Some(error.to_string()));
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await.map_err(failed)?;
    ticket.advance(Stage::Handshake).map_err(|_| HandshakeError::Rejection)?;
    let stream = hello.into_stream(config).await.map_err(failed)?;
    ticket.advance(Stage::Anonymous).map_err(|_| HandshakeError::Rejection)?;
    Ok(stream)
}

/// Returns the metric label of a failed handshake. A peer that rejects the certificate sends an alert with the
/// reason.
fn handshake_reason(error: &std::io::Error) -> &'static str {
    use rustls::AlertDescription as Alert;
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        // Certificates are backdated by an hour and renewed long before they expire.
        Some(rustls::Error::AlertReceived(Alert::CertificateExpired)) => "peer_clock_skew",
        Some(rustls::Error::AlertReceived(
            Alert::UnknownCA | Alert::BadCertificate | Alert::DecryptError | Alert::CertificateUnknown,
        )) => "peer_distrusts_certificate",
        _ => "handshake",
    }
}
