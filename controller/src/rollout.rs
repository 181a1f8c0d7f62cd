//! Takes settings through the fleet: watches ProxyProfiles and ProxyRollouts, decides, and carries it out.
//!
//! [`switchtower_core::rollout`] decides; here is what it needs and what follows from it. A round looks at everything
//! as it is stored, and does what is to be done; there is no other state, so that a controller that dies anywhere is
//! followed by one that goes on.
//!
//! What holds: a decision is stored in the ProxyRollout before any row changes; a row changes before its node gets
//! other settings; every write carries the version that it was decided on. Updates of Services and endpoints go on
//! whatever happens here. A round costs the number of nodes, and there is none while nothing is under way and nothing
//! changes.

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
use crate::status::{Assignments, NodeEvent};
use crate::watch::Restores;

mod announce;
mod clean;
mod clock;
mod convert;
mod facts;
mod metrics;
mod objects;
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
pub(crate) use settings::laid_over;

/// Between two rounds while a rollout is under way.
const TICK: Duration = Duration::from_millis(500);
/// Between two rounds at the least: what happens meanwhile is looked at together.
const GATHER: Duration = Duration::from_millis(50);
/// After a request that the API server did not answer, or refused for good.
const RETRY: Duration = Duration::from_secs(5);
/// After a request that it answered with an error.
const RETRY_OBJECT: Duration = Duration::from_secs(1);

/// Keeps an object until nothing needs it.
pub const FINALIZER: &str = "switchtower.dev/in-use";

type Events<K> = std::pin::Pin<Box<dyn Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send>>;

fn events<K>(api: &Api<K>) -> Events<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    Box::pin(watcher(api.clone(), watcher::Config::default()).default_backoff())
}

/// A revision that the API server will not take.
struct Refused {
    /// What it says.
    message: String,
    /// Something else, such as a quota, may have changed by then.
    again_at: Instant,
}

/// The task that decides about settings.
pub struct Rollouts {
    profile_api: Api<ProxyProfile>,
    rollout_api: Api<ProxyRollout>,
    fleet: Arc<Fleet>,
    assignments: Assignments,
    announcer: Announcer,
    metrics: RolloutMetrics,
    profiles: Objects<ProxyProfile>,
    rollouts: Objects<ProxyRollout>,
    nodes: HashMap<Arc<str>, NodeIdentity>,
    nodes_synced: bool,
    /// Nodes whose row names a revision that no rollout describes.
    unknown: HashMap<Arc<str>, Revision>,
    /// What agents are served: which revision each node has been told, since when; and the settings.
    told: HashMap<Arc<str>, (Revision, Instant)>,
    served: BTreeMap<SettingsName, Settings>,
    clock: Clock,
    /// Profiles whose new revision the API server refuses.
    refused: BTreeMap<String, Refused>,
    /// No request before this time: the API server cannot be reached.
    paused_until: Option<Instant>,
    /// Objects that the API server did not take, and when to try again. Others do not wait for them.
    postponed: BTreeMap<String, Instant>,
    complained: Option<Instant>,
}

impl Rollouts {
    /// A task that knows nothing yet.
    #[must_use]
    pub fn new(
        client: Client,
        replica: &str,
        fleet: Arc<Fleet>,
        assignments: Assignments,
        metrics: RolloutMetrics,
    ) -> Self {
        Self {
            profile_api: Api::all(client.clone()),
            rollout_api: Api::all(client.clone()),
            fleet,
            assignments,
            announcer: Announcer::new(client, replica),
            metrics,
            profiles: Objects::default(),
            rollouts: Objects::default(),
            nodes: HashMap::new(),
            nodes_synced: false,
            unknown: HashMap::new(),
            told: HashMap::new(),
            served: BTreeMap::new(),
            refused: BTreeMap::new(),
            clock: Clock::new(Box::new(Timestamp::now)),
            paused_until: None,
            postponed: BTreeMap::new(),
            complained: None,
        }
    }

    /// Reads what there is, and gives nodes the settings that their rows name, so that agents get the right ones from
    /// the first moment.
    ///
    /// # Errors
    /// The API server refused, or the CRDs are not installed; [`Rollouts::run`] goes on trying.
    pub async fn load(&mut self) -> Result<(), kube::Error> {
        self.rollouts.replace(requests::list(&self.rollout_api).await?);
        self.profiles.replace(requests::list(&self.profile_api).await?);
        self.serve();
        Ok(())
    }

