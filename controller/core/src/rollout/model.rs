//! Inputs of decisions.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use switchtower_proto::v1::DriftCause;

use super::{Selector, State, Time, WaitingOn};

/// A revision of a profile, such as `default@7`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision {
    /// The profile's name.
    pub profile: Arc<str>,
    /// Its revision, from 1; 0 for the built-in settings.
    pub number: u64,
}

impl Revision {
    /// The name of the settings that hold without any profile.
    pub const BUILTIN: &'static str = "builtin";

    /// The settings that hold without any profile.
    #[must_use]
    pub fn builtin() -> Self {
        Self { profile: Self::BUILTIN.into(), number: 0 }
    }

    /// Returns true for the built-in settings.
    #[must_use]
    pub fn is_builtin(&self) -> bool {
        self.number == 0
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}@{}", self.profile, self.number)
    }
}

/// A number of nodes, or a share of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// So many.
    Number(u32),
    /// This share, 0 to 100; rounded up.
    Percent(u8),
}

impl Quantity {
    /// Returns the number out of `all`, at most `all`.
    #[must_use]
    pub fn of(self, all: usize) -> usize {
        match self {
            Self::Number(number) => usize::try_from(number).unwrap_or(usize::MAX).min(all),
            Self::Percent(percent) => (all * usize::from(percent)).div_ceil(100).min(all),
        }
    }
}

/// One step of a strategy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Display name, possibly empty.
    pub name: String,
    /// Which nodes; `None`: all of the profile.
    pub selector: Option<Selector>,
    /// Number of them that hold the target at the end.
    pub nodes: Quantity,
    /// Label keys; nodes are taken in turn from the groups of equal values.
    pub spread_by: Vec<String>,
    /// Time for which its nodes are watched after all of them hold the target.
    pub soak: Duration,
    /// A person approves it afterwards.
    pub manual: bool,
}

/// Strategy of a rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Strategy {
    /// In their order.
    pub steps: Vec<Step>,
    /// Maximum number of nodes that may be unavailable at the same time; at least one.
    pub max_unavailable: Quantity,
    /// From the assignment to a connected node's acknowledgement; and how long the agent of a canary may be gone.
    pub apply_deadline: Duration,
    /// Without an advance for this long the rollout shows as stalled.
    pub progress_deadline: Duration,
    /// Lost streams of a touched node that are still in order.
    pub maximum_reconnects: usize,
    /// More than this share of untouched nodes unhealthy: the cause is elsewhere.
    pub freeze_percent: u8,
}

/// A rollout as stored in the API server.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Seeds the order of nodes.
    pub uid: Arc<str>,
    /// Revision to roll out.
    pub target: Revision,
    /// Revision to which nodes return.
    pub stable: Revision,
    /// Strategy.
    pub strategy: Strategy,
    /// No further node is touched.
    pub paused: bool,
    /// Steps that a person approved, from the first on.
    pub approved_steps: usize,
    /// It is to end.
    pub abort: bool,
    /// A newer revision takes its place, or its profile is going away.
    pub superseded: bool,
    /// Its profile is being deleted, and it gives the nodes the settings of this revision, which they get afterwards.
    pub handover: Option<Revision>,
    /// Progress stored with the last decision.
    pub progress: Progress,
}

/// State stored between decisions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// State.
    pub state: State,
    /// Event that it waits for.
    pub waiting_on: Option<WaitingOn>,
    /// Steps that are done.
    pub steps_done: usize,
    /// Time at which the first node of the current step was seen to be touched.
    pub step_began_at: Option<Time>,
    /// Since when all nodes of the current step hold the target.
    pub soaking_since: Option<Time>,
    /// Time of the latest advance of a node or a step.
    pub advanced_at: Option<Time>,
    /// Number of nodes that held the target then.
    pub updated: usize,
    /// Number of failed nodes.
    pub failed: usize,
    /// The first of them, at most 16.
    pub failures: Vec<FailedNode>,
}

/// A node that failed, with the evidence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FailedNode {
    /// The node.
    pub node: String,
    /// The name of a [`FailureReason`](super::FailureReason).
    pub reason: String,
    /// Human-readable message.
    pub message: String,
    /// The kernel's error number, 0 if there is none.
    pub errno: i32,
    /// Trace of the change, 32 hexadecimal digits; empty if there is none.
    pub trace: String,
}

