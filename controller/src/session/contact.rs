//! Contact with an agent: heartbeats, whose absence the row shows, and pings. [`Contact`] is pure.

use std::sync::Arc;
use std::time::Duration;

use switchtower_proto::v1::controller_message::Message as ToAgent;
use switchtower_proto::v1::{GoAwayReason, Ping};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::{End, Limits, Session};
use crate::fleet::{Fleet, Signal};
use crate::status::News;

/// Interval of heartbeats.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(6);
/// Silence after which heartbeats may be missing: one may be late.
const SUSPICIOUS: Duration = Duration::from_millis(7_500);
/// Interval between searches for silent agents.
const SEARCH: Duration = Duration::from_millis(500);
/// Time after which a suspicion is confirmed. In a busy process a message may have arrived and not been read.
const CONFIRMATION: Duration = Duration::from_millis(500);
/// Pings are due at multiples of this, so that one wake-up of the process serves many sessions. The answers arrive
/// together, and so do the heartbeats that follow them.
const GRID: Duration = Duration::from_millis(500);
/// Minimum time for which an agent stays with a stale replica, so that it changes replicas at most once per minute.
const STAY: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The agent sends no heartbeats.
    Unmonitored,
    InContact,
    /// The suspicion is confirmed or refuted after [`CONFIRMATION`].
    Suspected(Instant),
    Silent,
}

/// Contact with the agent of one stream.
#[derive(Debug)]
pub(super) struct Contact {
    heard: Instant,
    state: State,
}

impl Contact {
    pub(super) fn new(now: Instant) -> Self {
        Self { heard: now, state: State::Unmonitored }
    }

    /// Expects heartbeats from now on.
    pub(super) fn expect_heartbeats(&mut self) {
        self.state = State::InContact;
    }

    /// Returns true if the agent sends heartbeats.
    pub(super) fn is_monitored(&self) -> bool {
        self.state != State::Unmonitored
    }

    /// Time of the last message.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Records a message. Returns true if it ends a silence.
    pub(super) fn hear(&mut self, now: Instant) -> bool {
        self.heard = now;
        let was_silent = self.state == State::Silent;
        if self.state != State::Unmonitored {
            self.state = State::InContact;
        }
        was_silent
    }

    /// Time of the next check; none while no silence is suspected: [`search`] finds silent agents, because a timer for
    /// each one costs more than its heartbeats.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Unmonitored | State::Silent | State::InContact => None,
            State::Suspected(at) => Some(at + CONFIRMATION),
        }
    }

    /// Returns true if the agent has become silent.
    pub(super) fn check(&mut self, now: Instant) -> bool {
        match self.state {
            State::InContact if now >= self.heard + SUSPICIOUS => self.state = State::Suspected(now),
            State::Suspected(at) if now >= at + CONFIRMATION => self.state = State::Silent,
            _ => return false,
        }
        self.state == State::Silent
    }
}

/// Wakes the sessions of agents that may be silent, until the process ends.
pub(crate) async fn search(fleet: Arc<Fleet>) {
    let mut ticks = tokio::time::interval(SEARCH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        fleet.wake_silent(SUSPICIOUS);
    }
}

