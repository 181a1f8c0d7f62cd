//! Addresses of all controller replicas, for the bootstrap ConfigMap and for agents.
//!
//! The active controller advertises itself first, then every other controller Pod at the same port: an agent then knows
//! the next controller before the active one fails, without waiting for a kubelet to deliver a new ConfigMap. A standby
//! refuses the connection, so that the agent moves on.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::sync::watch;

use crate::errors::Chain;

/// Label of the controller's Pods.
const SELECTOR: &str = "app.kubernetes.io/name=switchtower-controller";
/// Interval between two lists of the Pods, and timeout of each.
const INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of addresses besides the own ones.
const LIMIT: usize = 8;

/// `host:port` of all replicas, the active one first. Clones share the list.
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

/// Follows the controller's Pods for as long as the process runs.
pub async fn follow(client: Client, namespace: String, port: u16, sender: watch::Sender<Vec<String>>) {
    let own = sender.borrow().clone();
    let api: Api<Pod> = Api::namespaced(client, &namespace);
    // From the API server's watch cache: a list that is seconds old is good enough.
    let params = ListParams::default().labels(SELECTOR).match_any();
    loop {
        match tokio::time::timeout(INTERVAL, api.list(&params)).await {
            Ok(Ok(pods)) => {
                let listed = addresses(&own, &pods.items, port);
                sender.send_if_modified(|known| {
                    let modified = *known != listed;
                    *known = listed;
                    modified
                });
            }
            // The previous list stays: agents skip an address that does not answer.
            Ok(Err(error)) => {
                tracing::debug!(error = %Chain(&error), %namespace, "failed to list the controller's Pods; retrying");
            }
            Err(_) => tracing::debug!(%namespace, "listing the controller's Pods timed out; retrying"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Keeps the resolved list current for as long as the process runs: no Service may take the address of a replica.
pub async fn reserve(mut peers: Peers, sender: watch::Sender<BTreeSet<SocketAddr>>) {
    loop {
        let addresses = resolve(&peers.take_current()).await;
        sender.send_if_modified(|known| std::mem::replace(known, addresses.clone()) != addresses);
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

/// Own addresses, then those of the other Pods in order. A Pod that ends or has its own network namespace has no
/// address that agents could use.
fn addresses(own: &[String], pods: &[Pod], port: u16) -> Vec<String> {
    let mut others: Vec<String> = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true))
        .filter_map(|pod| pod.status.as_ref())
        .filter(|status| status.phase.as_deref() == Some("Running"))
        .filter_map(|status| status.host_ip.as_ref()?.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, port).to_string())
        .filter(|address| !own.contains(address))
        .collect();
    others.sort_unstable();
    others.dedup();
    others.truncate(LIMIT);
    own.iter().cloned().chain(others).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(host: &str, host_network: bool, phase: &str, ending: bool) -> Pod {
        let ends = if ending { json!("2026-01-01T00:00:00Z") } else { Value::Null };
        serde_json::from_value(json!({
            "metadata": {"name": "c", "deletionTimestamp": ends},
            "spec": {"containers": [], "hostNetwork": host_network},
            "status": {"phase": phase, "hostIP": host},
        }))
        .unwrap()
    }

    #[test]
    fn running_replicas_are_listed_after_the_own_addresses() {
        let own = ["192.0.2.1:9443".to_owned()];
        let pods = [
            pod("2001:db8::2", true, "Running", false),
            pod("192.0.2.3", true, "Running", false),
            pod("192.0.2.1", true, "Running", false),
            pod("192.0.2.4", true, "Running", true),
            pod("192.0.2.5", true, "Pending", false),
            pod("192.0.2.6", false, "Running", false),
            pod("garbage", true, "Running", false),
        ];
        let expected = ["192.0.2.1:9443", "192.0.2.3:9443", "[2001:db8::2]:9443"];
        assert_eq!(addresses(&own, &pods, 9443), expected);
        assert_eq!(addresses(&own, &[], 9443), own);
    }
}
