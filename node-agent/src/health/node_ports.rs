//! healthCheckNodePort servers, which report local endpoints to cloud load balancers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use serde_json::json;
use switchtower_proto::v1::{HealthCheckFailure, HealthCheckKey};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Health, HealthTargets};
use crate::metrics::Metrics;

/// Interval between two attempts to bind a port.
const BIND_RETRY: Duration = Duration::from_secs(5);
/// Maximum number of reported failures.
const FAILURES: usize = 16;
/// Maximum number of open connections to one port at one address; there may be hundreds of ports.
const CONNECTIONS: usize = 16;
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// healthCheckNodePorts that cannot be bound; sent whenever the set changes.
#[derive(Debug)]
pub(crate) struct BindFailures(pub(crate) Vec<HealthCheckFailure>);

type Service = (String, String);

struct Server(JoinHandle<()>);

impl Server {
    /// Stops the server and releases its port.
    async fn close(mut self) {
        self.0.abort();
        // The only error is the abort itself.
        let _ = (&mut self.0).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Keeps one listener per health check and address, following the published targets. Requests read the counts, so only
/// a new or removed port affects listeners. Retries ports that cannot be bound, and sends changes of this set to
/// `notices`.
pub(crate) async fn serve_node_ports<N: From<BindFailures>>(
    health: Health,
    metrics: Metrics,
    notices: mpsc::Sender<N>,
) {
    let mut targets = health.subscribe();
    let mut servers: BTreeMap<(Service, SocketAddr), Server> = BTreeMap::new();
    let mut reported = Vec::new();
    loop {
        let wanted = listeners(&targets.borrow_and_update());
        // Close all before opening any: the same port may move to other addresses.
        let unwanted: Vec<_> = servers.keys().filter(|key| !wanted.contains(*key)).cloned().collect();
        for server in unwanted.iter().filter_map(|key| servers.remove(key)).collect::<Vec<_>>() {
            server.close().await;
        }
        let mut failures = Vec::new();
        for key in wanted {
            if servers.contains_key(&key) {
                continue;
            }
            match listen(key.1) {
                Ok(listener) => {
                    let server = tokio::spawn(serve(listener, health.clone(), key.clone()));
                    servers.insert(key, Server(server));
                }
                Err(error) => {
                    metrics.health_check_bind_failures.inc();
                    let ((namespace, name), address) = key;
                    tracing::warn!(namespace, name, %address, %error, "cannot listen on the healthCheckNodePort; retrying");
                    let key = Some(HealthCheckKey { namespace, name });
                    let (address, error) = (address.to_string(), error.to_string());
                    failures.push(HealthCheckFailure { key, address, error });
                }
            }
        }
        let failed = !failures.is_empty();
        failures.truncate(FAILURES);
        if failures != reported {
            reported.clone_from(&failures);
            if notices.send(BindFailures(failures).into()).await.is_err() {
                return;
            }
        }
        let changed = if failed {
            tokio::time::timeout(BIND_RETRY, targets.changed()).await.unwrap_or(Ok(()))
        } else {
            targets.changed().await
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Returns every pair of health check and address to listen on.
fn listeners(targets: &HealthTargets) -> BTreeSet<(Service, SocketAddr)> {
    let checks = targets.checks.iter();
    checks
        .flat_map(|(service, check)| {
            targets.bind.iter().map(|address| (service.clone(), SocketAddr::new(*address, check.port)))
        })
        .collect()
}

async fn serve(listener: TcpListener, health: Health, (service, address): (Service, SocketAddr)) {
    super::bounded::serve(listener, router(health, service, address.is_ipv6()), CONNECTIONS).await;
}

/// Listens on an address, IPv6 apart from IPv4.
pub(crate) fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address.ip() {
        IpAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        IpAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        // 0.0.0.0 and [::] are separate listeners.
        super::only_ipv6(&socket, true)?;
    }
    socket.bind(address)?;
    socket.listen(128)
}

/// Answers every path, as kube-proxy does.
fn router(health: Health, service: Service, ipv6: bool) -> Router {
    Router::new().fallback(async move || {
        let check = health.targets.borrow().checks.get(&service).copied();
        let local = check.map_or(0, |check| if ipv6 { check.ready_ipv6 } else { check.ready_ipv4 });
        let healthy = health.read().healthy;
        let code = if local != 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
            (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (WEIGHT, HeaderValue::from(local)),
        ];
        let body = json!({
            "service": { "namespace": service.0, "name": service.1 },
            "localEndpoints": local,
            "serviceProxyHealthy": healthy,
        });
        (code, headers, body.to_string()).into_response()
    })
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    #[tokio::test]
    async fn port_moves_to_other_addresses_without_a_pause() {
        let health = Health::default();
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let (notices, mut failures) = mpsc::channel::<BindFailures>(16);
        tokio::spawn(serve_node_ports(health.clone(), metrics.clone(), notices));
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let targets = |bind: &str| HealthTargets {
            checks: [(("shop".into(), "cart".into()), Check { port: free, ready_ipv4: 1, ready_ipv6: 0 })]
                .into(),
            bind: vec![bind.parse().unwrap()],
            eligible: true,
        };
        for (bind, reached) in
            [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), ("127.0.0.3", "127.0.0.3")]
        {
            health.publish(targets(bind));
            let deadline = tokio::time::Instant::now() + BIND_RETRY / 2;
            while tokio::net::TcpStream::connect((reached, free)).await.is_err() {
                assert!(tokio::time::Instant::now() < deadline, "no listener on {reached} in time");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        assert_eq!(metrics.health_check_bind_failures.get(), 0);
        assert!(failures.try_recv().is_err(), "no failure reported");
    }
}
