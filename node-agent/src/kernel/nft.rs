//! nf_tables over netlink: the tables `ip switchtower` and `ip6 switchtower`.
//!
//! `layout` declares sets, chains and rules; `mirror` and `plan` derive the elements from the view without IO; `encode`
//! writes a transaction; `dump` reads the tables back. [`Nft`] combines them as a [`Dataplane`].
//!
//! Invariants:
//! * One transaction covers both tables and has the stamp.
//! * Only our own tables are written; no process is started.

mod allocate;
mod batch;
mod dump;
mod element;
mod encode;
mod expression;
mod foreign;
mod inspect;
mod layout;
mod mirror;
mod monitor;
mod nfta;
mod plan;
mod reader;
mod release;
mod resolve;
mod text;
mod userdata;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::kernel::change::KernelChange;
use crate::kernel::dataplane::{Adopted, CommitError, Committed, Dataplane, Refused, Repaired, Stamp};
use crate::kernel::netlink::Socket;
use batch::{Batch, Failure};
use dump::TableDump;
use element::{Data, Element, Range};
use encode::{Encoded, Operation, Structure};
use layout::{FAMILY_IPV4, FAMILY_IPV6, Pick};
use mirror::Mirror;
use plan::Plan;

pub use foreign::ForeignProxy;
pub use inspect::{TableSummary, cleanup, inspect};
pub use layout::{LAYOUT_VERSION, TABLE};
pub use monitor::{Monitor, Notice};
pub use reader::{FrontendQuery, KernelReader};

/// Maximum attempts of one transaction: each removes at least one refused element or waits for another writer.
const ATTEMPTS: usize = 256;
/// Maximum elements that one transaction changes in a family: it takes about 50 ms, during which no other process in
/// the network namespace can change nf_tables.
const TRANSACTION_LIMIT: usize = 32_768;
/// Delay after a conflict with another transaction.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// Conflicts after which the tables are compared; after twice as many they are rebuilt.
const BUSY_ATTEMPTS: usize = 20;

/// The kernel's nf_tables as a [`Dataplane`], in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    plan: Plan,
    structures: (Structure, Structure),
    /// The stamp of the last successful commit or adoption.
    stamp: Option<Stamp>,
}

/// Operations and kernel time of a transaction.
#[derive(Default)]
struct Outcome {
    operations: u32,
    kernel: Duration,
}

/// The step after an attempt of a transaction.
enum Next {
    /// The transaction is committed.
    Done(Outcome),
    /// An element was removed or repaired: retry.
    Again,
    /// Another transaction, or an object that the kernel does not identify, conflicts: retry after a delay.
    Busy,
    /// The tables differ from the expected content: compare with a dump, then retry.
    Compare,
}

impl Nft {
    /// Opens a netlink socket.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or the process may open no more files.
    pub fn open() -> io::Result<Self> {
        Ok(Nft { socket: batch::open()?, plan: Plan::new(), structures: Default::default(), stamp: None })
    }

    /// Returns the netlink port id, which notifications of this socket's own transactions carry.
    ///
    /// # Errors
    /// The socket failed.
    pub fn port(&self) -> io::Result<u32> {
        self.socket.port()
    }

    /// Returns the kernel's ruleset generation, which every transaction of any process increases.
    ///
    /// # Errors
    /// The request failed.
    pub fn ruleset_generation(&mut self) -> io::Result<u32> {
        dump::generation(&mut self.socket)
    }

    /// Sends the pending changes until the kernel accepts them.
    fn transact(&mut self, stamp: Stamp) -> Result<Outcome, CommitError> {
        let result = self.transact_parts(&stamp_entries(&stamp));
        self.plan.v4.rejoin();
        self.plan.v6.rejoin();
        if result.is_ok() {
            self.stamp = Some(stamp);
        }
        result
    }

