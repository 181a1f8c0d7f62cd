//! Session of one agent: the controller's side of the protocol state machine.
//!
//! Invariants: nothing is sent before a valid Hello. At most one update is unacknowledged; later changes are combined
//! in the next. A generation that was sent is never reused for other content. A message of an agent only affects its
//! own node.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use switchtower_core::layer::{Cursor, HealthCheckPlacement, Plan, Planned, Subscription};
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::controller_message::Message as ToAgent;
use switchtower_proto::v1::{
    AgentMessage, ControllerMessage, GoAwayReason, ProxyMode, ReleaseHeld, Update, UpdateEnd, Welcome,
};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use crate::fleet::queries::PendingQuery;
use crate::fleet::{Fleet, Signal};
use crate::peers::Peers;
use crate::status::News;
use crate::status::row::BEHIND_GRACE;
use crate::text::sanitized;
use crate::token_bucket::{Rate, TokenBucket};

mod bounded;
mod contact;
mod drain;
mod go_away;
mod hello;
mod in_flight;
mod limits;
mod received;
mod resume;
mod source;

use contact::Contact;
pub(crate) use contact::search;
use go_away::go_away;
pub(crate) use go_away::overloaded;
use in_flight::InFlight;
pub use limits::Limits;
pub(crate) use received::read_message;

/// Messages that are written to the connection together.
pub(crate) type Batch = Vec<ControllerMessage>;

/// Maximum size of an update that is queued whole, for one write, in bytes.
const SMALL: usize = 64 << 10;
/// Maximum number of its parts.
const SMALL_PARTS: usize = 8;

/// Maximum time from an update to the next one, unless the acknowledgement takes longer. The same as the maximum
/// interval between publications: a node is ready again when the next one comes.
const HOLD: Duration = Duration::from_millis(750);
/// The next update waits this many times as long as the last one took, so that a busy network or node gets fewer and
/// larger updates.
const HOLD_FACTOR: u32 = 2;
/// Acknowledgement time below which nothing is considered busy.
const PROMPT: Duration = Duration::from_millis(20);

/// After this time without a response on the watches, the API server may not answer token reviews either.
const UNHEARD: Duration = Duration::from_secs(30);

/// An authenticated agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of its Node.
    pub node: Arc<str>,
    /// Expiry of its token.
    pub expires: SystemTime,
}

/// Reason for the end of a stream.
#[derive(Debug)]
enum End {
    /// Ended by the controller, which sends a GoAway.
    GoAway(GoAwayReason, String),
    /// Ended by the peer or the network.
    Gone(&'static str),
}

/// Delay of the next update after a refusal.
struct Pause {
    refused: Digest,
    wait_for_change: bool,
    earliest: Instant,
    until: Instant,
}

/// State of one stream.
pub(crate) struct Session {
    fleet: Arc<Fleet>,
    limits: Arc<Limits>,
    node: Arc<str>,
    expires: SystemTime,
    out: mpsc::Sender<Batch>,
    number: u64,
    subscription: Subscription,
    /// Position of the agent; `None` if it needs a complete snapshot.
    cursor: Option<Cursor>,
    /// Generation of the agent's view.
    generation: u64,
    /// Highest generation ever used for this node.
    highest: u64,
    /// Content of the kernel when the agent connected, until the first update. The agent's view may be older.
    kernel_at_hello: Option<(u64, Digest)>,
    /// The kernel did not hold the view of the Hello, and nothing has been acknowledged since.
    unproven: bool,
    in_flight: Option<InFlight>,
    /// Plan an update even if nothing changed.
    due: bool,
    /// Earliest time of the next update.
    held_until: Option<Instant>,
    pause: Option<Pause>,
    refusals: u32,
    pings: u64,
    /// Addresses of all replicas; the agent has those that are marked as seen.
    peers: Peers,
    /// The last `releaseHeldBefore` that was sent.
    released_before: u64,
    query: PendingQuery,
    drains: drain::DrainQueries,
    opened: Instant,
    contact: Contact,
    spoke: Instant,
    allowance: TokenBucket,
}

fn message(message: ToAgent) -> ControllerMessage {
    ControllerMessage { message: Some(message) }
}

/// Returns the delay before the next check if a stream may outlive its recycling time: while tokens cannot be
/// reviewed, it continues as long as its own token is valid (`left`).
fn put_off(left: Duration, upstream_age: Option<Duration>) -> Option<Duration> {
    let heard = upstream_age.is_some_and(|age| age <= UNHEARD);
    (!heard && !left.is_zero()).then(|| left.min(UNHEARD.mul_f64(rand::random_range(0.5..1.0))))
}

impl Session {
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        limits: Arc<Limits>,
        identity: Identity,
        out: mpsc::Sender<Batch>,
    ) -> Self {
        let now = Instant::now();
        let per_second = limits.messages_per_second;
        let rate = Rate { per_second, burst: per_second * 10.0 };
        let node = identity.node;
        Self {
            subscription: Subscription {
                node: node.clone(),
                zone: None,
                settings: ("".into(), 0),
                health_checks: HealthCheckPlacement::default(),
            },
            allowance: TokenBucket::new(rate, now.into_std()),
            peers: limits.peers.clone(),
            fleet,
            limits,
            node,
            expires: identity.expires,
            out,
            number: 0,
            cursor: None,
            generation: 0,
            highest: 0,
            kernel_at_hello: None,
            unproven: false,
            in_flight: None,
            due: true,
            held_until: None,
            pause: None,
            refusals: 0,
            pings: 0,
            released_before: 0,
            query: PendingQuery::default(),
            drains: drain::DrainQueries::default(),
            opened: now,
            contact: Contact::new(now),
            spoke: now,
        }
    }

