//! Authentication of agents: a pod-bound token of the agents' ServiceAccount, reviewed by the API server; while it cannot review
//! tokens, also a certificate of the node.
//!
//! Anyone who may create pods can project a token with this audience for another ServiceAccount, so the audience
//! proves nothing: the user must be the agents' ServiceAccount. The node is the one that the API server put into the
//! token.

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

use crate::authority::nodes::Certified;
use crate::session::Identity;

/// Maximum number of cached reviews.
const REMEMBERED_TOKENS: usize = 16_384;
/// Maximum number of concurrent reviews.
const REVIEWS: usize = 32;
/// Maximum number of concurrent reviews for strangers whose tokens cannot be verified.
const STRANGERS: usize = 2;

/// Reason why an agent is not authenticated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentRejection {
    /// No `authorization` in the request.
    #[error("the request has no bearer token; the agent reads it from --token-file")]
    NoToken,
    /// Not a JWT.
    #[error("the bearer token is not a JSON Web Token")]
    MalformedToken,
    /// Not signed by the API server.
    #[error("the token's signature is not the API server's")]
    Forged,
    /// Signed with a key that the API server does not publish (yet).
    #[error("the token is signed with a key that the API server does not publish; retry")]
    UnknownKey,
    /// For another audience.
    #[error("the token is not for the audience {0}; project it with that audience")]
    WrongAudience(String),
    /// Expired.
    #[error("the token has expired; the agent must read its file again")]
    Expired,
    /// Of another ServiceAccount or user.
    #[error("the token belongs to {0}, but only {1} may be an agent")]
    ForeignServiceAccount(String, String),
    /// Not bound to a Pod or Node.
    #[error("the token is not bound to a Pod on a node or to a Node; use a projected token")]
    NotPodBound,
    /// Its pod was deleted.
    #[error("the token's pod does not exist any more")]
    PodGone,
    /// No such Node, or --node-selector excludes it.
    #[error("the Node {0} of the token does not exist, or --node-selector excludes it")]
    UnknownNode(String),
    /// Rejected by the API server for another reason.
    #[error("the API server does not accept the token: {0}")]
    NotAuthenticated(String),
    /// The API server cannot review tokens.
    #[error("the token cannot be reviewed now: {0}; retry")]
    ReviewUnavailable(String),
}

impl AgentRejection {
    /// Returns the value of the metric label `reason`.
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

    /// Returns the gRPC status for the agent.
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

impl From<Unavailable> for AgentRejection {
    fn from(Unavailable(why): Unavailable) -> Self {
        Self::ReviewUnavailable(why)
    }
}

/// A token that passed the checks without IO, and its claims.
#[derive(Debug)]
pub struct Credential<'a> {
    token: &'a str,
    claims: Claims,
    /// Proven by the connection.
    certified: Option<&'a Certified>,
}

