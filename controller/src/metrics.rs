//! Metrics and health endpoints over plain HTTP, with OpenMetrics and exemplars on request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::Stream;
use prometheus::{Registry, TextEncoder};
use tokio::net::{TcpListener, TcpStream};
use tower::limit::GlobalConcurrencyLimitLayer;

use crate::fleet::metrics::StreamMetrics;
use crate::serve::connection::Connection;
use crate::serve::gate::{Gate, GateLimits, Stage};
use crate::serve::http1;
use crate::serve::tls::{self, Accepted};

mod exemplars;
pub mod health;
mod open_metrics;

use health::Health;

pub use exemplars::{Exemplar, Exemplars};

/// Error of the setup.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The address is in use or not of this host.
    #[error("listen for metrics on {address}; choose another address with --metrics-listen")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A metric exists twice, or the process' own could not be set up.
    #[error("register the process metrics")]
    Register(#[from] prometheus::Error),
}

/// Readiness of the controller, shared with the endpoint.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Set to true once all watches are synced, the first compilation is done and streams are accepted.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Creates a registry with the metrics of the process (`process_*`).
///
/// # Errors
/// They cannot be registered.
pub fn registry() -> Result<Registry, MetricsError> {
    let registry = Registry::new();
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    Ok(registry)
}

/// Binds the endpoint. The returned future serves it until dropped.
///
/// # Errors
/// The address cannot be bound.
pub async fn bind(
    address: SocketAddr,
    registry: Registry,
    exemplars: Exemplars,
    health: Health,
    serve_metrics: StreamMetrics,
) -> Result<impl Future<Output = ()>, MetricsError> {
    let listener =
        TcpListener::bind(address).await.map_err(|source| MetricsError::Listen { address, source })?;
    let gate = Gate::new("metrics", GateLimits::requests(), Arc::default(), serve_metrics);
    let one_scrape = GlobalConcurrencyLimitLayer::new(1);
    let router = Router::new()
        .route("/metrics", get(metrics).with_state((registry, exemplars)).layer(one_scrape))
        .route("/livez", get(health::live).with_state(health.clone()))
        .route("/healthz", get(health::live).with_state(health.clone()))
        .route("/readyz", get(health::ready).with_state(health));
    Ok(async move {
        tokio::select! {
            () = http1::serve(connections(listener, gate.clone()), router) => {}
            () = gate.watch() => {}
        }
    })
}

/// Returns connections that the gate admits, which skip the handshake stage for want of TLS.
fn connections(
    listener: TcpListener,
    gate: Arc<Gate>,
) -> impl Stream<Item = std::io::Result<Connection<TcpStream>>> {
    futures::stream::unfold((listener, gate), async |(listener, gate)| {
        loop {
            let Accepted { stream, ticket, closed } = tls::next(&listener, &gate).await;
            if ticket.advance(Stage::Anonymous).is_ok() {
                return Some((Ok(Connection::new(stream, ticket, closed)), (listener, gate)));
            }
        }
    })
}

async fn metrics(State((registry, exemplars)): State<(Registry, Exemplars)>, headers: HeaderMap) -> Response {
    let families = registry.gather();
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let (kind, encoded) = if open_metrics::is_preferred(&accept.collect::<Vec<_>>().join(",")) {
        let text = open_metrics::encode(&families, &exemplars).map_err(|error| error.to_string());
        (open_metrics::CONTENT_TYPE, text)
    } else {
        let text = TextEncoder::new().encode_to_string(&families).map_err(|error| error.to_string());
        (prometheus::TEXT_FORMAT, text)
    };
    match encoded {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("encoding metrics: {error}\n")).into_response()
        }
    }
}
