//! Transactions: retries without refused elements, parts of large changes, and commits of a single family.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use super::batch::{Batch, RefusedMessage};
use super::element::{Changes, Data, Element};
use super::encode::{self, Encoded, Operation, Structure};
use super::layout::{FAMILY_IPV4, FAMILY_IPV6, RuleConfig, TABLE};
use super::mirror::Mirror;
use super::{Nft, dump, nfta, stamp_entries};
use crate::kernel::addresses::kernel_version;
use crate::kernel::dataplane::{CommitError, Stamp};

/// Maximum attempts of one transaction: each removes at least one refused element or waits for another writer.
const ATTEMPTS: usize = 256;
/// Maximum elements that one transaction changes in a family: it takes about 50 ms, during which no other process in
/// the network namespace can change nf_tables.
const TRANSACTION_LIMIT: usize = 32_768;
/// Delay after a conflict with another transaction.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// Conflicts after which the tables are compared; after twice as many they are rebuilt.
const BUSY_ATTEMPTS: usize = 20;

/// Address families of a transaction, or of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Families {
    Both,
    Ipv4,
    Ipv6,
}

impl Families {
    fn has_ipv4(self) -> bool {
        self != Self::Ipv6
    }

    fn has_ipv6(self) -> bool {
        self != Self::Ipv4
    }

    fn covers(self, other: Self) -> bool {
        self == Self::Both || self == other
    }

    fn join(self, other: Self) -> Self {
        if self == other { self } else { Self::Both }
    }

    /// Returns the name of the refused family and the other family; `None` for both.
    fn split(self) -> Option<(&'static str, Self)> {
        match self {
            Self::Both => None,
            Self::Ipv4 => Some(("IPv4", Self::Ipv6)),
            Self::Ipv6 => Some(("IPv6", Self::Ipv4)),
        }
    }
}

/// An operation that the kernel refused for a reason that no element explains.
#[derive(Debug)]
struct RefusedBatch {
    families: Families,
    operation: String,
    errno: i32,
}

