//! Answers queries of other replicas, on the agents' port.
//!
//! A caller proves with a secret derived from the CA's key that it is a replica: only replicas can read that key, and TLS
//! has already proven to the caller that this process has it. The API server is not needed.

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::{Body, to_bytes};
use ring::hmac;
use switchtower_proto::v1::replica_server::Replica;
use switchtower_proto::v1::{ReplicaRequest, ReplicaResponse};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tower::ServiceExt as _;

use crate::authority::{Authority, CaPem};
use crate::serve::connection::Origin;

/// Maximum length of a path with its query, in bytes.
const PATH: usize = 4 << 10;
/// Maximum size of an answer, in bytes.
pub(super) const ANSWER: usize = 64 << 20;
/// Name of the header, and scheme of its value.
pub(super) const HEADER: &str = "authorization";
const SCHEME: &str = "Replica ";
/// Purpose of the derived secret.
const PURPOSE: &[u8] = b"switchtower: query between replicas, version 1";

/// Secret that the replicas share.
#[derive(Clone)]
pub struct ReplicaKey(hmac::Key);

impl ReplicaKey {
    /// Derives the secret from the CA's key.
    #[must_use]
    pub fn new(ca: &CaPem) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, ca.key.trim().as_bytes()))
    }

    /// Returns the value of the header.
    pub(super) fn header(&self) -> String {
        let tag = hmac::sign(&self.0, PURPOSE);
        tag.as_ref().iter().fold(SCHEME.to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }

    fn verifies(&self, tag: &[u8]) -> bool {
        hmac::verify(&self.0, PURPOSE, tag).is_ok()
    }
}

/// Secrets of all CAs in use: during a rotation the replicas do not change theirs at the same time.
#[derive(Clone)]
pub struct ReplicaKeys(Arc<ArcSwap<Vec<ReplicaKey>>>);

impl ReplicaKeys {
    /// Accepts replicas that sign with a CA of the authority.
    #[must_use]
    pub fn new(authority: &Authority) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(keys(authority))))
    }

    /// Replaces the CAs.
    pub fn trust(&self, authority: &Authority) {
        self.0.store(Arc::new(keys(authority)));
    }

    fn accepts(&self, metadata: &MetadataMap) -> bool {
        let value = metadata.get(HEADER).and_then(|value| value.to_str().ok());
        let digits = value.and_then(|value| value.strip_prefix(SCHEME)).unwrap_or_default().as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let tag: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
        tag.is_some_and(|tag| self.0.load().iter().any(|key| key.verifies(&tag)))
    }
}

fn keys(authority: &Authority) -> Vec<ReplicaKey> {
    authority.all().map(ReplicaKey::new).collect()
}

/// The gRPC service.
#[derive(Clone)]
pub struct ReplicaService {
    routes: Router,
    keys: ReplicaKeys,
}

impl ReplicaService {
    /// `routes` answer for the nodes of this replica.
    #[must_use]
    pub fn new(routes: Router, keys: ReplicaKeys) -> Self {
        Self { routes, keys }
    }
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    async fn get(&self, request: Request<ReplicaRequest>) -> Result<Response<ReplicaResponse>, Status> {
        let origin = request.extensions().get::<Origin>().cloned();
        let Some(Origin { ticket, .. }) = origin else {
            return Err(Status::internal("the connection is unknown"));
        };
        if ticket.is_refused() || !self.keys.accepts(request.metadata()) {
            ticket.refused("replica_key", None);
            ticket.refuse();
            return Err(Status::unauthenticated("the caller is no replica that has the same CA"));
        }
        let _authenticated = ticket.authenticated();
        let path = request.into_inner().path;
        if path.len() > PATH {
            return Err(Status::invalid_argument("the path is too long"));
        }
        let asked = http::Request::get(&path).body(Body::empty());
        let asked = asked.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let Ok(answer) = self.routes.clone().oneshot(asked).await;
        let status = answer.status().as_u16().into();
        let body = to_bytes(answer.into_body(), ANSWER).await;
        let body = body.map_err(|error| Status::internal(format!("read the answer: {error}")))?;
        Ok(Response::new(ReplicaResponse { status, body: body.to_vec() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ca(key: &str) -> CaPem {
        CaPem { certificate: String::new(), key: key.to_owned() }
    }

    #[test]
    fn secret_of_another_ca_is_refused() {
        let keys = ReplicaKeys::new(&Authority::new(ca("key\n")));
        let with = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(HEADER, value.parse().unwrap());
            keys.accepts(&metadata)
        };
        assert!(with(&ReplicaKey::new(&ca("key")).header()));
        assert!(!with(&ReplicaKey::new(&ca("another key")).header()));
        for garbage in ["", "Replica ", "Replica zz", "Bearer aa", "Replica 00", "Replica +1"] {
            assert!(!with(garbage), "{garbage:?}");
        }
        assert!(!keys.accepts(&MetadataMap::new()));
        let header = ReplicaKey::new(&ca("another key")).header();
        keys.trust(&Authority { next: Some(ca("another key")), ..Authority::new(ca("key")) });
        assert!(with(&header), "a replica that signs with the next CA already");
        keys.trust(&Authority { previous: Some(ca("key")), ..Authority::new(ca("another key")) });
        assert!(
            with(&ReplicaKey::new(&ca("key")).header()),
            "a replica that still signs with the previous CA"
        );
    }
}
