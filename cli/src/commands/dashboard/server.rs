//! HTTP server of the page.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use switchtower_admin_api::{ChangeReport, Explanation, VIEWER};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::guard::{self, Route};
use super::model::Model;
use super::page;
use crate::args::{Global, RolloutAction, ServiceName};
use crate::cluster::Cluster;
use crate::commands::rollout;
use crate::controller::{Controller, escaped};
use crate::error::CliError;
use crate::output::Style;

/// Maximum duration of a request for changes; then an empty update is returned and the page asks again.
const POLL: Duration = Duration::from_secs(20);
/// Collects changes that follow each other into one update.
const COLLECT: Duration = Duration::from_millis(250);
/// Maximum time to receive the headers of a request.
const HEADERS: Duration = Duration::from_secs(10);
/// Maximum number of connections. A browser opens six.
const CONNECTIONS: usize = 32;
/// Number of latest changes of a Service.
const CHANGES: usize = 5;

/// State of the server and of the watches.
pub(super) struct Shared {
    model: Mutex<Model>,
    version: watch::Sender<u64>,
    global: Global,
    cluster: Cluster,
    token: String,
    address: String,
}

impl Shared {
    pub(super) fn new(global: Global, cluster: Cluster, address: &str) -> Self {
        let token = page::nonce();
        Self {
            model: Mutex::default(),
            version: watch::Sender::new(0),
            global,
            cluster,
            token,
            address: address.to_owned(),
        }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}/{}/", self.address, self.token)
    }

    /// Changes the model and wakes requests that wait for a change.
    pub(super) fn change(&self, change: impl FnOnce(&mut Model)) {
        let version = self.with(|model| {
            change(model);
            model.version()
        });
        self.version.send_if_modified(|known| std::mem::replace(known, version) != version);
    }

    fn with<T>(&self, read: impl FnOnce(&mut Model) -> T) -> T {
        read(&mut self.model.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

pub(super) struct Server(Arc<Shared>);

impl Server {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Serves connections until dropped.
    pub(super) async fn run(self, listener: TcpListener) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let shared = self.0.clone();
                    tokio::spawn(async move {
                        serve(shared, stream).await;
                        drop(permit);
                    });
                }
                // For example too many open files.
                Err(_) => tokio::time::sleep(COLLECT).await,
            }
        }
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    let service = service_fn(move |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(&shared, request).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(16 << 10);
    // A browser closes connections at any time.
    drop(http.serve_connection(TokioIo::new(stream), service).await);
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Response<Full<Bytes>> {
    // No route has a body.
    let (parts, _) = request.into_parts();
    let mut response = match guard::route(&parts, &shared.token, &shared.address) {
        Err(status) => failure(status, "not permitted: open the address that the command printed"),
        Ok(Route::Page) => html(),
        Ok(Route::State { since }) => state(shared, since).await,
        Ok(Route::Service { name, node }) => result(service(shared, &name, node.as_deref()).await),
        Ok(Route::Rollout(action)) => result(control(shared, &action).await),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

fn html() -> Response<Full<Bytes>> {
    let nonce = page::nonce();
    let document = page::document(&nonce, None::<&()>, Timestamp::now());
    let mut response = Response::new(Full::from(document));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    if let Ok(policy) = HeaderValue::from_str(&page::policy(&nonce)) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}

/// Returns the changes since a version, waiting for one.
async fn state(shared: &Shared, since: u64) -> Response<Full<Bytes>> {
    let mut version = shared.version.subscribe();
    if since > 0 {
        // The sender outlives this request, so the wait cannot fail.
        let changed = tokio::time::timeout(POLL, version.wait_for(|version| *version != since)).await.is_ok();
        if changed {
            tokio::time::sleep(COLLECT).await;
        }
    }
    shared.with(|model| body(StatusCode::OK, &model.since(since)))
}

/// Returns path and latest changes of a Service.
async fn service(shared: &Shared, name: &str, node: Option<&str>) -> Result<serde_json::Value, CliError> {
    let ServiceName { namespace, name, port } = ServiceName::parse(name).map_err(CliError::new)?;
    let namespace = namespace.unwrap_or_else(|| shared.cluster.namespace().to_owned());
    let mut controller = Controller::connect(&shared.global, &shared.cluster, VIEWER).await?;
    let path = format!("/v1/services/{}/{}", escaped(&namespace), escaped(&name));
    let parameters = [("port", port.as_deref()), ("node", node)];
    let query: Vec<String> = parameters
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", escaped(value?))))
        .collect();
    let explanation: Explanation = controller.get(&format!("{path}/explanation?{}", query.join("&"))).await?;
    let changes: Vec<ChangeReport> = controller.get(&format!("{path}/changes?limit={CHANGES}")).await?;
    Ok(json!({"explanation": explanation, "changes": changes}))
}

async fn control(shared: &Shared, action: &RolloutAction) -> Result<serde_json::Value, CliError> {
    let report = rollout::perform(&shared.cluster, action, Style::PLAIN).await?;
    Ok(json!({"message": report.text.trim()}))
}

fn result(value: Result<serde_json::Value, CliError>) -> Response<Full<Bytes>> {
    match value {
        Ok(value) => body(StatusCode::OK, &value),
        Err(error) => {
            let code = error.code.map(|code| code.code);
            let value = json!({"error": error.message, "code": code});
            body(StatusCode::UNPROCESSABLE_ENTITY, &value)
        }
    }
}

fn failure(status: StatusCode, message: &str) -> Response<Full<Bytes>> {
    body(status, &json!({"error": message}))
}

fn body(status: StatusCode, value: &impl Serialize) -> Response<Full<Bytes>> {
    // The types contain no map with keys other than strings.
    let text = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
