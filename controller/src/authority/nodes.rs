//! Certificates of nodes: the second way for an agent to prove its node, while the API server cannot review its token.
//!
//! A replica issues one to every agent that a token has identified and that requests it. It is valid for a week, and accepted
//! only while tokens cannot be reviewed, so that a deleted Pod or Node loses its access as soon as the API server responds.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use time::Duration as Span;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Authority, named, valid_for};

/// Validity of a certificate.
const VALIDITY: Span = Span::days(7);
/// URI that names a node, before its name (SPIFFE ID).
const URI: &str = "spiffe://switchtower/node/";
/// Maximum length of a public key, in bytes: that of RSA with 4,096 bits is shorter.
const KEY: usize = 1 << 10;

/// Issues certificates with the signer of the authority. Clones share it.
#[derive(Clone)]
pub struct NodeCertificates(Arc<ArcSwap<Issuer<'static, KeyPair>>>);

impl NodeCertificates {
    /// Uses the signer of the authority.
    ///
    /// # Errors
    /// Its certificate or key cannot be used.
    pub fn new(authority: &Authority) -> Result<Self, rcgen::Error> {
        Ok(Self(Arc::new(ArcSwap::from_pointee(issuer(authority)?))))
    }

    /// Replaces the authority.
    ///
    /// # Errors
    /// As [`NodeCertificates::new`]; the previous authority stays in use.
    pub fn trust(&self, authority: &Authority) -> Result<(), rcgen::Error> {
        self.0.store(Arc::new(issuer(authority)?));
        Ok(())
    }

    /// Returns a certificate in DER for a node's public key (SubjectPublicKeyInfo in DER).
    ///
    /// # Errors
    /// The key is not usable.
    pub(crate) fn issue(&self, node: &str, public_key: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        if public_key.len() > KEY {
            return Err(rcgen::Error::CouldNotParseKeyPair);
        }
        let key = SubjectPublicKeyInfo::from_der(public_key)?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = named("switchtower-node-agent");
        parameters.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!("{URI}{node}"))?)];
        parameters.use_authority_key_identifier_extension = true;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        valid_for(&mut parameters, VALIDITY);
        Ok(parameters.signed_by(&key, &self.0.load())?.der().to_vec())
    }
}

fn issuer(authority: &Authority) -> Result<Issuer<'static, KeyPair>, rcgen::Error> {
    Issuer::from_ca_cert_pem(&authority.signer.certificate, KeyPair::from_pem(&authority.signer.key)?)
}

/// Node that a verified certificate names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certified {
    /// Name of the node.
    pub(crate) node: Arc<str>,
    /// End of the certificate's validity.
    pub(crate) expires: SystemTime,
}

impl Certified {
    /// Reads a certificate whose signature, validity and purpose were verified. `None` if it names no node.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let names = certificate.subject_alternative_name().ok()??;
        let node = names.value.general_names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(URI),
            _ => None,
        })?;
        let expires = SystemTime::from(certificate.validity().not_after.to_datetime());
        (!node.is_empty()).then(|| Self { node: node.into(), expires })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::PublicKeyData as _;

    use super::*;
    use crate::authority::generate;

    #[test]
    fn certificate_names_its_node_for_a_week() {
        let authority = Authority::new(generate().unwrap());
        let certificates = NodeCertificates::new(&authority).unwrap();
        let key = KeyPair::generate().unwrap().subject_public_key_info();
        let made = certificates.issue("node-1.example", &key).unwrap();
        let read = Certified::of(&CertificateDer::from(made)).unwrap();
        assert_eq!(&*read.node, "node-1.example");
        let left = read.expires.duration_since(SystemTime::now()).unwrap();
        assert!(left > Duration::from_secs(6 * 24 * 3_600) && left <= Duration::from_secs(7 * 24 * 3_600));
    }

    #[test]
    fn unusable_keys_and_other_certificates_are_refused() {
        let authority = Authority::new(generate().unwrap());
        let certificates = NodeCertificates::new(&authority).unwrap();
        for bad in [&b""[..], b"garbage", &[0x30; 2_000]] {
            assert!(certificates.issue("n1", bad).is_err());
        }
        let (_, ca) = x509_parser::pem::parse_x509_pem(authority.signer.certificate.as_bytes()).unwrap();
        assert_eq!(Certified::of(&CertificateDer::from(ca.contents)), None, "no name of a node");
        assert_eq!(Certified::of(&CertificateDer::from(&b"garbage"[..])), None);
    }
}
