//! Looking at and removing the own tables without a view: for `cleanup` and for a controller's questions.

use std::io;

use super::dump::{self, TableDump};
use super::element::{Data, Element};
use super::layout::{FAMILY_IPV4, FAMILY_IPV6, Layout, TABLE};
use super::netlink::{Batch, CREATE, DELETE_TABLE, NEW_TABLE, Socket};
use super::text;

/// What one table holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSummary {
    /// `ip` or `ip6`.
    pub family: &'static str,
    /// Chains with their number of rules, by name.
    pub chains: Vec<(String, usize)>,
    /// Elements, one a line as `set key : value`, sorted. Slots are in the order of history.
    pub elements: Vec<String>,
}

/// Reads our tables, nothing else. Absent ones are left out.
///
/// # Errors
/// The dump failed.
pub fn inspect() -> io::Result<Vec<TableSummary>> {
    read(&mut Socket::open()?)
}

pub(super) fn read(socket: &mut Socket) -> io::Result<Vec<TableSummary>> {
    let v4 = dump::table::<4>(socket)?.map(|dump| summary("ip", &dump));
    let v6 = dump::table::<16>(socket)?.map(|dump| summary("ip6", &dump));
    Ok(v4.into_iter().chain(v6).collect())
}

/// Removes our tables in one transaction; whether there were any.
///
/// # Errors
/// The kernel refused, or the socket failed.
pub fn cleanup() -> io::Result<bool> {
    let mut socket = Socket::open()?;
    let mut found = false;
    for family in [FAMILY_IPV4, FAMILY_IPV6] {
        found |= match dump::stamp(&mut socket, family) {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => table_exists(&mut socket, family)?,
            Err(error) => return Err(error),
        };
    }
    if !found {
        return Ok(false);
    }
    let mut batch = Batch::new();
    for family in [FAMILY_IPV4, FAMILY_IPV6] {
        // Creating it first makes the deletion succeed where only the other table exists.
        batch.push(NEW_TABLE, CREATE, family, |writer| writer.string(1, TABLE));
        batch.push(DELETE_TABLE, 0, family, |writer| writer.string(1, TABLE));
    }
    match socket.commit(&mut batch)?.first() {
        Some(failure) => Err(io::Error::from_raw_os_error(failure.errno)),
        None => Ok(true),
    }
}

fn table_exists(socket: &mut Socket, family: u8) -> io::Result<bool> {
    let request = (super::netlink::GET_TABLE, family, false);
    match socket.request(request, |writer| writer.string(1, TABLE), |_| ()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn summary<const N: usize>(family: &'static str, dump: &TableDump<N>) -> TableSummary {
    let rules = |chain: &String| dump.rules.get(chain).map_or(0, Vec::len);
    let mut elements: Vec<_> = dump.elements.iter().collect();
    elements.sort_unstable_by_key(|(element, _)| **element);
    debug_assert_eq!(Layout::new(N).family == FAMILY_IPV4, family == "ip");
    TableSummary {
        family,
        chains: dump.chains.keys().map(|chain| (chain.clone(), rules(chain))).collect(),
        elements: elements.into_iter().map(|(element, data)| describe(element, data)).collect(),
    }
}

/// One element as a line.
fn describe<const N: usize>(element: &Element<N>, data: &Data<N>) -> String {
    let set = element.set();
    let key = match element {
        Element::Frontend(key)
        | Element::Inside(key)
        | Element::Outside(key)
        | Element::Guarded(key)
        | Element::Refused(key)
        | Element::RefusedNodePort(key)
        | Element::Hairpin(key) => {
            format!("{}/{}", text::socket_address(&key.address, key.port), text::protocol(key.protocol))
        }
        Element::Slot { pool, index } => format!("{pool:#010x} {index}"),
        Element::Backend(id) | Element::StickyCluster(id) | Element::StickyLocal(id) => format!("{id:#010x}"),
        Element::StickyPool(pool) => format!("{pool:#010x}"),
        Element::SourceList(list) => format!("{list}"),
        Element::Vip(address) | Element::ClusterIp(address) => text::address(address).to_string(),
        Element::ServiceCidr(range) | Element::LocalPod(range) | Element::Source(_, range) => {
            format!("{}/{}", text::address(&range.address), range.prefix)
        }
    };
    match data {
        Data::Present => format!("{set} {key}"),
        Data::Value(value) => format!("{set} {key} : {value:#010x}"),
        Data::Endpoint(address, port) => format!("{set} {key} : {}", text::socket_address(address, *port)),
    }
}
