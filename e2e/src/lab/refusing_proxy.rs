//! An HTTP proxy in front of the API server that can refuse requests, as an overloaded or failing API server does.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Result;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use kube::Client;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::lab::control_plane::ControlPlane;

/// Maximum size of a request.
const REQUEST_LIMIT: usize = 8 << 20;
/// Answers while it refuses, in turn.
const REFUSALS: [StatusCode; 3] =
    [StatusCode::TOO_MANY_REQUESTS, StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE];

#[derive(Debug, Default)]
struct Behaviour {
    refuses: AtomicBool,
    refused: AtomicU64,
}

/// A running proxy, which ends on drop. Open watches continue while it refuses.
#[derive(Debug)]
pub struct RefusingProxy {
    address: SocketAddr,
    behaviour: Arc<Behaviour>,
    runtime: Option<Runtime>,
}

impl RefusingProxy {
    /// Starts the proxy, which passes the credentials of its clients on.
    ///
    /// # Errors
    /// The control plane's kubeconfig is unusable, or no port is free.
    pub fn start(control_plane: &ControlPlane) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let kubeconfig = Kubeconfig::read_from(control_plane.kubeconfig())?;
        let (client, listener) = runtime.block_on(async {
            let options = KubeConfigOptions::default();
            let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            config.auth_info = AuthInfo::default();
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            anyhow::Ok((Client::try_from(config)?, listener))
        })?;
        let (address, behaviour) = (listener.local_addr()?, Arc::new(Behaviour::default()));
        let router = axum::Router::new().fallback(pass).with_state((client, behaviour.clone()));
        runtime.spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, behaviour, runtime: Some(runtime) })
    }

    /// URL for a kubeconfig.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Refuses all new requests, or none.
    pub fn refuse(&self, refuses: bool) {
        self.behaviour.refuses.store(refuses, Ordering::Relaxed);
    }

    /// Number of requests that were refused.
    pub fn refused(&self) -> u64 {
        self.behaviour.refused.load(Ordering::Relaxed)
    }
}

impl Drop for RefusingProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn pass(State((client, behaviour)): State<(Client, Arc<Behaviour>)>, request: Request) -> Response {
    if behaviour.refuses.load(Ordering::Relaxed) {
        let number = behaviour.refused.fetch_add(1, Ordering::Relaxed);
        let status = REFUSALS[number as usize % REFUSALS.len()];
        let body = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status.as_u16(),
            "message": "refused by the laboratory", "reason": "InternalError",
        });
        return (status, [("content-type", "application/json"), ("retry-after", "1")], body.to_string())
            .into_response();
    }
    let (parts, body) = request.into_parts();
    let Ok(body) = to_bytes(body, REQUEST_LIMIT).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    let sent = client.send(http::Request::from_parts(parts, body.to_vec().into())).await;
    sent.map_or_else(|_| StatusCode::BAD_GATEWAY.into_response(), |answer| answer.map(Body::new))
}