/// Returns the ticks at which the stream is pinged.
pub(super) fn ping_ticks(limits: &Limits) -> Interval {
    let first = next_on_grid(Instant::now() + limits.ping, limits.origin, GRID.min(limits.ping));
    let mut ticks = tokio::time::interval_at(first, limits.ping);
    // Other behaviours leave the grid.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

/// Returns the first multiple of `step` after `origin` that is not before `time`.
fn next_on_grid(time: Instant, origin: Instant, step: Duration) -> Instant {
    let steps = (time - origin).as_nanos().div_ceil(step.as_nanos());
    origin + Duration::from_nanos((steps * step.as_nanos()) as u64)
}

impl Session {
    /// Returns the interval of heartbeats for the Welcome, in milliseconds; 0 if the agent does not support them.
    pub(super) fn expect_heartbeats(&mut self, features: &[String]) -> u32 {
        if !features.iter().any(|feature| feature == switchtower_proto::HEARTBEAT) {
            return 0;
        }
        self.contact.expect_heartbeats();
        HEARTBEAT.as_millis() as u32
    }

    /// Shows in the row that the agent's heartbeats are missing.
    pub(super) fn note_silence(&mut self) {
        if self.contact.check(Instant::now()) {
            let silence = self.contact.heard().elapsed();
            tracing::warn!(node = %self.node, session = self.number, seconds = silence.as_secs(), "no heartbeat of the agent");
            self.fleet.observe_with(&self.node, self.number, |known| {
                known.note_silence(silence);
                News::Transition
            });
        }
    }

    /// Records a message of the agent.
    pub(super) fn note_contact(&mut self, signal: &Signal) {
        let now = Instant::now();
        if self.contact.is_monitored() {
            signal.hear(now);
        }
        if self.contact.hear(now) {
            self.fleet.observe_with(&self.node, self.number, |known| {
                known.note_contact();
                News::Transition
            });
        }
    }

    /// Sends the agent to a replica that is more current.
    pub(super) fn leave_stale_replica(&self) -> Result<(), End> {
        if self.fleet.is_stale() && self.opened.elapsed() >= STAY {
            let detail =
                "the API server does not respond to this replica; another one is more current".to_owned();
            return Err(End::GoAway(GoAwayReason::StaleReplica, detail));
        }
        Ok(())
    }

    /// Checks that the agent responds. `peers` are sent if there are any.
    pub(super) async fn ping(&mut self, peers: Vec<String>) -> Result<(), End> {
        let silence = self.contact.heard().elapsed();
        if silence > self.limits.silence {
            return Err(End::Gone("silent"));
        }
        // The peers have just heard each other.
        let recent = self.limits.ping / 2;
        if peers.is_empty() && silence < recent && self.spoke.elapsed() < recent {
            return Ok(());
        }
        self.pings += 1;
        let age = self.fleet.upstream_age().map_or(u64::MAX, |age| age.as_millis() as u64);
        let ping = Ping { sequence: self.pings, upstream_age_milliseconds: age, peers };
        self.send(ToAgent::Ping(ping)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Silences that are found by checks at the given times, in milliseconds after the last message.
    fn silent_at(contact: &mut Contact, start: Instant, checks: &[u64]) -> Vec<u64> {
        let silent = |at: &&u64| contact.check(start + Duration::from_millis(**at));
        checks.iter().filter(silent).copied().collect()
    }

    #[test]
    fn silence_is_confirmed_once() {
        let start = Instant::now();
        let mut contact = Contact::new(start);
        assert_eq!(contact.deadline(), None, "an agent without heartbeats");
        contact.expect_heartbeats();
        assert_eq!(contact.deadline(), None, "the search finds it");
        assert_eq!(silent_at(&mut contact, start, &[7_400, 7_500, 7_900, 8_000, 9_000]), [8_000]);
        assert_eq!(contact.deadline(), None);
        let later = start + Duration::from_secs(60);
        assert!(contact.hear(later), "the silence ends");
        assert!(!contact.hear(later));
        assert!(!contact.check(later + SUSPICIOUS));
        assert_eq!(contact.deadline(), Some(later + SUSPICIOUS + CONFIRMATION));
    }

    #[test]
    fn streams_are_pinged_together() {
        let origin = Instant::now();
        let at = |milliseconds| origin + Duration::from_millis(milliseconds);
        for (time, expected) in [(0, 0), (1, 500), (499, 500), (500, 500), (86_400_000_001, 86_400_000_500)] {
            assert_eq!(next_on_grid(at(time), origin, GRID), at(expected), "{time} ms");
        }
    }

    #[test]
    fn late_check_of_a_busy_process_is_no_silence() {
        let start = Instant::now();
        let mut contact = Contact::new(start);
        contact.expect_heartbeats();
        assert!(!contact.check(start + Duration::from_secs(60)), "a message may be waiting");
        contact.hear(start + Duration::from_secs(60));
        assert_eq!(silent_at(&mut contact, start, &[60_500, 67_400]), [0; 0]);
    }
}
