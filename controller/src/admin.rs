//! The admin API for `kubectl switchtower`: the state of the controller and the content of the nodes' kernels.
//!
//! HTTP and JSON over TLS on a loopback address; the answers are [`switchtower_admin_api`]. Every request
//! needs a token of the ServiceAccount `switchtower-viewer` or `switchtower-operator`; RBAC decides who may create one.
//! All requests are read-only. Every replica answers for the nodes of all of them (`everywhere`).

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{MatchedPath, Path, Query, Request, State};
use axum::http::{StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{Registry, TextEncoder};
use serde::Deserialize;
use switchtower_admin_api::{
    ApiError, ChangeReport, ControllerInfo, DrainReport, Explanation, MetricsText, NodeDiff, NodeFrontends,
    NodeRules, Progress,
};
use switchtower_core::explain::Subject;
use switchtower_telemetry::{span, spans};
use tokio::net::TcpListener;
use tower::limit::GlobalConcurrencyLimitLayer;
use tracing::Instrument as _;

use crate::fleet::Fleet;
use crate::fleet::metrics::StreamMetrics;
use crate::fleet::queries::QueryError;
use crate::serve::gate::{Gate, GateLimits};
use crate::serve::http1;
use crate::serve::tls::{self, ServerTls};

pub mod auth;
mod drains;
mod everywhere;
mod explanation;
mod nodes;
mod progress;

use auth::{AdminAuthenticator, Caller};

/// Maximum number of concurrent requests.
const REQUESTS: usize = 16;

/// Maximum number of changes in an answer.
const CHANGES: usize = 100;

/// Shared state of the handlers.
#[derive(Clone)]
pub struct Admin {
    fleet: Arc<Fleet>,
    authenticator: Arc<AdminAuthenticator>,
    replica: Arc<str>,
    registry: Registry,
    scope: Scope,
}

/// Nodes that an answer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Those that this replica serves.
    Own,
    /// Those of all replicas.
    All,
}

/// Errors of requests.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The token does not permit the request.
    #[error(transparent)]
    Refused(#[from] auth::CallerRejection),
    /// A parameter is not an IP address.
    #[error("{0:?} is not an IPv4 or IPv6 address")]
    NotAnAddress(String),
    /// The Service is not served.
    #[error(
        "Service {0} has no frontend; check whether it exists, is headless, has the type ExternalName, or is labelled \
         for another proxy"
    )]
    UnknownService(String),
    /// The node is not served.
    #[error("Node {0} does not exist or does not match the controller's --node-selector")]
    UnknownNode(String),
    /// The agent could not be queried.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// The agent's answer cannot be decoded.
    #[error("cannot decode the answer of node {0}; check the version of its agent")]
    Answer(String),
    /// The path does not exist.
    #[error("this path does not exist; check whether kubectl-switchtower is newer than the controller")]
    NoSuchPath,
    /// A defect of the controller.
    #[error("internal error: {0}")]
    Internal(String),
}

impl AdminError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Refused(refusal) => refusal.status(),
            Self::NotAnAddress(_) => StatusCode::BAD_REQUEST,
            Self::UnknownService(_)
            | Self::UnknownNode(_)
            | Self::NoSuchPath
            | Self::Query(QueryError::UnknownNode(_)) => StatusCode::NOT_FOUND,
            Self::Query(QueryError::TooOften(_)) => StatusCode::TOO_MANY_REQUESTS,
            Self::Query(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Answer(_) | Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn code(&self) -> Option<&'static str> {
        use switchtower_admin_api::codes;
        match self {
            Self::Refused(_) => Some(codes::NO_RIGHT.code),
            Self::UnknownService(_) => Some(codes::NOT_SERVED.code),
            Self::Query(QueryError::UnknownNode(_)) => None,
            Self::Query(_) => Some(codes::KERNEL_UNKNOWN.code),
            _ => None,
        }
    }
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let failure = ApiError { message: self.to_string(), code: self.code().map(str::to_owned) };
        (self.status(), Json(failure)).into_response()
    }
}