    /// Runs the stream to its end.
    pub(crate) async fn run(mut self, mut inbound: Streaming<AgentMessage>) {
        let end = match self.open(&mut inbound).await {
            Ok(signal) => self.exchange(&mut inbound, &signal).await,
            Err(end) => end,
        };
        // Also where the Welcome could not be sent.
        if self.number != 0 {
            self.fleet.close(&self.node, self.number, matches!(end, End::Gone(_)));
        }
        match end {
            End::Gone(why) => {
                self.fleet.metrics().ended(why);
                tracing::info!(node = %self.node, session = self.number, why, "stream ended");
            }
            End::GoAway(reason, detail) => {
                let name = reason.as_str_name().trim_start_matches("GO_AWAY_REASON_").to_lowercase();
                match reason {
                    GoAwayReason::NodeNameMismatch
                    | GoAwayReason::Malformed
                    | GoAwayReason::Version
                    | GoAwayReason::GenerationOutOfRange => self.fleet.metrics().refused(&name),
                    _ => self.fleet.metrics().ended(&name),
                }
                tracing::info!(node = %self.node, session = self.number, reason = name, detail, "closing the stream");
                let message = go_away(reason, detail, &self.limits);
                // A peer that reads nothing must not keep the stream open.
                let _ = tokio::time::timeout(Duration::from_secs(1), self.out.send(vec![message])).await;
            }
        }
    }

    async fn open(&mut self, inbound: &mut Streaming<AgentMessage>) -> Result<Arc<Signal>, End> {
        let malformed = |detail: &str| End::GoAway(GoAwayReason::Malformed, detail.to_owned());
        let first = tokio::time::timeout(self.limits.hello, inbound.message()).await;
        let first = first.map_err(|_| malformed("no Hello in time"))?;
        let hello = match first {
            Ok(Some(AgentMessage { message: Some(FromAgent::Hello(hello)) })) => hello,
            Ok(Some(_)) => return Err(malformed("the first message must be Hello")),
            Ok(None) => return Err(End::Gone("closed_by_agent")),
            Err(status) => return Err(broken(&status)),
        };
        let known = self.fleet.floor(&self.node).generation;
        hello::check(&hello, &self.node, known).map_err(|(reason, detail)| End::GoAway(reason, detail))?;
        if !self.fleet.ready() {
            let detail = "the first lists of the API server are not complete".to_owned();
            return Err(End::GoAway(GoAwayReason::NotReady, detail));
        }
        let gone = || End::GoAway(GoAwayReason::NodeDeleted, "the Node does not exist".to_owned());
        self.catch_up(&hello).await?;
        let mut floor = self.fleet.floor(&self.node);
        floor.session = floor.session.max(hello::last_session(&hello, floor.session));
        let placement = HealthCheckPlacement::of(&hello.features);
        let (number, signal) = self.fleet.open(&self.node, &mut floor, placement).ok_or_else(gone)?;
        self.number = number;
        self.subscription = self.fleet.subscription(&self.node).ok_or_else(gone)?;
        self.resume(&hello, floor.generation);
        let welcome = Welcome {
            version: hello::VERSION,
            session: number,
            controller: self.limits.replica.clone(),
            peers: self.peers.take_current(),
            resumed: self.cursor.is_some(),
            features: vec![switchtower_proto::DRAIN_GATE.to_owned()],
            certificate: self.certificate(&hello.public_key),
            heartbeat_milliseconds: self.expect_heartbeats(&hello.features),
        };
        self.send(ToAgent::Welcome(welcome)).await?;
        tracing::info!(node = %self.node, session = number, resumed = self.cursor.is_some(),
            generation = self.generation, agent = hello.agent_version, "agent connected");
        Ok(signal)
    }

