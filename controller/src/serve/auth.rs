//! Which node an agent is: a pod-bound token of the agents' ServiceAccount, reviewed by the API server.
//!
//! Whoever may create pods can project a token of the right audience for its own ServiceAccount, so the
//! audience alone says nothing: the user must be exactly the agents'. The node is the one that the API server
//! itself put into the token.

use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::authentication::v1::TokenReviewStatus;
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::gate::Class;
use super::keys::{Keys, Signature};
use super::review::{Reviewer, Reviews, TOKEN, Unavailable};

mod claims;

use claims::Claims;

use crate::session::Identity;

/// Most remembered tokens.
const REMEMBERED_TOKENS: usize = 16_384;
/// Reviews at a time.
const REVIEWS: usize = 32;
/// Of them, those for unknown callers whose tokens cannot be verified.
const STRANGERS: usize = 2;

/// Why an agent is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No `authorization` in the request.
    #[error("the request has no bearer token; the agent reads it from --token-file")]
    NoToken,
    /// Not a JWT.
    #[error("the bearer token is not a JSON Web Token")]
    MalformedToken,
    /// Not signed by the API server.
    #[error("the token's signature is not the API server's")]
    Forged,
    /// Signed with a key that the API server does not publish, or not yet.
    #[error("the token is signed with a key that the API server does not publish; try again")]
    UnknownKey,
    /// For somebody else.
    #[error("the token is not for the audience {0}; project it with that audience")]
    WrongAudience(String),
    /// Too old.
    #[error("the token has expired; the agent must read its file again")]
    Expired,
    /// Of another user.
    #[error("the token is of {0}, only {1} may be an agent")]
    ForeignServiceAccount(String, String),
    /// Made without a pod.
    #[error("the token is not bound to a pod on a node; it must be a projected one")]
    NotPodBound,
    /// Its pod was deleted.
    #[error("the token's pod is gone")]
    PodGone,
    /// No such Node, or it is left out by --node-selector.
    #[error("the Node {0} of the token does not exist, or is not selected")]
    UnknownNode(String),
    /// The API server does not accept it, for another reason.
    #[error("the API server does not accept the token: {0}")]
    NotAuthenticated(String),
    /// The API server cannot be asked.
    #[error("the token cannot be reviewed now: {0}; try again")]
    ReviewUnavailable(String),
}

impl Refusal {
    /// The metric's label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::MalformedToken => "malformed_token",
            Self::Forged => "forged",
            Self::UnknownKey => "unknown_key",
            Self::WrongAudience(_) => "wrong_audience",
            Self::Expired => "expired",
            Self::ForeignServiceAccount(..) => "foreign_service_account",
            Self::NotPodBound => "not_pod_bound",
            Self::PodGone => "pod_gone",
            Self::UnknownNode(_) => "unknown_node",
            Self::NotAuthenticated(_) => "not_authenticated",
            Self::ReviewUnavailable(_) => "review_unavailable",
        }
    }

    /// What the agent gets.
    pub(super) fn status(&self) -> Status {
        let message = format!("{}: {self}", self.reason());
        match self {
            Self::ForeignServiceAccount(..) | Self::NotPodBound | Self::UnknownNode(_) => {
                Status::permission_denied(message)
            }
            Self::ReviewUnavailable(_) => {
                let mut status = Status::unavailable(message);
                let wait = rand::random_range(1_000..5_000_u32).to_string();
                if let Ok(wait) = wait.parse() {
                    status.metadata_mut().insert("retry-after-milliseconds", wait);
                }
                status
            }
            _ => Status::unauthenticated(message),
        }
    }
}

impl From<Unavailable> for Refusal {
    fn from(Unavailable(why): Unavailable) -> Self {
        Self::ReviewUnavailable(why)
    }
}

/// A token that may be accepted, and what it says of itself.
#[derive(Debug)]
pub struct Shown<'a> {
    token: &'a str,
    claims: Claims,
}

/// Accepts or refuses agents.
pub struct Authenticator {
    reviews: Reviews<Identity>,
    keys: Arc<Keys>,
    strangers: Semaphore,
    user: String,
}

impl Authenticator {
    /// Agents are the pods of this ServiceAccount, with tokens for this audience.
    #[must_use]
    pub fn new(
        reviewer: impl Reviewer,
        keys: Arc<Keys>,
        audience: &str,
        namespace: &str,
        service_account: &str,
    ) -> Self {
        Self {
            keys,
            strangers: Semaphore::new(STRANGERS),
            reviews: Reviews::new(reviewer, audience, REVIEWS, REMEMBERED_TOKENS),
            user: format!("system:serviceaccount:{namespace}:{service_account}"),
        }
    }

