//! Decides whether a controller may take the Lease, from its observations and their times. Pure.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use tokio::time::Instant;

/// Bounds of a stored duration in seconds: a Lease never expires at once and never blocks forever.
const SHORTEST: i32 = 1;
const LONGEST: i32 = 60;

/// Content of a Lease. A change of any field counts as a renewal.
#[derive(Debug, Clone, PartialEq)]
struct Record {
    uid: Option<String>,
    holder: String,
    renewed: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime>,
    transitions: Option<i32>,
    duration: Duration,
}

impl Record {
    fn of(lease: &Lease) -> Self {
        let spec = lease.spec.as_ref();
        let seconds = spec.and_then(|spec| spec.lease_duration_seconds).unwrap_or(LONGEST);
        Self {
            uid: lease.metadata.uid.clone(),
            holder: spec.and_then(|spec| spec.holder_identity.clone()).unwrap_or_default(),
            renewed: spec.and_then(|spec| spec.renew_time.clone()),
            transitions: spec.and_then(|spec| spec.lease_transitions),
            duration: Duration::from_secs(seconds.clamp(SHORTEST, LONGEST).unsigned_abs().into()),
        }
    }
}

/// Next step of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Write it.
    Take,
    /// Leave it to this holder.
    Wait(String),
}

/// Observations of one process.
#[derive(Debug)]
pub(super) struct Election {
    identity: String,
    seen: Option<(Record, Instant)>,
}

impl Election {
    pub(super) fn new(identity: &str) -> Self {
        Self { identity: identity.to_owned(), seen: None }
    }

    /// For a process that is not the leader. A deleted Lease is not a release: the holder that was
    /// seen last gets as long to create it again as it would have had to renew it.
    pub(super) fn follower(&mut self, stored: Option<&Lease>, now: Instant) -> Step {
        if let Some(lease) = stored {
            let record = Record::of(lease);
            if record.holder.is_empty() || record.holder == self.identity {
                return Step::Take;
            }
            if self.seen.as_ref().is_none_or(|(seen, _)| *seen != record) {
                self.seen = Some((record, now));
            }
        }
        match &self.seen {
            Some((record, since)) if now.duration_since(*since) < record.duration => {
                Step::Wait(record.holder.clone())
            }
            Some(_) | None => Step::Take,
        }
    }

    /// For the holder: a Lease that is gone is made again, one that names anybody else is lost.
    pub(super) fn holder(&self, stored: Option<&Lease>) -> Step {
        match stored.map(Record::of) {
            None => Step::Take,
            Some(record) if record.holder == self.identity => Step::Take,
            Some(record) if record.holder.is_empty() => Step::Wait("no replica".to_owned()),
            Some(record) => Step::Wait(record.holder),
        }
    }
}
