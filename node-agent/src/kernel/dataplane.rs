//! The interface between the agent's state and the kernel.
//!
//! [`crate::kernel::nft`] implements it with nf_tables; tests of the engine and session use a fake in memory.

use std::net::SocketAddr;
use std::time::Duration;

use crate::kernel::change::KernelChange;

/// Identification of the tables' content, written in the same transaction as the content, in both tables.
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

/// An item of the view that is not in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The item in readable form: `frontend 10.96.0.10:80/TCP (default/web)`.
    pub item: String,
    /// The reason in readable form.
    pub reason: String,
    /// The kernel's error number; 0 if the agent's own limit refused it.
    pub errno: i32,
}

/// The outcome of a commit.
#[derive(Debug, Clone, Default)]
pub struct Committed {
    /// Element, chain and rule operations in the batch, without the stamp. 0: only the stamp was written.
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
    /// The commit; `None` if the kernel held exactly the view already and nothing was written.
    pub committed: Option<Committed>,
    /// All items that are refused now.
    pub refused: Vec<Refused>,
}

/// The outcome of [`Dataplane::repair`].
#[derive(Debug, Clone, Default)]
pub struct Repaired {
    /// Number of elements, rules, chains and sets that another program changed, without refused items.
    pub differences: u32,
    /// All items that are refused now, after a retry of each.
    pub refused: Vec<Refused>,
}

/// The reason why nothing was committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The kernel refused the batch for a reason that no single item explains (EPERM, ENOMEM, …).
    #[error("the kernel refused the transaction, the old generation stays ({operation}, errno {errno})")]
    Refused {
        /// The attempted operation.
        operation: String,
        /// The kernel's error number.
        errno: i32,
    },
    /// The kernel refused the changes of one address family; it holds those of the other family, without a stamp.
    #[error(
        "the kernel refused the transaction of {family}, whose old generation stays; the other family's changes are in \
         force ({operation}, errno {errno})"
    )]
    Family {
        /// The refused address family: `IPv4` or `IPv6`.
        family: &'static str,
        /// The attempted operation.
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
            CommitError::Refused { errno, .. } | CommitError::Family { errno, .. } => *errno,
            CommitError::Io(error) => error.raw_os_error().unwrap_or(0),
        }
    }
}

/// The programmable part of the kernel.
pub trait Dataplane: Send {
    /// Reads the stamp. `None` if a table is absent, the stamps of both tables differ, or another layout version wrote
    /// them.
    ///
    /// # Errors
    /// The dump failed.
    fn stamp(&mut self) -> Result<Option<Stamp>, CommitError>;

    /// Makes the kernel hold exactly `view` (the whole merged view as additions) with as few writes as possible: dumps
    /// our tables, recovers ids, compares and repairs. Called at start, and whenever the incremental state may be wrong.
    ///
    /// # Errors
    /// Nothing was committed, or only one family ([`CommitError::Family`]).
    fn adopt(&mut self, view: &[KernelChange], stamp: Stamp) -> Result<Adopted, CommitError>;

    /// Applies changes in one transaction, with the stamp. If the kernel refuses an item, the batch is retried without
    /// it; [`Committed::refused`] lists the item until it is replaced or removed.
    ///
    /// # Errors
    /// Nothing was committed and the kernel holds the previous generation, or only one family was committed
    /// ([`CommitError::Family`]). The next commit may contain the same changes again.
    fn commit(&mut self, changes: &[KernelChange], stamp: Stamp) -> Result<Committed, CommitError>;

    /// Removes frontends at these addresses from the kernel, except ClusterIPs, so that the agent can reach its
    /// controllers before it may write anything else. Returns the number of removed elements.
    ///
    /// # Errors
    /// The kernel could not be read or written.
    fn release(&mut self, controllers: &[SocketAddr]) -> Result<usize, CommitError>;

    /// Compares the kernel with the desired content and repairs differences in one transaction, with a retry of the
    /// refused items.
    ///
    /// # Errors
    /// The dump or the repair failed.
    fn repair(&mut self) -> Result<Repaired, CommitError>;

    /// Retries the items that the kernel refused, without a comparison. Returns all items that are refused now.
    ///
    /// # Errors
    /// The transaction failed.
    fn retry_refused(&mut self) -> Result<Vec<Refused>, CommitError>;
}