    /// Only the last part has the stamp: an agent that starts between two parts finds none and compares.
    fn transact_parts(&mut self, stamp: &BTreeMap<u32, [u8; 16]>) -> Result<Outcome, CommitError> {
        let mut chunk = usize::MAX;
        let mut healed = (HashSet::new(), HashSet::new());
        let (mut compared, mut busy) = (false, 0);
        let mut total = Outcome::default();
        self.split();
        let mut attempts = ATTEMPTS;
        while attempts > 0 {
            attempts -= 1;
            let last = self.plan.v4.is_last_part() && self.plan.v6.is_last_part();
            let entries = if last { stamp } else { &BTreeMap::new() };
            match self.attempt(entries, &mut chunk, &mut healed)? {
                Next::Done(outcome) => {
                    total.operations += outcome.operations;
                    total.kernel += outcome.kernel;
                    if last {
                        return Ok(total);
                    }
                    self.plan.v4.next_part();
                    self.plan.v6.next_part();
                    attempts = ATTEMPTS;
                    continue;
                }
                Next::Again => {}
                Next::Busy => {
                    busy += 1;
                    std::thread::sleep(BUSY_PAUSE);
                    // A conflict that lasts is in our tables: a foreign reference that the mirror does not know.
                    if busy % BUSY_ATTEMPTS == 0 {
                        self.compare_or_rebuild(&mut compared)?;
                    }
                }
                Next::Compare => self.compare_or_rebuild(&mut compared)?,
            }
            // The attempt may have changed the pending elements.
            self.split();
        }
        Err(CommitError::Refused { operation: "every attempt was refused".to_owned(), errno: libc::EBUSY })
    }

    /// Sets the changes beyond one transaction aside, unless a table is replaced, which must leave no gap.
    fn split(&mut self) {
        let whole = |structure: &Structure| structure.built || structure.absent;
        if whole(&self.structures.0) && whole(&self.structures.1) {
            self.plan.v4.split(TRANSACTION_LIMIT);
            self.plan.v6.split(TRANSACTION_LIMIT);
        }
    }

    /// Compares with a dump; the second time it rebuilds both tables.
    fn compare_or_rebuild(&mut self, compared: &mut bool) -> io::Result<()> {
        self.plan.v4.rejoin();
        self.plan.v6.rejoin();
        if std::mem::replace(compared, true) {
            self.structures = Default::default();
            self.plan.v4.rebuild();
            self.plan.v6.rebuild();
            return Ok(());
        }
        self.compare().map(drop)
    }

    fn attempt(
        &mut self,
        entries: &BTreeMap<u32, [u8; 16]>,
        chunk: &mut usize,
        healed: &mut (HashSet<Element<4>>, HashSet<Element<16>>),
    ) -> Result<Next, CommitError> {
        let mut batch = Batch::new();
        let v4 = encode::family(&mut batch, &self.plan.v4, &self.structures.0, entries, *chunk);
        let v6 = encode::family(&mut batch, &self.plan.v6, &self.structures.1, entries, *chunk);
        let started = Instant::now();
        let failures = batch.commit(&mut self.socket)?;
        if failures.is_empty() {
            let kernel = started.elapsed();
            committed(&mut self.plan.v4, &mut self.structures.0, entries);
            committed(&mut self.plan.v6, &mut self.structures.1, entries);
            return Ok(Next::Done(Outcome { operations: v4.operations + v6.operations, kernel }));
        }
        // A refusal may change the later parts.
        self.plan.v4.rejoin();
        self.plan.v6.rejoin();
        let mut next = None;
        for failure in &failures {
            let busy = [libc::EBUSY, libc::EINTR, libc::EAGAIN, libc::ERESTART].contains(&failure.errno);
            if busy && !v4.has(failure.message) && !v6.has(failure.message) {
                next.get_or_insert(Next::Busy);
                continue;
            }
            if [libc::EPERM, libc::ENOMEM, libc::ENOBUFS, libc::EMSGSIZE].contains(&failure.errno) {
                return Err(CommitError::Refused {
                    operation: operation(&v4, &v6, failure),
                    errno: failure.errno,
                });
            }
            let position = batch.element_at(failure);
            let found = resolve(&mut self.plan.v4, &v4, failure, position, &mut healed.0)
                .or_else(|| resolve(&mut self.plan.v6, &v6, failure, position, &mut healed.1));
            match found {
                Some(()) => next = Some(Next::Again),
                None if (v4.has(failure.message) || v6.has(failure.message))
                    && failure.errno != libc::ENOENT =>
                {
                    // The kernel does not identify the element: send each in its own message.
                    *chunk = 1;
                    next.get_or_insert(Next::Again);
                }
                None if self.structures.0.built || self.structures.1.built => return Ok(Next::Compare),
                None => {
                    return Err(CommitError::Refused {
                        operation: operation(&v4, &v6, failure),
                        errno: failure.errno,
                    });
                }
            }
        }
        self.plan.settle();
        Ok(next.unwrap_or(Next::Again))
    }

