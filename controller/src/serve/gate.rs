//! Limits of a port for connections before authentication: their number, rate and duration.
//!
//! [`table`] contains the rules. A [`Ticket`] represents one connection in the table; dropping it removes the
//! connection. Every refused connection is counted; the log has one line per interval.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

mod table;

pub(crate) use table::{Bounds, Class, GateLimits, Pool, Rejection, Stage};

use crate::fleet::addresses::KnownAddresses;
use crate::fleet::metrics::StreamMetrics;
use crate::sync::lock;
use crate::token_bucket::Rate;
use table::{Id, Table};

/// Interval between checks for connections past their deadline.
const SWEEP: Duration = Duration::from_millis(250);
/// Minimum interval between log lines about refusals.
const LOG: Duration = Duration::from_secs(10);
/// Maximum number of concurrent reviews per source: known, stranger.
const REVIEWS: (usize, usize) = (64, 4);

impl GateLimits {
    /// The agents' port. Sufficient for 5,000 agents that reconnect at once. Agents are strangers only behind address
    /// translation, until the first of them has authenticated.
    pub(crate) fn agents() -> Self {
        let pool = |total, per_source, milliseconds| Pool {
            total,
            per_source,
            deadline: Duration::from_millis(milliseconds),
        };
        let rate = |per_second, burst| Rate { per_second, burst };
        Self {
            known: Bounds {
                silent: pool(4_096, 1_024, 2_000),
                handshake: pool(4_096, 1_024, 10_000),
                anonymous: pool(4_096, 1_024, 15_000),
                rate: rate(2_000.0, 6_000.0),
                source_rate: rate(500.0, 1_000.0),
            },
            strangers: Bounds {
                silent: pool(512, 64, 1_500),
                handshake: pool(128, 32, 2_000),
                anonymous: pool(256, 32, 5_000),
                rate: rate(200.0, 400.0),
                source_rate: rate(5.0, 20.0),
            },
        }
    }

    /// A port for few callers with short requests: metrics and health, or the admin API.
    pub(crate) fn requests() -> Self {
        let pool =
            |total, per_source, seconds| Pool { total, per_source, deadline: Duration::from_secs(seconds) };
        let rate = |per_second, burst| Rate { per_second, burst };
        let bounds = Bounds {
            silent: pool(64, 16, 2),
            handshake: pool(64, 16, 5),
            anonymous: pool(64, 16, 120),
            rate: rate(200.0, 400.0),
            source_rate: rate(50.0, 100.0),
        };
        Self { known: bounds, strangers: bounds }
    }
}

/// Refusals since the last log line.
#[derive(Debug)]
struct Tally {
    counts: HashMap<&'static str, u64>,
    sources: HashMap<IpAddr, u64>,
    detail: Option<String>,
    logged: Option<Instant>,
}

impl Tally {
    /// Maximum number of counted sources.
    const SOURCES: usize = 1_024;

    fn note(&mut self, reason: &'static str, source: IpAddr, detail: Option<String>) {
        *self.counts.entry(reason).or_default() += 1;
        if self.sources.len() < Self::SOURCES || self.sources.contains_key(&source) {
            *self.sources.entry(source).or_default() += 1;
        }
        if detail.is_some() {
            self.detail = detail;
        }
    }

    /// Logs the refusals, at most once per interval.
    fn log(&mut self, port: &'static str, now: Instant) {
        let early = self.logged.is_some_and(|at| now.saturating_duration_since(at) < LOG);
        if early || self.counts.is_empty() {
            return;
        }
        self.logged = Some(now);
        let mut reasons: Vec<_> = std::mem::take(&mut self.counts).into_iter().collect();
        reasons.sort_unstable_by_key(|(reason, count)| (std::cmp::Reverse(*count), *reason));
        let total: u64 = reasons.iter().map(|(_, count)| count).sum();
        let reasons: Vec<_> = reasons.iter().map(|(reason, count)| format!("{reason}={count}")).collect();
        let mut sources: Vec<_> = std::mem::take(&mut self.sources).into_iter().collect();
        sources.sort_unstable_by_key(|(source, count)| (std::cmp::Reverse(*count), *source));
        let most: Vec<_> =
            sources.iter().take(3).map(|(source, count)| format!("{source}={count}")).collect();
        let detail = self.detail.take().unwrap_or_default();
        tracing::warn!(
            port,
            total,
            reasons = reasons.join(" "),
            sources = sources.len(),
            most = most.join(" "),
            detail,
            "connections or requests refused"
        );
    }
}

/// A port's connections.
pub(crate) struct Gate {
    port: &'static str,
    table: Mutex<Table<oneshot::Sender<Rejection>>>,
    tally: Mutex<Tally>,
    reviews: Mutex<HashMap<IpAddr, Weak<Semaphore>>>,
    known: Arc<KnownAddresses>,
    metrics: StreamMetrics,
}

