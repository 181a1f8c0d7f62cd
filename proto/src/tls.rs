//! TLS of the clients of a controller: agents and other replicas.
//!
//! Every replica has a certificate of the cluster's own CA for one name, [`SERVER_NAME`], whatever the address. Clients
//! authenticate by a token or a secret in a header; an agent may also have a certificate of its node.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, Error, RootCertStore};

/// Name in a controller's certificate, for every address.
pub const SERVER_NAME: &str = "switchtower-controller";

/// Certificate and key of a client.
pub struct ClientIdentity {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
}

/// Returns the configuration of a client that trusts these CAs only, speaks HTTP/2, and presents `identity` if there is one.
///
/// # Errors
/// The provider of cryptography supports no version of TLS, or not the key.
pub fn client_config(roots: RootCertStore, identity: Option<ClientIdentity>) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(ClientIdentity { certificate, key }) => config.with_client_auth_cert(vec![certificate], key)?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