    /// Runs until the sender of node events is gone.
    pub async fn run(mut self, mut nodes: mpsc::UnboundedReceiver<NodeEvent>, mut restores: Restores) {
        let (mut profiles, mut rollouts) = (events(&self.profile_api), events(&self.rollout_api));
        let assignments = self.assignments.clone();
        let mut news = true;
        loop {
            if news && self.ready() {
                self.round().await;
                news = false;
            } else if news && self.knows_rows() {
                // Nodes are told what their rows name whatever else has to wait.
                self.serve();
            }
            let wake = self.wake_up(news);
            tokio::select! {
                event = nodes.recv() => match event {
                    Some(event) => news |= self.node(event),
                    None => return,
                },
                Some(event) = profiles.next() => match event {
                    Ok(event) => news |= self.profiles.take(event),
                    Err(error) => self.watch_failed(&error),
                },
                Some(event) = rollouts.next() => match event {
                    Ok(event) => news |= self.rollouts.take(event),
                    Err(error) => self.watch_failed(&error),
                },
                () = assignments.row_changed() => news = true,
                Ok(()) = restores.changed() => {
                    // What was said since the restore, such as an abort, is in the lists alone.
                    (profiles, rollouts) = (events(&self.profile_api), events(&self.rollout_api));
                    self.profiles.distrust();
                    self.rollouts.distrust();
                }
                () = sleep_until(wake) => news = true,
            }
            // What comes together is looked at together.
            if news {
                tokio::time::sleep(GATHER).await;
                while let Ok(event) = nodes.try_recv() {
                    self.node(event);
                }
            }
        }
    }

    /// Deciding from a part of the nodes or objects would be deciding wrongly.
    fn ready(&self) -> bool {
        self.nodes_synced && self.knows_rows() && !self.is_paused()
    }

    /// What rows name can be served.
    fn knows_rows(&self) -> bool {
        self.assignments.loaded() && self.profiles.synced() && self.rollouts.synced()
    }

    fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| until > Instant::now())
    }

    /// Requests about this object make sense now.
    fn may_ask(&self, object: &str) -> bool {
        let now = Instant::now();
        !self.is_paused() && self.postponed.get(object).is_none_or(|until| *until <= now)
    }

    fn wake_up(&mut self, news: bool) -> Option<Instant> {
        let now = Instant::now();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        self.postponed.retain(|_, until| *until > now);
        let under_way = || self.under_way() || self.profiles.iter().any(is_deleting);
        match self.paused_until {
            Some(until) => Some(until),
            None if !news && self.ready() && under_way() => Some(now + TICK),
            None => {
                let refused = self.refused.values().map(|refused| refused.again_at);
                refused.chain(self.postponed.values().copied()).min()
            }
        }
    }

    fn under_way(&self) -> bool {
        self.rollouts.iter().any(convert::is_under_way)
    }

    /// True: it matters.
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

    /// Without the CRDs there are no objects of them.
    fn watch_failed(&mut self, error: &watcher::Error) {
        let missing = match error {
            watcher::Error::InitialListFailed(error) => is_missing_kind(error),
            _ => false,
        };
        self.complain(missing, error);
    }

    /// A request about an object failed. An error that the API server answers may concern that object alone; where
    /// nothing answers, or the kind is missing, other requests would fail alike.
    fn request_failed(&mut self, object: &str, error: &kube::Error) {
        let now = Instant::now();
        if matches!(error, kube::Error::Api(_)) && !is_missing_kind(error) {
            self.postponed.insert(object.to_owned(), now + RETRY_OBJECT);
        } else {
            self.paused_until = Some(now + RETRY);
        }
        self.complain(is_missing_kind(error), error);
    }

    /// At most once a minute.
    fn complain(&mut self, missing: bool, error: &(dyn std::error::Error + 'static)) {
        let now = Instant::now();
        if self.complained.is_some_and(|at| now.duration_since(at) < Duration::from_secs(60)) {
            return;
        }
        self.complained = Some(now);
        if missing {
            tracing::error!(
                "the kinds ProxyProfile and ProxyRollout (switchtower.dev/v1alpha1) are not installed; install them \
                 with `kubectl apply -k crds/yaml`; nodes keep their settings meanwhile, and it is tried again"
            );
        } else {
            tracing::warn!(error = %Chain(error), "rollouts wait for the API server; nodes keep their settings meanwhile, and it is tried again");
        }
    }
}

fn is_deleting(profile: &ProxyProfile) -> bool {
    profile.metadata.deletion_timestamp.is_some()
}

async fn sleep_until(date: Option<Instant>) {
    match date {
        Some(date) => tokio::time::sleep_until(date).await,
        None => std::future::pending().await,
    }
}
