//! Messages of the agent and their effects: acknowledgements, refusals and reports.

use std::time::Duration;

use prost::Message as _;
use switchtower_core::layer::Cursor;
use switchtower_core::propagation::Delivery;
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::controller_message::Message as ToAgent;
use switchtower_proto::v1::{
    Ack, AgentMessage, DriftCause, GoAwayReason, KernelTable, Nack, NackReason, Pong, ProxyMode, Report,
};
use tokio::time::Instant;

use super::{End, HOLD, HOLD_FACTOR, PROMPT, Pause, Session, bounded};
use crate::fleet::Signal;
use crate::status::News;
use crate::status::observation::{RefusedGeneration, nack_reason};
use crate::text::sanitized;

/// Maximum delay before a snapshot that the agent cannot accept is sent again without a change of the view.
const REFUSED_SNAPSHOT_DELAY: Duration = Duration::from_secs(3_600);
/// Maximum number of kernel settings in a row.
const KERNEL_SETTINGS: usize = 8;

/// Validates and truncates a message as a stream does, for fuzzing.
pub(crate) fn read_message(message: FromAgent) {
    match message {
        FromAgent::Hello(hello) => {
            let node = hello.node_name.clone();
            if super::hello::check(&hello, &node, 0).is_ok() {
                let (deviations, trial) = (hello.deviations, hello.trial);
                let _ = (deviations.map(bounded::deviations), trial.map(bounded::trial));
            }
        }
        FromAgent::Ack(ack) => drop(ack.deviations.map(bounded::deviations)),
        FromAgent::Nack(nack) => drop((nack_reason(nack.reason()), sanitized(&nack.detail))),
        FromAgent::Report(report) => drop(report.trial.map(bounded::trial)),
        FromAgent::Answer(answer) => drop(KernelTable::decode(&*answer.part)),
        _ => {}
    }
}

impl Session {
    pub(super) async fn receive(&mut self, message: AgentMessage, signal: &Signal) -> Result<(), End> {
        self.note_contact(signal);
        let malformed = |detail: &str| Err(End::GoAway(GoAwayReason::Malformed, detail.to_owned()));
        if !self.allowance.take(self.contact.heard().into_std()) {
            return malformed("too many messages");
        }
        match message.message {
            Some(FromAgent::Ack(ack)) if ack.session == self.number => self.acknowledged(ack),
            Some(FromAgent::Nack(nack)) if nack.session == self.number => {
                self.refused(&nack);
                Ok(())
            }
            Some(FromAgent::Report(report)) if report.session == self.number => {
                self.reported(&report);
                Ok(())
            }
            // Of an earlier session, and therefore outdated.
            Some(FromAgent::Ack(_) | FromAgent::Nack(_) | FromAgent::Report(_)) => Ok(()),
            Some(FromAgent::Ping(ping)) => self.send(ToAgent::Pong(Pong { sequence: ping.sequence })).await,
            Some(FromAgent::Answer(answer)) => {
                self.query.take(answer);
                Ok(())
            }
            Some(FromAgent::DrainQuery(query)) => match self.drains.begin(&self.fleet, &self.node, &query) {
                Ok(None) => Ok(()),
                Ok(Some(answer)) => self.send(ToAgent::DrainAnswer(answer)).await,
                Err(detail) => malformed(detail),
            },
            Some(FromAgent::DrainCancel(cancel)) => {
                self.drains.cancel(cancel.id);
                Ok(())
            }
            Some(FromAgent::Pong(_)) => Ok(()),
            Some(FromAgent::Hello(_)) => malformed("a second Hello"),
            None => malformed("a message without content"),
        }
    }

    fn acknowledged(&mut self, ack: Ack) -> Result<(), End> {
        let Some(in_flight) = self.in_flight.take_if(|in_flight| in_flight.to == ack.generation) else {
            // Deviations may change without an update, for example when held removals are released.
            if ack.generation == self.generation {
                // Until the agent has a position in the log, its content is about to be replaced.
                if let Some(cursor) = &self.cursor {
                    if ack.digest != cursor.digest().to_bytes() {
                        let detail =
                            format!("generation {} was acknowledged with another digest", ack.generation);
                        return Err(End::GoAway(GoAwayReason::Malformed, detail));
                    }
                    self.unproven = false;
                    let cursor = cursor.clone();
                    self.note_ack(ack, &cursor, None, None, false);
                }
                return Ok(());
            }
            let detail = format!("generation {} was acknowledged but not sent", ack.generation);
            return Err(End::GoAway(GoAwayReason::Malformed, detail));
        };
        if ack.digest != in_flight.after.digest().to_bytes() {
            let detail = format!("generation {} was acknowledged with another digest", ack.generation);
            return Err(End::GoAway(GoAwayReason::Malformed, detail));
        }
        if !in_flight.retried {
            self.fleet.metrics().ack_seconds.observe(in_flight.since.elapsed().as_secs_f64());
        }
        self.generation = in_flight.to;
        self.unproven = false;
        self.refusals = 0;
        let delivery = in_flight.delivered(ack.timings.as_ref());
        let late = in_flight.late;
        let settings = &in_flight.after.subscription().settings;
        let switched = self.cursor.as_ref().is_some_and(|cursor| cursor.subscription().settings != *settings);
        let took = Duration::from_nanos(delivery.acknowledged.saturating_sub(delivery.started));
        self.note_ack(ack, &in_flight.after, Some(delivery), switched.then_some(took), late);
        self.cursor = Some(in_flight.after);
        let took = in_flight.since.elapsed();
        self.held_until =
            (took >= PROMPT).then(|| Instant::now() + (took * HOLD_FACTOR).min(HOLD.saturating_sub(took)));
        // A number from a session before may be ahead of this one.
        self.due = self.generation < self.highest;
        Ok(())
    }