    /// Reads both tables and records the differences; returns their number.
    fn compare(&mut self) -> io::Result<u32> {
        let v4 = dump::table::<4>(&mut self.socket)?;
        let v6 = dump::table::<16>(&mut self.socket)?;
        let (first, first_count) = encode::compare(&mut self.plan.v4, v4);
        let (second, second_count) = encode::compare(&mut self.plan.v6, v6);
        self.structures = (first, second);
        Ok(first_count + second_count)
    }

    fn refused(&self) -> Vec<Refused> {
        let all = self.plan.refusals().into_iter();
        all.map(|refusal| Refused { item: refusal.item, reason: refusal.reason, errno: refusal.errno })
            .collect()
    }

    fn committed(&self, outcome: &Outcome, started: Instant) -> Committed {
        Committed {
            operations: outcome.operations,
            plan: started.elapsed().saturating_sub(outcome.kernel),
            commit: outcome.kernel,
            refused: self.refused(),
        }
    }
}

/// Records that the kernel accepted all changes.
fn committed<const N: usize>(
    mirror: &mut Mirror<N>,
    structure: &mut Structure,
    stamp: &BTreeMap<u32, [u8; 16]>,
) {
    mirror.changes = element::Changes::default();
    let config = mirror.facts.rules.clone();
    *structure = Structure { built: true, config, stamp: stamp.clone(), ..Structure::default() };
}

