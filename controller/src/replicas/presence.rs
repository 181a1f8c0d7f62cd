//! Decides which replicas are present, from observed Leases and the times of the observations. Pure.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::Peer;

/// A Lease in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Name of the replica.
    pub name: String,
    /// `host:port` under which it is reached.
    pub addresses: Vec<String>,
    /// Version of the Lease: a change is a renewal.
    pub version: String,
}

/// Presence of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It renews its Lease.
    Present,
    /// It has no Lease that was listed; it may have just started.
    Awaited,
    /// It ended: it deleted its Lease, or has not renewed it in time.
    Gone,
}

/// Observations of one process.
#[derive(Debug)]
pub(super) struct Observer {
    own: String,
    duration: Duration,
    /// Time of the last complete list. Without a new list no replica expires.
    listed: Option<Instant>,
    /// Replicas in the last list, each with the time of its last observed renewal.
    known: BTreeMap<String, (Seen, Instant)>,
    /// Replicas that are in no list: the time of the first question, or of the removal.
    unknown: HashMap<String, Unknown>,
}

#[derive(Debug, Clone, Copy)]
enum Unknown {
    /// It may have started after the last list.
    AskedAt(Instant),
    Removed,
}

impl Observer {
    pub(super) fn new(own: &str, duration: Duration) -> Self {
        Self { own: own.to_owned(), duration, listed: None, known: BTreeMap::new(), unknown: HashMap::new() }
    }

    /// Records a complete list. Returns true if a replica appeared, moved, expired or was removed.
    pub(super) fn observe(&mut self, listed: &[Seen], now: Instant) -> bool {
        let before = (self.peers(), self.known.keys().cloned().collect::<Vec<_>>());
        let mut known = BTreeMap::new();
        for seen in listed {
            let since = match self.known.get(&seen.name) {
                Some((last, since)) if last == seen => *since,
                _ => now,
            };
            self.unknown.remove(&seen.name);
            known.insert(seen.name.clone(), (seen.clone(), since));
        }
        for name in self.known.keys().filter(|name| !known.contains_key(*name)) {
            self.unknown.insert(name.clone(), Unknown::Removed);
        }
        (self.known, self.listed) = (known, Some(now));
        before != (self.peers(), self.known.keys().cloned().collect())
    }

    /// Time of the last complete list.
    pub(super) fn listed(&self) -> Option<Instant> {
        self.listed
    }

    /// Returns the presence of a replica.
    pub(super) fn presence(&mut self, name: &str, now: Instant) -> Presence {
        if name == self.own {
            return Presence::Present;
        }
        match (self.known.get(name), self.listed) {
            (Some((_, since)), _) if self.has_expired(*since) => Presence::Gone,
            (Some(_), _) => Presence::Present,
            (None, None) => Presence::Awaited,
            (None, Some(_)) => {
                let unknown = *self.unknown.entry(name.to_owned()).or_insert(Unknown::AskedAt(now));
                match unknown {
                    Unknown::Removed => Presence::Gone,
                    Unknown::AskedAt(since) if self.has_expired(since) => Presence::Gone,
                    Unknown::AskedAt(_) => Presence::Awaited,
                }
            }
        }
    }

    /// Returns the other replicas that are present.
    pub(super) fn peers(&self) -> Vec<Peer> {
        let present =
            self.known.values().filter(|(seen, since)| seen.name != self.own && !self.has_expired(*since));
        present.map(|(seen, _)| Peer { name: seen.name.clone(), addresses: seen.addresses.clone() }).collect()
    }

    /// Returns true if a whole duration lies between the time and the last list.
    fn has_expired(&self, since: Instant) -> bool {
        self.listed.is_some_and(|listed| listed.saturating_duration_since(since) >= self.duration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DURATION: Duration = Duration::from_secs(10);

    fn lease(name: &str, version: u32) -> Seen {
        Seen { name: name.to_owned(), addresses: vec![format!("{name}:9443")], version: version.to_string() }
    }

    fn names(observer: &Observer) -> Vec<String> {
        observer.peers().into_iter().map(|peer| peer.name).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn replica_without_renewal_is_gone_after_its_duration() {
        let (mut observer, start) = (Observer::new("own", DURATION), Instant::now());
        assert!(observer.observe(&[lease("own", 1), lease("a", 1), lease("b", 1)], start));
        let later = start + DURATION / 2;
        assert!(!observer.observe(&[lease("own", 2), lease("a", 2), lease("b", 1)], later));
        assert_eq!(names(&observer), ["a", "b"]);
        assert!(observer.observe(&[lease("own", 3), lease("a", 3), lease("b", 1)], start + DURATION));
        assert_eq!(names(&observer), ["a"]);
        assert_eq!(observer.presence("b", start + DURATION), Presence::Gone);
        assert!(observer.observe(&[lease("a", 4), lease("b", 2)], start + DURATION * 2));
        assert_eq!(names(&observer), ["a", "b"], "it was stopped for a while");
        assert_eq!(observer.presence("own", start + DURATION * 9), Presence::Present);
    }

    #[tokio::test(start_paused = true)]
    async fn deleted_lease_means_gone_at_once() {
        let (mut observer, start) = (Observer::new("own", DURATION), Instant::now());
        observer.observe(&[lease("a", 1)], start);
        assert!(observer.observe(&[], start + Duration::from_secs(1)));
        assert_eq!(observer.presence("a", start + Duration::from_secs(1)), Presence::Gone);
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_replica_gets_time_to_appear() {
        let (mut observer, start) = (Observer::new("own", DURATION), Instant::now());
        assert_eq!(observer.presence("new", start), Presence::Awaited, "nothing was listed yet");
        observer.observe(&[], start);
        assert_eq!(observer.presence("new", start), Presence::Awaited);
        observer.observe(&[], start + DURATION);
        assert_eq!(observer.presence("new", start + DURATION), Presence::Gone);
        observer.observe(&[lease("new", 1)], start + DURATION * 2);
        assert_eq!(observer.presence("new", start + DURATION * 2), Presence::Present);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_expires_while_leases_cannot_be_read() {
        let (mut observer, start) = (Observer::new("own", DURATION), Instant::now());
        observer.observe(&[lease("a", 1)], start);
        assert_eq!(observer.presence("a", start + DURATION * 100), Presence::Present);
        observer.observe(&[lease("a", 1)], start + DURATION * 100);
        assert_eq!(observer.presence("a", start + DURATION * 100), Presence::Gone);
    }
}
