//! The Leases of the replicas: renews the own one, and reads those of the others.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Replicas;
use super::presence::Seen;
use crate::errors::Chain;
use crate::lease::{Fence, LEASE};
use crate::sync::publish;

/// Label of the Leases.
const LABEL: &str = "switchtower.dev/lease";
/// Value of the label.
const PRESENCE: &str = "replica";
/// Annotation with the addresses, separated by commas.
const ADDRESSES: &str = "switchtower.dev/addresses";
/// Field manager.
const MANAGER: &str = "switchtower-controller";
/// Minimum number of renewals within the duration of a Lease.
const TURNS: u32 = 5;
/// Maximum interval of renewals: they also show whether the API server responds to this replica.
const INTERVAL: Duration = Duration::from_secs(2);
/// Maximum number of replicas that are used.
const LIMIT: usize = 16;
/// Maximum number of addresses of a replica.
const ADDRESS_LIMIT: usize = 4;
/// Durations without a renewal after which the leader deletes a Lease.
const LEFT_OVER: u32 = 30;

/// The Lease of this replica.
#[derive(Debug, Clone)]
pub struct Announcement {
    api: Api<Lease>,
    name: String,
    replica: String,
    addresses: Vec<String>,
    duration: Duration,
}

/// Returns true if a replica has a Lease: it runs, or did until recently.
///
/// # Errors
/// The API server refuses.
pub async fn any(client: &kube::Client, namespace: &str) -> Result<bool, kube::Error> {
    let api: Api<Lease> = Api::namespaced(client.clone(), namespace);
    Ok(!api.list(&of_replicas(1)).await?.items.is_empty())
}

/// Parameters of a list of the replicas' Leases.
fn of_replicas(limit: u32) -> ListParams {
    ListParams::default().labels(&format!("{LABEL}={PRESENCE}")).limit(limit)
}

impl Announcement {
    /// `client` must not be fenced.
    #[must_use]
    pub fn new(
        client: kube::Client,
        namespace: &str,
        replica: &str,
        addresses: Vec<String>,
        duration: Duration,
    ) -> Self {
        let (name, replica) = (lease_name(replica), replica.to_owned());
        Self { api: Api::namespaced(client, namespace), name, replica, addresses, duration }
    }

    fn interval(&self) -> Duration {
        (self.duration / TURNS).min(INTERVAL)
    }

    async fn renew(&self) -> Result<(), kube::Error> {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {
                "name": self.name,
                "labels": {LABEL: PRESENCE},
                "annotations": {ADDRESSES: self.addresses.join(",")},
            },
            "spec": {
                "holderIdentity": self.replica,
                "leaseDurationSeconds": self.duration.as_secs(),
                "renewTime": MicroTime(Timestamp::now()),
            },
        });
        let params = PatchParams::apply(MANAGER).force();
        self.api.patch(&self.name, &params, &Patch::Apply(&lease)).await.map(drop)
    }

    /// Deletes the Lease: the others notice at once that this replica ends.
    pub async fn withdraw(&self) {
        let parameters = DeleteParams::default();
        let delete = self.api.delete(&self.name, &parameters);
        match tokio::time::timeout(self.interval(), delete).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = %Chain(&error), "failed to delete the replica's Lease; it expires");
            }
            Err(_) => tracing::debug!("deleting the replica's Lease timed out; it expires"),
        }
    }

    /// Renews the Lease and reads those of the others for as long as the process runs. `serving`: agents are accepted; there
    /// is no renewal before. `peers` gets the addresses of all replicas.
    pub async fn keep(
        self,
        replicas: Replicas,
        fence: Fence,
        serving: watch::Receiver<bool>,
        peers: watch::Sender<Vec<String>>,
    ) {
        let mut failed = false;
        loop {
            let turn = async {
                if *serving.borrow() {
                    self.renew().await?;
                }
                self.read(&replicas, &fence).await
            };
            let outcome = tokio::time::timeout(self.interval().max(Duration::from_secs(1)), turn).await;
            match outcome {
                Ok(Ok(())) => failed = false,
                Ok(Err(error)) if !failed => {
                    failed = true;
                    tracing::warn!(error = %Chain(&error), "failed to renew or read the Leases of the replicas; retrying");
                }
                Err(_) if !failed => {
                    failed = true;
                    tracing::warn!(
                        "the API server does not answer requests for the Leases of the replicas; retrying"
                    );
                }
                Ok(Err(_)) | Err(_) => {}
            }
            let listed = all_addresses(&self.addresses, &replicas);
            publish(&peers, listed);
            tokio::time::sleep(self.interval()).await;
        }
    }

    async fn read(&self, replicas: &Replicas, fence: &Fence) -> Result<(), kube::Error> {
        let leases = self.api.list(&of_replicas(500)).await?.items;
        let seen: Vec<Seen> = leases.iter().filter_map(seen).take(LIMIT).collect();
        replicas.observe(&seen, Instant::now());
        let now = Timestamp::now();
        for lease in leases.iter().filter(|lease| fence.is_open() && self.is_left_over(lease, replicas, now))
        {
            self.api.delete(&lease.name_any(), &DeleteParams::default()).await?;
        }
        Ok(())
    }

    /// Returns true if the replica is gone and its last renewal was long ago, on the clocks of both.
    fn is_left_over(&self, lease: &Lease, replicas: &Replicas, now: Timestamp) -> bool {
        let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref());
        let age = renewed.map(|at| Duration::try_from(now.duration_since(at.0)).unwrap_or_default());
        let old = age.is_none_or(|age| age > self.duration * LEFT_OVER);
        let name = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
        old && replicas.presence(name) == super::Presence::Gone
    }
}