    /// Returns a certificate for the public key of a Hello, empty if it requests none.
    fn certificate(&self, public_key: &[u8]) -> Vec<u8> {
        let certificates = self.limits.certificates.as_ref().filter(|_| !public_key.is_empty());
        let issued = certificates.map(|certificates| certificates.issue(&self.node, public_key));
        issued.transpose().map(Option::unwrap_or_default).unwrap_or_else(|error| {
            tracing::info!(node = %self.node, %error, "the agent's public key is not usable");
            Vec::new()
        })
    }

    async fn exchange(&mut self, inbound: &mut Streaming<AgentMessage>, signal: &Signal) -> End {
        let mut recycled = Instant::now() + self.lifetime();
        let mut ping = contact::ping_ticks(&self.limits);
        let mut timer = std::pin::pin!(tokio::time::sleep_until(recycled));
        self.note_contact(signal);
        loop {
            if let Some(reason) = signal.ended() {
                return End::GoAway(reason, String::new());
            }
            signal.stop_waiting();
            self.note_silence();
            if let Err(end) = self.leave_stale_replica() {
                return end;
            }
            if let Err(end) = self.advance(signal).await {
                return end;
            }
            let before = signal.release_held_before();
            if std::mem::replace(&mut self.released_before, before) != before
                && let Err(end) = self.send(ToAgent::ReleaseHeld(ReleaseHeld { before })).await
            {
                return end;
            }
            if let Some(query) = self.query.next(&signal.queries)
                && let Err(end) = self.send(ToAgent::Query(query)).await
            {
                return end;
            }
            if self.is_idle() && !signal.wait_for_change() {
                continue;
            }
            let next = self.deadline().map_or(recycled, |deadline| deadline.min(recycled));
            // Changing a timer takes a lock that all sessions share. One that fires early costs less.
            if next < timer.deadline() || timer.is_elapsed() {
                timer.as_mut().reset(next);
            }
            let outcome = tokio::select! {
                received = inbound.message() => match received {
                    Ok(Some(message)) => self.receive(message, signal).await,
                    Ok(None) => Err(End::Gone("closed_by_agent")),
                    Err(status) => Err(broken(&status)),
                },
                () = signal.notify.notified() => Ok(()),
                answer = self.drains.next() => self.send(ToAgent::DrainAnswer(answer)).await,
                _ = ping.tick() => self.ping(Vec::new()).await,
                () = self.peers.changed() => self.ping(self.peers.current()).await,
                () = timer.as_mut() => self.recycle(&mut recycled),
            };
            if let Err(end) = outcome {
                return end;
            }
        }
    }

    /// Returns the time until the stream is recycled: before the token expires, at a random time.
    fn lifetime(&self) -> Duration {
        let left = self.expires.duration_since(SystemTime::now()).unwrap_or_default();
        left.mul_f64(rand::random_range(0.75..0.9))
    }

