//! Elements of our sets and maps as values, with their encoding.
//!
//! Generic over the length of an address, so that the mirror of an IPv4 table has no memory cost for IPv6.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hash;

use super::data::{Verdict, write_value};
use super::layout::{source_list_name, source_list_of};
use super::nfta;
use crate::kernel::netlink::wire::Writer;

/// Lowest bit of the number of a source list in a frontend's value.
pub(crate) const LIST_SHIFT: u32 = 12;

/// Address, protocol and port of a frontend or a local endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key<const N: usize> {
    pub(crate) address: [u8; N],
    pub(crate) port: u16,
    pub(crate) protocol: u8,
}

/// A prefix. Host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Range<const N: usize> {
    pub(crate) address: [u8; N],
    pub(crate) prefix: u8,
}

impl<const N: usize> Range<N> {
    /// `None` if the length is wrong; host bits are cleared.
    pub(crate) fn new(address: &[u8], prefix: u32) -> Option<Self> {
        let mut address: [u8; N] = address.try_into().ok()?;
        let prefix = u8::try_from(prefix).ok().filter(|prefix| usize::from(*prefix) <= N * 8)?;
        for (index, byte) in address.iter_mut().enumerate() {
            *byte &= mask(prefix, index);
        }
        Some(Range { address, prefix })
    }

    pub(crate) fn contains(&self, address: &[u8; N]) -> bool {
        (0..N).all(|index| address[index] & mask(self.prefix, index) == self.address[index])
    }

    /// Returns the last address.
    pub(crate) fn last(&self) -> [u8; N] {
        std::array::from_fn(|index| self.address[index] | !mask(self.prefix, index))
    }

    /// Returns the prefix with this first and last address; `None` if they do not form one.
    pub(crate) fn between(first: [u8; N], last: [u8; N]) -> Option<Self> {
        (0..=N * 8)
            .rev()
            .filter_map(|prefix| Range::new(&first, prefix as u32))
            .find(|range| range.address == first && range.last() == last)
    }

    /// Removes ranges that lie inside another one: interval sets hold no overlapping elements.
    pub(crate) fn outermost(mut ranges: Vec<Self>) -> Vec<Self> {
        // A range sorts after those that contain it, and the kept ones are disjoint: only the last can contain it.
        ranges.sort_unstable();
        let mut kept: Vec<Self> = Vec::new();
        for range in ranges {
            if !kept.last().is_some_and(|outer| outer.contains(&range.address)) {
                kept.push(range);
            }
        }
        kept
    }
}

fn mask(prefix: u8, index: usize) -> u8 {
    let bits = usize::from(prefix).saturating_sub(index * 8).min(8);
    !(0xffu32 >> bits) as u8
}

/// Returns the address after `last`; `None` at the end of the address space.
fn successor<const N: usize>(mut last: [u8; N]) -> Option<[u8; N]> {
    for byte in last.iter_mut().rev() {
        let (next, overflow) = byte.overflowing_add(1);
        *byte = next;
        if !overflow {
            return Some(last);
        }
    }
    None
}

fn predecessor<const N: usize>(mut end: [u8; N]) -> [u8; N] {
    for byte in end.iter_mut().rev() {
        let (next, underflow) = byte.overflowing_sub(1);
        *byte = next;
        if !underflow {
            break;
        }
    }
    end
}

/// A unit of change: an element, with the chain and set that depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Element<const N: usize> {
    Frontend(Key<N>),
    Inside(Key<N>),
    Outside(Key<N>),
    Guarded(Key<N>),
    Slot {
        pool: u32,
        index: u32,
    },
    Backend(u32),
    StickyCluster(u32),
    StickyLocal(u32),
    /// The value of the pool of a service port with affinity, without masquerading; the key is its upper bits.
    StickyPool(u32),
    /// A list of sources, with its set and chain.
    SourceList(u32),
    Vip([u8; N]),
    ClusterIp([u8; N]),
    ServiceCidr(Range<N>),
    LocalPod(Range<N>),
    Refused(Key<N>),
    RefusedNodePort(Key<N>),
    Hairpin(Key<N>),
    /// A range of a list of sources.
    Source(u32, Range<N>),
}

