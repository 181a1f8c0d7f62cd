//! The Lease that elects the leader among the replicas.
//!
//! Every replica serves agents. The leader alone writes what concerns the whole cluster: rollouts and assignments, the
//! creation and deletion of rows, the rows of nodes that no replica serves, the bootstrap ConfigMap, and Events about
//! compiled objects. [`Candidate`] takes part in the election, and [`Fence`] decides locally whether this process may still
//! write as the leader. Expiry counts from renewals that this process observed, on its own monotonic clock: wall clocks of
//! replicas may differ by any amount.
//!
//! A leader that cannot renew stops these writes before another replica can take over. It keeps its agents and takes part
//! in the election again.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::errors::Chain;

mod election;
mod fence;

#[cfg(test)]
mod tests;

use election::{Election, Step};
pub use fence::{Fence, Fenced, Turns};

/// The Lease's name, in the controller's namespace.
pub const LEASE: &str = "switchtower-controller";
/// Renewals, or reads by a follower, within one lease duration.
const TURNS: u32 = 5;
/// Maximum interval between two reads of the Lease by a follower.
const POLL: Duration = Duration::from_secs(1);

/// A replica that takes part in the election.
#[derive(Debug)]
pub struct Candidate {
    api: Api<Lease>,
    identity: String,
    duration: Duration,
    election: Election,
    fence: Fence,
    /// The Lease as the API server answered last.
    stored: Option<Lease>,
    /// The last request wrote the Lease in the name of this process.
    holds: bool,
}

impl Candidate {
    /// `client` must not be fenced. `replica` is the readable part of the identity, which is unique to this process: two
    /// processes of the same name stay distinguishable.
    #[must_use]
    pub fn new(client: Client, namespace: &str, replica: &str, duration: Duration, fence: Fence) -> Self {
        let identity = format!("{replica}_{:016x}", rand::random::<u64>());
        let election = Election::new(&identity);
        Self {
            api: Api::namespaced(client, namespace),
            identity,
            duration,
            election,
            fence,
            stored: None,
            holds: false,
        }
    }

    fn interval(&self) -> Duration {
        self.duration / TURNS
    }

    /// Takes part until [`Candidacy::withdraw`].
    #[must_use]
    pub fn start(mut self) -> Candidacy {
        let (withdraw, withdrawn) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = self.campaign() => {}
                // An error means that the handle was dropped: the process ends.
                _ = withdrawn => {}
            }
            self.fence.close_for_good();
            if self.holds {
                self.give_up().await;
            }
        });
        Candidacy { withdraw, task }
    }

    /// Acquires the Lease, renews it until it is lost, and acquires it again.
    async fn campaign(&mut self) {
        loop {
            self.acquire().await;
            tracing::info!("this replica is the leader");
            let holder = self.renew().await;
            self.holds = false;
            self.fence.close();
            tracing::warn!(%holder, "the Lease {LEASE} was lost; this replica keeps its agents and is not the leader");
        }
    }

    /// Waits until this process holds the Lease. The fence is open then.
    async fn acquire(&mut self) {
        let mut logged: Option<String> = None;
        loop {
            match self.try_acquire().await {
                Ok(Turn::Held) => return,
                Ok(Turn::Waiting(holder)) => {
                    if logged.as_ref() != Some(&holder) {
                        tracing::info!(%holder, "another replica is the leader");
                        logged = Some(holder);
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "the Lease could not be acquired; retrying");
                }
            }
            tokio::time::sleep(self.interval().min(POLL)).await;
        }
    }

    /// Renews the Lease until another replica holds it. Returns the holder.
    async fn renew(&mut self) -> String {
        let mut failed = false;
        loop {
            tokio::time::sleep(self.interval()).await;
            match self.try_renew().await {
                Ok(Turn::Held) => failed = false,
                Ok(Turn::Waiting(holder)) => return holder,
                Err(error) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!(error = %Chain(&error), "the Lease could not be renewed; retrying. Agents stay connected, and nothing is written as the leader once it may have expired");
                    }
                }
            }
        }
    }

    async fn try_acquire(&mut self) -> Result<Turn, kube::Error> {
        let stored = self.bounded(self.api.get_opt(LEASE)).await?;
        if let Step::Wait(holder) = self.election.follower(stored.as_ref(), Instant::now()) {
            return Ok(Turn::Waiting(holder));
        }
        match self.write(stored).await {
            // Another replica was faster; the next turn sees which one.
            Err(error) if is_conflict(&error) => Ok(Turn::Waiting("another replica".to_owned())),
            written => written.map(|()| Turn::Held),
        }
    }

    /// Replaces the last known Lease; reads it only if another writer changed or deleted it.
    async fn try_renew(&mut self) -> Result<Turn, kube::Error> {
        if let Some(known) = self.stored.clone() {
            match self.write(Some(known)).await {
                Err(error) if is_conflict(&error) => {}
                written => return written.map(|()| Turn::Held),
            }
        }
        let stored = self.bounded(self.api.get_opt(LEASE)).await?;
        match self.election.holder(stored.as_ref()) {
            Step::Wait(holder) => Ok(Turn::Waiting(holder)),
            Step::Take => self.write(stored).await.map(|()| Turn::Held),
        }
    }

    /// Creates or replaces the Lease. The fence stays open for less than others wait, counted from before the request.
    async fn write(&mut self, stored: Option<Lease>) -> Result<(), kube::Error> {
        let sent = Instant::now();
        let lease = self.lease(stored.as_ref(), Timestamp::now());
        let params = PostParams::default();
        let written = match stored {
            None => self.bounded(self.api.create(&params, &lease)).await?,
            Some(_) => self.bounded(self.api.replace(LEASE, &params, &lease)).await?,
        };
        self.stored = Some(written);
        self.holds = true;
        self.fence.open_until(sent + self.duration.mul_f64(0.8));
        Ok(())
    }

    /// A request may not take longer than until the next one is due.
    async fn bounded<T>(
        &self,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, kube::Error> {
        let patience = self.interval().max(POLL);
        tokio::time::timeout(patience, request)
            .await
            .unwrap_or_else(|_| Err(kube::Error::Service("the API server does not answer in time".into())))
    }

    fn lease(&self, stored: Option<&Lease>, now: Timestamp) -> Lease {
        let mut lease = stored.cloned().unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if spec.holder_identity.as_ref() != Some(&self.identity) {
            let before = spec.lease_transitions.unwrap_or(0);
            spec.lease_transitions = Some(before.saturating_add(i32::from(stored.is_some())));
            spec.acquire_time = Some(MicroTime(now));
        }
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = i32::try_from(self.duration.as_secs()).ok();
        spec.renew_time = Some(MicroTime(now));
        lease
    }

    /// Lets others take over at once.
    async fn give_up(&self) {
        let Some(mut lease) = self.stored.clone() else { return };
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
        }
        match self.bounded(self.api.replace(LEASE, &PostParams::default(), &lease)).await {
            Ok(_) => tracing::info!("Lease released"),
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "the Lease could not be released; it expires by itself");
            }
        }
    }
}

/// Returns true if another writer changed or deleted the Lease since it was read.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
}

enum Turn {
    Held,
    Waiting(String),
}

/// A candidate that runs in the background.
#[derive(Debug)]
pub struct Candidacy {
    withdraw: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Candidacy {
    /// Stops all writes of this process as the leader, and releases the Lease if it is held.
    pub async fn withdraw(self) {
        let _ = self.withdraw.send(());
        let _ = self.task.await;
    }
}
