//! Rolls settings out to the fleet: watches ProxyProfiles and ProxyRollouts, decides, and carries the decisions out.
//!
//! [`switchtower_core::rollout`] decides; this module collects its inputs and applies its decisions. Each round starts
//! from the stored objects and keeps no other state, so that a restarted controller continues at any point.
//!
//! Invariants: a decision is stored in the ProxyRollout before any row changes. A row changes before its node gets
//! other settings. Every write carries the version on which it was decided. Every replica serves the assigned settings; only
//! the leader decides. Updates of Services and endpoints never
//! wait for rollouts. A round costs O(nodes); there are no rounds while no rollout is active and nothing changes.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use switchtower_core::rollout::Revision;
use switchtower_crds::{ProxyProfile, ProxyRollout};
use switchtower_proto::v1::Settings;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::errors::{Chain, is_missing_kind};
use crate::fleet::{Fleet, SettingsName};
use crate::ingest::NodeIdentity;
use crate::lease::Fence;
use crate::replicas;
use crate::status::{Assignments, NodeEvent};
use crate::watch::Restores;

mod announce;
mod clean;
mod clock;
mod convert;
mod facts;
mod metrics;
mod objects;
pub(crate) mod others;
mod profiles;
mod requests;
mod round;
mod settings;

#[cfg(test)]
mod tests;

use announce::Announcer;
use clock::Clock;
pub use metrics::RolloutMetrics;
use objects::Objects;
use others::Others;
pub(crate) use settings::laid_over;

/// Interval between rounds while a rollout is active.
const TICK: Duration = Duration::from_millis(500);
/// Minimum interval between rounds: changes within it share a round.
const GATHER: Duration = Duration::from_millis(50);
/// Maximum interval between two rounds in a large fleet.
const LONGEST_GATHER: Duration = Duration::from_secs(1);
/// Delay after a request that the API server did not answer, or refused permanently.
const RETRY: Duration = Duration::from_secs(5);
/// Delay after a request about an object that the API server answered with an error.
const RETRY_OBJECT: Duration = Duration::from_secs(1);

/// Time for which a node keeps its settings while no known rollout describes those that its row names: rows and rollouts are
/// watched separately, and the row may arrive first.
const DESCRIBED_WITHIN: Duration = Duration::from_secs(5);

/// Finalizer that keeps an object while it is needed.
pub const FINALIZER: &str = "switchtower.dev/in-use";

type Events<K> = std::pin::Pin<Box<dyn Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send>>;

fn events<K>(api: &Api<K>) -> Events<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    Box::pin(watcher(api.clone(), watcher::Config::default()).default_backoff())
}

/// A revision whose ProxyRollout the API server refuses.
struct Refused {
    /// Message of the API server.
    message: String,
    /// Time of the next attempt: a quota, for example, may have changed by then.
    retry_at: Instant,
}

/// The task that runs rollouts.
pub struct Rollouts {
    profile_api: Api<ProxyProfile>,
    rollout_api: Api<ProxyRollout>,
    fleet: Arc<Fleet>,
    assignments: Assignments,
    fence: Fence,
    others: Others,
    announcer: Announcer,
    metrics: RolloutMetrics,
    profiles: Objects<ProxyProfile>,
    rollouts: Objects<ProxyRollout>,
    nodes: HashMap<Arc<str>, NodeIdentity>,
    nodes_synced: bool,
    /// Revisions that a row names and no rollout describes, each with the time when that was seen first.
    undescribed: HashMap<Revision, Instant>,
    /// Nodes with an assigned revision that no rollout describes.
    unknown: HashMap<Arc<str>, Revision>,
    /// The revision that each node is served, and since when.
    served: HashMap<Arc<str>, (Revision, Instant)>,
    /// The settings of all served revisions.
    served_settings: BTreeMap<SettingsName, Settings>,
    clock: Clock,
    /// Profiles whose new revision the API server refuses.
    refused: BTreeMap<String, Refused>,
    /// End of a pause of all requests: the API server cannot be reached.
    paused_until: Option<Instant>,
    /// Objects that the API server refused, and the time of the next attempt. Other objects do not wait for them.
    postponed: BTreeMap<String, Instant>,
    error_logged: Option<Instant>,
    /// Time that the last round took to read all nodes.
    reading: Duration,
}

