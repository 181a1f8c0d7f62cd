//! Selects the next requests. Assignments have a lane of their own, so that a rollback does not wait for the status
//! writes that it causes.

use std::sync::Arc;

use tokio::time::Instant;

use super::super::Registry;
use super::super::requests::Request;
use super::super::row::{Row, api_time};
use super::super::schedule::{renewal_interval, validity, writes_per_second};
use super::Writer;

/// Maximum number of concurrent requests other than assignments.
const CONCURRENCY: usize = 32;
/// Maximum number of concurrent assignments.
const ASSIGNING: usize = 32;

/// Lane of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// Assignments.
    Assignment,
    /// All other requests.
    Row,
}

impl<R: Registry> Writer<R> {
    /// Starts the requests that the budgets allow. Returns the latest time to call it again.
    pub(super) fn start_requests(&mut self) -> Option<Instant> {
        let date = self.schedule.next_date();
        self.paused_until = self.paused_until.filter(|date| *date > Instant::now());
        if self.paused_until.is_some() {
            return earlier(date, self.paused_until);
        }
        earlier(date, earlier(self.start_assignments(), self.start_writes()))
    }

    /// Starts assignments, which wait only for each other.
    fn start_assignments(&mut self) -> Option<Instant> {
        while self.schedule.has_assignments() && self.assigning < ASSIGNING {
            if let Err(date) = self.assignment_budget.take(Instant::now()) {
                return Some(date);
            }
            let Some(name) = self.schedule.pop_assignment() else { break };
            if let Some(request) = self.next_assignment(&name) {
                self.start(name, request);
            }
        }
        None
    }

    fn start_writes(&mut self) -> Option<Instant> {
        let interval = renewal_interval(self.entries.len());
        self.budget.set_rate(writes_per_second(self.entries.len()));
        while self.schedule.has_work() && self.running.len() - self.assigning < CONCURRENCY {
            if let Err(date) = self.budget.take(Instant::now()) {
                return Some(date);
            }
            let Some(name) = self.schedule.pop() else { break };
            let Some(request) = self.next_request(&name) else { continue };
            if let Some(entry) = self.entries.get_mut(&name) {
                let now = Instant::now();
                entry.last_write = Some(now);
                entry.renew_at = Some(now + interval.mul_f64(0.9 + 0.2 * rand::random::<f64>()));
            }
            self.start(name, request);
        }
        None
    }

    fn start(&mut self, name: Arc<str>, request: Request) {
        if let Some(entry) = self.entries.get_mut(&name) {
            entry.in_flight = true;
        }
        let lane = if matches!(request, Request::Assign(..)) { Lane::Assignment } else { Lane::Row };
        self.assigning += usize::from(lane == Lane::Assignment);
        let api = if request.is_status() { &self.api } else { &self.leader_api }.clone();
        self.running.spawn(async move {
            let outcome = request.run(api).await;
            (name, lane, outcome)
        });
    }

    fn next_assignment(&self, name: &Arc<str>) -> Option<Request> {
        let entry = self.entries.get(name).filter(|entry| !entry.in_flight)?;
        let stored = entry.stored.as_ref().filter(|_| entry.is_known())?;
        let requested = self.settings.assignments.requested(name, stored.assignment.as_ref())?;
        Some(Request::Assign(name.clone(), Box::new(stored.clone()), requested))
    }

    fn next_request(&mut self, name: &Arc<str>) -> Option<Request> {
        let leads = self.settings.fence.is_open();
        let entry = self.entries.get(name).filter(|entry| !entry.in_flight)?;
        match (&entry.node, &entry.stored) {
            (None, None) => None,
            (Some(_), Some(_)) if entry.outdated => Some(Request::Read(name.clone())),
            (None, Some(_)) | (Some(_), None) if !leads => None,
            (None, Some(stored)) => Some(Request::Delete(name.clone(), stored.clone())),
            (Some(node), None) => {
                let requested = self.settings.assignments.requested(name, None);
                Some(Request::Create(node.clone(), requested.or_else(|| entry.kept(node))))
            }
            (Some(node), Some(stored)) if stored.owner.as_deref() != Some(&*node.uid) => {
                leads.then(|| Request::Adopt(node.clone(), stored.clone()))
            }
            (Some(_), Some(stored)) => {
                let stored = stored.clone();
                let Row { mut status, confirmed, .. } = self.make(name)?;
                if !confirmed && stored.status.as_ref() == Some(&status) {
                    return None;
                }
                let now = self.settings.clock.now();
                status.reported_at = Some(api_time(now));
                status.stale_after = now.checked_add(validity(self.entries.len())).ok().map(api_time);
                Some(Request::Write(name.clone(), Box::new(stored), Box::new(status)))
            }
        }
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}
