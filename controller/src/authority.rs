//! The CAs whose certificates identify the controllers to agents: stored in the Secret `switchtower-ca`, or in a directory.
//!
//! During a rotation there are two. Agents trust a CA for some minutes before it signs, and for as long after it has
//! signed last, so that every certificate is trusted by every agent and no connection is closed ([`rotation`]).
//!
//! Invariant: an authority that is not usable (no key, a key of another certificate) never replaces a usable one.

use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    PublicKeyData as _,
};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use time::{Duration as Span, OffsetDateTime};

pub mod directory;
pub(crate) mod nodes;
pub mod rotation;
pub mod secret;

use secret::CA_SECRET;

/// Validity of a CA.
const VALIDITY: Span = Span::days(3_650);
/// Time before the start of the validity of certificates, to tolerate clocks that are slow.
const BACKDATED: Span = Span::hours(1);

/// A CA in PEM format.
#[derive(Clone, PartialEq, Eq)]
pub struct CaPem {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

impl std::fmt::Debug for CaPem {
    /// Omits the key.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("CaPem").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// Errors of the stored CAs.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
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
    /// A field is missing, not UTF-8, or empty.
    #[error(
        "the CA in {place} has no usable {field}; repair it, or delete it and restart all controllers to generate a new CA"
    )]
    Incomplete {
        /// The Secret or directory.
        place: String,
        /// Name of the field.
        field: &'static str,
    },
    /// A certificate and a key do not form a CA.
    #[error(
        "{field} in {place} is not a usable CA: {reason}; repair it, or delete it and restart all controllers to generate a new CA"
    )]
    Unusable {
        /// The Secret or directory.
        place: String,
        /// Name of the certificate's field.
        field: &'static str,
        /// The reason.
        reason: String,
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
    /// A CA could not be generated.
    #[error("cannot generate a CA")]
    Generate(#[from] rcgen::Error),
}

/// Creates a CA that is valid for ten years.
///
/// # Errors
/// Generating a key failed.
pub fn generate() -> Result<CaPem, AuthorityError> {
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named("switchtower-ca");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut parameters, VALIDITY);
    let certificate = parameters.self_signed(&key)?;
    Ok(CaPem { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Returns a distinguished name that consists of a common name.
pub(crate) fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Sets the validity from one hour ago, to tolerate clocks that are slow.
pub(crate) fn valid_for(parameters: &mut CertificateParams, span: Span) {
    let now = OffsetDateTime::now_utc();
    parameters.not_before = now - BACKDATED;
    parameters.not_after = now + span;
}

impl CaPem {
    /// Returns the end of the validity.
    ///
    /// # Errors
    /// The first certificate cannot be parsed, is not that of a CA, or has another key. Returns the reason.
    pub fn expiry(&self) -> Result<OffsetDateTime, String> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(self.certificate.as_bytes())
            .map_err(|error| format!("its certificate cannot be parsed: {error}"))?;
        let certificate =
            pem.parse_x509().map_err(|error| format!("its certificate cannot be parsed: {error}"))?;
        if !certificate.is_ca() {
            return Err("its certificate is not that of a CA".to_owned());
        }
        let key =
            KeyPair::from_pem(&self.key).map_err(|error| format!("its key cannot be parsed: {error}"))?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err("its key belongs to another certificate".to_owned());
        }
        Ok(certificate.validity().not_after.to_datetime())
    }
}

/// The CAs of the controllers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// Signs the certificates of all replicas. Its certificate may be followed by others that agents trust.
    pub signer: CaPem,
    /// Signs next. Agents trust it already.
    pub next: Option<CaPem>,
    /// Has signed before. Agents still trust it.
    pub previous: Option<CaPem>,
}

/// Names of the fields of one CA: certificate and key.
type Fields = (&'static str, &'static str);
const SIGNER: Fields = ("ca.crt", "ca.key");
const NEXT: Fields = ("next.crt", "next.key");
const PREVIOUS: Fields = ("previous.crt", "previous.key");

impl Authority {
    /// An authority without a rotation.
    #[must_use]
    pub fn new(signer: CaPem) -> Self {
        Self { signer, next: None, previous: None }
    }

