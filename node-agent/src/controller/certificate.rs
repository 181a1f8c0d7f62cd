//! The node's certificate, with which the agent identifies itself while the API server cannot review its token.
//!
//! The controller issues it in Welcome and accepts it only during such an outage. The agent presents it only after a replica
//! has refused the token, and after a failure of that attempt not in the next one: an unusable certificate never keeps an
//! agent out.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use switchtower_proto::tls::ClientIdentity;
use tokio::time::Instant;

use crate::storage::files::{Content, StateFiles};

/// Age at which a certificate is replaced; it is valid for a week.
const RENEWAL: Duration = Duration::from_secs(24 * 3_600);

/// Name of the key's file in the state directory.
pub(crate) const KEY_FILE: &str = "node-key.der";
/// Name of the certificate's file.
pub(crate) const CERTIFICATE_FILE: &str = "node-certificate.der";

/// Whether the next attempt presents the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presentation {
    TokenOnly,
    WithCertificate,
}

/// Key and certificate of this node.
pub(crate) struct NodeCertificate {
    /// PKCS #8 in DER.
    key: Vec<u8>,
    /// SubjectPublicKeyInfo in DER.
    public_key: Vec<u8>,
    certificate: Option<CertificateDer<'static>>,
    /// Time at which the certificate was issued; `None` for one that was read from disk.
    issued: Option<Instant>,
    next: Presentation,
    /// Key and certificate on disk.
    paths: Option<(PathBuf, PathBuf)>,
    files: StateFiles,
}

impl NodeCertificate {
    /// Reads key and certificate from the state directory, or generates a key. `None` if that fails.
    pub(crate) fn load(state: Option<&Path>, files: StateFiles) -> Option<Self> {
        let paths = state.map(|state| (state.join(KEY_FILE), state.join(CERTIFICATE_FILE)));
        let read = paths.as_ref().and_then(|(key, certificate)| {
            let key = std::fs::read(key).ok()?;
            Some((public_key(&key)?, key, std::fs::read(certificate).ok().map(CertificateDer::from)))
        });
        let (public_key, key, certificate) = match read {
            Some(read) => read,
            None => {
                let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new());
                let key = key.ok()?.as_ref().to_vec();
                if let Some((path, _)) = &paths {
                    files.put(path, Content::Bytes(key.clone()), None);
                }
                (public_key(&key)?, key, None)
            }
        };
        Some(Self { key, public_key, certificate, issued: None, next: Presentation::TokenOnly, paths, files })
    }

    /// Returns the public key if a new certificate is due, otherwise nothing.
    pub(crate) fn request(&self) -> Vec<u8> {
        let is_fresh = self.issued.is_some_and(|issued| issued.elapsed() < RENEWAL);
        if is_fresh { Vec::new() } else { self.public_key.clone() }
    }

    /// Keeps a certificate that the controller issued; an empty one is none.
    pub(crate) fn received(&mut self, certificate: Vec<u8>) {
        if certificate.is_empty() {
            return;
        }
        if let Some((_, path)) = &self.paths {
            self.files.put(path, Content::Bytes(certificate.clone()), None);
        }
        self.certificate = Some(certificate.into());
        self.issued = Some(Instant::now());
    }

    /// Returns what the next attempt presents.
    pub(crate) fn identity(&self) -> Option<ClientIdentity> {
        let certificate = self.certificate.clone().filter(|_| self.next == Presentation::WithCertificate)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.clone()));
        Some(ClientIdentity { certificate, key })
    }

    /// Records the end of an attempt or session: whether a replica refused the token.
    pub(crate) fn ended(&mut self, token_refused: bool) {
        self.next = match self.next {
            Presentation::TokenOnly if token_refused => Presentation::WithCertificate,
            Presentation::TokenOnly | Presentation::WithCertificate => Presentation::TokenOnly,
        };
    }
}

/// Returns the public key of a PKCS #8 key; `None` if it is not usable.
fn public_key(key: &[u8]) -> Option<Vec<u8>> {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    Some(any_ecdsa_type(&key).ok()?.public_key()?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(directory: &Path) -> NodeCertificate {
        let files = StateFiles::start().unwrap();
        let made = NodeCertificate::load(Some(directory), files.clone()).unwrap();
        assert!(files.flush(Duration::from_secs(10)));
        made
    }

    #[tokio::test(start_paused = true)]
    async fn certificate_survives_a_restart_and_is_renewed_daily() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = load(directory.path());
        let key = first.request();
        assert!(!key.is_empty());
        first.received(b"certificate".to_vec());
        assert!(first.request().is_empty());
        tokio::time::advance(RENEWAL).await;
        assert_eq!(first.request(), key);
        assert!(first.files.flush(Duration::from_secs(10)));
        let second = load(directory.path());
        assert_eq!(second.request(), key, "its age is unknown");
        assert_eq!(second.certificate.as_deref(), Some(&b"certificate"[..]));
        std::fs::write(directory.path().join(KEY_FILE), "garbage").unwrap();
        let third = load(directory.path());
        assert_ne!(third.request(), key);
        assert_eq!(third.certificate, None, "that of another key");
    }

    #[test]
    fn certificate_is_presented_once_after_a_refused_token() {
        let directory = tempfile::tempdir().unwrap();
        let mut certificate = load(directory.path());
        certificate.ended(true);
        assert!(certificate.identity().is_none(), "there is none");
        certificate.ended(true);
        certificate.received(b"certificate".to_vec());
        assert!(certificate.identity().is_none());
        certificate.ended(false);
        assert!(certificate.identity().is_none(), "not without a refusal");
        certificate.ended(true);
        assert!(certificate.identity().is_some());
        certificate.ended(true);
        assert!(certificate.identity().is_none(), "not after a failure of the attempt");
    }
}
