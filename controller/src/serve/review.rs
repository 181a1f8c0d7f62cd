//! Reviews of bearer tokens by the API server: bounded, and remembered for a moment.
//!
//! What a good review means is the caller's: the closure that judges it says who the token's holder is. Tokens are
//! remembered by hash, and only those that were accepted.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest as _, Sha256};
use switchtower_telemetry::{span, spans};
use tokio::sync::Semaphore;
use tracing::Instrument as _;

/// How long an accepted token is not reviewed again. Short: a deleted pod's token ends with its pod.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Longest time that a review may take, waiting for its turn included.
const REVIEW: Duration = Duration::from_secs(8);
/// Longest token, in bytes.
pub(crate) const TOKEN: usize = 16 << 10;

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

/// The API server cannot be asked, and why.
#[derive(Debug)]
pub(crate) struct Unavailable(pub(crate) String);

/// Reviews tokens for one audience, and remembers who holds them.
pub(crate) struct Reviews<T> {
    reviewer: Box<dyn Reviewer>,
    audience: String,
    turns: Semaphore,
    most: usize,
    accepted: Mutex<HashMap<[u8; 32], (Instant, T)>>,
}

impl<T: Clone> Reviews<T> {
    /// At most `at_once` reviews at a time, and at most `most` remembered tokens.
    pub(crate) fn new(reviewer: impl Reviewer, audience: &str, at_once: usize, most: usize) -> Self {
        Self {
            reviewer: Box::new(reviewer),
            audience: audience.to_owned(),
            turns: Semaphore::new(at_once),
            most,
            accepted: Mutex::default(),
        }
    }

    /// Whom tokens must be for.
    pub(crate) fn audience(&self) -> &str {
        &self.audience
    }

    /// Who holds a token: remembered, or what `judge` makes of its review.
    ///
    /// # Errors
    /// The API server cannot be asked, or `judge` refuses.
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
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, holder) = accepted.get(hash)?;
        (*until > Instant::now()).then(|| holder.clone())
    }

    fn remember(&self, hash: [u8; 32], holder: &T) {
        let now = Instant::now();
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        if accepted.len() >= self.most {
            accepted.retain(|_, (until, _)| *until > now);
        }
        if accepted.len() < self.most {
            accepted.insert(hash, (now + REMEMBERED, holder.clone()));
        }
    }
}
