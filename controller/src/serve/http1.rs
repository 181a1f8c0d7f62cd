//! HTTP/1.1 for ports with few callers and short requests: metrics, health, the admin API.
//!
//! Limits in addition to those of [`super::gate`]: the time for a request's head, and thereby the idle time of a
//! connection.

use std::time::Duration;

use axum::Router;
use futures::{Stream, StreamExt as _};
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

use super::connection::Connection;

/// Timeout of a request's head, from the start of the connection or the previous response.
const HEAD: Duration = Duration::from_secs(10);
/// Maximum size of a request's head, in bytes: enough for a token.
const HEAD_SIZE: usize = 32 << 10;

/// Serves requests on all connections until the stream of connections ends.
pub(crate) async fn serve<S>(connections: impl Stream<Item = std::io::Result<Connection<S>>>, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connections = std::pin::pin!(connections);
    while let Some(connection) = connections.next().await {
        let Ok(connection) = connection else { continue };
        let service = TowerToHyperService::new(router.clone());
        let mut http = Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_SIZE);
        let answered = http.serve_connection(TokioIo::new(connection), service);
        tokio::spawn(async move {
            if let Err(error) = answered.await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}
