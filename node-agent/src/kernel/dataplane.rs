//! What the agent asks of the kernel: the seam between [`crate::controller::session`] and [`crate::kernel::nft`].
//!
//! One implementation programs nf_tables; tests of the session use one in memory.

use std::net::SocketAddr;
use std::time::Duration;

use crate::kernel::change::KernelChange;

/// What the kernel holds, written in the same transaction as the content, in both tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamp {
    /// The node's generation.
    pub generation: u64,
    /// Digest of the desired view at that generation.
    pub digest: u128,
    /// Hash of the node facts (settings, node record, host addresses) that the content was resolved with.
    pub facts: u64,
    /// Number of items in which the kernel differs from the desired view on purpose.
    pub deviations: u32,
}

/// An item that is not in the kernel although the view has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The item, for people: `frontend 10.96.0.10:80/TCP (default/web)`.
    pub item: String,
    /// Why.
    pub reason: String,
    /// The kernel's error number; 0 if the agent's own limit refused it.
    pub errno: i32,
}

/// The outcome of a commit.
#[derive(Debug, Clone, Default)]
pub struct Committed {
    /// Element, chain and rule operations in the batch, the stamp not counted. 0: only the stamp was written.
    pub operations: u32,
    /// Time to plan and encode.
    pub plan: Duration,
    /// Time in the kernel.
    pub commit: Duration,
    /// All items that are refused now, not only those of this commit.
    pub refused: Vec<Refused>,
}

/// The outcome of [`Dataplane::adopt`].
#[derive(Debug, Clone, Default)]
pub struct Adopted {
    /// The commit that was needed; `None` if the kernel held exactly the view already: nothing was written.
    pub committed: Option<Committed>,
    /// Items refused now.
    pub refused: Vec<Refused>,
}

/// The outcome of [`Dataplane::repair`].
#[derive(Debug, Clone, Default)]
pub struct Repaired {
    /// Elements, rules, chains and sets that somebody else changed. What is refused is none of them.
    pub differences: u32,
    /// All items that are refused now: each was tried again.
    pub refused: Vec<Refused>,
}

/// Why nothing was committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The kernel refused the batch for a reason that no single item explains (EPERM, ENOMEM, …).
    #[error("the kernel refused the transaction, the old generation stays ({operation}, errno {errno})")]
    Refused {
        /// What was attempted.
        operation: String,
        /// The kernel's error number.
        errno: i32,
    },
    /// The netlink socket failed.
    #[error("nf_tables netlink: {0}")]
    Io(#[from] std::io::Error),
}

impl CommitError {
    /// The error number for a NACK, 0 if unknown.
    pub fn errno(&self) -> i32 {
        match self {
            CommitError::Refused { errno, .. } => *errno,
            CommitError::Io(error) => error.raw_os_error().unwrap_or(0),
        }
    }
}

/// The kernel as the agent sees it.
pub trait Dataplane: Send {
    /// What the tables' stamps say. `None` if a table is absent, the stamps differ, or another layout version
    /// wrote them.
    ///
    /// # Errors
    /// The dump failed.
    fn stamp(&mut self) -> Result<Option<Stamp>, CommitError>;

    /// Makes the kernel hold exactly `view` (the whole merged view as additions) with as few writes as
    /// possible: dumps the own tables, recovers ids, compares, repairs. Called once at start, and again
    /// whenever the incremental state is in doubt.
    ///
    /// # Errors
    /// Nothing was committed.
    fn adopt(&mut self, view: &[KernelChange], stamp: Stamp) -> Result<Adopted, CommitError>;

    /// Applies changes in one transaction, with the stamp. An item that the kernel refuses is taken out and
    /// the batch is tried again; it is listed in [`Committed::refused`] until it is replaced or removed.
    ///
    /// # Errors
    /// Nothing was committed, and the kernel still holds the generation before.
    fn commit(&mut self, changes: &[KernelChange], stamp: Stamp) -> Result<Committed, CommitError>;

    /// Takes frontends at these addresses out of the kernel, except ClusterIPs, so that the agent can reach its
    /// controllers although nothing else may be written yet. Returns how many elements were removed.
    ///
    /// # Errors
    /// The kernel could not be read or written.
    fn release(&mut self, controllers: &[SocketAddr]) -> Result<usize, CommitError>;

    /// Compares the kernel with what it should hold and repairs differences in one transaction. Items that the
    /// kernel refused before are tried again.
    ///
    /// # Errors
    /// The dump or the repair failed.
    fn repair(&mut self) -> Result<Repaired, CommitError>;
}
