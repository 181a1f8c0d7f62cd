//! Summarizes and removes our tables without a view, for `cleanup` and the inspector.

use std::io;

use super::batch::{self, Batch, Get};
use super::dump::{self, TableDump};
use super::element::{Data, Element};
use super::layout::{FAMILY_IPV4, FAMILY_IPV6, Layout, TABLE};
use super::{nfta, text};
use crate::kernel::netlink::Socket;
use crate::kernel::netlink::wire::Writer;

/// The content of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSummary {
    /// `ip` or `ip6`.
    pub family: &'static str,
    /// Chains with their number of rules, by name.
    pub chains: Vec<(String, usize)>,
    /// Elements as `set key : value`, sorted. The order of slots depends on the history of the pool.
    pub elements: Vec<String>,
}

/// Reads those of our tables that exist.
///
/// # Errors
/// The dump failed.
pub fn inspect() -> io::Result<Vec<TableSummary>> {
    read(&mut batch::open()?)
}

pub(super) fn read(socket: &mut Socket) -> io::Result<Vec<TableSummary>> {
    let v4 = dump::table::<4>(socket)?.map(|dump| summary("ip", &dump));
    let v6 = dump::table::<16>(socket)?.map(|dump| summary("ip6", &dump));
    Ok(v4.into_iter().chain(v6).collect())
}

/// Removes our tables in one transaction; returns whether there were any.
///
/// # Errors
/// The kernel refused, or the socket failed.
pub fn cleanup() -> io::Result<bool> {
    let mut socket = batch::open()?;
    let mut found = false;
    for family in [FAMILY_IPV4, FAMILY_IPV6] {
        found |= match dump::stamp(&mut socket, family) {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                Get::one(libc::NFT_MSG_GETTABLE, family).exists(&mut socket, own_table)?
            }
            Err(error) => return Err(error),
        };
    }
    if !found {
        return Ok(false);
    }
    let mut batch = Batch::new();
    for family in [FAMILY_IPV4, FAMILY_IPV6] {
        // Creating the table first makes the deletion succeed if only the other family has one.
        batch.push(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, family, own_table);
        batch.push(libc::NFT_MSG_DELTABLE, 0, family, own_table);
    }
    match batch.commit(&mut socket)?.first() {
        Some(failure) => Err(io::Error::from_raw_os_error(failure.errno)),
        None => Ok(true),
    }
}

fn own_table(writer: &mut Writer) {
    writer.string(nfta::table::NAME, TABLE);
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

/// Formats one element as a line.
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
