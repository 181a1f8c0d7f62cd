//! Reads our tables for the inspector: whole, or the elements of a few frontends one by one.
//!
//! A lookup follows the maps as the kernel does and reads only the elements on its way, so that its cost follows the
//! Service and not the table. A read is not atomic: if the stamps before and after differ, it is repeated, and the last
//! attempt may mix two generations.

use std::io;

use switchtower_proto::v1::{
    Family, FrontendKey, KernelChain, KernelFrontend, KernelTable, Stamp as WireStamp,
};

use super::dump::{self, TableDump};
use super::element::{Data, Element, Key};
use super::inspect;
use super::layout::{FAMILY_IPV4, FAMILY_IPV6, Pick, source_list_name};
use super::resolve::{self, Lookup};
use super::{batch, plan, stamp_from};
use crate::kernel::netlink::Socket;

/// Attempts of a read that commits interrupt.
const ATTEMPTS: usize = 3;

/// A socket for reads, separate from the one that commits.
#[derive(Debug)]
pub struct KernelReader {
    socket: Socket,
}

impl KernelReader {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or the process may open no more files.
    pub fn open() -> io::Result<Self> {
        Ok(KernelReader { socket: batch::open()? })
    }

    /// Reads frontends by key, without absent ones. A key without an address stands for every address of its family.
    ///
    /// # Errors
    /// Reading failed.
    pub fn lookup(&mut self, wanted: &[FrontendKey]) -> io::Result<KernelTable> {
        self.steadily(|socket| {
            let of = |family: Family| wanted.iter().filter(move |key| key.family() == family);
            let mut frontends = lookup::<4>(socket, of(Family::Ipv4))?;
            frontends.extend(lookup::<16>(socket, of(Family::Ipv6))?);
            Ok(KernelTable { total: frontends.len() as u64, frontends, ..KernelTable::default() })
        })
    }

    /// Reads at most `limit` frontends.
    ///
    /// # Errors
    /// Reading failed.
    pub fn frontends(&mut self, limit: usize) -> io::Result<KernelTable> {
        self.steadily(|socket| {
            let mut frontends = all::<4>(socket)?;
            frontends.extend(all::<16>(socket)?);
            let total = frontends.len() as u64;
            frontends.truncate(limit);
            Ok(KernelTable { total, frontends, ..KernelTable::default() })
        })
    }

    /// Reads at most `limit` elements whose line contains `filter`.
    ///
    /// # Errors
    /// Reading failed.
    pub fn elements(&mut self, filter: &str, limit: usize) -> io::Result<KernelTable> {
        self.steadily(|socket| {
            let tables = inspect::read(socket)?;
            let lines = tables.iter().flat_map(|table| {
                table.elements.iter().map(move |element| format!("{} {element}", table.family))
            });
            let mut elements: Vec<String> = lines.filter(|line| line.contains(filter)).collect();
            let total = elements.len() as u64;
            elements.truncate(limit);
            Ok(KernelTable { total, elements, ..KernelTable::default() })
        })
    }

    /// Reads all chains.
    ///
    /// # Errors
    /// Reading failed.
    pub fn chains(&mut self) -> io::Result<KernelTable> {
        self.steadily(|socket| {
            let mut chains = self::chains::<4>(socket, "ip")?;
            chains.extend(self::chains::<16>(socket, "ip6")?);
            Ok(KernelTable { chains, ..KernelTable::default() })
        })
    }

    /// Reads until the stamp is the same before and after, or returns the last attempt.
    fn steadily(
        &mut self,
        mut read: impl FnMut(&mut Socket) -> io::Result<KernelTable>,
    ) -> io::Result<KernelTable> {
        let mut before = stamp(&mut self.socket)?;
        let mut table = read(&mut self.socket)?;
        for _ in 1..ATTEMPTS {
            let after = stamp(&mut self.socket)?;
            if after == before {
                break;
            }
            before = after;
            table = read(&mut self.socket)?;
        }
        table.stamp = before;
        Ok(table)
    }
}