    /// What a request shows, without asking anybody: costs little, so that it comes before the limits of streams.
    ///
    /// # Errors
    /// It has no token, or none that could be accepted.
    pub fn shown<'a>(&self, metadata: &'a MetadataMap) -> Result<Shown<'a>, Refusal> {
        let value = metadata.get("authorization").ok_or(Refusal::NoToken)?;
        let value = value.to_str().map_err(|_| Refusal::MalformedToken)?;
        let token = value.strip_prefix("Bearer ").ok_or(Refusal::NoToken)?.trim();
        if token.len() > TOKEN {
            return Err(Refusal::MalformedToken);
        }
        // Not verified yet. It spares what cannot be a token any further look, and tells why one was refused.
        let claims = Claims::of(token).ok_or(Refusal::MalformedToken)?;
        if claims.expires <= SystemTime::now() {
            return Err(Refusal::Expired);
        }
        if !claims.audiences.iter().any(|audience| audience == self.reviews.audience()) {
            return Err(Refusal::WrongAudience(self.reviews.audience().to_owned()));
        }
        Ok(Shown { token, claims })
    }

    /// Finds out who sent a request.
    ///
    /// # Errors
    /// It is no agent of an existing Node.
    pub(super) async fn authenticate(
        &self,
        Shown { token, claims }: Shown<'_>,
        class: Class,
        node_exists: impl Fn(&str) -> bool,
    ) -> Result<Identity, Refusal> {
        let _turn = match self.keys.verify(token).await {
            Signature::Genuine => {
                self.check(&claims, &node_exists)?;
                None
            }
            Signature::Forged => return Err(Refusal::Forged),
            Signature::UnknownKey => return Err(Refusal::UnknownKey),
            // Nodes' tokens do not wait for those that anybody may have made up.
            Signature::Unverifiable if class == Class::Stranger => self.strangers.acquire().await.ok(),
            Signature::Unverifiable => None,
        };
        let identity = self.reviews.holder(token, |status| self.judge(status, &claims)).await?;
        if !node_exists(&identity.node) {
            return Err(Refusal::UnknownNode(identity.node.to_string()));
        }
        Ok(identity)
    }

    /// What a genuine token tells without a review: any pod may have one of its own ServiceAccount.
    fn check(&self, claims: &Claims, node_exists: impl Fn(&str) -> bool) -> Result<(), Refusal> {
        if let Some(subject) = claims.subject.as_ref().filter(|subject| **subject != self.user) {
            return Err(Refusal::ForeignServiceAccount(subject.clone(), self.user.clone()));
        }
        if !claims.pod_bound {
            return Err(Refusal::NotPodBound);
        }
        match &claims.node {
            Some(node) if !node_exists(node) => Err(Refusal::UnknownNode(node.clone())),
            _ => Ok(()),
        }
    }

    fn judge(&self, status: TokenReviewStatus, claims: &Claims) -> Result<Identity, Refusal> {
        let ours =
            |audiences: &[String]| audiences.iter().any(|audience| audience == self.reviews.audience());
        if status.authenticated != Some(true) {
            return Err(self.explain(status.error.unwrap_or_default(), claims));
        }
        // An API server that does not know audiences answers with none.
        if !status.audiences.as_deref().is_some_and(ours) {
            return Err(Refusal::WrongAudience(self.reviews.audience().to_owned()));
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        if name != self.user {
            return Err(Refusal::ForeignServiceAccount(name, self.user.clone()));
        }
        let extra = |key: &str| {
            let values = user.extra.as_ref()?.get(key)?;
            values.first().filter(|value| !value.is_empty()).map(|value| Arc::<str>::from(value.as_str()))
        };
        let node = extra("authentication.kubernetes.io/node-name").ok_or(Refusal::NotPodBound)?;
        extra("authentication.kubernetes.io/pod-uid").ok_or(Refusal::NotPodBound)?;
        Ok(Identity { node, expires: claims.expires })
    }

    /// Why the API server refused. Its text is for people; what the token says about itself is more precise,
    /// and lying there gains nothing but another word in the log.
    fn explain(&self, error: String, claims: &Claims) -> Refusal {
        if !claims.audiences.iter().any(|audience| audience == self.reviews.audience()) {
            return Refusal::WrongAudience(self.reviews.audience().to_owned());
        }
        if error.contains("expired") {
            return Refusal::Expired;
        }
        if claims.pod_bound
            && (error.contains("invalidated") || error.contains("not found") || error.contains("pod"))
        {
            return Refusal::PodGone;
        }
        Refusal::NotAuthenticated(error)
    }
}
