//! List and watch of one kind of object, without a store of API objects.
//!
//! This is a loop over [`kube::Api`], because kube-runtime's watcher hides bookmarks, list versions and reconnects,
//! so that an idle cluster and a dead watch look the same for minutes. Here every watch lasts ten seconds, so that
//! [`Upstream::age`] reflects a lost API server after about that time. Every batch carries the resourceVersion up to
//! which its resource is processed.
//!
//! After a restore of etcd from a backup, the API server accepts a watch from a version ahead of its own, and omits
//! every change up to there. So after a watch without events, and after a failed one, this loop reads the current
//! version of the API server and lists everything again if it went back.
//!
//! Invariants: an object that cannot be decoded never blocks the others. Objects that disappeared while the watch was
//! down become deletions after the next complete list, never before. A list that lacks most of the known objects is
//! confirmed by a second one before anything is deleted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt as _, pin_mut};
use kube::Api;
use kube::api::{ListParams, ObjectList, WatchEvent, WatchParams};
use switchtower_core::model::ObjectKey;
use switchtower_telemetry::{span, spans};
use tokio::sync::mpsc;
use tracing::Instrument as _;

use crate::errors::Chain;
use crate::ingest::{Ingested, object_key};

mod backoff;
mod lean;
mod resource;
mod tolerant;
mod upstream;

#[cfg(test)]
mod tests;

pub use backoff::Backoff;
pub use lean::Lean;
pub use resource::{Watched, WatchedResource};
pub use tolerant::Tolerant;
pub use upstream::{Restores, Upstream, UpstreamCollector, WatchMetrics};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// Duration of a watch in seconds. The API server sends a bookmark shortly before the end, so this limits the age of
/// the information about an idle cluster.
const WATCH_SECONDS: u32 = 10;
/// Silence after which a watch is considered dead although its connection is open.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
/// Timeout of a page of a list, including the client's own retries.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of objects whose disappearance in one list needs no confirmation, whatever their share.
const UNCONFIRMED: usize = 100;
/// Delay before the list that confirms a mass disappearance. With the duration of a list it is the maximum delay of an
/// intended one.
const CONFIRM_AFTER: Duration = Duration::from_secs(1);

/// Output of a watch: one event, or a page of a list.
#[derive(Debug)]
pub struct Batch {
    /// Watched resource.
    pub resource: WatchedResource,
    /// Objects in the order of the API server; empty for a bookmark.
    pub facts: Vec<Ingested>,
    /// Version up to which the resource is processed; 0 within an incomplete list.
    pub resource_version: u64,
    /// True if this completes a list: objects that were not in it do not exist.
    pub synced: bool,
    /// Time of receipt.
    pub received: SystemTime,
}

/// Selectors of one watch, in the syntax of the API.
#[derive(Debug, Clone, Default)]
pub struct Selectors {
    /// `labelSelector`, `None` for all objects.
    pub labels: Option<String>,
}

/// Lists and watches until the receiver of the batches is dropped.
pub async fn run<K: Watched>(
    api: Api<Tolerant<K>>,
    selectors: Selectors,
    upstream: Arc<Upstream>,
    metrics: WatchMetrics,
    sink: mpsc::Sender<Batch>,
) {
    let mut watch = Watch {
        api,
        selectors,
        upstream,
        metrics,
        sink,
        known: HashMap::new(),
        verify_version: false,
        unconfirmed: false,
    };
    let mut backoff = Backoff::default();
    let mut version: Option<String> = None;
    loop {
        let outcome = match version.take() {
            None => watch.list().await.map(Some),
            Some(from) => watch.follow(from, &mut backoff).await,
        };
        match outcome {
            Ok(next) => version = next,
            Err(Stop::Closed) => return,
            Err(Stop::Failed { error, resume }) => {
                version = resume;
                watch.verify_version = true;
                watch.metrics.error(K::RESOURCE);
                let delay = backoff.next_delay();
                tracing::warn!(
                    resource = K::RESOURCE.name(),
                    error = %Chain(&error),
                    retry_in_milliseconds = delay.as_millis(),
                    "watching the API server failed; the last known state stays in force"
                );
                tokio::time::sleep(delay).await;
            }
        }
    }
}

/// Reason for the early end of a list or a watch.
enum Stop {
    /// The receiver of the batches was dropped.
    Closed,
    /// The request failed; `resume` is the version to continue from, or `None` to list again.
    Failed { error: kube::Error, resume: Option<String> },
}

impl From<mpsc::error::SendError<Batch>> for Stop {
    fn from(_: mpsc::error::SendError<Batch>) -> Self {
        Self::Closed
    }
}

