//! The door of a port: who may keep a connection before anything is known of it, and for how long.
//!
//! [`table`] has the rules. A [`Ticket`] is one connection's place; dropping it gives the place back. Refused
//! connections are counted one by one, and logged as one line per interval.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

mod table;

pub(crate) use table::{Bounds, Class, GateLimits, Pool, Stage, Turned};

use crate::fleet::addresses::KnownAddresses;
use crate::fleet::metrics::StreamMetrics;
use crate::token_bucket::Rate;
use table::{Id, Table};

/// Between two looks for connections past their deadline.
const SWEEP: Duration = Duration::from_millis(250);
/// Between two log lines about what was refused.
const LOG: Duration = Duration::from_secs(10);
/// Tokens of one source that are looked at together.
const REVIEWS: (usize, usize) = (64, 4);

impl GateLimits {
    /// The agents' port. A fleet of 5,000 that returns at once fits; strangers are agents only where addresses are
    /// translated, and a source is known after its first agent.
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

/// What was refused since the last log line.
#[derive(Debug)]
struct Tally {
    counts: HashMap<&'static str, u64>,
    sources: HashMap<IpAddr, u64>,
    detail: Option<String>,
    logged: Option<Instant>,
}

impl Tally {
    /// Most sources that are counted.
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

    /// At most once per interval.
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
    table: Mutex<Table<oneshot::Sender<Turned>>>,
    tally: Mutex<Tally>,
    reviews: Mutex<HashMap<IpAddr, Weak<Semaphore>>>,
    known: Arc<KnownAddresses>,
    metrics: StreamMetrics,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// `port` names it in the log.
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

    /// Closes what is past its deadline and logs what was refused, until it is dropped.
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

    /// A connection that was accepted.
    pub(crate) fn enter(
        self: &Arc<Self>,
        peer: IpAddr,
        local: Option<IpAddr>,
    ) -> Result<(Arc<Ticket>, oneshot::Receiver<Turned>), Turned> {
        let (source, now) = (peer.to_canonical(), Instant::now());
        // Only processes of this host reach it from its own address.
        let own = local.is_some_and(|local| local.to_canonical() == source);
        let class = if own || self.known.contains(source, now) { Class::Known } else { Class::Stranger };
        let (close, closed) = oneshot::channel();
        let entered = lock(&self.table).enter(source, class, close, now);
        let (id, displaced) = entered.inspect_err(|turned| self.refused(turned.reason(), source, None))?;
        displaced.into_iter().for_each(|closing| self.close(closing));
        Ok((Arc::new(Ticket { gate: self.clone(), id, source, class }), closed))
    }

    /// Counts a refusal, and has it logged.
    pub(crate) fn refused(&self, reason: &'static str, source: IpAddr, detail: Option<String>) {
        self.metrics.refused(reason);
        lock(&self.tally).note(reason, source, detail);
    }

    fn close(&self, (close, source, turned): (oneshot::Sender<Turned>, IpAddr, Turned)) {
        // What refused the credential is counted already.
        if turned != Turned::Refused {
            self.refused(turned.reason(), source, None);
        }
        // Fails when the connection has just ended by itself.
        let _ = close.send(turned);
    }
}

/// One connection's place.
pub(crate) struct Ticket {
    gate: Arc<Gate>,
    id: Id,
    source: IpAddr,
    class: Class,
}

impl Ticket {
    /// Where it comes from.
    pub(crate) fn class(&self) -> Class {
        self.class
    }

    /// The connection has come to this stage; refused where there is no room in it.
    pub(crate) fn advance(&self, stage: Stage) -> Result<(), Turned> {
        let advanced = lock(&self.gate.table).advance(self.id, stage, Instant::now());
        let displaced = advanced.inspect_err(|turned| self.refused(turned.reason(), None))?;
        displaced.into_iter().for_each(|closing| self.gate.close(closing));
        Ok(())
    }

    /// A stream on the connection is authenticated until the guard is dropped. `None`: it was closed meanwhile.
    pub(crate) fn authenticated(self: &Arc<Self>) -> Option<Authenticated> {
        self.gate.known.authenticated(self.source, Instant::now());
        lock(&self.gate.table).authenticated(self.id).then(|| Authenticated(self.clone()))
    }

    /// A credential on the connection was refused: the connection is closed as soon as the peer had time to read
    /// the answer.
    pub(crate) fn refuse(&self) {
        lock(&self.gate.table).refuse(self.id, Instant::now());
    }

    /// Nothing that comes on the connection is worth a look any more.
    pub(crate) fn is_refused(&self) -> bool {
        lock(&self.gate.table).is_refused(self.id)
    }

    /// Counts a refusal of something on this connection.
    pub(crate) fn refused(&self, reason: &'static str, detail: Option<String>) {
        self.gate.refused(reason, self.source, detail);
    }

    /// A turn among the source's credentials that are under review; waits for one.
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

/// An authenticated stream; without it, the connection is again one that nobody knows.
pub(crate) struct Authenticated(Arc<Ticket>);

impl Drop for Authenticated {
    fn drop(&mut self) {
        let Ticket { gate, id, .. } = &*self.0;
        let ended = lock(&gate.table).ended(*id, Instant::now());
        match ended {
            Ok(displaced) => displaced.into_iter().for_each(|closing| gate.close(closing)),
            // Without room for it the table has dropped what keeps it open.
            Err(turned) => self.0.refused(turned.reason(), None),
        }
    }
}
