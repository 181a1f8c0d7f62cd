//! The latest observation of a node's agent: input of a row.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use switchtower_admin_api::NodeReason;
use switchtower_core::locality::Locality;
use switchtower_proto::v1::{Deviations, DriftCause, NackReason, ProxyMode, TrialStatus};
use tokio::time::Instant;

/// Maximum number of lost streams that are kept per node.
pub const LOSSES: usize = 32;

/// State of one node's agent in the registry of streams.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observation {
    /// Number of the session; increases with each stream.
    pub session: u64,
    /// Start of the stream.
    pub since: Timestamp,
    /// End of the stream, or the last message of an agent that has become silent; `None` while the agent is in contact.
    pub lost_since: Option<Timestamp>,
    /// Meaning of `lost_since`.
    pub loss: Loss,
    /// Generation that the node should hold.
    pub desired: u64,
    /// Generation that was sent last.
    pub sent: u64,
    /// Generation that the kernel holds.
    pub applied: u64,
    /// The agent acknowledged a generation in this session, or the session resumed without a change.
    pub acknowledged: bool,
    /// Time since which `applied` is below `desired`.
    pub behind_since: Option<Timestamp>,
    /// Digest of the acknowledged generation.
    pub digest: Option<[u8; 16]>,
    /// Deviations from Hello or the last acknowledgement.
    pub deviations: Option<Deviations>,
    /// The last refusal, until the next acknowledgement.
    pub failure: Option<RefusedGeneration>,
    /// Version of the agent.
    pub agent_version: String,
    /// Kernel release of the node.
    pub kernel_version: String,
    /// Reported addresses of the node's interfaces. Used in explanations only, never compiled.
    pub addresses: Vec<std::net::IpAddr>,
    /// Reported numbers of services and endpoints in the node's view.
    pub counts: Option<(u32, u32)>,
    /// Foreign changes repaired since the agent started.
    pub drift_repaired: u64,
    /// Cause of the last foreign change.
    pub drift_cause: DriftCause,
    /// Time of the last repaired foreign change.
    pub drift_at: Option<Timestamp>,
    /// Mode of the tables in the kernel.
    pub mode: ProxyMode,
    /// Rules of kube-proxy exist on the node.
    pub foreign_proxy: bool,
    /// Kernel settings of the profile that are not in force, each with its values and the reason.
    pub unset_kernel_settings: Vec<String>,
    /// Reason why the drain gate does not work; empty if it works or is off.
    pub drain_gate_failure: String,
    /// Profile and revision of the settings in the last acknowledged view; `None` before the first.
    pub settings: Option<(Arc<str>, u64)>,
    /// Time from sending these settings to their acknowledgement; `None` if the stream began with them.
    pub settings_took: Option<Duration>,
    /// The same times on the monotonic clock.
    pub moments: Moments,
    /// State of the agent's last trial of settings, from Hello or a report.
    pub trial: Option<TrialStatus>,
    /// Local detection in the node's desired settings, and the pods that it misses.
    pub locality: Locality,
}

/// How the contact to an agent was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Loss {
    /// Its stream ended.
    #[default]
    StreamEnded,
    /// Its stream is open, but its heartbeats do not arrive.
    Silent,
}

/// Times on the monotonic clock, for durations. The times of the wall clock are for display.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// Start of the stream.
    pub connected: Option<Instant>,
    /// End of the stream.
    pub lost: Option<Instant>,
    /// Last repaired foreign change.
    pub drifted: Option<Instant>,
    /// The last streams that were lost without a cause in this controller, at most [`LOSSES`].
    pub losses: VecDeque<Instant>,
}

impl Observation {
    /// Records the start of a stream.
    pub fn note_connected(&mut self) {
        (self.since, self.lost_since) = (Timestamp::now(), None);
        self.moments.connected = Some(Instant::now());
    }

    /// Records the end of the stream. The contact may have been lost before.
    pub fn note_end(&mut self) {
        self.loss = Loss::StreamEnded;
        if self.lost_since.is_none() {
            self.lost_since = Some(Timestamp::now());
            self.moments.lost = Some(Instant::now());
        }
    }

    /// Records that heartbeats have been missing since the last message, `elapsed` ago.
    pub fn note_silence(&mut self, elapsed: Duration) {
        self.loss = Loss::Silent;
        self.lost_since = Some(Timestamp::now() - elapsed);
        self.moments.lost = Instant::now().checked_sub(elapsed);
    }

    /// Records a message after a silence.
    pub fn note_contact(&mut self) {
        self.lost_since = None;
        self.moments.lost = None;
    }

    /// Records that the stream was lost.
    pub fn note_loss(&mut self) {
        if self.moments.losses.len() == LOSSES {
            self.moments.losses.pop_front();
        }
        self.moments.losses.push_back(Instant::now());
    }

    /// Records the repair of a foreign change.
    pub fn note_drift(&mut self, cause: DriftCause) {
        (self.drift_at, self.drift_cause) = (Some(Timestamp::now()), cause);
        self.moments.drifted = Some(Instant::now());
    }
}

/// A generation that the agent refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedGeneration {
    /// Reason of the condition.
    pub reason: NodeReason,
    /// Message of the agent.
    pub detail: String,
    /// Error number of the kernel; 0 if the kernel is not the cause.
    pub errno: i32,
    /// The refused generation.
    pub generation: u64,
}

/// Returns the condition reason of a refusal.
#[must_use]
pub fn nack_reason(reason: NackReason) -> NodeReason {
    match reason {
        NackReason::Unspecified => NodeReason::Refused,
        NackReason::FromMismatch => NodeReason::FromMismatch,
        NackReason::DigestMismatch => NodeReason::DigestMismatch,
        NackReason::Malformed => NodeReason::MalformedUpdate,
        NackReason::OverLimit => NodeReason::OverLimit,
        NackReason::UnknownFeature => NodeReason::UnknownFeature,
        NackReason::Kernel => NodeReason::KernelRefused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_ends_with_a_message_or_the_stream() {
        let mut known = Observation::default();
        known.note_connected();
        tokio::time::advance(Duration::from_secs(60)).await;
        known.note_silence(Duration::from_secs(7));
        let silent_since = known.lost_since;
        assert_eq!((known.loss, silent_since.is_some()), (Loss::Silent, true));
        assert_eq!(known.moments.lost.map(|at| at.elapsed()), Some(Duration::from_secs(7)));
        known.note_end();
        assert_eq!((known.loss, known.lost_since), (Loss::StreamEnded, silent_since), "it was lost before");
        known.note_connected();
        known.note_silence(Duration::from_secs(7));
        known.note_contact();
        assert_eq!((known.lost_since, known.moments.lost), (None, None));
    }
}