struct Watch<K: Watched> {
    api: Api<Tolerant<K>>,
    selectors: Selectors,
    upstream: Arc<Upstream>,
    metrics: WatchMetrics,
    sink: mpsc::Sender<Batch>,
    /// Version of every existing object, to recognize deleted and unchanged objects in a list.
    known: HashMap<ObjectKey, u64>,
    /// The last watch had no event or failed: the API server may have gone back in time.
    verify_version: bool,
    /// The last complete list lacked most of the known objects; the next one decides.
    unconfirmed: bool,
}

impl<K: Watched> Watch<K> {
    /// Reads a complete, consistent list within a span. Returns its version.
    async fn list(&mut self) -> Result<String, Stop> {
        let span = span!(
            "switchtower.watch.list",
            otel.kind = "client",
            switchtower.resource = K::RESOURCE.name(),
            switchtower.objects = tracing::field::Empty,
        );
        let listed = self.confirmed().instrument(span.clone()).await;
        match &listed {
            Ok(_) => {
                span.record("switchtower.objects", i64::try_from(self.known.len()).unwrap_or(i64::MAX));
            }
            Err(Stop::Failed { error, .. }) => spans::failed(&span, error),
            Err(Stop::Closed) => {}
        }
        listed
    }

    /// Lists until a list is complete and, if most objects disappeared, a second one agrees.
    async fn confirmed(&mut self) -> Result<String, Stop> {
        loop {
            if let Some(version) = self.pages().await? {
                return Ok(version);
            }
            tokio::time::sleep(CONFIRM_AFTER).await;
        }
    }

    /// Returns true if the deletion of this many of the known objects waits for a second list.
    fn doubts(&mut self, gone: usize) -> bool {
        let mass = gone >= UNCONFIRMED && gone * 2 > self.known.len();
        self.unconfirmed = mass && !self.unconfirmed;
        if self.unconfirmed {
            tracing::warn!(
                resource = K::RESOURCE.name(),
                gone,
                known = self.known.len(),
                "most objects are missing in a list; listing again before anything is removed"
            );
        }
        self.unconfirmed
    }