    /// Ends the stream if it is time to recycle it, or puts that off.
    fn recycle(&self, recycled: &mut Instant) -> Result<(), End> {
        let now = Instant::now();
        if now < *recycled {
            return Ok(());
        }
        let left = self.expires.duration_since(SystemTime::now()).unwrap_or_default();
        let Some(delay) = put_off(left, self.fleet.upstream_age()) else {
            let detail = "reconnect with a new token".to_owned();
            return Err(End::GoAway(GoAwayReason::CredentialExpiring, detail));
        };
        *recycled = now + delay;
        Ok(())
    }

    /// Returns the time of the next check if no event occurs before.
    fn deadline(&self) -> Option<Instant> {
        self.update_deadline().into_iter().chain(self.contact.deadline()).min()
    }

    fn update_deadline(&self) -> Option<Instant> {
        if let Some(in_flight) = &self.in_flight {
            let late = (!in_flight.late).then(|| in_flight.since + BEHIND_GRACE);
            let lost = (!in_flight.retried).then(|| in_flight.since + self.limits.acknowledgement);
            return late.into_iter().chain(lost).min();
        }
        let pause = self.pause.as_ref().map(|pause| pause.until);
        pause.into_iter().chain(self.held_until).min()
    }

    /// Only a change, a message or a timer gives it work.
    fn is_idle(&self) -> bool {
        self.in_flight.is_none() && self.held_until.is_none()
    }

    /// Sends pending changes unless an update is unacknowledged, held or paused.
    async fn advance(&mut self, signal: &Signal) -> Result<(), End> {
        if let Some(in_flight) = &mut self.in_flight {
            if !in_flight.retried && in_flight.since.elapsed() >= self.limits.acknowledgement {
                let detail = format!("generation {} was not acknowledged in time", in_flight.to);
                return Err(End::GoAway(GoAwayReason::Unspecified, detail));
            }
            if !in_flight.late && in_flight.since.elapsed() >= BEHIND_GRACE {
                in_flight.late = true;
                self.fleet.observe_with(&self.node, self.number, |_| News::Transition);
            }
            return Ok(());
        }
        if self.held_until.is_some_and(|until| until > Instant::now()) {
            return Ok(());
        }
        self.held_until = None;
        let changed = signal.take_changed();
        if !changed && !self.due {
            return Ok(());
        }
        let gone = || End::GoAway(GoAwayReason::NodeDeleted, "the Node does not exist".to_owned());
        self.subscription = self.fleet.subscription(&self.node).ok_or_else(gone)?;
        // Each change may end the pause.
        self.due = self.paused();
        if self.due {
            return Ok(());
        }
        match self.fleet.plan(&self.subscription, self.cursor.as_ref()).await {
            Planned::Update(plan) => self.update(*plan).await,
            // An earlier session used a higher generation: send the generation without changes.
            Planned::Nothing(after) if self.generation < self.highest => {
                let source = self.fleet.read(|layers| layers.source());
                let plan = Plan {
                    whole: false,
                    snapshot: false,
                    parts: Vec::new(),
                    changes: 0,
                    infos: Vec::new(),
                    after,
                    source,
                };
                self.update(plan).await
            }
            Planned::Nothing(after) => {
                self.settled(after);
                Ok(())
            }
            Planned::Compress(_) => Ok(()),
        }
    }

    /// Records that the agent has everything.
    fn settled(&mut self, after: Cursor) {
        let generation = self.generation;
        let digest = after.digest().to_bytes();
        let settings = after.subscription().settings.clone();
        let unproven = self.unproven;
        let (mut held, mut mode) = (0, ProxyMode::default());
        self.fleet.reached(&self.node, self.number, &after, None, |known| {
            held = known.deviations.as_ref().map_or(0, |deviations| deviations.held);
            mode = known.mode;
            known.sent = generation;
            known.desired = generation;
            if unproven {
                // It is still committing: its acknowledgement or refusal is pending.
                return News::Transition;
            }
            let news = !known.acknowledged || known.settings.as_ref() != Some(&settings);
            known.acknowledged = true;
            known.applied = generation;
            known.digest = Some(digest);
            known.settings = Some(settings);
            if news { News::Transition } else { News::Progress }
        });
        if !unproven {
            self.kernel_reached(&after, held, mode);
        }
        self.cursor = Some(after);
    }

