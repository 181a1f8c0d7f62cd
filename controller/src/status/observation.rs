//! What is known of a node's agent: the input of a row.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use switchtower_core::locality::Locality;
use switchtower_proto::v1::{Deviations, NackReason, TrialStatus};
use tokio::time::Instant;

/// Most lost streams that are remembered of a node.
pub const LOSSES: usize = 32;

/// One node's agent, as the registry of streams saw it last.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observation {
    /// Number of the node's stream; grows with each.
    pub session: u64,
    /// When the stream began.
    pub since: Timestamp,
    /// When it ended; `None` while it is open.
    pub lost_since: Option<Timestamp>,
    /// What the node should hold.
    pub desired: u64,
    /// What was sent last.
    pub sent: u64,
    /// What the kernel holds.
    pub applied: u64,
    /// The agent acknowledged something in this session, or was resumed without a change.
    pub acknowledged: bool,
    /// Since when `applied` is below `desired`.
    pub behind_since: Option<Timestamp>,
    /// Digest of what was acknowledged.
    pub digest: Option<[u8; 16]>,
    /// Of Hello or the last acknowledgement; `None` without any.
    pub deviations: Option<Deviations>,
    /// The refusal that was not followed by an acknowledgement.
    pub failure: Option<Failure>,
    /// The agent's version.
    pub agent_version: String,
    /// The node's kernel release.
    pub kernel_version: String,
    /// The addresses of the node's interfaces, as the agent told them; for explanations, never compiled.
    pub addresses: Vec<std::net::IpAddr>,
    /// Services and endpoints in the node's view, as the agent counted them.
    pub counts: Option<(u32, u32)>,
    /// Foreign changes repaired since the agent started.
    pub drift_repaired: u64,
    /// The last one's cause.
    pub drift_cause: String,
    /// When the number grew last.
    pub drift_at: Option<Timestamp>,
    /// Rules of kube-proxy exist on the node.
    pub foreign_proxy: bool,
    /// Kernel settings of the profile that are not in force, each with its values and why.
    pub unset_kernel_settings: Vec<String>,
    /// Profile and revision of the settings in the view that was acknowledged last; `None` before the first.
    pub settings: Option<(Arc<str>, u64)>,
    /// From the sending of these settings to their acknowledgement; `None` if the stream began with them.
    pub settings_took: Option<Duration>,
    /// The same times by a clock that never jumps.
    pub moments: Moments,
    /// Where the agent's last trial of settings stands, as it told in Hello or Report.
    pub trial: Option<TrialStatus>,
    /// Whether the settings that the node is to have recognise its pods.
    pub locality: Locality,
}

/// When things happened, for those who measure how long ago that was; the wall clock's times are for people.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// The stream began.
    pub connected: Option<Instant>,
    /// It ended.
    pub lost: Option<Instant>,
    /// The number of repaired foreign changes grew last.
    pub drifted: Option<Instant>,
    /// Streams were lost lately without this controller's doing, at most [`LOSSES`].
    pub losses: VecDeque<Instant>,
}

impl Observation {
    /// The stream begins.
    pub fn note_connected(&mut self) {
        (self.since, self.lost_since) = (Timestamp::now(), None);
        self.moments.connected = Some(Instant::now());
    }

    /// The stream is over.
    pub fn note_end(&mut self) {
        self.lost_since = Some(Timestamp::now());
        self.moments.lost = Some(Instant::now());
    }

    /// Remembers that the stream was lost.
    pub fn note_loss(&mut self) {
        if self.moments.losses.len() == LOSSES {
            self.moments.losses.pop_front();
        }
        self.moments.losses.push_back(Instant::now());
    }

    /// Foreign changes were repaired, this one the last.
    pub fn note_drift(&mut self, cause: String) {
        (self.drift_at, self.drift_cause) = (Some(Timestamp::now()), cause);
        self.moments.drifted = Some(Instant::now());
    }
}

/// A generation that the agent refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One CamelCase word.
    pub reason: &'static str,
    /// What the agent says.
    pub detail: String,
    /// The kernel's error number, 0 if it was not the kernel.
    pub errno: i32,
    /// Which generation.
    pub generation: u64,
}

/// The reason of a refusal as it stands in a condition.
#[must_use]
pub fn nack_word(reason: NackReason) -> &'static str {
    match reason {
        NackReason::Unspecified => "Refused",
        NackReason::FromMismatch => "FromMismatch",
        NackReason::DigestMismatch => "DigestMismatch",
        NackReason::Malformed => "MalformedUpdate",
        NackReason::OverLimit => "OverLimit",
        NackReason::UnknownFeature => "UnknownFeature",
        NackReason::Kernel => "KernelRefused",
    }
}