impl Admin {
    /// Creates the admin API.
    #[must_use]
    pub fn new(
        fleet: Arc<Fleet>,
        authenticator: AdminAuthenticator,
        replica: &str,
        registry: Registry,
    ) -> Self {
        let authenticator = Arc::new(authenticator);
        Self { fleet, authenticator, replica: replica.into(), registry, scope: Scope::All }
    }

    /// Returns the routes. Authentication covers all of them, including the fallback for unknown paths.
    pub fn router(self) -> Router {
        Router::new()
            .route("/v1/metrics", get(metrics))
            .route("/v1/progress", get(how_far))
            .route("/v1/drains/{address}", get(drain))
            .merge(questions())
            .fallback(|| async { AdminError::NoSuchPath })
            .layer(axum::middleware::from_fn_with_state(self.authenticator.clone(), auth::authenticate))
            .layer(GlobalConcurrencyLimitLayer::new(REQUESTS))
            .layer(axum::middleware::from_fn(traced))
            .with_state(self)
    }

    /// Serves requests until the future is dropped.
    pub async fn serve(self, listener: TcpListener, tls: Arc<ServerTls>, metrics: StreamMetrics) {
        let gate = Gate::new("admin", GateLimits::requests(), Arc::default(), metrics);
        http1::serve(tls::incoming(listener, tls, gate), self.router()).await;
    }
}

/// Returns the routes that other replicas may query, too.
fn questions() -> Router<Admin> {
    Router::new()
        .route("/v1/controller", get(controller))
        .route("/v1/services/{namespace}/{name}/explanation", get(explain))
        .route("/v1/services/{namespace}/{name}/changes", get(changes))
        .route("/v1/nodes/{node}/diff", get(diff))
        .route("/v1/nodes/{node}/frontends", get(frontends))
        .route("/v1/nodes/{node}/rules", get(rules))
}

/// Records a request as a span, with OpenTelemetry's semantic conventions for HTTP servers.
async fn traced(request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>();
    let span = span!(
        "switchtower.admin.request",
        otel.kind = "server",
        http.request.method = request.method().as_str(),
        http.route = path.map_or("", MatchedPath::as_str),
        http.response.status_code = tracing::field::Empty,
    );
    let response = next.run(request).instrument(span.clone()).await;
    span.record("http.response.status_code", i64::from(response.status().as_u16()));
    if response.status().is_server_error() {
        spans::failed(&span, &response.status());
    }
    response
}

type Answer<T> = Result<Json<T>, AdminError>;

/// The connected nodes of all replicas, and the age of the data that the stalest of them serves.
async fn controller(State(admin): State<Admin>, uri: Uri) -> Json<ControllerInfo> {
    let (nodes, connected) = admin.fleet.sizes();
    let age = admin.fleet.upstream_age();
    let mut info = ControllerInfo {
        replica: admin.replica.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        upstream_age_milliseconds: age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        revision: admin.fleet.revision(),
        nodes,
        connected,
    };
    let others: Vec<ControllerInfo> = admin.ask_others(&uri, everywhere::STATE_TIMEOUT).await;
    for other in others {
        info.connected += other.connected;
        let ages = info.upstream_age_milliseconds.zip(other.upstream_age_milliseconds);
        info.upstream_age_milliseconds = ages.map(|(one, other)| one.max(other));
    }
    Json(info)
}

/// The metrics, for a caller without a route to the metrics port.
async fn metrics(State(admin): State<Admin>) -> Answer<MetricsText> {
    let text = TextEncoder::new().encode_to_string(&admin.registry.gather());
    text.map(|text| Json(MetricsText { text }))
        .map_err(|error| AdminError::Internal(format!("encode the metrics: {error}")))
}

async fn how_far(
    State(admin): State<Admin>,
    Query(parameters): Query<progress::Parameters>,
) -> Json<Progress> {
    let replies = admin.fleet.others().ask(&parameters.local_path(), everywhere::STATE_TIMEOUT).await;
    let own = progress::local(&admin.fleet, &parameters);
    Json(progress::everywhere(&admin.fleet.names(), own, replies))
}

