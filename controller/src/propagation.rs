//! Time that changes take to reach the nodes: the core's tracker with a clock, a lock and metrics.
//!
//! Invariants: recording never waits for the reader. A reader that is too slow loses records, which are counted.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use switchtower_admin_api::ChangeReport;
use switchtower_core::drain::Removal;
use switchtower_core::propagation::{
    Change, Delivery, DrainRecord, Limits, Pacer, Publication, Record, Slot, StepResult, TraceContext,
    Tracker, UnixNanoseconds,
};
use switchtower_proto::v1::ChangeInfo;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::sync::lock;

mod metrics;

pub use metrics::PropagationMetrics;

/// Maximum number of concluded records in the queue to the reader.
const RECORDS: usize = 256;

/// Converts a time to the format of records.
#[must_use]
pub fn unix_nanoseconds(time: SystemTime) -> UnixNanoseconds {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixNanoseconds::try_from(since.as_nanos()).unwrap_or(UnixNanoseconds::MAX)
}

/// Creates the context of a trace that is not sampled.
#[must_use]
pub fn new_trace() -> TraceContext {
    let (trace, span) = (rand::random_range(1..=u128::MAX), rand::random_range(1..=u64::MAX));
    TraceContext { trace, span, sampled: false }
}

/// Input of the reader, which exports traces.
#[derive(Debug)]
pub enum Traced {
    /// Changes that are concluded.
    Record(Record),
    /// A query of the drain gate, in the trace of a change.
    Drain(TraceContext, DrainRecord),
}

/// Propagation of each change, shared by the streams, the engine and the admin API.
#[derive(Debug)]
pub struct Propagation {
    tracker: Mutex<Tracker>,
    metrics: PropagationMetrics,
    reader: Option<mpsc::Sender<Traced>>,
    opened: Notify,
    pacer: Mutex<Pacer>,
    /// Half of the nodes hold the last publication.
    half_reached: Notify,
}

impl Propagation {
    /// Creates a tracker without changes.
    #[must_use]
    pub fn new(limits: Limits, metrics: PropagationMetrics) -> Self {
        Self {
            tracker: Mutex::new(Tracker::new(limits)),
            metrics,
            reader: None,
            opened: Notify::new(),
            pacer: Mutex::default(),
            half_reached: Notify::new(),
        }
    }

    /// Sends every concluded record and drain query to the returned receiver.
    #[must_use]
    pub fn with_reader(self) -> (Self, mpsc::Receiver<Traced>) {
        let (reader, records) = mpsc::channel(RECORDS);
        (Self { reader: Some(reader), ..self }, records)
    }

    /// Describes the changes of a publication for agents, with their traces if these are exported.
    pub(crate) fn describe(&self, publication: &Publication) -> Vec<ChangeInfo> {
        let describe = |change: &Change| ChangeInfo {
            id: change.id,
            traceparent: if self.reader.is_some() { change.trace.to_string() } else { String::new() },
            received_unix_nanoseconds: change.received,
            object: change.object.to_string(),
            trigger_unix_nanoseconds: change.triggered.unwrap_or(0),
        };
        publication.changes.iter().map(describe).collect()
    }

    /// Returns the propagation of the latest changes that `wanted` accepts, newest first.
    pub fn changes(&self, limit: usize, wanted: impl Fn(&Change) -> bool) -> Vec<ChangeReport> {
        self.lock().reports(limit, wanted)
    }

    /// Returns the minimum revision of all connected nodes; `None` without nodes.
    #[must_use]
    pub fn held_by_all(&self) -> Option<u64> {
        self.lock().held_by_all()
    }

    /// Concludes overdue records. Never returns.
    pub async fn watch(self: Arc<Self>) {
        loop {
            let next = self.lock().next_overdue();
            match next {
                None => self.opened.notified().await,
                Some(at) => {
                    let left = at.saturating_sub(unix_nanoseconds(SystemTime::now()));
                    tokio::time::sleep(Duration::from_nanos(left)).await;
                    let outcome = self.lock().overdue(unix_nanoseconds(SystemTime::now()));
                    self.note(outcome);
                }
            }
        }
    }