    /// Reads the fields of a Secret. `place` names it in errors.
    fn parse(place: &str, field: impl Fn(&str) -> Option<String>) -> Result<Self, AuthorityError> {
        let text = |name: &'static str| {
            let found = field(name).filter(|text| !text.is_empty());
            found.ok_or_else(|| AuthorityError::Incomplete { place: place.to_owned(), field: name })
        };
        let required = |(certificate, key): Fields| -> Result<CaPem, AuthorityError> {
            let ca = CaPem { certificate: text(certificate)?, key: text(key)? };
            ca.expiry().map_err(|reason| AuthorityError::Unusable {
                place: place.to_owned(),
                field: certificate,
                reason,
            })?;
            Ok(ca)
        };
        let optional = |fields: Fields| field(fields.0).map(|_| required(fields)).transpose();
        Ok(Self { signer: required(SIGNER)?, next: optional(NEXT)?, previous: optional(PREVIOUS)? })
    }

    /// Returns the fields that [`Authority::parse`] reads.
    fn fields(&self) -> Vec<(&'static str, &str)> {
        let present =
            [(SIGNER, Some(&self.signer)), (NEXT, self.next.as_ref()), (PREVIOUS, self.previous.as_ref())];
        let mut fields = Vec::new();
        for ((certificate, key), ca) in present {
            if let Some(ca) = ca {
                fields.extend([(certificate, ca.certificate.as_str()), (key, ca.key.as_str())]);
            }
        }
        fields
    }

    /// All CAs, that of the signer first.
    pub fn all(&self) -> impl Iterator<Item = &CaPem> {
        [Some(&self.signer), self.next.as_ref(), self.previous.as_ref()].into_iter().flatten()
    }

    /// Returns all certificates that agents and replicas trust, for TLS.
    ///
    /// # Errors
    /// A certificate cannot be parsed.
    pub fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.bundle().as_bytes()) {
            let certificate = certificate.map_err(|error| rustls::Error::General(error.to_string()))?;
            roots.add(certificate)?;
        }
        Ok(roots)
    }

    /// Returns all certificates that agents and replicas trust, in PEM format.
    #[must_use]
    pub fn bundle(&self) -> String {
        self.all().map(|ca| format!("{}\n", ca.certificate.trim_end())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: &[(&str, &str)]) -> Result<Authority, AuthorityError> {
        Authority::parse("a test", |name| {
            fields.iter().find(|(field, _)| *field == name).map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn authority_survives_its_fields() {
        let [signer, next, previous] = [(); 3].map(|()| generate().unwrap());
        let mut authority = Authority::new(signer);
        assert_eq!(parse(&authority.fields()).unwrap(), authority);
        authority.next = Some(next);
        authority.previous = Some(previous);
        assert_eq!(parse(&authority.fields()).unwrap(), authority);
        assert_eq!(authority.bundle().matches("BEGIN CERTIFICATE").count(), 3);
        assert!(authority.bundle().starts_with(authority.signer.certificate.trim_end()));
        assert!(!format!("{authority:?}").contains("PRIVATE"));
    }

    #[test]
    fn unusable_authority_is_refused() {
        let [first, second] = [(); 2].map(|()| generate().unwrap());
        let refused = |fields: &[(&str, &str)]| parse(fields).unwrap_err().to_string();
        assert!(refused(&[]).contains("no usable ca.crt"));
        assert!(refused(&[("ca.crt", &first.certificate)]).contains("no usable ca.key"));
        let mixed = [("ca.crt", first.certificate.as_str()), ("ca.key", second.key.as_str())];
        assert!(refused(&mixed).contains("another certificate"));
        assert!(refused(&[("ca.crt", "garbage"), ("ca.key", &first.key)]).contains("cannot be parsed"));
        let half = [
            ("ca.crt", first.certificate.as_str()),
            ("ca.key", first.key.as_str()),
            ("next.crt", second.certificate.as_str()),
        ];
        assert!(refused(&half).contains("next.key"));
    }

    #[test]
    fn first_certificate_of_a_bundle_signs() {
        let [first, second] = [(); 2].map(|()| generate().unwrap());
        let bundle = format!("{}{}", first.certificate, second.certificate);
        let authority = parse(&[("ca.crt", &bundle), ("ca.key", &first.key)]).unwrap();
        assert_eq!(authority.bundle().matches("BEGIN CERTIFICATE").count(), 2);
        assert!(parse(&[("ca.crt", &bundle), ("ca.key", &second.key)]).is_err());
    }
}
