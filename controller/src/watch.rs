//! List and watch of one kind of object, without a store of API objects.
//!
//! Own loop over [`kube::Api`], because kube-runtime's watcher hides bookmarks, list versions and reconnects:
//! an idle cluster and a dead watch look alike to it for minutes. Here every watch lives for ten seconds, so
//! that [`Upstream::age`] tells within about that time whether the API server is still heard, and every
//! batch carries the resourceVersion up to which its resource is processed.
//!
//! An API server whose etcd was restored from a backup takes a watch from a version that lies ahead of it, and leaves
//! out every change up to there. So after a watch that said nothing, and after one that failed, the version that the
//! API server has reached is asked for; if it went back, everything is listed anew.
//!
//! What holds: an object that cannot be decoded never stops the others; objects that went away while the
//! watch was down become deletions after the next complete list, never before.

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
mod resource;
mod tolerant;
mod upstream;

#[cfg(test)]
mod tests;

pub use backoff::Backoff;
pub use resource::{Watched, WatchedResource};
pub use tolerant::Tolerant;
pub use upstream::{Restores, Upstream, UpstreamCollector, WatchMetrics};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// Seconds that a watch lives. The API server sends a bookmark shortly before it ends one, so this bounds
/// the age of what is known of an idle cluster.
const WATCH_SECONDS: u32 = 10;
/// Silence after which a watch counts as dead although its connection stands.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
/// Longest time for a page of a list, the client's own repetitions included.
const PAGE_PATIENCE: Duration = Duration::from_secs(30);

/// What a watch hands on at once: one event, or a page of a list.
#[derive(Debug)]
pub struct Batch {
    /// Where it comes from.
    pub resource: WatchedResource,
    /// Objects in the order of the API server; empty for a bookmark.
    pub facts: Vec<Ingested>,
    /// Everything of the resource up to here is processed; 0 within a list that is not complete.
    pub resource_version: u64,
    /// A list is complete: what is not known by now does not exist.
    pub synced: bool,
    /// When the first byte of it was understood.
    pub received: SystemTime,
}

/// Selectors of one watch, as the API server takes them.
#[derive(Debug, Clone, Default)]
pub struct Selectors {
    /// `labelSelector`, `None` for all objects.
    pub labels: Option<String>,
}

/// Lists and watches until the receiver of the batches is gone.
pub async fn run<K: Watched>(
    api: Api<Tolerant<K>>,
    selectors: Selectors,
    upstream: Arc<Upstream>,
    metrics: WatchMetrics,
    sink: mpsc::Sender<Batch>,
) {
    let mut watch = Watch { api, selectors, upstream, metrics, sink, known: HashMap::new(), in_doubt: false };
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
                watch.in_doubt = true;
                watch.metrics.error(K::RESOURCE);
                let delay = backoff.next_delay();
                tracing::warn!(
                    resource = K::RESOURCE.name(),
                    error = %Chain(&error),
                    retry_in_milliseconds = delay.as_millis(),
                    "watching the API server failed; what is known stays in force"
                );
                tokio::time::sleep(delay).await;
            }
        }
    }
}

/// Why a list or a watch ended early.
enum Stop {
    /// Nobody takes batches any more.
    Closed,
    /// The request failed; `resume` is the version to go on from, `None` to list again.
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
    /// Version of every object that exists, to tell deletions and unchanged objects in a list.
    known: HashMap<ObjectKey, u64>,
    /// The last watch said nothing, or failed: the API server may be in the past.
    in_doubt: bool,
}

impl<K: Watched> Watch<K> {
    /// A complete, consistent list, told as a span. Returns its version.
    async fn list(&mut self) -> Result<String, Stop> {
        let span = span!(
            "switchtower.watch.list",
            otel.kind = "client",
            switchtower.resource = K::RESOURCE.name(),
            switchtower.objects = tracing::field::Empty,
        );
        let listed = self.pages().instrument(span.clone()).await;
        match &listed {
            Ok(_) => {
                span.record("switchtower.objects", i64::try_from(self.known.len()).unwrap_or(i64::MAX));
            }
            Err(Stop::Failed { error, .. }) => spans::failed(&span, error),
            Err(Stop::Closed) => {}
        }
        listed
    }

    async fn pages(&mut self) -> Result<String, Stop> {
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
                    facts.extend(gone.map(|key| Ingested::gone(K::forget(key.clone()))));
                    self.known = seen;
                    self.in_doubt = false;
                    self.send(facts, parse_version(&version), true, received).await?;
                    return Ok(version);
                }
            }
        }
    }

    async fn page(&self, params: &ListParams) -> Result<ObjectList<Tolerant<K>>, kube::Error> {
        let page = tokio::time::timeout(PAGE_PATIENCE, self.api.list(params)).await;
        let page = page.unwrap_or_else(|_| {
            let message = format!("no answer to a list within {} seconds", PAGE_PATIENCE.as_secs());
            Err(kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message)))
        })?;
        self.upstream.heard(K::RESOURCE);
        Ok(page)
    }

    /// The API server has not reached the version again that it gave out: versions mean other objects now.
    async fn went_back(&mut self, version: &str) -> Result<bool, kube::Error> {
        // Without a selector, one object costs the same whatever there is.
        let now = self.page(&ListParams::default().limit(1)).await?.metadata.resource_version;
        let (now, then) = (parse_version(&now.unwrap_or_default()), parse_version(version));
        self.in_doubt = false;
        if now == 0 || now >= then {
            return Ok(false);
        }
        tracing::warn!(
            resource = K::RESOURCE.name(),
            now,
            then,
            "the API server went back in time, as after a restore of its etcd; everything is listed anew"
        );
        self.known.values_mut().for_each(|version| *version = 0);
        self.upstream.went_back();
        Ok(true)
    }

    /// One watch from a version on, until the API server ends it. `None`: the version is too old, list again.
    async fn follow(&mut self, mut version: String, backoff: &mut Backoff) -> Result<Option<String>, Stop> {
        let mut params = WatchParams::default().timeout(WATCH_SECONDS);
        params.label_selector = self.selectors.labels.clone();
        if self.in_doubt {
            match self.went_back(&version).await {
                Ok(true) => return Ok(None),
                Ok(false) => {}
                Err(error) => return Err(Stop::Failed { error, resume: Some(version) }),
            }
        }
        self.in_doubt = true;
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
            self.in_doubt = false;
            backoff.reset();
            if let Some(next) = self.take(event).await? {
                version = next;
            }
        }
        // A server that ends every watch at once must not be asked in a tight loop.
        if started.elapsed() < Duration::from_secs(1) {
            tokio::time::sleep(backoff.next_delay()).await;
        }
        Ok(Some(version))
    }

    /// Hands on one event. Returns the version it brings.
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

    /// Converts an object; one that cannot be decoded keeps the state that it had.
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

/// 410: the version is older than what the API server remembers.
fn is_expired(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410 || status.reason == "Expired")
}

fn silence() -> kube::Error {
    let message = format!("nothing heard on the watch for {} seconds", SILENCE.as_secs());
    kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message))
}