/// Reads the stamp, if both tables have the same one.
fn stamp(socket: &mut Socket) -> io::Result<Option<WireStamp>> {
    let mut read = |family| match dump::stamp(socket, family) {
        Ok(entries) => Ok(stamp_from(&entries)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    };
    let (first, second) = (read(FAMILY_IPV4)?, read(FAMILY_IPV6)?);
    let stamp = first.filter(|_| first == second);
    Ok(stamp
        .map(|stamp| WireStamp { generation: stamp.generation, digest: stamp.digest.to_le_bytes().to_vec() }))
}

fn all<const N: usize>(socket: &mut Socket) -> io::Result<Vec<KernelFrontend>> {
    Ok(dump::table::<N>(socket)?.map(|dump| resolve::frontends(&dump)).unwrap_or_default())
}

fn chains<const N: usize>(socket: &mut Socket, family: &str) -> io::Result<Vec<KernelChain>> {
    let Some(dump) = dump::structure_only::<N>(socket)? else { return Ok(Vec::new()) };
    let chain = |(name, hook): (&String, &Option<dump::DumpedHook>)| {
        let rules = dump.rules.get(name).map(Vec::as_slice).unwrap_or_default();
        KernelChain {
            family: family.to_owned(),
            name: name.clone(),
            hook: hook.as_ref().map(ToString::to_string).unwrap_or_default(),
            rules: rules.len() as u32,
            foreign: rules.iter().filter(|rule| rule.is_none()).count() as u32,
        }
    };
    Ok(dump.chains.iter().map(chain).collect())
}

fn lookup<'a, const N: usize>(
    socket: &mut Socket,
    wanted: impl Iterator<Item = &'a FrontendKey>,
) -> io::Result<Vec<KernelFrontend>> {
    let mut partial = Partial::<N> { socket, dump: TableDump::default() };
    let mut keys = Vec::new();
    for wanted in wanted {
        if wanted.address.is_empty() {
            keys.extend(partial.keys_with(wanted)?);
        } else {
            keys.extend(plan::key::<N>(&wanted.address, wanted.protocol(), wanted.port));
        }
    }
    keys.sort_unstable();
    keys.dedup();
    for key in &keys {
        partial.follow(key)?;
    }
    Ok(resolve::frontends(&partial.dump))
}

/// The elements that the lookups of some frontends read.
struct Partial<'a, const N: usize> {
    socket: &'a mut Socket,
    dump: TableDump<N>,
}

impl<const N: usize> Partial<'_, N> {
    /// Returns the keys of frontends on any address; reads the whole map `frontends`.
    fn keys_with(&mut self, wanted: &FrontendKey) -> io::Result<Vec<Key<N>>> {
        let Some(wanted) = plan::key::<N>(&[0; N], wanted.protocol(), wanted.port) else {
            return Ok(Vec::new());
        };
        let mut frontends = TableDump::<N>::default();
        match dump::elements(self.socket, "frontends", &mut frontends) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
            _ => {}
        }
        let keys = frontends.elements.keys().filter_map(|element| match element {
            Element::Frontend(key) if (key.protocol, key.port) == (wanted.protocol, wanted.port) => {
                Some(*key)
            }
            _ => None,
        });
        Ok(keys.collect())
    }

    /// Reads the elements for a connection to this frontend, on both sides.
    fn follow(&mut self, key: &Key<N>) -> io::Result<()> {
        for side in [Element::Outside, Element::Inside] {
            let value = loop {
                match resolve::next_element(&self.dump, key, side) {
                    Lookup::Value(value) => break Some(value),
                    Lookup::Missing(element) if self.get(element)?.is_none() => break None,
                    Lookup::Missing(_) => {}
                }
            };
            if let Some(value) = value {
                self.follow_value(value)?;
            }
        }
        if let Some(list) = resolve::source_list(&self.dump, key) {
            self.sources(list)?;
        }
        Ok(())
    }

    fn follow_value(&mut self, value: u32) -> io::Result<()> {
        let Some(pick) = Pick::of(value) else { return Ok(()) };
        let (_, most) = pick.slots();
        for index in 0..most {
            // Slots have no gaps: the first absent one is the end.
            let Some(Data::Value(id)) = self.get(resolve::slot(value, index))? else { break };
            self.get(resolve::backend(id, value))?;
        }
        Ok(())
    }

    fn get(&mut self, element: Element<N>) -> io::Result<Option<Data<N>>> {
        if let Some(known) = self.dump.elements.get(&element) {
            return Ok(Some(*known));
        }
        let found = dump::element(self.socket, &element)?;
        if let Some(data) = found {
            self.dump.elements.insert(element, data);
        }
        Ok(found)
    }

    /// Reads a whole list, once: the kernel cannot look single elements of an interval set up.
    fn sources(&mut self, list: u32) -> io::Result<()> {
        let known = |element: &Element<N>| matches!(element, Element::Source(of, _) if *of == list);
        if self.dump.elements.keys().any(known) {
            return Ok(());
        }
        match dump::elements(self.socket, &source_list_name(list), &mut self.dump) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }
}
