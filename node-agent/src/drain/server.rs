//! The listener on loopback that answers `preStop` hooks.
//!
//! It answers 200 whatever the verdict: a hook that fails has no other effect than an Event, and the kubelet never cancels
//! its request. A malformed request gets 400, and the pod terminates at once. Connections that no rule redirected are
//! closed without a wait.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use switchtower_proto::v1::{DrainAnswer, DrainVerdict};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::path::Hook;
use super::requests::{GateAnswer, Requests};
use super::{GateSettings, Pod, PodName};
use crate::kernel::original_destination::original_destination;

/// Interval between two attempts to listen.
const BIND_RETRY: Duration = Duration::from_secs(5);
/// Timeout for the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of open connections.
const CONNECTIONS: usize = 1_024;
/// Delay after a failed accept, for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Reason why the agent cannot listen, or `None`; sent whenever it changes.
#[derive(Debug)]
pub(crate) struct ListenFailure(pub(crate) Option<String>);

/// Listens on the port of the settings, until their sender is dropped. Requests in progress outlive a change of the port.
pub(crate) async fn serve<N: From<ListenFailure>>(
    mut settings: watch::Receiver<GateSettings>,
    requests: Requests,
    notices: mpsc::Sender<N>,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut open = JoinSet::new();
    let mut reported = None;
    loop {
        let GateSettings { port, node_addresses } = settings.borrow_and_update().clone();
        let node_addresses = Arc::from(node_addresses);
        let (listeners, failure) = listen(port);
        if failure != reported {
            if let Some(failure) = &failure {
                tracing::warn!(failure, "the drain gate does not work; retrying");
            }
            reported.clone_from(&failure);
            if notices.send(ListenFailure(failure.clone()).into()).await.is_err() {
                return;
            }
        }
        let changed = {
            let accepting = accept(&listeners, &room, &requests, &node_addresses, &mut open);
            let changed = async {
                if failure.is_some() {
                    tokio::time::timeout(BIND_RETRY, settings.changed()).await.unwrap_or(Ok(()))
                } else {
                    settings.changed().await
                }
            };
            tokio::select! {
                () = accepting => Ok(()),
                changed = changed => changed,
            }
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Listens on loopback of both families. A host without IPv6 is no failure.
fn listen(port: Option<u16>) -> (Vec<TcpListener>, Option<String>) {
    let Some(port) = port else { return (Vec::new(), None) };
    let mut listeners = Vec::new();
    for address in LOOPBACK {
        match crate::health::listen(SocketAddr::new(address, port)) {
            Ok(listener) => listeners.push(listener),
            Err(error) if address.is_ipv6() && is_unsupported(&error) => {}
            Err(error) => {
                let failure = format!("cannot listen on {}: {error}", SocketAddr::new(address, port));
                return (listeners, Some(failure));
            }
        }
    }
    (listeners, None)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

async fn accept(
    listeners: &[TcpListener],
    room: &Arc<Semaphore>,
    requests: &Requests,
    node_addresses: &Arc<[IpAddr]>,
    open: &mut JoinSet<()>,
) {
    if listeners.is_empty() {
        return std::future::pending().await;
    }
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let accepts = listeners.iter().map(|listener| Box::pin(listener.accept()));
        let (accepted, ..) = futures::future::select_all(accepts).await;
        while open.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                let (requests, node_addresses) = (requests.clone(), node_addresses.clone());
                open.spawn(async move {
                    connection(stream, requests, node_addresses).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one request: the kubelet opens a connection for each hook.
async fn connection(stream: TcpStream, requests: Requests, node_addresses: Arc<[IpAddr]>) {
    // A connection that the rule did not redirect has no other original destination, or none at all.
    let pod = original_destination(&stream).ok().map(|address| address.ip().to_canonical());
    let pod = pod.filter(|address| !address.is_loopback());
    let router = axum::Router::new().fallback(async move |method: Method, uri: Uri| {
        let Some(address) = pod else {
            return bad_request(
                "this connection was not redirected; connect to the address of a pod of this node",
            );
        };
        let hook = Hook::parse(&method, &uri);
        let hook = hook.and_then(|hook| Ok((hook.timeout, hook.pod(address, &node_addresses)?)));
        match hook {
            Ok((timeout, pod)) => answer(&requests, &pod, timeout).await,
            Err(problem) => bad_request(&problem),
        }
    });
    // Errors of clients, such as a reset or a request that is not HTTP, need no report.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
}

fn bad_request(problem: &str) -> Response {
    (StatusCode::BAD_REQUEST, format!("{problem}\n")).into_response()
}

async fn answer(requests: &Requests, pod: &Pod, timeout: Duration) -> Response {
    let began = Instant::now();
    let outcome = requests.wait(pod, timeout).await;
    let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (verdict, detail) = describe(&outcome);
    let answer = match outcome {
        GateAnswer::Answered(answer) => answer,
        GateAnswer::NoController | GateAnswer::Busy => DrainAnswer::default(),
    };
    let address = pod.address();
    let name = match pod {
        Pod::Address(_) => None,
        Pod::Host { name: PodName { namespace, name }, .. } => Some(format!("{namespace}/{name}")),
    };
    tracing::info!(%address, pod = name, verdict, milliseconds, waited_for = ?answer.waited_for, "drain gate");
    let body = json!({
        "address": address.to_string(),
        "pod": name,
        "verdict": verdict,
        "detail": detail,
        "milliseconds": milliseconds,
        "nodesWaitedFor": answer.waited_for,
        "nodesWaitedForTotal": answer.waited_for_total,
        "nodesMissing": answer.missing,
        "nodesMissingTotal": answer.missing_total,
    });
    (StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

/// Returns the verdict as users see it, and what it means.
fn describe(outcome: &GateAnswer) -> (&'static str, &'static str) {
    let answer = match outcome {
        GateAnswer::Answered(answer) => answer,
        GateAnswer::NoController => return ("NoController", "No controller answered in time."),
        GateAnswer::Busy => return ("TimedOut", "Too many pods of the node wait at once."),
    };
    match answer.verdict() {
        DrainVerdict::Drained => ("Drained", "No node sends new connections to the pod."),
        DrainVerdict::LastEndpoint => {
            ("LastEndpoint", "A Service sends connections to the pod because no ready endpoint is left.")
        }
        DrainVerdict::NotAnEndpoint => ("NotAnEndpoint", "No Service sends connections to the pod."),
        DrainVerdict::Overloaded => ("TimedOut", "Too many pods of the cluster wait at once."),
        DrainVerdict::TimedOut | DrainVerdict::Unspecified if answer.waited_for_total == 0 => {
            ("TimedOut", "The pod is still a ready endpoint of a Service.")
        }
        DrainVerdict::TimedOut | DrainVerdict::Unspecified => {
            ("TimedOut", "Nodes have not acknowledged the removal of the pod.")
        }
    }
}

#[cfg(test)]
mod tests;