/// Returns the name of a replica's Lease.
fn lease_name(replica: &str) -> String {
    let valid = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
    let replica: String = replica.chars().map(valid).take(200).collect();
    format!("{LEASE}-{}", replica.trim_matches(['-', '.']))
}

fn seen(lease: &Lease) -> Option<Seen> {
    let name = lease.spec.as_ref()?.holder_identity.clone().filter(|name| !name.is_empty())?;
    let addresses = lease.annotations().get(ADDRESSES).map(String::as_str).unwrap_or_default();
    let addresses = addresses.split(',').map(str::trim).filter(|address| !address.is_empty());
    Some(Seen {
        name,
        addresses: addresses.take(ADDRESS_LIMIT).map(str::to_owned).collect(),
        version: lease.resource_version().unwrap_or_default(),
    })
}

/// Own addresses, then those of the others in order.
fn all_addresses(own: &[String], replicas: &Replicas) -> Vec<String> {
    let mut others: Vec<String> = replicas.peers().into_iter().flat_map(|peer| peer.addresses).collect();
    others.retain(|address| !own.contains(address));
    others.sort_unstable();
    others.dedup();
    own.iter().cloned().chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(value: serde_json::Value) -> Lease {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn lease_names_are_valid_object_names() {
        assert_eq!(lease_name("controller-0"), "switchtower-controller-controller-0");
        assert_eq!(lease_name("Tower_1.example."), "switchtower-controller-tower-1.example");
    }

    #[test]
    fn addresses_are_read_from_leases() {
        let read = seen(&lease(json!({
            "metadata": {"resourceVersion": "7", "annotations": {ADDRESSES: "192.0.2.1:9443, [2001:db8::1]:9443,,"}},
            "spec": {"holderIdentity": "a"},
        })));
        let read = read.unwrap();
        assert_eq!((read.name.as_str(), read.version.as_str()), ("a", "7"));
        assert_eq!(read.addresses, ["192.0.2.1:9443", "[2001:db8::1]:9443"]);
        assert_eq!(seen(&lease(json!({"metadata": {}, "spec": {}}))), None, "no replica");
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_of_present_replicas_are_listed_after_the_own_ones() {
        let replicas = Replicas::new("own", Duration::from_secs(10));
        let of = |name: &str, address: &str| Seen {
            name: name.to_owned(),
            addresses: vec![address.to_owned()],
            version: String::new(),
        };
        let listed = [of("b", "192.0.2.3:9443"), of("a", "192.0.2.2:9443"), of("own", "192.0.2.1:9443")];
        replicas.observe(&listed, Instant::now());
        let own = ["192.0.2.1:9443".to_owned()];
        let expected = ["192.0.2.1:9443", "192.0.2.2:9443", "192.0.2.3:9443"];
        assert_eq!(all_addresses(&own, &replicas), expected);
    }
}
