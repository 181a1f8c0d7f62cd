//! Which node an agent is: a pod-bound token of the agents' ServiceAccount, reviewed by the API server.
//!
//! Whoever may create pods can project a token of the right audience for its own ServiceAccount, so the
//! audience alone says nothing: the user must be exactly the agents'. The node is the one that the API server
//! itself put into the token.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::fleet::Fleet;

mod claims;

use claims::Claims;

/// How long an accepted token is not reviewed again. Short: a deleted pod's token ends with its pod.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Most remembered tokens.
const REMEMBERED_TOKENS: usize = 16_384;
/// Reviews at a time.
const REVIEWS: usize = 32;
/// Longest time that a review may take, waiting for its turn included.
const REVIEW: Duration = Duration::from_secs(8);
/// Longest token.
const TOKEN: usize = 16 << 10;

/// Who an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its node.
    pub node: Arc<str>,
    /// UID of its pod.
    pub pod: Arc<str>,
    /// When its token ends.
    pub expires: SystemTime,
}

/// Why an agent is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No `authorization` in the request.
    #[error("the request has no bearer token; the agent reads it from --token-file")]
    NoToken,
    /// Not a JWT.
    #[error("the bearer token is not a JSON Web Token")]
    MalformedToken,
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

/// The answer of a review, or why there is none.
pub type Review<'a> = Pin<Box<dyn Future<Output = Result<TokenReviewStatus, String>> + Send + 'a>>;

/// Asks whether a token is genuine.
pub trait Reviewer: Send + Sync + 'static {
    /// Reviews a token for an audience.
    fn review<'a>(&'a self, token: &'a str, audience: &'a str) -> Review<'a>;
}

impl Reviewer for Client {
    fn review<'a>(&'a self, token: &'a str, audience: &'a str) -> Review<'a> {
        Box::pin(async move {
            let spec =
                TokenReviewSpec { audiences: Some(vec![audience.to_owned()]), token: Some(token.to_owned()) };
            let review = TokenReview { spec, ..TokenReview::default() };
            let api: Api<TokenReview> = Api::all(self.clone());
            let answer =
                api.create(&PostParams::default(), &review).await.map_err(|error| error.to_string())?;
            answer.status.ok_or_else(|| "the review has no status".to_owned())
        })
    }
}

/// Accepts or refuses agents.
pub struct Authenticator {
    reviewer: Box<dyn Reviewer>,
    audience: String,
    user: String,
    turns: Semaphore,
    accepted: Mutex<HashMap<[u8; 32], (Instant, Identity)>>,
}

impl Authenticator {
    /// Agents are the pods of this ServiceAccount, with tokens for this audience.
    #[must_use]
    pub fn new(reviewer: impl Reviewer, audience: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            reviewer: Box::new(reviewer),
            audience: audience.to_owned(),
            user: format!("system:serviceaccount:{namespace}:{service_account}"),
            turns: Semaphore::new(REVIEWS),
            accepted: Mutex::default(),
        }
    }

    /// Finds out who sent a request.
    ///
    /// # Errors
    /// It is no agent of an existing Node.
    pub async fn authenticate(&self, metadata: &MetadataMap, fleet: &Fleet) -> Result<Identity, Refusal> {
        let value = metadata.get("authorization").ok_or(Refusal::NoToken)?;
        let value = value.to_str().map_err(|_| Refusal::MalformedToken)?;
        let token = value.strip_prefix("Bearer ").ok_or(Refusal::NoToken)?.trim();
        if token.len() > TOKEN {
            return Err(Refusal::MalformedToken);
        }
        // Not verified: the review does that. It spares reviews of what cannot be a token, and tells why one
        // was refused.
        let claims = Claims::of(token).ok_or(Refusal::MalformedToken)?;
        let identity = self.identify(token, &claims).await?;
        if !fleet.knows(&identity.node) {
            return Err(Refusal::UnknownNode(identity.node.to_string()));
        }
        Ok(identity)
    }

    async fn identify(&self, token: &str, claims: &Claims) -> Result<Identity, Refusal> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if claims.expires <= SystemTime::now() {
            return Err(Refusal::Expired);
        }
        if let Some(identity) = self.remembered(&hash) {
            return Ok(identity);
        }
        let review = async {
            let _turn = self.turns.acquire().await.map_err(|error| error.to_string())?;
            self.reviewer.review(token, &self.audience).await
        };
        let answer = tokio::time::timeout(REVIEW, review).await;
        let status = answer
            .map_err(|_| Refusal::ReviewUnavailable("no answer in time".to_owned()))?
            .map_err(Refusal::ReviewUnavailable)?;
        let identity = self.judge(status, claims)?;
        self.remember(hash, &identity);
        Ok(identity)
    }

    fn judge(&self, status: TokenReviewStatus, claims: &Claims) -> Result<Identity, Refusal> {
        let ours = |audiences: &[String]| audiences.contains(&self.audience);
        if status.authenticated != Some(true) {
            return Err(self.explain(status.error.unwrap_or_default(), claims));
        }
        // An API server that does not know audiences answers with none.
        if !status.audiences.as_deref().is_some_and(ours) {
            return Err(Refusal::WrongAudience(self.audience.clone()));
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
        let pod = extra("authentication.kubernetes.io/pod-uid").ok_or(Refusal::NotPodBound)?;
        Ok(Identity { node, pod, expires: claims.expires })
    }

    /// Why the API server refused. Its text is for people; what the token says about itself is more precise,
    /// and lying there gains nothing but another word in the log.
    fn explain(&self, error: String, claims: &Claims) -> Refusal {
        if !claims.audiences.contains(&self.audience) {
            return Refusal::WrongAudience(self.audience.clone());
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

    fn remembered(&self, hash: &[u8; 32]) -> Option<Identity> {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, identity) = accepted.get(hash)?;
        (*until > Instant::now()).then(|| identity.clone())
    }

    fn remember(&self, hash: [u8; 32], identity: &Identity) {
        let now = Instant::now();
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        if accepted.len() >= REMEMBERED_TOKENS {
            accepted.retain(|_, (until, _)| *until > now);
        }
        if accepted.len() < REMEMBERED_TOKENS {
            accepted.insert(hash, (now + REMEMBERED, identity.clone()));
        }
    }
}