/// The value of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Data<const N: usize> {
    /// An element of a set.
    Present,
    Value(u32),
    Endpoint([u8; N], u16),
}

fn key_bytes<const N: usize>(key: &Key<N>, to: &mut Vec<u8>) {
    to.extend(key.address);
    service_bytes(key, to);
}

fn service_bytes<const N: usize>(key: &Key<N>, to: &mut Vec<u8>) {
    to.extend([key.protocol, 0, 0, 0]);
    to.extend(key.port.to_be_bytes());
    to.extend([0, 0]);
}

fn key_from<const N: usize>(bytes: &[u8]) -> Option<Key<N>> {
    let address = bytes.get(..N)?.try_into().ok()?;
    let port = u16::from_be_bytes(bytes.get(N + 4..N + 6)?.try_into().ok()?);
    (bytes.len() >= N + 8).then_some(Key { address, port, protocol: bytes[N] })
}

impl<const N: usize> Element<N> {
    /// Returns the name of the set or map.
    pub(crate) fn set(&self) -> Cow<'static, str> {
        let name = match self {
            Element::Frontend(_) => "frontends",
            Element::Inside(_) => "inside",
            Element::Outside(_) => "outside",
            Element::Guarded(_) => "guarded",
            Element::Slot { .. } => "slots",
            Element::Backend(_) => "backends",
            Element::StickyCluster(_) => "sticky_cluster",
            Element::StickyLocal(_) => "sticky_local",
            Element::StickyPool(_) => "sticky_pools",
            Element::SourceList(_) => "source_lists",
            Element::Vip(_) => "vips",
            Element::ClusterIp(_) => "cluster_ips",
            Element::ServiceCidr(_) => "service_cidrs",
            Element::LocalPod(_) => "local_pods",
            Element::Refused(_) => "refused",
            Element::RefusedNodePort(_) => "refused_node_ports",
            Element::Hairpin(_) => "hairpin",
            Element::Source(list, _) => return source_list_name(*list).into(),
        };
        Cow::Borrowed(name)
    }

    /// Appends the element to a list of elements, without `data` for its removal. Returns the number of list entries:
    /// an interval has a start and an end.
    pub(crate) fn encode(&self, writer: &mut Writer, data: Option<&Data<N>>) -> usize {
        let mut key = Vec::with_capacity(48);
        let mut list_chain = None;
        match self {
            Element::Frontend(at)
            | Element::Inside(at)
            | Element::Outside(at)
            | Element::Guarded(at)
            | Element::Refused(at)
            | Element::RefusedNodePort(at) => key_bytes(at, &mut key),
            Element::Slot { pool, index } => {
                key.extend(pool.to_ne_bytes());
                key.extend(index.to_ne_bytes());
            }
            Element::Backend(id) | Element::StickyCluster(id) | Element::StickyLocal(id) => {
                key.extend(id.to_ne_bytes());
            }
            Element::StickyPool(pool) => key.extend(pool.to_ne_bytes()),
            Element::SourceList(list) => {
                key.extend((list << LIST_SHIFT).to_ne_bytes());
                list_chain = Some(source_list_name(*list));
            }
            Element::Vip(address) | Element::ClusterIp(address) => key.extend(address),
            Element::Hairpin(at) => {
                key.extend(at.address);
                key_bytes(at, &mut key);
            }
            Element::ServiceCidr(range) | Element::LocalPod(range) | Element::Source(_, range) => {
                return encode_interval(range, writer);
            }
        }
        writer.nest(nfta::list::ENTRY, |writer| {
            write_value(writer, nfta::element::KEY, &key);
            match data {
                None => {}
                Some(Data::Present) => {
                    if let Some(chain) = list_chain {
                        writer.nest(nfta::element::DATA, |writer| Verdict::Jump(chain).encode(writer));
                    }
                }
                Some(Data::Value(number)) => write_value(writer, nfta::element::DATA, &number.to_ne_bytes()),
                Some(Data::Endpoint(address, port)) => {
                    let mut endpoint = address.to_vec();
                    endpoint.extend(port.to_be_bytes());
                    endpoint.extend([0, 0]);
                    write_value(writer, nfta::element::DATA, &endpoint);
                }
            }
        });
        1
    }
}