    fn paused(&mut self) -> bool {
        let Some(pause) = &mut self.pause else { return false };
        let now = Instant::now();
        if pause.wait_for_change {
            let digest = self.fleet.read(|layers| layers.head(&self.subscription)).digest();
            if digest != pause.refused {
                pause.until = pause.until.min(pause.earliest);
            }
        }
        if now < pause.until {
            return true;
        }
        self.pause = None;
        false
    }

    async fn update(&mut self, plan: Plan) -> Result<(), End> {
        let Plan { whole, snapshot, parts, changes, infos, after, source } = plan;
        // An agent that was killed before it saved its view lacks the content of its kernel: the same content keeps
        // its generation, and nothing is written.
        let held = self.kernel_at_hello.take() == Some((self.highest, after.digest()));
        let keeps = held && self.generation < self.highest;
        // Even without a change: the highest generation may have been sent with other content and not been
        // acknowledged.
        let to = if keeps { self.highest } else { self.highest + changes.max(1) };
        self.highest = to;
        let metrics = self.fleet.metrics();
        metrics.updated(if whole {
            "snapshot"
        } else if snapshot {
            "mixed"
        } else {
            "delta"
        });
        let mut in_flight = InFlight::begin(to, after, whole, snapshot, &parts);
        let after = &in_flight.after;
        metrics.sent_bytes.inc_by(in_flight.bytes());
        let update = Update {
            from: (!whole).then_some(self.generation),
            to,
            digest: after.digest().to_bytes().to_vec(),
            source: Some(source),
            resume: Some(self.fleet.resume_token(after.revision())),
            changes: infos,
            changes_total: u32::try_from(changes).unwrap_or(u32::MAX),
            required_features: self.fleet.required_features(&after.subscription().settings),
        };
        self.fleet.observe_with(&self.node, self.number, |known| {
            known.sent = to;
            known.desired = to;
            News::Progress
        });
        let small = in_flight.bytes() <= SMALL as u64 && parts.len() <= SMALL_PARTS;
        let begin = std::iter::once(ToAgent::Update(update));
        let all =
            begin.chain(parts.into_iter().map(ToAgent::Part)).chain([ToAgent::UpdateEnd(UpdateEnd { to })]);
        if small {
            self.send_batch(all.map(message).collect()).await?;
        } else {
            // The queue to the connection bounds what waits for a slow peer.
            for one in all {
                self.send(one).await?;
            }
        }
        in_flight.sent();
        self.in_flight = Some(in_flight);
        Ok(())
    }

    async fn send(&mut self, what: ToAgent) -> Result<(), End> {
        self.send_batch(vec![message(what)]).await
    }

    async fn send_batch(&mut self, batch: Batch) -> Result<(), End> {
        let sent = match self.out.try_send(batch) {
            Err(mpsc::error::TrySendError::Full(batch)) => {
                let sending = self.out.send(batch);
                tokio::time::timeout(self.limits.silence, sending)
                    .await
                    .map_err(|_| End::Gone("takes_nothing"))?
                    .is_ok()
            }
            sent => sent.is_ok(),
        };
        self.spoke = Instant::now();
        if sent { Ok(()) } else { Err(End::Gone("connection_lost")) }
    }
}

/// Maps a stream error to the end of the session.
fn broken(status: &Status) -> End {
    match status.code() {
        tonic::Code::OutOfRange
        | tonic::Code::ResourceExhausted
        | tonic::Code::Internal
        | tonic::Code::InvalidArgument => End::GoAway(GoAwayReason::Malformed, sanitized(status.message())),
        _ => End::Gone("connection_lost"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_kept_while_tokens_unreviewable() {
        let seconds = Duration::from_secs;
        assert_eq!(put_off(seconds(900), Some(seconds(9))), None, "the agent can reconnect");
        for age in [Some(seconds(31)), None] {
            let delay = put_off(seconds(900), age).unwrap();
            assert!(delay >= seconds(15) && delay <= UNHEARD, "{delay:?}");
            assert_eq!(put_off(seconds(3), age), Some(seconds(3)), "not beyond its token");
            assert_eq!(put_off(Duration::ZERO, age), None);
        }
    }
}
