//! Reading our own table back: its sets, chains, rules' fingerprints and elements. Never another table.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::element::{Data, Dumped, Element, Range, decode, decode_intervals};
use super::expression::fingerprint_of;
use super::layout::{Layout, SetSpec, TABLE, source_list_of};
use super::netlink::{GET_CHAIN, GET_ELEMENT, GET_GENERATION, GET_RULE, GET_SET, GET_TABLE, Socket};
use super::wire::{Attributes, Received, find, find_number, find_path, find_string};

/// Where a dumped chain is hooked: type, hook number, priority, policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DumpedHook {
    pub(crate) kind: String,
    pub(crate) number: u32,
    pub(crate) priority: i32,
    pub(crate) policy: u32,
}

impl std::fmt::Display for DumpedHook {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // NF_INET_PRE_ROUTING and the following.
        let names = ["prerouting", "input", "forward", "output", "postrouting"];
        let hook = names.get(self.number as usize).copied().unwrap_or("unknown");
        write!(formatter, "{} hook {hook} priority {}", self.kind, self.priority)
    }
}

/// A set's declaration, comparable with [`SetSpec`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DumpedSet {
    flags: u32,
    key: (u32, u32),
    data: Option<(u32, u32)>,
}

impl DumpedSet {
    /// Whether this is the set that `spec` declares.
    pub(crate) fn is(&self, spec: &SetSpec) -> bool {
        (self.flags, self.key, self.data) == (spec.flags, spec.key, spec.data)
    }
}

/// Our table as the kernel has it.
#[derive(Debug, Default)]
pub(crate) struct TableDump<const N: usize> {
    /// Table flags; not 0: made dormant by someone.
    pub(crate) flags: u32,
    pub(crate) sets: BTreeMap<String, DumpedSet>,
    pub(crate) chains: BTreeMap<String, Option<DumpedHook>>,
    /// Fingerprints in order, by chain; `None` for a rule that is not ours.
    pub(crate) rules: HashMap<String, Vec<Option<u64>>>,
    pub(crate) elements: HashMap<Element<N>, Data<N>>,
    /// Elements that are not of our form.
    pub(crate) unknown: usize,
    pub(crate) stamp: BTreeMap<u32, [u8; 16]>,
}

const ANONYMOUS: u32 = 1;

/// Reads one family's table; `None` if there is none.
///
/// # Errors
/// The dump failed.
pub(crate) fn table<const N: usize>(socket: &mut Socket) -> io::Result<Option<TableDump<N>>> {
    let Some(mut dump) = structure_only(socket)? else { return Ok(None) };
    let names: Vec<String> = dump.sets.keys().cloned().collect();
    for name in names {
        // The clients in it are the packets' doing.
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
    let found = socket.request(
        (GET_TABLE, family, false),
        |writer| writer.string(1, TABLE),
        |message| {
            dump.flags = find_number(message.attributes(), 2).unwrap_or_default();
        },
    );
    match found {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    }
    structure(socket, family, &mut dump)?;
    Ok(Some(dump))
}

fn ours(attributes: &[u8]) -> bool {
    find_string(attributes, 1) == Some(TABLE)
}

fn structure<const N: usize>(socket: &mut Socket, family: u8, dump: &mut TableDump<N>) -> io::Result<()> {
    socket.request(
        (GET_SET, family, true),
        |writer| writer.string(1, TABLE),
        |message| {
            let attributes = message.attributes();
            let number = |kind| find_number(attributes, kind).unwrap_or_default();
            let flags = number(3);
            if let Some(name) =
                find_string(attributes, 2).filter(|_| ours(attributes) && flags & ANONYMOUS == 0)
            {
                let data = find(attributes, 6).map(|_| (number(6), number(7)));
                dump.sets.insert(name.to_owned(), DumpedSet { flags, key: (number(4), number(5)), data });
            }
        },
    )?;
    // The kernel cannot restrict this dump to a table: others are skipped by the name.
    socket.request(
        (GET_CHAIN, family, true),
        |_| (),
        |message| {
            let attributes = message.attributes();
            if let Some(name) = find_string(attributes, 3).filter(|_| ours(attributes)) {
                let hook = find(attributes, 4).map(|hook| DumpedHook {
                    kind: find_string(attributes, 7).unwrap_or_default().to_owned(),
                    number: find_number(hook, 1).unwrap_or_default(),
                    priority: find_number(hook, 2).unwrap_or_default() as i32,
                    policy: find_number(attributes, 5).unwrap_or_default(),
                });
                dump.chains.insert(name.to_owned(), hook);
            }
        },
    )?;
    socket.request(
        (GET_RULE, family, true),
        |writer| writer.string(1, TABLE),
        |message| {
            let attributes = message.attributes();
            if let Some(chain) = find_string(attributes, 2).filter(|_| ours(attributes)) {
                let fingerprint = find(attributes, 7).and_then(fingerprint_of);
                dump.rules.entry(chain.to_owned()).or_default().push(fingerprint);
            }
        },
    )
}

/// Calls `each` with the elements of one set, some at a time.
fn each_element(
    socket: &mut Socket,
    family: u8,
    set: &str,
    mut each: impl FnMut(Dumped<'_>),
) -> io::Result<()> {
    let request = |writer: &mut super::wire::Writer| {
        writer.string(1, TABLE);
        writer.string(2, set);
    };
    socket.request((GET_ELEMENT, family, true), request, |message| for_each_element(message, &mut each))
}

fn for_each_element(message: &Received<'_>, mut each: impl FnMut(Dumped<'_>)) {
    for (_, element) in Attributes(find(message.attributes(), 3).unwrap_or_default()) {
        let data = find(element, 2);
        each(Dumped {
            key: find_path(element, &[1, 1]).unwrap_or_default(),
            interval_end: find_number(element, 3).unwrap_or_default() & 1 != 0,
            data: data.and_then(|data| find(data, 1)),
            chain: data.and_then(|data| find_string(find(data, 2)?, 2)),
        });
    }
}

/// Reads one element of a map or of a set without intervals; `None` if it is not there, or not of our form.
///
/// # Errors
/// The request failed.
pub(crate) fn element<const N: usize>(
    socket: &mut Socket,
    element: &Element<N>,
) -> io::Result<Option<Data<N>>> {
    let set = element.set();
    let request = |writer: &mut super::wire::Writer| {
        writer.string(1, TABLE);
        writer.string(2, &set);
        writer.nest(3, |writer| {
            element.encode(writer, None);
        });
    };
    let mut found = None;
    let result = socket.request((GET_ELEMENT, Layout::new(N).family, false), request, |message| {
        for_each_element(message, |dumped| found = decode(&set, &dumped).map(|(_, data)| data));
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

/// The entries of one family's stamp; an error with ENOENT if there is no table.
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

/// The kernel's ruleset generation: it changes with each transaction, whoever commits it.
///
/// # Errors
/// The request failed.
pub(crate) fn generation(socket: &mut Socket) -> io::Result<u32> {
    let mut generation = 0;
    socket.request(
        (GET_GENERATION, 0, false),
        |_| (),
        |message| {
            generation = find_number(message.attributes(), 1).unwrap_or_default();
        },
    )?;
    Ok(generation)
}
