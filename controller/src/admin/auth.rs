//! Who may ask: holders of a token of one of two ServiceAccounts, for the audience `switchtower-admin`.
//!
//! The right to create such a token is RBAC's (`serviceaccounts/token` of that name), so that an administrator
//! grants and takes it like any other, and it works with every kind of kubeconfig.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use k8s_openapi::api::authentication::v1::TokenReviewStatus;
use switchtower_admin_api::{AUDIENCE, OPERATOR, VIEWER};

use super::AdminError;
use crate::serve::review::{Reviewer, Reviews, TOKEN, Unavailable};

/// Most remembered tokens.
const REMEMBERED_TOKENS: usize = 1_024;
/// Reviews at a time.
const REVIEWS: usize = 8;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Reads what the controller knows, and single Services from kernels.
    Viewer,
    /// Also reads whole tables, which costs the node some time.
    Operator,
}

impl Caller {
    /// For whole tables.
    pub(super) fn must_be_operator(self) -> Result<(), Refusal> {
        if self == Self::Operator { Ok(()) } else { Err(Refusal::OperatorOnly) }
    }
}

/// Why a caller is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No token.
    #[error("the request has no bearer token; kubectl switchtower asks the API server for one")]
    NoToken,
    /// Not for us, expired, or made up.
    #[error("the API server does not accept the token for the audience {AUDIENCE}: {0}")]
    NotAuthenticated(String),
    /// Of another user.
    #[error("the token is of {0}, not of the ServiceAccount {VIEWER} or {OPERATOR}")]
    ForeignUser(String),
    /// The API server cannot be asked.
    #[error("the token cannot be reviewed now: {0}; try again")]
    ReviewUnavailable(String),
    /// A viewer asks for what operators may read.
    #[error("a token of {OPERATOR} is needed to read a node's whole tables")]
    OperatorOnly,
}

impl Refusal {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoToken | Self::NotAuthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::ForeignUser(_) | Self::OperatorOnly => StatusCode::FORBIDDEN,
            Self::ReviewUnavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<Unavailable> for Refusal {
    fn from(Unavailable(why): Unavailable) -> Self {
        Self::ReviewUnavailable(why)
    }
}

/// Reviews tokens of callers.
pub struct AdminAuthenticator {
    reviews: Reviews<Caller>,
    namespace: String,
}

impl AdminAuthenticator {
    /// The ServiceAccounts are those of this namespace.
    #[must_use]
    pub fn new(reviewer: impl Reviewer, namespace: &str) -> Self {
        Self {
            reviews: Reviews::new(reviewer, AUDIENCE, REVIEWS, REMEMBERED_TOKENS),
            namespace: namespace.to_owned(),
        }
    }

    async fn identify(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = value.and_then(|value| value.strip_prefix("Bearer ")).ok_or(Refusal::NoToken)?.trim();
        if token.is_empty() || token.len() > TOKEN {
            return Err(Refusal::NoToken);
        }
        self.reviews.holder(token, |status| self.judge(status)).await
    }

    fn judge(&self, status: TokenReviewStatus) -> Result<Caller, Refusal> {
        // An API server that does not know audiences answers with none.
        let ours =
            status.audiences.is_some_and(|audiences| audiences.iter().any(|audience| audience == AUDIENCE));
        if status.authenticated != Some(true) || !ours {
            let error = status.error.unwrap_or_else(|| "it is for another audience".to_owned());
            return Err(Refusal::NotAuthenticated(error));
        }
        let name = status.user.and_then(|user| user.username).unwrap_or_default();
        let of = |account: &str| format!("system:serviceaccount:{}:{account}", self.namespace);
        if name == of(OPERATOR) {
            Ok(Caller::Operator)
        } else if name == of(VIEWER) {
            Ok(Caller::Viewer)
        } else {
            Err(Refusal::ForeignUser(name))
        }
    }
}

/// Lets a request through with its caller, or answers it.
pub(super) async fn authenticate(
    State(authenticator): State<Arc<AdminAuthenticator>>,
    mut request: Request,
    next: Next,
) -> Response {
    match authenticator.identify(request.headers()).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => {
            tracing::warn!(%refusal, "a request to the admin API was refused");
            AdminError::from(refusal).into_response()
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = AdminError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        // Without the layer around the router there is no caller, and no answer.
        parts.extensions.get().copied().ok_or_else(|| Refusal::NoToken.into())
    }
}
