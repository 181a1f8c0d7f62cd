//! Entry points of the fuzz target of the netlink reader.

use super::dump::for_each_element;
use super::element::{Dumped, decode, decode_intervals};
use super::expression::fingerprint_of;
use super::{TABLE, monitor, nfta};
use crate::kernel::netlink::wire::{Message, find, find_number, find_path, find_string};

/// Sets whose elements are decoded one by one.
const SETS: [&str; 15] = [
    "frontends",
    "inside",
    "outside",
    "guarded",
    "slots",
    "backends",
    "sticky_cluster",
    "sticky_local",
    "sticky_pools",
    "source_lists",
    "vips",
    "cluster_ips",
    "refused",
    "refused_node_ports",
    "hairpin",
];

/// Reads a message as a notice, and as a part of each dump.
pub(in crate::kernel) fn read_message(message: &Message<'_>) {
    let _ = monitor::notice(message);
    let attributes = message.attributes();
    let mut intervals = Vec::new();
    for_each_element(attributes, |dumped| {
        for set in SETS {
            let _ = (decode::<4>(set, &dumped), decode::<16>(set, &dumped));
        }
        intervals.push((dumped.key.to_vec(), dumped.interval_end));
    });
    let intervals: Vec<Dumped<'_>> = intervals
        .iter()
        .map(|(key, interval_end)| Dumped { key, interval_end: *interval_end, ..Dumped::default() })
        .collect();
    let _ = (decode_intervals::<4>(&intervals), decode_intervals::<16>(&intervals));
    let _ = find(attributes, nfta::rule::USER_DATA).and_then(fingerprint_of);
    let _ = find_path(attributes, &[nfta::chain::HOOK, nfta::hook::PRIORITY]);
    let _ = (find_string(attributes, nfta::table::NAME) == Some(TABLE), find_number(attributes, 1));
}

/// Datagrams as the kernel sends them: elements of some sets, and a reply.
#[cfg(test)]
pub(in crate::kernel) fn example_datagrams() -> Vec<(&'static str, Vec<u8>)> {
    use super::element::{Data, Element, Key, Range};
    use crate::kernel::netlink::wire::{Header, Writer, netfilter_header, netfilter_type};

    let key = Key { address: [10, 96, 0, 1], port: 80, protocol: 6 };
    let range = Range::between([10, 0, 0, 0], [10, 255, 255, 255]);
    let elements: [(&str, &str, Element<4>, Data<4>); 5] = [
        ("frontends", "frontends", Element::Frontend(key), Data::Value(7)),
        ("slots", "slots", Element::Slot { pool: 8, index: 1 }, Data::Value(3)),
        ("backends", "backends", Element::Backend(3), Data::Endpoint([10, 1, 0, 7], 8080)),
        ("vips", "vips", Element::Vip([10, 96, 0, 1]), Data::Present),
        ("service-cidrs", "service_cidrs", range.map(Element::ServiceCidr).unwrap(), Data::Present),
    ];
    let kind = netfilter_type(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWSETELEM);
    let message = |writer: &mut Writer, set: &str, element: &Element<4>, data: &Data<4>| {
        writer.message(Header { kind, flags: 2, sequence: 1 }, |writer| {
            writer.header(&netfilter_header(libc::NFPROTO_IPV4 as u8, 0));
            writer.string(nfta::element_list::TABLE, TABLE);
            writer.string(nfta::element_list::SET, set);
            writer.nest(nfta::element_list::ELEMENTS, |writer| {
                element.encode(writer, Some(data));
            });
        });
    };
    let encode = |(name, set, element, data): &(&'static str, &str, Element<4>, Data<4>)| {
        let mut writer = Writer::default();
        message(&mut writer, set, element, data);
        (*name, writer.bytes)
    };
    let mut datagrams: Vec<_> = elements.iter().map(encode).collect();
    let mut error = Writer::default();
    let header = Header { kind: libc::NLMSG_ERROR as u16, flags: libc::NLM_F_ACK_TLVS as u16, sequence: 1 };
    error.message(header, |writer| {
        writer.header(&(-libc::EEXIST).to_ne_bytes());
        writer.header(&[0; 16]);
        writer.attribute(2, &20_u32.to_ne_bytes());
    });
    datagrams.push(("error", error.bytes));
    datagrams
}