/// Authenticates agents.
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

    /// Extracts the credential of a request. Needs no IO, so that it can precede all limits.
    ///
    /// # Errors
    /// The request has no token, or one that cannot be accepted.
    pub(crate) fn credential<'a>(
        &self,
        metadata: &'a MetadataMap,
        certified: Option<&'a Certified>,
    ) -> Result<Credential<'a>, AgentRejection> {
        let value = metadata.get("authorization").ok_or(AgentRejection::NoToken)?;
        let value = value.to_str().map_err(|_| AgentRejection::MalformedToken)?;
        let token = value.strip_prefix("Bearer ").ok_or(AgentRejection::NoToken)?.trim();
        if token.len() > TOKEN {
            return Err(AgentRejection::MalformedToken);
        }
        // Not verified yet: rejects early what cannot be a token, and gives the reason.
        let claims = Claims::of(token).ok_or(AgentRejection::MalformedToken)?;
        // Kubelets cannot renew tokens without the API server. If it responds, the review refuses the token.
        if claims.expires <= SystemTime::now() && certified.is_none() {
            return Err(AgentRejection::Expired);
        }
        if !claims.audiences.iter().any(|audience| audience == self.reviews.audience()) {
            return Err(AgentRejection::WrongAudience(self.reviews.audience().to_owned()));
        }
        // A certificate of another node than the token's proves nothing.
        let certified =
            certified.filter(|certified| claims.node.as_ref().is_none_or(|node| **node == *certified.node));
        Ok(Credential { token, claims, certified })
    }

    /// Authenticates the sender of a request.
    ///
    /// # Errors
    /// The sender is not an agent of an existing Node.
    pub(super) async fn authenticate(
        &self,
        Credential { token, claims, certified }: Credential<'_>,
        class: Class,
        node_exists: impl Fn(&str) -> bool,
    ) -> Result<Identity, AgentRejection> {
        let _turn = match self.keys.verify(token).await {
            Signature::Genuine => {
                self.check(&claims, &node_exists)?;
                None
            }
            Signature::Forged => return Err(AgentRejection::Forged),
            Signature::UnknownKey => return Err(AgentRejection::UnknownKey),
            // Tokens of nodes do not wait behind possibly forged ones.
            Signature::Unverifiable if class == Class::Stranger => self.strangers.acquire().await.ok(),
            Signature::Unverifiable => None,
        };
        let reviewed = self.reviews.holder(token, |status| self.judge(status, &claims)).await;
        let identity = match (reviewed, certified) {
            (Err(AgentRejection::ReviewUnavailable(why)), Some(certified)) => {
                tracing::info!(node = &*certified.node, why, "identified by the node's certificate");
                Identity { node: certified.node.clone(), expires: certified.expires }
            }
            (reviewed, _) => reviewed?,
        };
        if !node_exists(&identity.node) {
            return Err(AgentRejection::UnknownNode(identity.node.to_string()));
        }
        Ok(identity)
    }

    /// Checks the claims of a genuine token without a review: every pod can have one for its own ServiceAccount.
    fn check(&self, claims: &Claims, node_exists: impl Fn(&str) -> bool) -> Result<(), AgentRejection> {
        if let Some(subject) = claims.subject.as_ref().filter(|subject| **subject != self.user) {
            return Err(AgentRejection::ForeignServiceAccount(subject.clone(), self.user.clone()));
        }
        if !claims.bound {
            return Err(AgentRejection::NotPodBound);
        }
        match &claims.node {
            Some(node) if !node_exists(node) => Err(AgentRejection::UnknownNode(node.clone())),
            _ => Ok(()),
        }
    }

    fn judge(&self, status: TokenReviewStatus, claims: &Claims) -> Result<Identity, AgentRejection> {
        let ours =
            |audiences: &[String]| audiences.iter().any(|audience| audience == self.reviews.audience());
        if status.authenticated != Some(true) {
            return Err(self.explain(status.error.unwrap_or_default(), claims));
        }
        // An API server that does not know audiences answers with none.
        if !status.audiences.as_deref().is_some_and(ours) {
            return Err(AgentRejection::WrongAudience(self.reviews.audience().to_owned()));
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        if name != self.user {
            return Err(AgentRejection::ForeignServiceAccount(name, self.user.clone()));
        }
        let extra = |key: &str| {
            let values = user.extra.as_ref()?.get(key)?;
            values.first().filter(|value| !value.is_empty()).map(|value| Arc::<str>::from(value.as_str()))
        };
        let node = extra("authentication.kubernetes.io/node-name").ok_or(AgentRejection::NotPodBound)?;
        // A kubelet can request only tokens of Pods on its Node; a token that is bound to the Node itself, for an agent
        // outside of a Pod, needs an administrator.
        let bound = ["authentication.kubernetes.io/pod-uid", "authentication.kubernetes.io/node-uid"];
        bound.into_iter().find_map(extra).ok_or(AgentRejection::NotPodBound)?;
        Ok(Identity { node, expires: claims.expires })
    }

    /// Returns the reason for a rejection. The API server's message is free text; the token's claims are more
    /// precise, and a false claim only changes the reason in the log.
    fn explain(&self, error: String, claims: &Claims) -> AgentRejection {
        if !claims.audiences.iter().any(|audience| audience == self.reviews.audience()) {
            return AgentRejection::WrongAudience(self.reviews.audience().to_owned());
        }
        if error.contains("expired") {
            return AgentRejection::Expired;
        }
        if claims.bound
            && (error.contains("invalidated") || error.contains("not found") || error.contains("pod"))
        {
            return AgentRejection::PodGone;
        }
        AgentRejection::NotAuthenticated(error)
    }
}
