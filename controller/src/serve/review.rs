//! Reviews of bearer tokens by the API server: limited in number, and cached for a short time.
//!
//! The caller's closure derives the holder from a review. The cache contains only accepted tokens, by hash.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest as _, Sha256};
use switchtower_telemetry::{span, spans};
use tokio::sync::Semaphore;
use tracing::Instrument as _;

use crate::sync::lock;

/// Lifetime of a cache entry. Short, because the token of a deleted pod becomes invalid with the pod.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Timeout of a review, including the wait for its turn.
const REVIEW: Duration = Duration::from_secs(8);
/// Maximum length of a token, in bytes.
pub(crate) const TOKEN: usize = 16 << 10;

/// Future of a review: its status, or an error message.
pub type Review<'a> = Pin<Box<dyn Future<Output = Result<TokenReviewStatus, String>> + Send + 'a>>;

/// Reviews tokens.
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

/// The API server cannot review the token, with the reason.
#[derive(Debug)]
pub(crate) struct Unavailable(pub(crate) String);

/// Reviews tokens for one audience and caches their holders.
pub(crate) struct Reviews<T> {
    reviewer: Box<dyn Reviewer>,
    audience: String,
    turns: Semaphore,
    most: usize,
    accepted: Mutex<HashMap<[u8; 32], (Instant, T)>>,
}

impl<T: Clone> Reviews<T> {
    /// Allows at most `at_once` concurrent reviews and `most` cached tokens.
    pub(crate) fn new(reviewer: impl Reviewer, audience: &str, at_once: usize, most: usize) -> Self {
        Self {
            reviewer: Box::new(reviewer),
            audience: audience.to_owned(),
            turns: Semaphore::new(at_once),
            most,
            accepted: Mutex::default(),
        }
    }

    /// Returns the required audience.
    pub(crate) fn audience(&self) -> &str {
        &self.audience
    }

    /// Returns the holder of a token, from the cache or from a review that `judge` evaluates.
    ///
    /// # Errors
    /// The API server cannot review the token, or `judge` refuses it.
    pub(crate) async fn holder<E: From<Unavailable>>(
        &self,
        token: &str,
        judge: impl FnOnce(TokenReviewStatus) -> Result<T, E>,
    ) -> Result<T, E> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(holder) = self.remembered(&hash) {
            return Ok(holder);
        }
        let review = async {
            let _turn = self.turns.acquire().await.map_err(|error| error.to_string())?;
            self.reviewer.review(token, &self.audience).await
        };
        let span =
            span!("switchtower.token.review", otel.kind = "client", switchtower.audience = &*self.audience);
        let answer = tokio::time::timeout(REVIEW, review).instrument(span.clone()).await;
        let answer = answer.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        if let Err(error) = &answer {
            spans::failed(&span, error);
        }
        let holder = judge(answer.map_err(Unavailable)?)?;
        self.remember(hash, &holder);
        Ok(holder)
    }

    fn remembered(&self, hash: &[u8; 32]) -> Option<T> {
        let accepted = lock(&self.accepted);
        let (until, holder) = accepted.get(hash)?;
        (*until > Instant::now()).then(|| holder.clone())
    }

    fn remember(&self, hash: [u8; 32], holder: &T) {
        let now = Instant::now();
        let mut accepted = lock(&self.accepted);
        if accepted.len() >= self.most {
            accepted.retain(|_, (until, _)| *until > now);
        }
        if accepted.len() < self.most {
            accepted.insert(hash, (now + REMEMBERED, holder.clone()));
        }
    }
}
