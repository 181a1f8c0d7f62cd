//! Reads our own tables back: sets, chains, the fingerprints of rules, and elements.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::batch::Get;
use super::element::{Data, Dumped, Element, Range, decode, decode_intervals};
use super::expression::fingerprint_of;
use super::layout::{DataType, Layout, SetSpec, TABLE, source_list_of};
use super::nfta;
use crate::kernel::netlink::Socket;
use crate::kernel::netlink::wire::{Attributes, Writer, find, find_number, find_path, find_string};

/// The hook of a dumped chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DumpedHook {
    pub(crate) kind: String,
    pub(crate) number: u32,
    pub(crate) priority: i32,
    pub(crate) policy: u32,
}

impl std::fmt::Display for DumpedHook {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Indexed by `NF_INET_*`.
        let names = ["prerouting", "input", "forward", "output", "postrouting"];
        let hook = names.get(self.number as usize).copied().unwrap_or("unknown");
        write!(formatter, "{} hook {hook} priority {}", self.kind, self.priority)
    }
}

/// A set's declaration, comparable with [`SetSpec`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DumpedSet {
    flags: u32,
    key: DataType,
    data: Option<DataType>,
}

impl DumpedSet {
    /// Returns whether this is the set that `spec` declares.
    pub(crate) fn is(&self, spec: &SetSpec) -> bool {
        (self.flags, self.key, self.data) == (spec.flags, spec.key, spec.data)
    }
}

/// Our table as the kernel has it.
#[derive(Debug, Default)]
pub(crate) struct TableDump<const N: usize> {
    /// Table flags; not 0 if another program made the table dormant.
    pub(crate) flags: u32,
    pub(crate) sets: BTreeMap<String, DumpedSet>,
    pub(crate) chains: BTreeMap<String, Option<DumpedHook>>,
    /// Fingerprints in order, by chain; `None` for a rule that is not ours.
    pub(crate) rules: HashMap<String, Vec<Option<u64>>>,
    pub(crate) elements: HashMap<Element<N>, Data<N>>,
    /// Number of elements that are not of our form.
    pub(crate) unknown: usize,
    pub(crate) stamp: BTreeMap<u32, [u8; 16]>,
}

/// Reads one family's table; `None` if there is none.
///
/// # Errors
/// The dump failed.
pub(crate) fn table<const N: usize>(socket: &mut Socket) -> io::Result<Option<TableDump<N>>> {
    let Some(mut dump) = structure_only(socket)? else { return Ok(None) };
    let names: Vec<String> = dump.sets.keys().cloned().collect();
    for name in names {
        // Packets change its elements.
        if name != "affinity" {
            elements(socket, &name, &mut dump)?;
        }
    }
    Ok(Some(dump))
}

/// Reads one family's sets, chains and rules without elements; `None` if there is no table.
///
/// # Errors
/// The dump failed.
pub(crate) fn structure_only<const N: usize>(socket: &mut Socket) -> io::Result<Option<TableDump<N>>> {
    let family = Layout::new(N).family;
    let mut dump = TableDump::default();
    let found = Get::one(libc::NFT_MSG_GETTABLE, family).send(
        socket,
        |writer| writer.string(nfta::table::NAME, TABLE),
        |attributes| dump.flags = find_number(attributes, nfta::table::FLAGS).unwrap_or_default(),
    );
    match found {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    }
    structure(socket, family, &mut dump)?;
    Ok(Some(dump))
}

/// Returns whether a set, chain or rule belongs to our table.
fn is_ours(attributes: &[u8]) -> bool {
    const _: () = assert!(nfta::set::TABLE == nfta::chain::TABLE && nfta::set::TABLE == nfta::rule::TABLE);
    find_string(attributes, nfta::set::TABLE) == Some(TABLE)
}

fn structure<const N: usize>(socket: &mut Socket, family: u8, dump: &mut TableDump<N>) -> io::Result<()> {
    use nfta::{chain, hook, rule, set};
    Get::all(libc::NFT_MSG_GETSET, family).send(
        socket,
        |writer| writer.string(set::TABLE, TABLE),
        |attributes| {
            let number = |kind| find_number(attributes, kind).unwrap_or_default();
            let flags = number(set::FLAGS);
            let named = is_ours(attributes) && flags & libc::NFT_SET_ANONYMOUS as u32 == 0;
            if let Some(name) = find_string(attributes, set::NAME).filter(|_| named) {
                let kind = |kind, length| DataType { number: number(kind), length: number(length) };
                let key = kind(set::KEY_TYPE, set::KEY_LENGTH);
                let data = find(attributes, set::DATA_TYPE).map(|_| kind(set::DATA_TYPE, set::DATA_LENGTH));
                dump.sets.insert(name.to_owned(), DumpedSet { flags, key, data });
            }
        },
    )?;
    // The kernel cannot restrict this dump to a table: the chains of others are skipped by name.
    Get::all(libc::NFT_MSG_GETCHAIN, family).send(
        socket,
        |_| (),
        |attributes| {
            if let Some(name) = find_string(attributes, chain::NAME).filter(|_| is_ours(attributes)) {
                let hook = find(attributes, chain::HOOK).map(|found| DumpedHook {
                    kind: find_string(attributes, chain::TYPE).unwrap_or_default().to_owned(),
                    number: find_number(found, hook::NUMBER).unwrap_or_default(),
                    priority: find_number(found, hook::PRIORITY).unwrap_or_default() as i32,
                    policy: find_number(attributes, chain::POLICY).unwrap_or_default(),
                });
                dump.chains.insert(name.to_owned(), hook);
            }
        },
    )?;
    Get::all(libc::NFT_MSG_GETRULE, family).send(
        socket,
        |writer| writer.string(rule::TABLE, TABLE),
        |attributes| {
            if let Some(chain) = find_string(attributes, rule::CHAIN).filter(|_| is_ours(attributes)) {
                let fingerprint = find(attributes, rule::USER_DATA).and_then(fingerprint_of);
                dump.rules.entry(chain.to_owned()).or_default().push(fingerprint);
            }
        },
    )
}

