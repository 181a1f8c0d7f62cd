//! HTTP server with a bounded number of connections.
//!
//! The ports are open to every host that reaches the node. Silent connections must not exhaust the descriptors that the
//! kubelet's probe, a scrape or the controller's stream needs: beyond the limit, a new connection closes the oldest.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

/// Timeout for the head of a request, and for an idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Delay after a failed accept, for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until dropped, which closes all connections.
pub(super) async fn serve(listener: TcpListener, router: Router, limit: usize) {
    let mut tasks = JoinSet::new();
    let mut open: VecDeque<AbortHandle> = VecDeque::with_capacity(limit);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection");
                if let Some(oldest) = open.pop_front() {
                    oldest.abort();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        open.retain(|task| !task.is_finished());
        if open.len() >= limit
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
        open.push_back(tasks.spawn(connection(stream, router.clone())));
    }
}

async fn connection(stream: TcpStream, router: Router) {
    // Errors of clients, such as a reset or a request that is not HTTP, need no report.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn ask(address: std::net::SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn idle_connections_do_not_block_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(async || "fine"));
        let server = tokio::spawn(serve(listener, router, 4));
        let mut idle = Vec::new();
        for _ in 0..40 {
            idle.push(TcpStream::connect(address).await.unwrap());
            assert!(ask(address).await.ends_with("fine"));
        }
        let mut closed = 0;
        for mut stream in idle {
            let end = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0; 1])).await;
            closed += u32::from(end.is_ok());
        }
        assert!(closed >= 36, "{closed} idle connections were closed");
        server.abort();
    }
}