impl Gate {
    /// Creates a gate. `port` is its name in the log.
    pub(crate) fn new(
        port: &'static str,
        limits: GateLimits,
        known: Arc<KnownAddresses>,
        metrics: StreamMetrics,
    ) -> Arc<Self> {
        let tally = Tally { counts: HashMap::new(), sources: HashMap::new(), detail: None, logged: None };
        Arc::new(Self {
            port,
            table: Mutex::new(Table::new(limits, Instant::now())),
            tally: Mutex::new(tally),
            reviews: Mutex::default(),
            known,
            metrics,
        })
    }

    /// Closes connections past their deadline and logs refusals. Runs until dropped.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(SWEEP);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = Instant::now();
            let late = lock(&self.table).sweep(now);
            late.into_iter().for_each(|closing| self.close(closing));
            lock(&self.reviews).retain(|_, semaphore| semaphore.strong_count() > 0);
            lock(&self.tally).log(self.port, now);
        }
    }

    /// Admits an accepted connection, or refuses it.
    pub(crate) fn enter(
        self: &Arc<Self>,
        peer: IpAddr,
        local: Option<IpAddr>,
    ) -> Result<(Arc<Ticket>, oneshot::Receiver<Rejection>), Rejection> {
        let (source, now) = (peer.to_canonical(), Instant::now());
        // Only processes of this host can connect from its own address.
        let own = local.is_some_and(|local| local.to_canonical() == source);
        let class = if own || self.known.contains(source, now) { Class::Known } else { Class::Stranger };
        let (close, closed) = oneshot::channel();
        let entered = lock(&self.table).enter(source, class, close, now);
        let (id, displaced) = entered.inspect_err(|turned| self.refused(turned.reason(), source, None))?;
        displaced.into_iter().for_each(|closing| self.close(closing));
        Ok((Arc::new(Ticket { gate: self.clone(), id, source, class }), closed))
    }

    /// Counts a refusal and adds it to the next log line.
    pub(crate) fn refused(&self, reason: &'static str, source: IpAddr, detail: Option<String>) {
        self.metrics.refused(reason);
        lock(&self.tally).note(reason, source, detail);
    }

    fn close(&self, (close, source, turned): (oneshot::Sender<Rejection>, IpAddr, Rejection)) {
        // The refusal of a credential is counted already.
        if turned != Rejection::Refused {
            self.refused(turned.reason(), source, None);
        }
        // Fails if the connection has just ended.
        let _ = close.send(turned);
    }
}

/// A connection in the table of the gate.
pub(crate) struct Ticket {
    gate: Arc<Gate>,
    id: Id,
    source: IpAddr,
    class: Class,
}

impl Ticket {
    /// Class of the source address.
    pub(crate) fn class(&self) -> Class {
        self.class
    }

    /// Moves the connection to a stage, or refuses it if the stage is full.
    pub(crate) fn advance(&self, stage: Stage) -> Result<(), Rejection> {
        let advanced = lock(&self.gate.table).advance(self.id, stage, Instant::now());
        let displaced = advanced.inspect_err(|turned| self.refused(turned.reason(), None))?;
        displaced.into_iter().for_each(|closing| self.gate.close(closing));
        Ok(())
    }

    /// Marks the connection as authenticated until the guard is dropped. Returns `None` if it was closed before.
    pub(crate) fn authenticated(self: &Arc<Self>) -> Option<Authenticated> {
        self.gate.known.authenticated(self.source, Instant::now());
        lock(&self.gate.table).authenticated(self.id).then(|| Authenticated(self.clone()))
    }

    /// Records that a credential was refused: the connection is closed as soon as the peer had time to read the
    /// response.
    pub(crate) fn refuse(&self) {
        lock(&self.gate.table).refuse(self.id, Instant::now());
    }

    /// Returns true if further requests on the connection are to be ignored.
    pub(crate) fn is_refused(&self) -> bool {
        lock(&self.gate.table).is_refused(self.id)
    }

    /// Counts a refusal on this connection.
    pub(crate) fn refused(&self, reason: &'static str, detail: Option<String>) {
        self.gate.refused(reason, self.source, detail);
    }

    /// Waits for a permit to review a credential of this source.
    pub(crate) async fn review(&self) -> Option<OwnedSemaphorePermit> {
        let most = match self.class {
            Class::Known => REVIEWS.0,
            Class::Stranger => REVIEWS.1,
        };
        let semaphore = {
            let mut reviews = lock(&self.gate.reviews);
            reviews.get(&self.source).and_then(Weak::upgrade).unwrap_or_else(|| {
                let semaphore = Arc::new(Semaphore::new(most));
                reviews.insert(self.source, Arc::downgrade(&semaphore));
                semaphore
            })
        };
        semaphore.acquire_owned().await.ok()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.gate.table).leave(self.id);
    }
}

/// An authenticated stream; after the last one, the connection is unauthenticated again.
pub(crate) struct Authenticated(Arc<Ticket>);

impl Drop for Authenticated {
    fn drop(&mut self) {
        let Ticket { gate, id, .. } = &*self.0;
        let ended = lock(&gate.table).ended(*id, Instant::now());
        match ended {
            Ok(displaced) => displaced.into_iter().for_each(|closing| gate.close(closing)),
            // The stage is full and the table has dropped the sender that keeps the connection open.
            Err(turned) => self.0.refused(turned.reason(), None),
        }
    }
}