/// Calls `each` with every element of one set.
fn each_element(
    socket: &mut Socket,
    family: u8,
    set: &str,
    mut each: impl FnMut(Dumped<'_>),
) -> io::Result<()> {
    let request = |writer: &mut Writer| {
        writer.string(nfta::element_list::TABLE, TABLE);
        writer.string(nfta::element_list::SET, set);
    };
    Get::all(libc::NFT_MSG_GETSETELEM, family)
        .send(socket, request, |attributes| for_each_element(attributes, &mut each))
}

/// Calls `each` with every element in a message.
pub(super) fn for_each_element(attributes: &[u8], mut each: impl FnMut(Dumped<'_>)) {
    use nfta::{data, element, verdict};
    for (_, found) in Attributes(find(attributes, nfta::element_list::ELEMENTS).unwrap_or_default()) {
        let value = find(found, element::DATA);
        let flags = find_number(found, element::FLAGS).unwrap_or_default();
        each(Dumped {
            key: find_path(found, &[element::KEY, data::VALUE]).unwrap_or_default(),
            interval_end: flags & libc::NFT_SET_ELEM_INTERVAL_END as u32 != 0,
            data: value.and_then(|value| find(value, data::VALUE)),
            chain: value.and_then(|value| find_string(find(value, data::VERDICT)?, verdict::CHAIN)),
        });
    }
}

/// Reads one element of a map or of a set without intervals; `None` if it is absent, or not of our form.
///
/// # Errors
/// The request failed.
pub(crate) fn element<const N: usize>(
    socket: &mut Socket,
    element: &Element<N>,
) -> io::Result<Option<Data<N>>> {
    let set = element.set();
    let request = |writer: &mut Writer| {
        writer.string(nfta::element_list::TABLE, TABLE);
        writer.string(nfta::element_list::SET, &set);
        writer.nest(nfta::element_list::ELEMENTS, |writer| {
            element.encode(writer, None);
        });
    };
    let mut found = None;
    let get = Get::one(libc::NFT_MSG_GETSETELEM, Layout::new(N).family);
    let result = get.send(socket, request, |attributes| {
        for_each_element(attributes, |dumped| found = decode(&set, &dumped).map(|(_, data)| data));
    });
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
        Ok(()) => Ok(found),
    }
}

/// Reads the elements of one set into a dump.
///
/// # Errors
/// The dump failed.
pub(crate) fn elements<const N: usize>(
    socket: &mut Socket,
    set: &str,
    dump: &mut TableDump<N>,
) -> io::Result<()> {
    let family = Layout::new(N).family;
    let range: Option<Box<dyn Fn(Range<N>) -> Element<N>>> = match set {
        "service_cidrs" => Some(Box::new(Element::ServiceCidr)),
        "local_pods" => Some(Box::new(Element::LocalPod)),
        _ => source_list_of(set).map(|list| -> Box<dyn Fn(Range<N>) -> Element<N>> {
            Box::new(move |range| Element::Source(list, range))
        }),
    };
    if let Some(element) = range {
        let mut owned: Vec<(Vec<u8>, bool)> = Vec::new();
        each_element(socket, family, set, |element| {
            owned.push((element.key.to_vec(), element.interval_end));
        })?;
        let dumped: Vec<Dumped<'_>> = owned
            .iter()
            .map(|(key, interval_end)| Dumped { key, interval_end: *interval_end, ..Dumped::default() })
            .collect();
        match decode_intervals(&dumped) {
            Some(ranges) => {
                dump.elements.extend(ranges.into_iter().map(|range| (element(range), Data::Present)));
            }
            None => dump.unknown += 1,
        }
        return Ok(());
    }
    if set == "stamp" {
        dump.stamp = stamp(socket, family)?;
        return Ok(());
    }
    each_element(socket, family, set, |element| match decode(set, &element) {
        Some((element, data)) => {
            dump.elements.insert(element, data);
        }
        None => dump.unknown += 1,
    })
}

/// Reads the entries of one family's stamp; ENOENT if there is no table.
///
/// # Errors
/// The dump failed.
pub(crate) fn stamp(socket: &mut Socket, family: u8) -> io::Result<BTreeMap<u32, [u8; 16]>> {
    let mut entries = BTreeMap::new();
    each_element(socket, family, "stamp", |element| {
        let key = element.key.try_into().ok().map(u32::from_ne_bytes);
        let value = element.data.and_then(|data| data.try_into().ok());
        entries.extend(key.zip(value));
    })?;
    Ok(entries)
}

/// Reads the kernel's ruleset generation, which every transaction of any process changes.
///
/// # Errors
/// The request failed.
pub(crate) fn generation(socket: &mut Socket) -> io::Result<u32> {
    let mut generation = 0;
    Get::one(libc::NFT_MSG_GETGEN, libc::NFPROTO_UNSPEC as u8).send(
        socket,
        |_| (),
        |attributes| generation = find_number(attributes, nfta::generation::ID).unwrap_or_default(),
    )?;
    Ok(generation)
}