impl Rollouts {
    /// Creates the task, without any objects.
    #[must_use]
    pub fn new(
        client: Client,
        replica: &str,
        fleet: Arc<Fleet>,
        assignments: Assignments,
        leadership: (Fence, replicas::Client),
        metrics: RolloutMetrics,
    ) -> Self {
        let (fence, others) = leadership;
        Self {
            profile_api: Api::all(client.clone()),
            rollout_api: Api::all(client.clone()),
            fleet,
            assignments,
            fence,
            others: Others::new(others),
            announcer: Announcer::new(client, replica),
            metrics,
            profiles: Objects::default(),
            rollouts: Objects::default(),
            nodes: HashMap::new(),
            nodes_synced: false,
            undescribed: HashMap::new(),
            unknown: HashMap::new(),
            served: HashMap::new(),
            served_settings: BTreeMap::new(),
            refused: BTreeMap::new(),
            clock: Clock::new(Box::new(Timestamp::now)),
            paused_until: None,
            postponed: BTreeMap::new(),
            error_logged: None,
            reading: Duration::ZERO,
        }
    }

    /// Uses the clock that all replicas share, instead of that of this process.
    #[must_use]
    pub fn timed_by(mut self, wall: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        self.clock = Clock::new(Box::new(wall));
        self
    }

    /// Reads all objects and serves the assigned settings, so that agents get the right ones from the start.
    ///
    /// # Errors
    /// The API server refused, or the CRDs are not installed; [`Rollouts::run`] retries.
    pub async fn load(&mut self) -> Result<(), kube::Error> {
        self.rollouts.replace(requests::list(&self.rollout_api).await?);
        self.profiles.replace(requests::list(&self.profile_api).await?);
        self.serve();
        Ok(())
    }

    /// Runs until the sender of node events is dropped.
    pub async fn run(mut self, mut nodes: mpsc::UnboundedReceiver<NodeEvent>, mut restores: Restores) {
        let (mut profiles, mut rollouts) = (events(&self.profile_api), events(&self.rollout_api));
        let assignments = self.assignments.clone();
        let mut turns = self.fence.turns();
        let mut dirty = true;
        let mut pause = GATHER;
        loop {
            if dirty && self.ready() {
                self.round().await;
                pause = pause_after(self.reading);
                dirty = false;
            } else if dirty && self.knows_rows() {
                // Serving assigned settings never waits for rounds, nor for the leader.
                self.serve();
                dirty = self.fence.is_open();
            }
            let wake = self.wake_up(dirty);
            tokio::select! {
                event = nodes.recv() => match event {
                    Some(event) => dirty |= self.node(event),
                    None => return,
                },
                Some(event) = profiles.next() => match event {
                    Ok(event) => dirty |= self.profiles.apply(event),
                    Err(error) => self.watch_failed(&error),
                },
                Some(event) = rollouts.next() => match event {
                    Ok(event) => dirty |= self.rollouts.apply(event),
                    Err(error) => self.watch_failed(&error),
                },
                () = assignments.row_changed() => dirty = true,
                () = turns.changed() => {
                    dirty = true;
                    self.metrics.publish(self.rollouts.iter().filter(|_| self.fence.is_open()));
                }
                Ok(()) = restores.changed() => {
                    // Only complete lists contain the changes since the restore, such as an abort.
                    (profiles, rollouts) = (events(&self.profile_api), events(&self.rollout_api));
                    self.profiles.invalidate();
                    self.rollouts.invalidate();
                }
                () = sleep_until(wake) => dirty = true,
            }
            // Changes within a short time share a round.
            if dirty {
                tokio::time::sleep(pause).await;
                while let Ok(event) = nodes.try_recv() {
                    self.node(event);
                }
            }
        }
    }