    /// Waits until the fleet is ready for the next publication: see [`Pacer`].
    pub(crate) async fn ready_for_publication(&self) {
        loop {
            let next = lock(&self.pacer).next().map(Instant::from_std);
            let Some(next) = next.filter(|next| *next > Instant::now()) else { return };
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = self.half_reached.notified() => {}
            }
        }
    }

    pub(crate) fn publish(&self, revision: u64, publication: Publication, nodes: &[Slot]) {
        // A publication without changes has no milestones.
        if !publication.changes.is_empty() {
            lock(&self.pacer).published(revision, nodes.len(), Instant::now().into_std());
        }
        let outcome = self.lock().publish(revision, publication, nodes);
        self.note(outcome);
        self.opened.notify_one();
    }

    pub(crate) fn join(&self, node: Arc<str>, revision: u64) -> Slot {
        self.lock().join(node, revision)
    }

    pub(crate) fn reached(&self, slot: Slot, revision: u64, delivery: Option<Delivery>) {
        let now = delivery.map(|delivery| delivery.acknowledged);
        let now = now.unwrap_or_else(|| unix_nanoseconds(SystemTime::now()));
        let outcome = self.lock().reached(slot, revision, now, delivery);
        self.note(outcome);
    }

    pub(crate) fn refused(&self, slot: Slot, revision: u64, reason: &'static str) {
        self.lock().refused(slot, revision, unix_nanoseconds(SystemTime::now()), reason);
    }

    pub(crate) fn leave(&self, slot: Slot) {
        let outcome = self.lock().leave(slot);
        self.note(outcome);
    }

    /// Adds a query of the drain gate to the trace of the change that removed the endpoint.
    pub(crate) fn drained(&self, removal: &Removal, record: DrainRecord) {
        let Some(reader) = &self.reader else { return };
        let Some(trace) = self.lock().trace_of(removal) else { return };
        if reader.try_send(Traced::Drain(trace, record)).is_err() {
            self.metrics.unread();
        }
    }

    fn note(&self, outcome: StepResult) {
        self.metrics.note(&outcome);
        if let Some(revision) = outcome.half
            && lock(&self.pacer).half_reached(revision, Instant::now().into_std())
        {
            self.half_reached.notify_one();
        }
        let Some(reader) = &self.reader else { return };
        for record in outcome.concluded {
            if reader.try_send(Traced::Record(record)).is_err() {
                self.metrics.unread();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tracker> {
        lock(&self.tracker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propagation() -> Propagation {
        let metrics = PropagationMetrics::new(&prometheus::Registry::new()).unwrap();
        Propagation::new(Limits::default(), metrics)
    }

    fn publication() -> Publication {
        let change = Change {
            id: 1,
            object: "Service default/web".into(),
            service: None,
            received: 0,
            triggered: None,
            trace: new_trace(),
            origin: None,
        };
        Publication { changes: vec![change], total: 1, ..Publication::default() }
    }

    /// Publishes as fast as allowed, while every node acknowledges `delay` after a publication. Returns the number of
    /// publications in a minute.
    async fn publications(nodes: usize, delay: Duration) -> u64 {
        let propagation = Arc::new(propagation());
        let slots: Vec<_> = (0..nodes).map(|node| propagation.join(format!("n{node}").into(), 0)).collect();
        let end = Instant::now() + Duration::from_secs(60);
        for revision in 1.. {
            propagation.ready_for_publication().await;
            if Instant::now() >= end {
                return revision - 1;
            }
            propagation.publish(revision, publication(), &slots);
            let (propagation, slots) = (propagation.clone(), slots.clone());
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                slots.iter().for_each(|slot| propagation.reached(*slot, revision, None));
            });
            // The next change.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        0
    }

    #[tokio::test(start_paused = true)]
    async fn publications_follow_rounds_of_the_fleet_not_changes() {
        let milliseconds = Duration::from_millis;
        let few = publications(10, milliseconds(50)).await;
        assert!(few > 5_000, "{few}: no limit for few nodes");
        let fast = publications(1_000, milliseconds(1)).await;
        assert!(fast > 5_000, "{fast}: no limit for fast nodes");
        let busy = publications(1_000, milliseconds(50)).await;
        assert!((230..=241).contains(&busy), "{busy} of 6,000 changes, one in 250 ms");
        let overloaded = publications(1_000, milliseconds(500)).await;
        assert!((75..=81).contains(&overloaded), "{overloaded}: one in 750 ms");
    }
}
