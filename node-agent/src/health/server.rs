//! The HTTP servers for health and metrics.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use jiff::Timestamp;
use prometheus::{Encoder as _, Registry, TextEncoder};
use serde_json::{Value, json};
use switchtower_proto::v1::ProxyMode;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;

use super::{Health, Reading};
use crate::controller::link::Contact;
use crate::metrics::Metrics;

/// Default ports of kube-proxy's metrics and health.
const KUBE_PROXY_PORTS: [u16; 2] = [10249, 10256];
/// Interval between two attempts to listen.
const BIND_RETRY: Duration = Duration::from_secs(5);
/// Maximum number of open connections to one port.
const CONNECTIONS: usize = 64;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Returns the routes `/healthz`, `/livez`, `/readyz`, and `/connection` with the status of the controller's link.
pub(crate) fn health_router(health: &Health, contact: &Contact, metrics: &Metrics) -> Router {
    let (for_healthz, for_livez, for_readyz) = (health.clone(), health.clone(), health.clone());
    let (contact, for_connection) = (contact.clone(), contact.clone());
    let (healthz_total, livez_total) = (metrics.healthz.clone(), metrics.livez.clone());
    Router::new()
        .route(
            "/healthz",
            get(async move || {
                let reading = for_healthz.read();
                answer(reading, reading.healthy && reading.eligible, Some(reading.eligible), &healthz_total)
            }),
        )
        .route(
            "/livez",
            get(async move || {
                let reading = for_livez.read();
                answer(reading, reading.healthy, None, &livez_total)
            }),
        )
        .route("/readyz", get(async move || readiness(&for_readyz, &contact)))
        .route("/connection", get(async move || Json(for_connection.state())))
}

/// Returns the routes `/metrics`, `/proxyMode` and `/healthz` of kube-proxy's metrics server.
pub(crate) fn metrics_router(registry: Registry) -> Router {
    Router::new()
        .route("/metrics", get(async move || exposition(&registry)))
        .route("/proxyMode", get(async || ([(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], "nftables")))
        .route("/healthz", get(async || "ok"))
}

/// Readiness for the kubelet: a rolling update replaces the next agent only when this one is ready.
fn readiness(health: &Health, contact: &Contact) -> impl IntoResponse + use<> {
    let (reading, state) = (health.read(), contact.state());
    let latched = health.ready(state.is_usable());
    let (reason, detail) = if !reading.healthy {
        ("ProgrammingStuck", "a change has not been committed to the kernel for at least a minute".to_owned())
    } else if latched {
        ("", String::new())
    } else if !state.is_usable() {
        (state.reason, state.detail)
    } else {
        (
            "NoView",
            "the kernel holds no view yet, neither of a controller nor of the snapshot file".to_owned(),
        )
    };
    let ready = reason.is_empty();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": ready, "reason": reason, "detail": detail })))
}

/// `eligible` appears in the body of `/healthz`, but not of `/livez`.
fn answer(
    reading: Reading,
    good: bool,
    eligible: Option<bool>,
    total: &prometheus::IntCounterVec,
) -> impl IntoResponse + use<> {
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    total.with_label_values(&[code.as_str()]).inc();
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (code, headers, body(reading, eligible, SystemTime::now()).to_string())
}

/// Body as in kube-proxy; while healthy, `lastUpdated` is the current time, as older probes expect.
fn body(reading: Reading, eligible: Option<bool>, now: SystemTime) -> Value {
    let updated = if reading.healthy { Some(now) } else { reading.last_updated };
    let updated = rfc3339(updated.unwrap_or(SystemTime::UNIX_EPOCH));
    let family = json!({ "lastUpdated": updated, "healthy": reading.healthy });
    let mut body = json!({
        "lastUpdated": updated,
        "currentTime": rfc3339(now),
        "healthy": reading.healthy,
        "status": { "IPv4": family, "IPv6": family },
    });
    if let Some(eligible) = eligible {
        body["nodeEligible"] = json!(eligible);
    }
    body
}

/// RFC 3339 in UTC with whole seconds; the epoch stands for times out of jiff's range.
fn rfc3339(time: SystemTime) -> String {
    let time = Timestamp::try_from(time).unwrap_or_default();
    Timestamp::from_second(time.as_second()).unwrap_or_default().to_string()
}

fn exposition(registry: &Registry) -> impl IntoResponse + use<> {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&registry.gather(), &mut text) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text),
        Err(error) => {
            let text = format!("cannot encode metrics: {error}").into_bytes();
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], text)
        }
    }
}

/// Listens on both families for `[::]`, whatever the machine's default, or on 0.0.0.0 without IPv6.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let SocketAddr::V6(v6) = address else { return listen_with(&TcpSocket::new_v4, address) };
    let bound = listen_with(&TcpSocket::new_v6, address);
    match bound {
        Err(error) if v6.ip().is_unspecified() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            listen_with(&TcpSocket::new_v4, (Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        other => other,
    }
}

fn listen_with(socket: &dyn Fn() -> io::Result<TcpSocket>, address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket()?;
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        super::only_ipv6(&socket, false)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until the process exits, except on a port of kube-proxy in mode Shadow: there it closes the listener and its
/// connections until the mode changes.
pub(crate) async fn serve_in_mode(
    address: SocketAddr,
    what: &'static str,
    router: Router,
    mut mode: watch::Receiver<ProxyMode>,
) {
    if !KUBE_PROXY_PORTS.contains(&address.port()) {
        return serve(address, what, router).await;
    }
    // The sender lives as long as the engine; without one the last mode stays.
    while mode.wait_for(|mode| *mode == ProxyMode::Active).await.is_ok() {
        tokio::select! {
            () = serve(address, what, router.clone()) => return,
            shadow = mode.wait_for(|mode| *mode == ProxyMode::Shadow) => {
                if shadow.is_err() {
                    return;
                }
                tracing::info!(%address, what, "closed in mode Shadow");
            }
        }
    }
}

/// Serves until the process exits. Retries an address that cannot be bound, because forwarding does not depend on the
/// health server.
pub(crate) async fn serve(address: SocketAddr, what: &'static str, router: Router) {
    loop {
        match listen(address) {
            Ok(listener) => {
                tracing::info!(%address, what, "listening");
                return super::bounded::serve(listener, router, CONNECTIONS).await;
            }
            Err(error) => {
                tracing::error!(%address, what, %error, "cannot listen; retrying; check for another proxy on this node");
            }
        }
        tokio::time::sleep(BIND_RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_matches_kube_proxy() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let stale = Reading {
            healthy: false,
            eligible: true,
            last_updated: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000)),
            holds_view: true,
        };
        let body = body(stale, Some(true), now);
        assert_eq!(body["lastUpdated"], "2020-09-13T12:26:40Z");
        assert_eq!(body["currentTime"], "2023-11-14T22:13:20Z");
        assert_eq!(body["nodeEligible"], true);
        assert_eq!(body["status"]["IPv4"]["healthy"], false);
        let healthy = super::body(Reading { healthy: true, ..stale }, None, now);
        assert_eq!(healthy["lastUpdated"], "2023-11-14T22:13:20Z", "as of now while healthy");
        assert!(healthy.get("nodeEligible").is_none(), "/livez does not report it");
    }
}