fn encode_interval<const N: usize>(range: &Range<N>, writer: &mut Writer) -> usize {
    writer.nest(nfta::list::ENTRY, |writer| write_value(writer, nfta::element::KEY, &range.address));
    let Some(end) = successor(range.last()) else { return 1 };
    writer.nest(nfta::list::ENTRY, |writer| {
        write_value(writer, nfta::element::KEY, &end);
        writer.number(nfta::element::FLAGS, libc::NFT_SET_ELEM_INTERVAL_END as u32);
    });
    2
}

/// An element as a dump shows it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dumped<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) interval_end: bool,
    pub(crate) data: Option<&'a [u8]>,
    /// The chain of a `jump`.
    pub(crate) chain: Option<&'a str>,
}

/// Reads an element of one of our sets; `None` if it is not of our form.
pub(crate) fn decode<const N: usize>(set: &str, dumped: &Dumped<'_>) -> Option<(Element<N>, Data<N>)> {
    let number = || Some(u32::from_ne_bytes(dumped.key.get(..4)?.try_into().ok()?));
    let value = || Some(Data::Value(u32::from_ne_bytes(dumped.data?.try_into().ok()?)));
    let endpoint = || {
        let data = dumped.data?;
        let port = u16::from_be_bytes(data.get(N..N + 2)?.try_into().ok()?);
        Some(Data::Endpoint(data.get(..N)?.try_into().ok()?, port))
    };
    Some(match set {
        "frontends" => (Element::Frontend(key_from(dumped.key)?), value()?),
        "inside" => (Element::Inside(key_from(dumped.key)?), value()?),
        "outside" => (Element::Outside(key_from(dumped.key)?), value()?),
        "guarded" => (Element::Guarded(key_from(dumped.key)?), value()?),
        "slots" => {
            let index = u32::from_ne_bytes(dumped.key.get(4..8)?.try_into().ok()?);
            (Element::Slot { pool: number()?, index }, value()?)
        }
        "backends" => (Element::Backend(number()?), endpoint()?),
        "sticky_cluster" => (Element::StickyCluster(number()?), endpoint()?),
        "sticky_local" => (Element::StickyLocal(number()?), endpoint()?),
        "sticky_pools" => (Element::StickyPool(number()?), value()?),
        "source_lists" => {
            let list = source_list_of(dumped.chain?)?;
            (number()? == list << LIST_SHIFT).then_some((Element::SourceList(list), Data::Present))?
        }
        "vips" => (Element::Vip(dumped.key.try_into().ok()?), Data::Present),
        "cluster_ips" => (Element::ClusterIp(dumped.key.try_into().ok()?), Data::Present),
        "refused" => (Element::Refused(key_from(dumped.key)?), Data::Present),
        "refused_node_ports" => (Element::RefusedNodePort(key_from(dumped.key)?), Data::Present),
        "hairpin" => (Element::Hairpin(key_from(dumped.key.get(N..)?)?), Data::Present),
        _ => return None,
    })
}