/// Handles a refused element: corrects the expected value, or removes its item. `None`: it is not an element of this
/// family, or the kernel does not identify it.
fn resolve<const N: usize>(
    mirror: &mut Mirror<N>,
    encoded: &Encoded<N>,
    failure: &Failure,
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

/// Describes the operation of a failure.
fn operation(v4: &Encoded<4>, v6: &Encoded<16>, failure: &Failure) -> String {
    let element = v4.element(failure.message, None).map(|(element, _)| format!("{element:?}"));
    let element =
        element.or_else(|| v6.element(failure.message, None).map(|(element, _)| format!("{element:?}")));
    element.unwrap_or_else(|| format!("operation {} of the transaction", failure.message))
}

/// Encodes the stamp as entries of map `stamp`: 0 the digest; 1 generation, layout version, deviations; 2 the facts.
fn stamp_entries(stamp: &Stamp) -> BTreeMap<u32, [u8; 16]> {
    let mut second = [0; 16];
    second[..8].copy_from_slice(&stamp.generation.to_be_bytes());
    second[8..10].copy_from_slice(&LAYOUT_VERSION.to_be_bytes());
    second[12..].copy_from_slice(&stamp.deviations.to_be_bytes());
    let mut third = [0; 16];
    third[8..].copy_from_slice(&stamp.facts.to_be_bytes());
    BTreeMap::from([(0, stamp.digest.to_be_bytes()), (1, second), (2, third)])
}

/// The inverse of [`stamp_entries`]; `None` if incomplete or of another layout version.
fn stamp_from(entries: &BTreeMap<u32, [u8; 16]>) -> Option<Stamp> {
    let (first, second, third) = (entries.get(&0)?, entries.get(&1)?, entries.get(&2)?);
    if second[8..10] != LAYOUT_VERSION.to_be_bytes() {
        return None;
    }
    Some(Stamp {
        digest: u128::from_be_bytes(*first),
        generation: u64::from_be_bytes(second[..8].try_into().ok()?),
        deviations: u32::from_be_bytes(second[12..].try_into().ok()?),
        facts: u64::from_be_bytes(third[8..].try_into().ok()?),
    })
}

/// Gives a new mirror the numbers and ids that the kernel holds.
fn hint<const N: usize>(mirror: &mut Mirror<N>, dump: &TableDump<N>) {
    let mut slots: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    let mut lists: BTreeMap<u32, Vec<Range<N>>> = BTreeMap::new();
    for (element, data) in &dump.elements {
        match (element, data) {
            (
                Element::Frontend(key) | Element::Inside(key) | Element::Outside(key) | Element::Guarded(key),
                Data::Value(value),
            ) if Pick::of(*value).is_some() => {
                mirror.hints.numbers.insert(*key, value >> 13);
            }
            (Element::Slot { pool, index }, Data::Value(id)) => {
                slots.insert((*pool, *index), *id);
            }
            (Element::Backend(id), Data::Endpoint(address, port)) => {
                mirror.hints.backends.insert(*id);
                mirror.hints.endpoints.insert(*id, (*address, *port));
            }
            (Element::StickyCluster(id) | Element::StickyLocal(id), Data::Endpoint(address, port)) => {
                mirror.hints.endpoints.insert(*id, (*address, *port));
            }
            (Element::SourceList(list), _) => drop(lists.entry(*list).or_default()),
            (Element::Source(list, range), _) => lists.entry(*list).or_default().push(*range),
            _ => {}
        }
    }
    for ((pool, _), id) in slots {
        mirror.hints.slots.entry(pool).or_default().push(id);
    }
    for (list, mut ranges) in lists {
        ranges.sort_unstable();
        // Of two lists with the same ranges one is adopted and the other removed.
        mirror.hints.lists.entry(ranges).or_insert(list);
    }
    mirror.adopt_numbers();
}

impl Dataplane for Nft {
    fn stamp(&mut self) -> Result<Option<Stamp>, CommitError> {
        let mut stamps = Vec::new();
        for family in [FAMILY_IPV4, FAMILY_IPV6] {
            match dump::stamp(&mut self.socket, family) {
                Ok(entries) => stamps.push(stamp_from(&entries)),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(stamps[0].filter(|_| stamps[0] == stamps[1]))
    }

    fn adopt(&mut self, view: &[KernelChange], stamp: Stamp) -> Result<Adopted, CommitError> {
        let started = Instant::now();
        let v4 = dump::table::<4>(&mut self.socket)?;
        let v6 = dump::table::<16>(&mut self.socket)?;
        let mut plan = Plan::new();
        (plan.v4.recording, plan.v6.recording) = (false, false);
        if let Some(dump) = &v4 {
            hint(&mut plan.v4, dump);
        }
        if let Some(dump) = &v6 {
            hint(&mut plan.v6, dump);
        }
        for change in view {
            plan.apply(change);
        }
        plan.settle();
        (plan.v4.recording, plan.v6.recording) = (true, true);
        plan.v4.forget_hints();
        plan.v6.forget_hints();
        let previous = std::mem::replace(&mut self.plan, plan);
        let structures = self.structures.clone();
        let (first, first_count) = encode::compare(&mut self.plan.v4, v4);
        let (second, second_count) = encode::compare(&mut self.plan.v6, v6);
        self.structures = (first, second);
        let entries = stamp_entries(&stamp);
        let stamped = self.structures.0.stamp == entries && self.structures.1.stamp == entries;
        if first_count + second_count == 0 && stamped {
            self.stamp = Some(stamp);
            return Ok(Adopted { committed: None, refused: self.refused() });
        }
        match self.transact(stamp) {
            Ok(outcome) => {
                let committed = self.committed(&outcome, started);
                Ok(Adopted { refused: committed.refused.clone(), committed: Some(committed) })
            }
            Err(error) => {
                (self.plan, self.structures) = (previous, structures);
                Err(error)
            }
        }
    }

    fn commit(&mut self, changes: &[KernelChange], stamp: Stamp) -> Result<Committed, CommitError> {
        let started = Instant::now();
        let mut undo: Vec<_> = changes.iter().flat_map(|change| self.plan.apply(change)).collect();
        self.plan.settle();
        match self.transact(stamp) {
            Ok(outcome) => Ok(self.committed(&outcome, started)),
            Err(error) => {
                while let Some(step) = undo.pop() {
                    self.plan.undo(step);
                }
                self.plan.settle();
                Err(error)
            }
        }
    }

    fn release(&mut self, controllers: &[SocketAddr]) -> Result<usize, CommitError> {
        Ok(release::release::<4>(&mut self.socket, controllers)?
            + release::release::<16>(&mut self.socket, controllers)?)
    }

    fn repair(&mut self) -> Result<Repaired, CommitError> {
        let retried = (self.plan.v4.retry_refused(), self.plan.v6.retry_refused());
        let count = self.compare()?;
        let own = (self.plan.v4.count_of(&retried.0) + self.plan.v6.count_of(&retried.1)) as u32;
        let Some(stamp) = self.stamp else {
            return Ok(Repaired { differences: count - own, refused: self.refused() });
        };
        let entries = stamp_entries(&stamp);
        let stamps = [&self.structures.0, &self.structures.1];
        let wrong = stamps.iter().filter(|structure| structure.stamp != entries).count() as u32;
        if count + wrong > 0 {
            self.transact(stamp)?;
        }
        Ok(Repaired { differences: count - own + wrong, refused: self.refused() })
    }
}
