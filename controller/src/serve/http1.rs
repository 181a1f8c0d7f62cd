//! HTTP/1.1 for ports with few callers and short requests: metrics, health, the admin API.
//!
//! What [`super::gate`] does not bound is bounded here: how long a request's head may take, and with it how long a
//! connection may idle.

use std::time::Duration;

use axum::Router;
use futures::{Stream, StreamExt as _};
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

use super::connection::Connection;

/// Longest time until a request's head is complete, from the connection's start or the answer before.
const HEAD: Duration = Duration::from_secs(10);
/// Longest head, in bytes: a token fits.
const HEAD_SIZE: usize = 32 << 10;

/// Answers requests on all of the connections until there are no more.
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