    /// Reads one list. Returns its version, or `None` if another list must confirm it.
    async fn pages(&mut self) -> Result<Option<String>, Stop> {
        self.metrics.list(K::RESOURCE);
        let mut seen: HashMap<ObjectKey, u64> = HashMap::with_capacity(self.known.len());
        let mut params =
            ListParams { label_selector: self.selectors.labels.clone(), ..ListParams::default() };
        params = params.limit(PAGE);
        loop {
            let page = self.page(&params).await.map_err(|error| Stop::Failed { error, resume: None })?;
            let received = SystemTime::now();
            let mut facts = Vec::with_capacity(page.items.len());
            for object in &page.items {
                let (key, version) = identity(object);
                let unchanged = version != 0 && self.known.get(&key) == Some(&version);
                if !unchanged && let Some(fact) = self.ingest(object, &key) {
                    facts.push(fact);
                }
                self.known.insert(key.clone(), version);
                seen.insert(key, version);
            }
            let version = page.metadata.resource_version.unwrap_or_default();
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => {
                    self.send(facts, 0, false, received).await?;
                    params.continue_token = Some(token);
                }
                None => {
                    let gone = self.known.keys().filter(|key| !seen.contains_key(*key));
                    let gone: Vec<_> = gone.cloned().collect();
                    if self.doubts(gone.len()) {
                        self.send(facts, 0, false, received).await?;
                        return Ok(None);
                    }
                    facts.extend(gone.into_iter().map(|key| Ingested::gone(K::forget(key))));
                    self.known = seen;
                    self.verify_version = false;
                    self.send(facts, parse_version(&version), true, received).await?;
                    return Ok(Some(version));
                }
            }
        }
    }

    async fn page(&self, params: &ListParams) -> Result<ObjectList<Tolerant<K>>, kube::Error> {
        let page = tokio::time::timeout(PAGE_TIMEOUT, self.api.list(params)).await;
        let page = page.unwrap_or_else(|_| {
            let message = format!("no answer to a list within {} seconds", PAGE_TIMEOUT.as_secs());
            Err(kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message)))
        })?;
        self.upstream.heard(K::RESOURCE);
        Ok(page)
    }

    /// Returns true if the API server is behind a version that it sent before: versions now stand for other objects.
    async fn went_back(&mut self, version: &str) -> Result<bool, kube::Error> {
        // Without a selector, reading one object is cheap regardless of their number.
        let now = self.page(&ListParams::default().limit(1)).await?.metadata.resource_version;
        let (now, then) = (parse_version(&now.unwrap_or_default()), parse_version(version));
        self.verify_version = false;
        if now == 0 || now >= then {
            return Ok(false);
        }
        tracing::warn!(
            resource = K::RESOURCE.name(),
            now,
            then,
            "the API server went back in time, as after a restore of etcd; listing all objects again"
        );
        self.known.values_mut().for_each(|version| *version = 0);
        self.upstream.went_back();
        Ok(true)
    }

    /// Watches from a version until the API server ends the watch. Returns `None` if the version is too old and a
    /// list is needed.
    async fn follow(&mut self, mut version: String, backoff: &mut Backoff) -> Result<Option<String>, Stop> {
        let mut params = WatchParams::default().timeout(WATCH_SECONDS);
        params.label_selector = self.selectors.labels.clone();
        if self.verify_version {
            match self.went_back(&version).await {
                Ok(true) => return Ok(None),
                Ok(false) => {}
                Err(error) => return Err(Stop::Failed { error, resume: Some(version) }),
            }
        }
        self.verify_version = true;
        let started = tokio::time::Instant::now();
        let stream = match tokio::time::timeout(SILENCE, self.api.watch(&params, &version)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if is_expired(&error) => return Ok(None),
            Ok(Err(error)) => return Err(Stop::Failed { error, resume: Some(version) }),
            Err(_) => return Err(Stop::Failed { error: silence(), resume: Some(version) }),
        };
        self.upstream.heard(K::RESOURCE);
        pin_mut!(stream);
        loop {
            let event = match tokio::time::timeout(SILENCE, stream.next()).await {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) if is_expired(&error) => return Ok(None),
                Ok(Some(Err(error))) => return Err(Stop::Failed { error, resume: Some(version) }),
                Ok(None) => break,
                Err(_) => return Err(Stop::Failed { error: silence(), resume: Some(version) }),
            };
            if let WatchEvent::Error(status) = event {
                let error = kube::Error::Api(status);
                return if is_expired(&error) {
                    Ok(None)
                } else {
                    Err(Stop::Failed { error, resume: Some(version) })
                };
            }
            self.upstream.heard(K::RESOURCE);
            self.verify_version = false;
            backoff.reset();
            if let Some(next) = self.take(event).await? {
                version = next;
            }
        }
        // Avoids a tight loop with a server that ends every watch at once.
        if started.elapsed() < Duration::from_secs(1) {
            tokio::time::sleep(backoff.next_delay()).await;
        }
        Ok(Some(version))
    }

    /// Forwards one event. Returns its version.
    async fn take(&mut self, event: WatchEvent<Tolerant<K>>) -> Result<Option<String>, Stop> {
        let received = SystemTime::now();
        let (object, gone) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
            WatchEvent::Deleted(object) => (object, true),
            WatchEvent::Bookmark(bookmark) => {
                let version = bookmark.metadata.resource_version;
                self.send(Vec::new(), parse_version(&version), false, received).await?;
                return Ok(Some(version));
            }
            WatchEvent::Error(_) => return Ok(None),
        };
        let (key, version) = identity(&object);
        let fact = if gone {
            self.known.remove(&key);
            Some(Ingested::gone(K::forget(key)))
        } else {
            let fact = self.ingest(&object, &key);
            self.known.insert(key, version);
            fact
        };
        self.send(fact.into_iter().collect(), version, false, received).await?;
        Ok(object.metadata().resource_version.clone())
    }

    /// Converts an object; one that cannot be decoded keeps its previous state.
    fn ingest(&self, object: &Tolerant<K>, key: &ObjectKey) -> Option<Ingested> {
        match object {
            Tolerant::Whole(object) => Some(object.ingest()),
            Tolerant::Broken { error, .. } => {
                self.metrics.undecodable(K::RESOURCE);
                tracing::error!(
                    resource = K::RESOURCE.name(),
                    namespace = %key.namespace,
                    name = %key.name,
                    %error,
                    "the API server sent an object that cannot be decoded; its previous state stays in force"
                );
                None
            }
        }
    }

    async fn send(
        &self,
        facts: Vec<Ingested>,
        resource_version: u64,
        synced: bool,
        received: SystemTime,
    ) -> Result<(), Stop> {
        let batch = Batch { resource: K::RESOURCE, facts, resource_version, synced, received };
        Ok(self.sink.send(batch).await?)
    }
}

fn identity<K: Watched>(object: &Tolerant<K>) -> (ObjectKey, u64) {
    let metadata = object.metadata();
    (object_key(metadata), parse_version(metadata.resource_version.as_deref().unwrap_or_default()))
}

/// resourceVersions of one resource are comparable integers (KEP-5504); anything else counts as unknown.
fn parse_version(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

/// 410: the version is older than the history of the API server.
fn is_expired(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410 || status.reason == "Expired")
}

fn silence() -> kube::Error {
    let message = format!("no event on the watch for {} seconds", SILENCE.as_secs());
    kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message))
}