    /// `took`: time until a change of settings was acknowledged. `late`: the row may show that the node is behind.
    fn note_ack(
        &self,
        ack: Ack,
        at: &Cursor,
        delivery: Option<Delivery>,
        took: Option<Duration>,
        late: bool,
    ) {
        let mode = ack.mode();
        let Ack { generation, digest, deviations, timings, .. } = ack;
        let deviations = deviations.map(bounded::deviations);
        let settings = Some(at.subscription().settings.clone());
        let held = deviations.as_ref().map_or(0, |deviations| deviations.held);
        let mut held_before = held;
        self.fleet.reached(&self.node, self.number, at, delivery, |known| {
            held_before = known.deviations.as_ref().map_or(0, |deviations| deviations.held);
            let same = known.acknowledged
                && known.failure.is_none()
                && known.deviations == deviations
                && known.settings == settings
                && known.mode == mode;
            known.acknowledged = true;
            known.applied = generation;
            known.digest = digest.as_slice().try_into().ok();
            known.deviations = deviations;
            known.mode = mode;
            known.failure = None;
            known.settings = settings;
            known.settings_took = took.or(known.settings_took);
            known.counts = timings.map(|timings| (timings.services, timings.endpoints)).or(known.counts);
            if same && !late { News::Progress } else { News::Transition }
        });
        self.kernel_reached(at, held, mode);
        if held > held_before {
            self.fleet.report_held(&self.node, held);
        }
    }

    /// Reports to the drain gate which revision the kernel has reached. With held removals it has endpoints that the
    /// revision lacks, so the node keeps its last place, and addresses removed since then do not count as drained. In mode
    /// Shadow another proxy sends connections, whose state is unknown.
    pub(super) fn kernel_reached(&self, at: &Cursor, held: u32, mode: ProxyMode) {
        if held == 0 && mode == ProxyMode::Active {
            self.fleet.holds(&self.node, self.number, at.revision());
        }
    }

    fn refused(&mut self, nack: &Nack) {
        let reason = nack.reason();
        let in_flight = self.in_flight.as_ref().is_some_and(|in_flight| in_flight.to == nack.generation);
        // A commit without a new generation, such as the switch to settings on trial: the agent retries, and repeats
        // the acknowledgement of the generation when its kernel accepts it.
        let held =
            self.cursor.is_some() && nack.generation == self.generation && reason == NackReason::Kernel;
        if !in_flight && !held {
            return;
        }
        self.fleet.metrics().nacked(nack_reason(reason).as_str());
        tracing::warn!(node = %self.node, generation = nack.generation, reason = nack_reason(reason).as_str(),
            errno = nack.errno, detail = sanitized(&nack.detail), "the agent refused an update");
        if let Some(sent) = self.in_flight.as_mut().filter(|_| in_flight) {
            let revision = sent.after.revision();
            // The agent keeps the update and acknowledges it when its kernel accepts it.
            sent.retried = reason == NackReason::Kernel;
            self.fleet.refused(&self.node, self.number, revision, nack_reason(reason).as_str());
            if reason != NackReason::Kernel {
                self.recover_from_refusal(reason, nack.kept);
            }
        }
        self.fleet.observe_with(&self.node, self.number, |known| {
            known.failure = Some(RefusedGeneration {
                reason: nack_reason(reason),
                detail: sanitized(&nack.detail),
                errno: nack.errno,
                generation: nack.generation,
            });
            News::Transition
        });
    }

    /// Sends a snapshot after a refused delta. After a refused snapshot, or repeated refusals, waits first: an
    /// immediate repetition would fail in the same way.
    fn recover_from_refusal(&mut self, reason: NackReason, kept: u64) {
        let Some(in_flight) = self.in_flight.take() else { return };
        self.due = true;
        self.refusals = self.refusals.saturating_add(1);
        let unknown = reason == NackReason::UnknownFeature;
        if !unknown || kept != self.generation {
            self.cursor = None;
        }
        if unknown || in_flight.snapshot || self.refusals > 1 {
            let now = Instant::now();
            let backoff = self.limits.pause * (1 << self.refusals.min(7).saturating_sub(1));
            // An agent refuses the same snapshot every time for these reasons.
            let permanent =
                in_flight.snapshot && matches!(reason, NackReason::OverLimit | NackReason::Malformed);
            let (earliest, latest) =
                if permanent { (backoff, REFUSED_SNAPSHOT_DELAY) } else { (self.limits.pause, backoff) };
            self.pause = Some(Pause {
                refused: in_flight.after.digest(),
                wait_for_change: unknown || permanent,
                earliest: now + earliest,
                until: now + latest.mul_f64(rand::random_range(0.5..1.0)),
            });
        }
    }

    fn reported(&self, report: &Report) {
        self.fleet.report_health_check_failures(&self.node, &report.health_check_failures);
        self.fleet.observe_with(&self.node, self.number, |known| {
            // Without a cause the count is historical, repeated for a controller that may not know it.
            if report.drift_repaired > known.drift_repaired && report.drift_cause() != DriftCause::Unspecified
            {
                known.note_drift(report.drift_cause());
            }
            known.drift_repaired = report.drift_repaired;
            known.foreign_proxy = report.foreign_proxy;
            let unset = report.unset_kernel_settings.iter().take(KERNEL_SETTINGS);
            known.unset_kernel_settings = unset.map(|one| sanitized(one)).collect();
            known.drain_gate_failure = sanitized(&report.drain_gate_failure);
            if let Some(trial) = &report.trial {
                known.trial = Some(bounded::trial(trial.clone()));
            }
            News::Transition
        });
    }
}
