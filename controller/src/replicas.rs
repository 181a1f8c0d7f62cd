//! The replicas of the controller: which are present, their addresses, and queries to them.
//!
//! Each replica renews a Lease of its own, which contains its addresses ([`announce`]); [`presence`] decides from the
//! observed renewals which replicas are gone. [`client`] queries the others on the agents' port, where [`service`] answers
//! from the admin API's routes for the nodes of one replica.
//!
//! Invariants: a replica counts as gone only after its Lease was observed without a renewal for its duration, on this
//! process' own clock, or after its Lease was deleted. While the API server cannot be read, no replica is gone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::sync::lock;

pub mod announce;
pub mod client;
pub(crate) mod nodes;
pub mod presence;
pub mod service;

pub use client::{AskError, Client, Reply};
use presence::Observer;
pub use presence::Presence;

/// A replica and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name, as in rows.
    pub name: String,
    /// `host:port` under which agents and replicas reach it.
    pub addresses: Vec<String>,
}

/// All replicas. Clones share the state.
#[derive(Debug, Clone)]
pub struct Replicas {
    own: Arc<str>,
    observer: Arc<Mutex<Observer>>,
    changes: Arc<watch::Sender<u64>>,
}

impl Replicas {
    /// Knows this replica only. `duration`: time without a renewal after which a replica is gone.
    #[must_use]
    pub fn new(own: &str, duration: Duration) -> Self {
        Self {
            own: own.into(),
            observer: Arc::new(Mutex::new(Observer::new(own, duration))),
            changes: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Name of this replica.
    #[must_use]
    pub fn own(&self) -> &str {
        &self.own
    }

    /// Returns whether a replica that a row names is present.
    #[must_use]
    pub fn presence(&self, name: &str) -> Presence {
        lock(&self.observer).presence(name, Instant::now())
    }

    /// Returns the time since the API server last responded to requests about the Leases; `None` before the first time.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        lock(&self.observer).listed().map(|at| at.elapsed())
    }

    /// Returns the other replicas that are present, by name.
    #[must_use]
    pub fn peers(&self) -> Vec<Peer> {
        lock(&self.observer).peers()
    }

    /// Returns a receiver that changes whenever a replica appears, moves or is gone.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Records a complete list of the replicas' Leases.
    pub(crate) fn observe(&self, listed: &[presence::Seen], now: Instant) {
        if lock(&self.observer).observe(listed, now) {
            self.changes.send_modify(|count| *count += 1);
        }
    }
}
