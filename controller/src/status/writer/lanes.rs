//! Which requests are made next: assignments in a lane of their own, so that a rollback does not wait for the news that
//! it makes; everything else in the other.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::Instant;

use super::super::Registry;
use super::super::requests::Request;
use super::super::row::{Row, api_time};
use super::super::schedule::{renewal_interval, validity};
use super::Writer;

/// Requests under way at once, but for those that assign.
const CONCURRENCY: usize = 8;
/// Requests under way at once that assign.
const ASSIGNING: usize = 32;

impl<R: Registry> Writer<R> {
    /// Starts what the budgets allow. Returns when to wake up at the latest.
    pub(super) fn start_requests(&mut self) -> Option<Instant> {
        let date = self.schedule.next_date();
        self.paused_until = self.paused_until.filter(|date| *date > Instant::now());
        if self.paused_until.is_some() {
            return earlier(date, self.paused_until);
        }
        earlier(date, earlier(self.start_assignments(), self.start_writes()))
    }

    /// Assignments wait for nothing but each other.
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
        let assigned = matches!(request, Request::Assign(..));
        self.assigning += usize::from(assigned);
        let api = self.api.clone();
        self.running.spawn(async move {
            let outcome = request.run(api).await;
            (name, assigned, outcome)
        });
    }

    fn next_assignment(&self, name: &Arc<str>) -> Option<Request> {
        let entry = self.entries.get(name).filter(|entry| !entry.in_flight)?;
        let stored = entry.stored.as_ref().filter(|_| entry.is_known())?;
        let wish = self.assignments.wish(name, stored.assignment.as_ref())?;
        Some(Request::Assign(name.clone(), Box::new(stored.clone()), wish))
    }

    fn next_request(&mut self, name: &Arc<str>) -> Option<Request> {
        let entry = self.entries.get(name).filter(|entry| !entry.in_flight)?;
        match (&entry.node, &entry.stored) {
            (None, None) => None,
            (None, Some(stored)) => Some(Request::Delete(name.clone(), stored.clone())),
            (Some(node), None) => {
                let wish = self.assignments.wish(name, None);
                Some(Request::Create(node.clone(), wish.or_else(|| entry.kept(node))))
            }
            (Some(node), Some(stored)) if stored.owner.as_deref() != Some(&*node.uid) => {
                Some(Request::Adopt(node.clone(), stored.clone()))
            }
            (Some(_), Some(_)) if !entry.is_known() => Some(Request::Read(name.clone())),
            (Some(_), Some(stored)) => {
                let stored = stored.clone();
                let Row { mut status, confirmed, .. } = self.make(name)?;
                if !confirmed && stored.status.as_ref() == Some(&status) {
                    return None;
                }
                let now = Timestamp::now();
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
