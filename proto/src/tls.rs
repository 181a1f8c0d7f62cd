//! TLS of the clients of a controller: agents and other replicas.
//!
//! Every replica has a certificate of the cluster's own CA for one name, [`SERVER_NAME`], whatever the address. Clients
//! have no certificate; they authenticate by a token or a secret in a header.

use std::sync::Arc;

use rustls::{ClientConfig, Error, RootCertStore};

/// Name in a controller's certificate, for every address.
pub const SERVER_NAME: &str = "switchtower-controller";

/// Returns the configuration of a client that trusts these CAs only and speaks HTTP/2.
///
/// # Errors
/// The provider of cryptography supports no version of TLS.
pub fn client_config(roots: RootCertStore) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