/// The reason why a transaction failed.
enum Failed {
    Refused(RefusedBatch),
    Io(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Operations and kernel time of a transaction.
#[derive(Default)]
pub(super) struct Written {
    pub(super) operations: u32,
    pub(super) kernel: Duration,
}

/// The step after an attempt of a transaction.
enum Next {
    /// The transaction is committed.
    Done(Written),
    /// An element was removed or repaired: retry.
    Again,
    /// Another transaction, or an object that the kernel does not identify, conflicts: retry after a delay.
    Busy(Families),
    /// The tables differ from the expected content: compare with a dump, then retry.
    Compare(Families),
    /// The kernel refuses the changes of these families as a whole.
    Refused(RefusedBatch),
}

impl Nft {
    /// Sends the pending changes until the kernel accepts them. If it refuses those of one family, sends
    /// only the other family's, without a stamp: an agent that starts then finds none and compares.
    pub(super) fn transact(&mut self, stamp: Option<Stamp>) -> Result<Written, CommitError> {
        let entries = stamp.as_ref().map(stamp_entries).unwrap_or_default();
        let RefusedBatch { families, operation, errno } =
            match self.transact_families(Families::Both, &entries) {
                Ok(outcome) => {
                    self.stamp = stamp;
                    return Ok(outcome);
                }
                Err(Failed::Io(error)) => return Err(error.into()),
                Err(Failed::Refused(refusal)) => refusal,
            };
        if let Some((family, other)) = families.split()
            && self.transact_families(other, &BTreeMap::new()).is_ok()
        {
            self.stamp = None;
            return Err(CommitError::Family { family, operation, errno });
        }
        Err(CommitError::Refused { operation, errno })
    }

    /// Checks that the kernel accepts the empty tables, in a transaction that it aborts. Writes nothing. If a table
    /// exists, the kernel has accepted them before.
    ///
    /// # Errors
    /// The kernel refuses a part of them; the error names it and the kernel.
    pub fn check_support(&mut self) -> Result<(), CommitError> {
        for family in [FAMILY_IPV4, FAMILY_IPV6] {
            match dump::stamp(&mut self.socket, family) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(()),
            }
        }
        let absent = Structure { absent: true, ..Structure::default() };
        let (mut batch, entries) = (Batch::new(), BTreeMap::new());
        let v4 = encode::family(&mut batch, &Mirror::new(), &absent, &entries, usize::MAX);
        let boundary = batch.len();
        let v6 = encode::family(&mut batch, &Mirror::new(), &absent, &entries, usize::MAX);
        let aborting = batch.len();
        batch.push(libc::NFT_MSG_DELTABLE, 0, FAMILY_IPV4, |writer| {
            writer.string(nfta::table::NAME, &format!("{TABLE}-absent"));
        });
        let mut sent = Sent { batch, v4, v6, boundary };
        let failures = sent.batch.commit(&mut self.socket)?;
        match failures.iter().find(|failure| failure.message != aborting) {
            Some(failure) => {
                let operation = sent.operation(failure) + &unsupported(failure.errno);
                Err(CommitError::Refused { operation, errno: failure.errno })
            }
            None => Ok(()),
        }
    }

    fn transact_families(
        &mut self,
        families: Families,
        stamp: &BTreeMap<u32, [u8; 16]>,
    ) -> Result<Written, Failed> {
        let result = self.transact_parts(families, stamp);
        self.plan.v4.rejoin();
        self.plan.v6.rejoin();
        result
    }

    /// Only the last part has the stamp: an agent that starts between two parts finds none and compares.
    fn transact_parts(
        &mut self,
        families: Families,
        stamp: &BTreeMap<u32, [u8; 16]>,
    ) -> Result<Written, Failed> {
        let mut retry = Retry { chunk: usize::MAX, healed: Default::default() };
        let (mut compared, mut busy) = (false, 0);
        let mut blamed = families;
        let mut total = Written::default();
        self.split(families);
        let mut attempts = ATTEMPTS;
        while attempts > 0 {
            attempts -= 1;
            let last = (!families.has_ipv4() || self.plan.v4.is_last_part())
                && (!families.has_ipv6() || self.plan.v6.is_last_part());
            let entries = if last { stamp } else { &BTreeMap::new() };
            match self.attempt(families, entries, &mut retry)? {
                Next::Done(outcome) => {
                    total.operations += outcome.operations;
                    total.kernel += outcome.kernel;
                    if last {
                        return Ok(total);
                    }
                    self.next_part(families);
                    attempts = ATTEMPTS;
                    continue;
                }
                Next::Again => {}
                Next::Busy(families) => {
                    busy += 1;
                    blamed = families;
                    std::thread::sleep(BUSY_PAUSE);
                    // A conflict that lasts is in our tables: a foreign reference that the mirror does not know.
                    if busy % BUSY_ATTEMPTS == 0 {
                        self.compare_or_rebuild(families, &mut compared)?;
                    }
                }
                Next::Compare(families) => self.compare_or_rebuild(families, &mut compared)?,
                Next::Refused(refusal) => return Err(Failed::Refused(refusal)),
            }
            // The attempt may have changed the pending elements.
            self.split(families);
        }
        let operation = "every attempt was refused".to_owned();
        Err(Failed::Refused(RefusedBatch { families: blamed, operation, errno: libc::EBUSY }))
    }

    /// Sets the changes beyond one transaction aside, unless a table is replaced, which must leave no gap.
    fn split(&mut self, families: Families) {
        let whole = |structure: &Structure| structure.built || structure.absent;
        let replaced = families.has_ipv4() && !whole(&self.structures.0)
            || families.has_ipv6() && !whole(&self.structures.1);
        if replaced {
            return;
        }
        if families.has_ipv4() {
            self.plan.v4.split(TRANSACTION_LIMIT);
        }
        if families.has_ipv6() {
            self.plan.v6.split(TRANSACTION_LIMIT);
        }
    }

    fn next_part(&mut self, families: Families) {
        if families.has_ipv4() {
            self.plan.v4.next_part();
        }
        if families.has_ipv6() {
            self.plan.v6.next_part();
        }
    }

    /// Compares with a dump; the second time it rebuilds the tables of these families.
    fn compare_or_rebuild(&mut self, families: Families, compared: &mut bool) -> io::Result<()> {
        self.plan.v4.rejoin();
        self.plan.v6.rejoin();
        if !std::mem::replace(compared, true) {
            return self.compare().map(drop);
        }
        if families.has_ipv4() {
            self.structures.0 = Structure::default();
            self.plan.v4.rebuild();
        }
        if families.has_ipv6() {
            self.structures.1 = Structure::default();
            self.plan.v6.rebuild();
        }
        Ok(())
    }

    fn attempt(
        &mut self,
        families: Families,
        entries: &BTreeMap<u32, [u8; 16]>,
        retry: &mut Retry,
    ) -> Result<Next, Failed> {
        let mut sent =
            Sent { batch: Batch::new(), v4: Encoded::default(), v6: Encoded::default(), boundary: 0 };
        let (batch, chunk) = (&mut sent.batch, retry.chunk);
        if families.has_ipv4() {
            sent.v4 = encode::family(batch, &self.plan.v4, &self.structures.0, entries, chunk);
        }
        sent.boundary = batch.len();
        if families.has_ipv6() {
            sent.v6 = encode::family(batch, &self.plan.v6, &self.structures.1, entries, chunk);
        }
        let started = Instant::now();
        let failures = sent.batch.commit(&mut self.socket)?;
        if !failures.is_empty() {
            return Ok(self.refused_by(&failures, families, &sent, retry));
        }
        let kernel = started.elapsed();
        if families.has_ipv4() {
            committed(&mut self.plan.v4, &mut self.structures.0, entries);
        }
        if families.has_ipv6() {
            committed(&mut self.plan.v6, &mut self.structures.1, entries);
        }
        Ok(Next::Done(Written { operations: sent.v4.operations + sent.v6.operations, kernel }))
    }

    /// Removes or corrects the refused elements and decides the next step.
    fn refused_by(
        &mut self,
        failures: &[RefusedMessage],
        families: Families,
        sent: &Sent,
        retry: &mut Retry,
    ) -> Next {
        // A refusal may change the later parts.
        self.plan.v4.rejoin();
        self.plan.v6.rejoin();
        let (mut next, mut refusal) = (None, None::<RefusedBatch>);
        for failure in failures {
            let family = sent.family(failure).unwrap_or(families);
            // Errors that follow from the first one of a family say nothing about their elements.
            if refusal.as_ref().is_some_and(|refusal| refusal.families.covers(family)) {
                continue;
            }
            match self.judge(failure, family, sent, retry) {
                Next::Refused(own) => {
                    refusal = Some(match refusal {
                        Some(first) => RefusedBatch { families: first.families.join(family), ..first },
                        None => own,
                    });
                }
                compare @ Next::Compare(_) => return compare,
                busy @ Next::Busy(_) => {
                    next.get_or_insert(busy);
                }
                other => next = Some(other),
            }
        }
        self.plan.settle();
        refusal.map(Next::Refused).or(next).unwrap_or(Next::Again)
    }

    /// Handles one failure of a transaction.
    fn judge(&mut self, failure: &RefusedMessage, family: Families, sent: &Sent, retry: &mut Retry) -> Next {
        let elements = sent.v4.has(failure.message) || sent.v6.has(failure.message);
        let busy = [libc::EBUSY, libc::EINTR, libc::EAGAIN, libc::ERESTART].contains(&failure.errno);
        if busy && !elements {
            return Next::Busy(family);
        }
        let general = [libc::EPERM, libc::ENOMEM, libc::ENOBUFS, libc::EMSGSIZE].contains(&failure.errno);
        let mut operation = sent.operation(failure);
        if !general {
            let position = sent.batch.element_at(failure);
            let found = resolve(&mut self.plan.v4, &sent.v4, failure, position, &mut retry.healed.0)
                .or_else(|| resolve(&mut self.plan.v6, &sent.v6, failure, position, &mut retry.healed.1));
            if found.is_some() {
                return Next::Again;
            }
            if elements && failure.errno != libc::ENOENT {
                // The kernel does not identify the element: send each in its own message.
                retry.chunk = 1;
                return Next::Again;
            }
            let built = (family.has_ipv4() && self.structures.0.built)
                || (family.has_ipv6() && self.structures.1.built);
            if built {
                return Next::Compare(family);
            }
            operation += &unsupported(failure.errno);
        }
        Next::Refused(RefusedBatch { families: family, operation, errno: failure.errno })
    }
}

/// A transaction as it was sent.
struct Sent {
    batch: Batch,
    v4: Encoded<4>,
    v6: Encoded<16>,
    /// Index of the first message after those of IPv4.
    boundary: usize,
}

impl Sent {
    /// Returns the family of a failure; `None` if it is about the batch as a whole.
    fn family(&self, failure: &RefusedMessage) -> Option<Families> {
        let message = failure.message;
        let known = (1..self.batch.len()).contains(&message);
        known.then_some(if message < self.boundary { Families::Ipv4 } else { Families::Ipv6 })
    }