/// Joins the starts and ends of an interval set. `None` if they are not prefixes.
pub(crate) fn decode_intervals<const N: usize>(dumped: &[Dumped<'_>]) -> Option<Vec<Range<N>>> {
    let mut points: Vec<([u8; N], bool)> = Vec::new();
    for element in dumped {
        points.push((element.key.try_into().ok()?, !element.interval_end));
    }
    // At the same address the end of an interval precedes the start of the next one.
    points.sort_unstable();
    let (mut ranges, mut start) = (Vec::new(), None);
    for (address, starts) in points {
        match (starts, start) {
            (true, None) => start = Some(address),
            (false, Some(first)) => {
                ranges.push(Range::between(first, predecessor(address))?);
                start = None;
            }
            // The kernel keeps an end at the start of the address space for sets without an interval there.
            (false, None) if address == [0; N] => {}
            _ => return None,
        }
    }
    if let Some(first) = start {
        ranges.push(Range::between(first, [0xff; N])?);
    }
    Some(ranges)
}

/// Differences between the kernel and the desired content: per element the value before and after.
#[derive(Debug)]
pub(crate) struct Changes<const N: usize>(pub(crate) HashMap<Element<N>, (Option<Data<N>>, Option<Data<N>>)>);

impl<const N: usize> Default for Changes<N> {
    fn default() -> Self {
        Changes(HashMap::new())
    }
}

impl<const N: usize> Changes<N> {
    /// Records a change; several changes of one element become one.
    pub(crate) fn put(&mut self, element: Element<N>, before: Option<Data<N>>, after: Option<Data<N>>) {
        let entry = self.0.entry(element).or_insert((before, after));
        entry.1 = after;
        if entry.0 == entry.1 {
            self.0.remove(&element);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Range<4> {
        let (address, prefix) = text.split_once('/').unwrap();
        let address: std::net::Ipv4Addr = address.parse().unwrap();
        Range::new(&address.octets(), prefix.parse().unwrap()).unwrap()
    }

    #[test]
    fn ranges_inside_others_removed() {
        let all = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "11.0.0.0/8", "10.0.0.0/8"].map(range);
        assert_eq!(Range::outermost(all.to_vec()), ["10.0.0.0/8", "11.0.0.0/8"].map(range));
        let everything = ["0.0.0.0/0", "10.0.0.0/8"].map(range);
        assert_eq!(Range::outermost(everything.to_vec()), [range("0.0.0.0/0")]);
    }

    #[test]
    fn outermost_fast_for_100000_ranges() {
        let range = |number: u32| Range { address: (number * 16).to_be_bytes(), prefix: 28 };
        let ranges: Vec<Range<4>> = (0..100_000).rev().map(range).collect();
        let started = std::time::Instant::now();
        assert_eq!(Range::outermost(ranges).len(), 100_000);
        assert!(started.elapsed().as_secs() < 2, "{:?}", started.elapsed());
    }

    #[test]
    fn host_bits_cleared_and_wrong_lengths_refused() {
        assert_eq!(range("10.1.2.3/8"), range("10.0.0.0/8"));
        assert_eq!(Range::<4>::new(&[10, 0, 0], 8), None);
        assert_eq!(Range::<4>::new(&[10, 0, 0, 0], 33), None);
    }

    #[test]
    fn range_recovered_from_its_ends() {
        for text in ["0.0.0.0/0", "10.96.0.0/16", "10.0.0.1/32", "128.0.0.0/1"] {
            let range = range(text);
            assert_eq!(Range::between(range.address, range.last()), Some(range));
        }
        assert_eq!(Range::between([10, 0, 0, 1], [10, 0, 0, 2]), None, "not a prefix");
    }

    #[test]
    fn intervals_joined_from_starts_and_ends() {
        let dumped = |key: &'static [u8], interval_end| Dumped { key, interval_end, ..Dumped::default() };
        let adjacent = [
            dumped(&[10, 1, 0, 0], true),
            dumped(&[10, 1, 0, 0], false),
            dumped(&[10, 0, 0, 0], false),
            dumped(&[10, 2, 0, 0], true),
        ];
        let ranges = ["10.0.0.0/16", "10.1.0.0/16"].map(range).to_vec();
        assert_eq!(decode_intervals(&adjacent), Some(ranges));
        assert_eq!(decode_intervals(&[dumped(&[0; 4], false)]), Some(vec![range("0.0.0.0/0")]));
        assert_eq!(decode_intervals::<4>(&[dumped(&[10, 0, 0, 0], true)]), None);
    }

    #[test]
    fn changes_of_one_element_merged() {
        let mut changes = Changes::<4>::default();
        let (first, second) = (Some(Data::Value(1)), Some(Data::Value(2)));
        changes.put(Element::Backend(7), first, None);
        changes.put(Element::Backend(7), None, second);
        assert_eq!(changes.0.get(&Element::Backend(7)), Some(&(first, second)));
        changes.put(Element::Backend(7), second, first);
        assert!(changes.0.is_empty());
    }
}
