//! Addresses of all controller replicas, for the bootstrap ConfigMap and for agents.
//!
//! Each replica lists itself first, then the others that are present ([`crate::replicas`]): an agent then knows the other
//! replicas before its own fails, without waiting for a kubelet to deliver a new ConfigMap.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

use crate::sync::publish;

/// `host:port` of all replicas, the own ones first. Clones share the list.
#[derive(Debug, Clone)]
pub struct Peers(watch::Receiver<Vec<String>>);

impl Peers {
    /// Starts with this replica's addresses. The second value updates the list.
    #[must_use]
    pub fn new(own: Vec<String>) -> (Self, watch::Sender<Vec<String>>) {
        let (sender, receiver) = watch::channel(own);
        (Self(receiver), sender)
    }

    /// The current list.
    #[must_use]
    pub fn current(&self) -> Vec<String> {
        self.0.borrow().clone()
    }

    /// Waits for another list than the one that [`Peers::take_current`] returned last. Never returns once updates have ended.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The current list, marked as seen.
    pub fn take_current(&mut self) -> Vec<String> {
        self.0.borrow_and_update().clone()
    }
}

/// Keeps the resolved list current for as long as the process runs: no Service may take the address of a replica.
pub async fn reserve(mut peers: Peers, sender: watch::Sender<BTreeSet<SocketAddr>>) {
    loop {
        let addresses = resolve(&peers.take_current()).await;
        publish(&sender, addresses);
        peers.changed().await;
    }
}

/// Timeout of the name resolution.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(5);

/// Resolves `host:port`. Logs and omits names that cannot be resolved: agents resolve them on their own.
pub async fn resolve(controllers: &[String]) -> BTreeSet<SocketAddr> {
    let lookups = controllers.iter().map(|controller| async move {
        let found = tokio::time::timeout(RESOLVE_DEADLINE, tokio::net::lookup_host(controller)).await;
        match found.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(addresses) => addresses.collect::<Vec<_>>(),
            Err(error) => {
                tracing::warn!(controller, %error, "cannot resolve the advertised name; Services that use its addresses are not rejected");
                Vec::new()
            }
        }
    });
    futures::future::join_all(lookups).await.into_iter().flatten().collect()
}
