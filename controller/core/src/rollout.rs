//! Rollouts of settings: which node gets which revision of a profile, as a pure function of what is known.
//!
//! [`decide()`] takes one rollout, the whole fleet and the time, and returns what to store and which nodes to move.
//! [`profile`] determines the profile of a node, the stable revision, and when a new rollout begins.
//!
//! Invariants:
//! * A node is touched iff its row names the target. Counts are made of that at each decision, never kept.
//! * What a decision needs beyond rows and agents is in [`Progress`], which is stored with each decision before
//!   any node is moved: a controller that dies in between loses nothing and repeats nothing.
//! * No more nodes than `max_unavailable` are out of order because of a rollout, and none is touched while too much
//!   is out of order elsewhere.
//! * A rollout that failed, was aborted or superseded never touches a node again except to return it.
//! * A step is passed only with a node at hand that holds the target and passed its gates.

use std::time::Duration;

mod decide;
mod describe;
pub mod handover;
mod judge;
mod model;
mod order;
pub mod profile;
mod selector;
mod survey;

#[cfg(test)]
mod tests;

pub use decide::{Decision, decide};
pub use describe::{Condition, Status, Transition};
pub use judge::{Health, health};
pub use model::{
    Acknowledgements, Agent, Assignment, Excluded, FailedNode, FleetNode, Observed, Progress, Quantity,
    Revision, Rollout, Step, Strategy, Trial, TrialPhase, UpdateRefusal,
};
pub use selector::{Requirement, Selector};
pub use switchtower_admin_api::{FailureReason, RolloutState as State, WaitingOn};

/// A point in time, in milliseconds since 1970. Times of different clocks are compared with care: where one lies in
/// the future, no time has passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub i64);

impl Time {
    /// Returns the time since `earlier`; zero if it lies in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}
