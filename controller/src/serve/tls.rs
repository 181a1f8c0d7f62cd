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
use rustls::server::Acceptor;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration as Span, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::connection::Connection;
use super::gate::{Gate, Stage, Ticket, Turned};
use crate::bootstrap::CaPem;

/// The name in the server's certificate, which agents pin.
pub const SERVER_NAME: &str = "switchtower-controller";
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

/// Connections after their handshake. The gate bounds how many get there and how long they may take.
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
                // Counted by whoever closed it.
                _ = &mut closed => return,
                shaken = handshake(stream, tls, &ticket) => match shaken {
                    Ok(stream) => stream,
                    Err(Broken::Turned) => return,
                    Err(Broken::Peer(reason, detail)) => return ticket.refused(reason, detail),
                },
            };
            // Fails only when the server is gone.
            let _ = out.send(Ok(Connection::new(stream, ticket, closed))).await;
        });
    }
}

/// A connection that has its place at the gate.
pub(crate) struct Accepted {
    pub(crate) stream: TcpStream,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) closed: oneshot::Receiver<Turned>,
}

/// The next connection that the gate lets in.
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

/// Why there is no TLS on a connection.
enum Broken {
    /// The gate has no room for it, and has counted it.
    Turned,
    /// The peer's doing: the metric's label, and what it said.
    Peer(&'static str, Option<String>),
}

async fn handshake(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    ticket: &Ticket,
) -> Result<TlsStream<TcpStream>, Broken> {
    // Without it small frames wait for an acknowledgement; it is a matter of speed only.
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1) if first[0] == TLS_HANDSHAKE => {}
        Ok(1) => return Err(Broken::Peer("plaintext", None)),
        _ => return Err(Broken::Peer("closed_before_handshake", None)),
    }
    let failed = |error: std::io::Error| Broken::Peer(handshake_reason(&error), Some(error.to_string()));
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await.map_err(failed)?;
    ticket.advance(Stage::Handshake).map_err(|_| Broken::Turned)?;
    let stream = hello.into_stream(config).await.map_err(failed)?;
    ticket.advance(Stage::Anonymous).map_err(|_| Broken::Turned)?;
    Ok(stream)
}

/// The metric's label of a failed handshake. A peer that does not accept the certificate says why.
fn handshake_reason(error: &std::io::Error) -> &'static str {
    use rustls::AlertDescription as Alert;
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        // Certificates are dated back by an hour and renewed long before they end.
        Some(rustls::Error::AlertReceived(Alert::CertificateExpired)) => "peer_clock_skew",
        Some(rustls::Error::AlertReceived(
            Alert::UnknownCA | Alert::BadCertificate | Alert::DecryptError | Alert::CertificateUnknown,
        )) => "peer_distrusts_certificate",
        _ => "handshake",
    }
}
