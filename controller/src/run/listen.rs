//! The ports of agents and of the admin API. A port that another program uses is retried, not fatal.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use switchtower_admin_api::NodeReason;
use tokio::net::TcpListener;

use super::RETRY;
use crate::admin::Admin;
use crate::fleet::metrics::StreamMetrics;
use crate::serve::tls::ServerTls;
use crate::status::absence::{Agents, Blocker};

/// Binds the address that agents connect to. `None`: another program uses it, possibly the previous controller; the
/// rows report that until it is free.
pub(super) async fn bind(address: SocketAddr, agents: &Agents) -> anyhow::Result<Option<TcpListener>> {
    match TcpListener::bind(address).await {
        Ok(listener) => {
            agents.closed(None);
            Ok(Some(listener))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            agents.closed(Some(Blocker::new(
                NodeReason::ControllerNotListening,
                format!(
                    "The controller cannot accept agents: another program uses {address}. Stop it, or choose another \
                     port with --listen."
                ),
            )));
            Ok(None)
        }
        Err(error) => Err(error)
            .with_context(|| format!("listening for agents on {address}; choose another with --listen")),
    }
}

/// Binds the address as soon as it is free.
pub(super) async fn bind_with_retry(address: SocketAddr, agents: &Agents) -> anyhow::Result<TcpListener> {
    loop {
        tracing::error!(%address, "another program uses the address; agents cannot connect; retrying");
        tokio::time::sleep(RETRY).await;
        if let Some(listener) = bind(address, agents).await? {
            return Ok(listener);
        }
    }
}

/// Serves the admin API. Agents are served without it: a port in use is retried.
pub(super) async fn serve_admin(
    admin: Admin,
    address: SocketAddr,
    tls: Arc<ServerTls>,
    metrics: StreamMetrics,
) {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => admin.clone().serve(listener, tls.clone(), metrics.clone()).await,
            Err(error) => {
                tracing::warn!(%error, %address, "cannot serve kubectl switchtower; --admin-listen names another address");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