    /// Returns true if this replica is the leader and all nodes and objects are known: decisions on a part of them would be
    /// wrong.
    fn ready(&self) -> bool {
        self.fence.is_open() && self.nodes_synced && self.knows_rows() && !self.is_paused()
    }

    /// Returns true if the assigned settings of all rows are known.
    fn knows_rows(&self) -> bool {
        self.assignments.loaded() && self.profiles.synced() && self.rollouts.synced()
    }

    fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| until > Instant::now())
    }

    /// Returns true if no pause or delay applies to requests about this object.
    fn may_request(&self, object: &str) -> bool {
        let now = Instant::now();
        !self.is_paused() && self.postponed.get(object).is_none_or(|until| *until <= now)
    }

    fn wake_up(&mut self, dirty: bool) -> Option<Instant> {
        let now = Instant::now();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        self.postponed.retain(|_, until| *until > now);
        let under_way = || self.under_way() || self.profiles.iter().any(is_deleting);
        match self.paused_until {
            Some(until) => Some(until),
            None if !dirty && self.ready() && under_way() => Some(now + TICK),
            None => {
                let refused = self.refused.values().map(|refused| refused.retry_at);
                refused.chain(self.postponed.values().copied()).chain(self.undescribed_until(now)).min()
            }
        }
    }

    fn under_way(&self) -> bool {
        self.rollouts.iter().any(convert::is_under_way)
    }

    /// Records a node event. Returns true if it changes the inputs of a round.
    fn node(&mut self, event: NodeEvent) -> bool {
        match event {
            NodeEvent::Applied(identity) => {
                let name = identity.name.clone();
                self.nodes.get(&name) != Some(&identity) && {
                    self.nodes.insert(name, identity);
                    true
                }
            }
            NodeEvent::Gone(name) => self.nodes.remove(&name).is_some(),
            NodeEvent::Synced => !std::mem::replace(&mut self.nodes_synced, true),
        }
    }

    /// Logs the failure of a watch.
    fn watch_failed(&mut self, error: &watcher::Error) {
        let missing = match error {
            watcher::Error::InitialListFailed(error) => is_missing_kind(error),
            _ => false,
        };
        self.log_error(missing, error);
    }

    /// Handles the failure of a request about an object.
    ///
    /// An error that the API server returned postpones that object only. If the API server does not answer or the kind
    /// is missing, all requests pause.
    fn request_failed(&mut self, object: &str, error: &kube::Error) {
        let now = Instant::now();
        if matches!(error, kube::Error::Api(_)) && !is_missing_kind(error) {
            self.postponed.insert(object.to_owned(), now + RETRY_OBJECT);
        } else {
            self.paused_until = Some(now + RETRY);
        }
        self.log_error(is_missing_kind(error), error);
    }

    /// Logs at most one error per minute.
    fn log_error(&mut self, missing: bool, error: &(dyn std::error::Error + 'static)) {
        let now = Instant::now();
        if self.error_logged.is_some_and(|at| now.duration_since(at) < Duration::from_secs(60)) {
            return;
        }
        self.error_logged = Some(now);
        if missing {
            tracing::error!(
                "the kinds ProxyProfile and ProxyRollout (switchtower.dev/v1alpha1) are not installed; install them \
                 with `kubectl apply -k crds/yaml`; nodes keep their settings; retrying"
            );
        } else {
            tracing::warn!(error = %Chain(error), "rollouts wait for the API server; nodes keep their settings; retrying");
        }
    }
}

fn is_deleting(profile: &ProxyProfile) -> bool {
    profile.metadata.deletion_timestamp.is_some()
}

/// Returns the pause after a round that read all nodes in `round`: at most a tenth of the time is spent on rounds while
/// rows change one by one, as after a start.
fn pause_after(round: Duration) -> Duration {
    (round * 9).clamp(GATHER, LONGEST_GATHER)
}

async fn sleep_until(date: Option<Instant>) {
    match date {
        Some(date) => tokio::time::sleep_until(date).await,
        None => std::future::pending().await,
    }
}