/// A node that is left out for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Excluded {
    /// The node.
    pub node: Arc<str>,
    /// Machine-readable reason in CamelCase.
    pub reason: &'static str,
}

/// Time that nodes took from being sent a revision to acknowledging it. Reported, never judged by: a node whose kernel
/// is busy is no worse for that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledgements {
    /// Of how many nodes that is known.
    pub nodes: usize,
    /// Half of them took no longer.
    pub median: Duration,
    /// None took longer.
    pub slowest: Duration,
    /// The node that took longest.
    pub slowest_node: Arc<str>,
}

/// The revision that a node's row names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Which one.
    pub revision: Revision,
    /// Since when; never before the row was written, if this controller saw that.
    pub at: Time,
    /// Trace of the assignment, 32 hexadecimal digits; empty if it is not known.
    pub trace: String,
    /// Revision of another profile that the node had before a rollout touched it, and returns to; see
    /// [`profile::origin`](super::profile::origin).
    pub previous: Option<Revision>,
}

/// A node with everything that decisions look at.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetNode {
    /// Its name.
    pub name: Arc<str>,
    /// UID of the Node.
    pub uid: Arc<str>,
    /// Labels of the Node.
    pub labels: Arc<BTreeMap<String, String>>,
    /// The profile that it belongs to.
    pub profile: Option<Arc<str>>,
    /// Revision that its row names or is about to name; `None` before anything was assigned.
    pub assigned: Option<Assignment>,
    /// Revision that its row still names while something else is being written.
    pub still: Option<Revision>,
    /// The row does not name `assigned` yet, so that the node does not know it.
    pub pending: bool,
    /// The row names a revision that no ProxyRollout describes, for example after its finalizer was removed by hand.
    pub unknown: bool,
    /// State of its agent.
    pub agent: Agent,
    /// Since when its agent has been gone, as far as this controller knows.
    pub lost: Option<Time>,
}

/// State of a node's agent.
#[derive(Debug, Clone, PartialEq)]
pub enum Agent {
    /// Nothing yet: this controller has just started.
    Unknown,
    /// There has been none.
    Absent,
    /// Not connected.
    Disconnected,
    /// Connected, with its latest reports.
    Connected(Box<Observed>),
}

impl Agent {
    /// A connected agent.
    #[must_use]
    pub fn connected(observed: Observed) -> Self {
        Self::Connected(Box::new(observed))
    }
}

/// A connected agent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// Start of its stream.
    pub since: Time,
    /// Settings of the last view that it acknowledged; `None` before the first.
    pub acknowledged: Option<Revision>,
    /// From the sending of these to their acknowledgement; `None` if it had them before the stream began.
    pub took: Option<Duration>,
    /// Other settings are in force than the acknowledged ones.
    pub in_force: Option<Revision>,
    /// An update was refused and nothing acknowledged since.
    pub refusal: Option<UpdateRefusal>,
    /// Items that the kernel refused.
    pub refused_items: u32,
    /// Removals that are held back.
    pub held_removals: u32,
    /// State of its latest trial of settings.
    pub trial: Option<Trial>,
    /// Time and cause of the latest foreign change of its tables known to this controller.
    pub drift: Option<(Time, DriftCause)>,
    /// Times of recent stream losses.
    pub losses: Vec<Time>,
}

/// An update that the agent refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateRefusal {
    /// Machine-readable reason in CamelCase.
    pub reason: String,
    /// Reports of a connected agent.
    pub detail: String,
    /// The kernel's error number, 0 if it was not the kernel.
    pub errno: i32,
    /// The stream repairs this by itself, with a snapshot.
    pub transient: bool,
}

/// A trial of settings on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// Revision on trial.
    pub revision: Revision,
    /// State.
    pub phase: TrialPhase,
    /// The first probe whose failure counts: its name, address and what happened.
    pub evidence: Option<(String, i32)>,
}

/// Phase of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrialPhase {
    /// The probes run with the old settings.
    Before,
    /// The new settings are in force and probed.
    Watching,
    /// They are good.
    Passed,
    /// They are not: the node returned to its fallback by itself.
    RolledBack,
}