async fn drain(State(admin): State<Admin>, Path(address): Path<String>) -> Answer<DrainReport> {
    let address = address.parse::<IpAddr>().map_err(|_| AdminError::NotAnAddress(address))?;
    Ok(Json(drains::drain(&admin.fleet, address).await))
}

#[derive(Debug, Default, Deserialize)]
struct ExplainParameters {
    port: Option<String>,
    node: Option<String>,
    from: Option<String>,
}

async fn explain(
    State(admin): State<Admin>,
    Path((namespace, name)): Path<(String, String)>,
    Query(parameters): Query<ExplainParameters>,
    uri: Uri,
) -> Answer<Explanation> {
    let from = match &parameters.from {
        None => None,
        Some(text) => Some(text.parse::<IpAddr>().map_err(|_| AdminError::NotAnAddress(text.clone()))?),
    };
    let question = explanation::Question { namespace, name, port: parameters.port, from };
    match parameters.node {
        Some(node) => {
            let own = async { explanation::on_node(&admin.fleet, &question, &node).await.map(Json) };
            admin.of_node(&node, &uri, own).await
        }
        None => {
            let elsewhere = admin.served_elsewhere().await;
            explanation::on_all(&admin.fleet, question, elsewhere).await.map(Json)
        }
    }
}

#[derive(Debug, Default, Deserialize)]
struct ChangesParameters {
    limit: Option<usize>,
}

async fn changes(
    State(admin): State<Admin>,
    Path((namespace, name)): Path<(String, String)>,
    Query(parameters): Query<ChangesParameters>,
    uri: Uri,
) -> Json<Vec<ChangeReport>> {
    let limit = parameters.limit.unwrap_or(1).clamp(1, CHANGES);
    let mut reports = admin.fleet.changes(limit, &namespace, &name);
    reports.iter_mut().for_each(|report| report.replica = admin.replica.to_string());
    let others: Vec<Vec<ChangeReport>> = admin.ask_others(&uri, everywhere::STATE_TIMEOUT).await;
    reports.extend(others.into_iter().flatten());
    Json(reports)
}

async fn diff(
    State(admin): State<Admin>,
    caller: Caller,
    Path(node): Path<String>,
    uri: Uri,
) -> Answer<NodeDiff> {
    caller.must_be_operator()?;
    let own = async { nodes::diff(&admin.fleet, &node).await.map(Json) };
    admin.of_node(&node, &uri, own).await
}

async fn frontends(
    State(admin): State<Admin>,
    caller: Caller,
    Path(node): Path<String>,
    uri: Uri,
) -> Answer<NodeFrontends> {
    caller.must_be_operator()?;
    let own = async { nodes::frontends(&admin.fleet, &node).map(Json) };
    admin.of_node(&node, &uri, own).await
}

#[derive(Debug, Default, Deserialize)]
struct RulesParameters {
    /// NAMESPACE/NAME.
    service: Option<String>,
    port: Option<String>,
    #[serde(default)]
    filter: String,
    #[serde(default)]
    limit: u32,
}

async fn rules(
    State(admin): State<Admin>,
    caller: Caller,
    Path(node): Path<String>,
    Query(parameters): Query<RulesParameters>,
    uri: Uri,
) -> Answer<NodeRules> {
    caller.must_be_operator()?;
    let own = own_rules(&admin, &node, parameters);
    admin.of_node(&node, &uri, own).await
}

async fn own_rules(admin: &Admin, node: &str, parameters: RulesParameters) -> Answer<NodeRules> {
    let RulesParameters { service, port, filter, limit } = parameters;
    let Some(service) = service else {
        return nodes::rules(&admin.fleet, node, filter, limit).await.map(Json);
    };
    let (namespace, name) =
        service.split_once('/').ok_or_else(|| AdminError::UnknownService(service.clone()))?;
    let subject = Subject { namespace, name, port: port.as_deref() };
    nodes::rules_of(&admin.fleet, node, subject).await.map(Json)
}

#[cfg(test)]
mod tests;