    /// Describes the operation of a failure.
    fn operation(&self, failure: &RefusedMessage) -> String {
        let v4 = self.v4.element(failure.message, None).map(|(element, _)| format!("{element:?}"));
        let v6 = self.v6.element(failure.message, None).map(|(element, _)| format!("{element:?}"));
        let object = v4.or(v6).or_else(|| self.batch.describe(failure));
        object.unwrap_or_else(|| format!("operation {} of the transaction", failure.message))
    }
}

/// State across the attempts of a transaction.
struct Retry {
    /// Maximum elements per message.
    chunk: usize,
    /// Elements whose foreign value was corrected once.
    healed: (HashSet<Element<4>>, HashSet<Element<16>>),
}

/// Records that the kernel accepted all changes.
fn committed<const N: usize>(
    mirror: &mut Mirror<N>,
    structure: &mut Structure,
    stamp: &BTreeMap<u32, [u8; 16]>,
) {
    let hooks = encode::written_hooks(structure, mirror);
    mirror.changes = Changes::default();
    let config = RuleConfig { hooks, ..mirror.facts.rules.clone() };
    *structure = Structure { built: true, config, stamp: stamp.clone(), ..Structure::default() };
}

/// Handles a refused element: corrects the expected value, or removes its item. `None`: it is not an element of this
/// family, or the kernel does not identify it.
fn resolve<const N: usize>(
    mirror: &mut Mirror<N>,
    encoded: &Encoded<N>,
    failure: &RefusedMessage,
    position: Option<usize>,
    healed: &mut HashSet<Element<N>>,
) -> Option<()> {
    let (element, operation) = encoded.element(failure.message, position)?;
    match (failure.errno, operation) {
        // Another process removed it before us.
        (libc::ENOENT, Operation::Delete) => {
            let change = mirror.changes.0.get_mut(&element)?;
            change.0 = None;
            if change.1.is_none() {
                mirror.changes.0.remove(&element);
            }
        }
        // The error is not about the element: its table, its set or the chain that it refers to is gone.
        (libc::ENOENT, Operation::Add) => return None,
        // Another process added another value: remove that first.
        (libc::EEXIST, Operation::Add) if healed.insert(element) => {
            let change = mirror.changes.0.get_mut(&element)?;
            change.0 = Some(Data::Present);
        }
        (errno, _) => mirror.refuse(element, errno),
    }
    Some(())
}

/// Names the kernel if an error means that it lacks a part of nf_tables.
fn unsupported(errno: i32) -> String {
    // The kernel's ENOTSUPP, which no header of user space has.
    const NOT_SUPPORTED: i32 = 524;
    let lacking = [libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::EAFNOSUPPORT, NOT_SUPPORTED];
    if !lacking.contains(&errno) {
        return String::new();
    }
    format!(
        "; kernel {} does not support it: load the missing module nft_* or use kernel 6.1 or later",
        kernel_version()
    )
}
