//! Authentication: callers need a token of one of two ServiceAccounts, for the audience `switchtower-admin`.
//!
//! RBAC controls who may create such a token (`serviceaccounts/token` of that name), so an administrator grants and
//! revokes it like any other permission, and it works with every kind of kubeconfig.

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

/// Maximum number of cached tokens.
const REMEMBERED_TOKENS: usize = 1_024;
/// Maximum number of concurrent reviews.
const REVIEWS: usize = 8;

/// Permissions of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Reads the controller's state, and single Services from kernels.
    Viewer,
    /// Also reads whole tables, which costs CPU time on the node.
    Operator,
}

impl Caller {
    /// Returns an error unless the caller is an operator.
    pub(super) fn must_be_operator(self) -> Result<(), CallerRejection> {
        if self == Self::Operator { Ok(()) } else { Err(CallerRejection::OperatorOnly) }
    }
}

/// Reasons to refuse a caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallerRejection {
    /// The request has no token.
    #[error("the request has no bearer token; kubectl switchtower requests one from the API server")]
    NoToken,
    /// The token is invalid, expired or for another audience.
    #[error("the API server does not accept the token for the audience {AUDIENCE}: {0}")]
    NotAuthenticated(String),
    /// The token belongs to another user.
    #[error("the token belongs to {0}, not to the ServiceAccount {VIEWER} or {OPERATOR}")]
    ForeignUser(String),
    /// The API server cannot review the token.
    #[error("the token cannot be reviewed now: {0}; retry later")]
    ReviewUnavailable(String),
    /// The request needs an operator.
    #[error("reading a node's whole tables requires a token of {OPERATOR}")]
    OperatorOnly,
}

impl CallerRejection {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoToken | Self::NotAuthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::ForeignUser(_) | Self::OperatorOnly => StatusCode::FORBIDDEN,
            Self::ReviewUnavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<Unavailable> for CallerRejection {
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
    /// Creates an authenticator for the ServiceAccounts of a namespace.
    #[must_use]
    pub fn new(reviewer: impl Reviewer, namespace: &str) -> Self {
        Self {
            reviews: Reviews::new(reviewer, AUDIENCE, REVIEWS, REMEMBERED_TOKENS),
            namespace: namespace.to_owned(),
        }
    }

    async fn identify(&self, headers: &HeaderMap) -> Result<Caller, CallerRejection> {
        let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token =
            value.and_then(|value| value.strip_prefix("Bearer ")).ok_or(CallerRejection::NoToken)?.trim();
        if token.is_empty() || token.len() > TOKEN {
            return Err(CallerRejection::NoToken);
        }
        self.reviews.holder(token, |status| self.judge(status)).await
    }

    fn judge(&self, status: TokenReviewStatus) -> Result<Caller, CallerRejection> {
        // An API server without support for audiences returns none.
        let ours =
            status.audiences.is_some_and(|audiences| audiences.iter().any(|audience| audience == AUDIENCE));
        if status.authenticated != Some(true) || !ours {
            let error = status.error.unwrap_or_else(|| "it is for another audience".to_owned());
            return Err(CallerRejection::NotAuthenticated(error));
        }
        let name = status.user.and_then(|user| user.username).unwrap_or_default();
        let of = |account: &str| format!("system:serviceaccount:{}:{account}", self.namespace);
        if name == of(OPERATOR) {
            Ok(Caller::Operator)
        } else if name == of(VIEWER) {
            Ok(Caller::Viewer)
        } else {
            Err(CallerRejection::ForeignUser(name))
        }
    }
}

/// Adds the caller to a request, or refuses the request.
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
            tracing::warn!(%refusal, "refused a request to the admin API");
            AdminError::from(refusal).into_response()
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = AdminError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        // Without the authentication layer there is no caller: refuse.
        parts.extensions.get().copied().ok_or_else(|| CallerRejection::NoToken.into())
    }
}
