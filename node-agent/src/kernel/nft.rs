//! nf_tables over netlink: the tables `ip switchtower` and `ip6 switchtower`.
//!
//! `layout` declares sets, chains and rules; `mirror` and `plan` derive the elements from the view without IO; `encode`
//! writes a transaction; `dump` reads the tables back. [`Nft`] combines them as a [`Dataplane`].
//!
//! Invariants:
//! * One transaction covers both tables and has the stamp. Only if the kernel refuses one family, the other family's
//!   changes are committed alone, without a stamp: the generation counts as committed once both tables hold it.
//! * Only our own tables are written; no process is started.

mod allocate;
mod batch;
mod data;
mod dump;
mod element;
mod encode;
mod expression;
mod foreign;
mod fuzz;
mod inspect;
mod layout;
mod mirror;
mod monitor;
mod nfta;
mod numbering;
mod plan;
mod pool_role;
mod port_name;
mod reader;
mod release;
mod resolve;
mod text;
mod transaction;
mod userdata;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use crate::kernel::change::KernelChange;
use crate::kernel::dataplane::{Adopted, CommitError, Committed, Dataplane, Refused, Repaired, Stamp};
use crate::kernel::netlink::Socket;
use dump::TableDump;
use element::{Data, Element, Range};
use encode::Structure;
use layout::{FAMILY_IPV4, FAMILY_IPV6, Pick};
use mirror::Mirror;
use plan::Plan;
use transaction::Written;

pub(crate) use foreign::ForeignProxy;
#[cfg(test)]
pub(in crate::kernel) use fuzz::example_datagrams;
pub(in crate::kernel) use fuzz::read_message;
pub use inspect::{cleanup, inspect};
pub(crate) use layout::{LAYOUT_VERSION, TABLE};
pub use monitor::{Monitor, Notice};
pub use reader::KernelReader;

/// The kernel's nf_tables as a [`Dataplane`], in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    plan: Plan,
    structures: (Structure, Structure),
    /// The stamp of the last successful commit or adoption.
    stamp: Option<Stamp>,
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

    fn committed(&self, outcome: &Written, started: Instant) -> Committed {
        Committed {
            operations: outcome.operations,
            plan: started.elapsed().saturating_sub(outcome.kernel),
            commit: outcome.kernel,
            refused: self.refused(),
        }
    }
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
        match self.transact(Some(stamp)) {
            Ok(outcome) => {
                let committed = self.committed(&outcome, started);
                Ok(Adopted { refused: committed.refused.clone(), committed: Some(committed) })
            }
            // The plan is what the other family's table holds.
            Err(error @ CommitError::Family { .. }) => Err(error),
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
        match self.transact(Some(stamp)) {
            Ok(outcome) => Ok(self.committed(&outcome, started)),
            // The other family's table holds the changes, and they may be applied again: each sets absolute values.
            Err(error @ CommitError::Family { .. }) => Err(error),
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
        let entries = self.stamp.as_ref().map(stamp_entries).unwrap_or_default();
        let stamps = [&self.structures.0, &self.structures.1];
        let wrong = stamps.iter().filter(|structure| structure.stamp != entries).count() as u32;
        if count + wrong > 0 {
            self.transact(self.stamp)?;
        }
        Ok(Repaired { differences: count - own + wrong, refused: self.refused() })
    }

    fn retry_refused(&mut self) -> Result<Vec<Refused>, CommitError> {
        self.plan.v4.requeue_refused();
        self.plan.v6.requeue_refused();
        self.plan.settle();
        self.transact(self.stamp)?;
        Ok(self.refused())
    }
}
