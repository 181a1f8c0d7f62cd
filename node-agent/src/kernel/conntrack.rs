//! Deletes stale UDP conntrack entries: the flows of a removed endpoint must find another one.
//!
//! Like kube-proxy it never touches TCP: flows to a removed endpoint end by themselves. A pass takes one dump per
//! family, which the kernel filters to UDP where it can, and one request per deleted entry. It runs in its own thread:
//! a dump takes as long as the table of the whole machine takes, however small the share of this network namespace.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::netlink::Socket;
use super::netlink::wire::{Message, Writer, find, find_path, netfilter_header, netfilter_type};

/// Messages (`IPCTNL_MSG_CT_*`) and attributes (`CTA_*`) of `linux/netfilter/nfnetlink_conntrack.h`, which `libc`
/// lacks.
mod cta {
    use super::netfilter_type;

    pub(super) const GET: u16 = netfilter_type(libc::NFNL_SUBSYS_CTNETLINK, 1);
    pub(super) const DELETE: u16 = netfilter_type(libc::NFNL_SUBSYS_CTNETLINK, 2);
    pub(super) const GET_STATISTICS: u16 = netfilter_type(libc::NFNL_SUBSYS_CTNETLINK, 5);

    pub(super) const TUPLE_ORIGINAL: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
    pub(super) const FILTER: u16 = 25;

    /// `CTA_TUPLE_*`.
    pub(super) mod tuple {
        pub(in super::super) const IP: u16 = 1;
        pub(in super::super) const PROTOCOL: u16 = 2;
    }

    /// `CTA_IP_*`.
    pub(super) mod ip {
        pub(in super::super) const V4_SOURCE: u16 = 1;
        pub(in super::super) const V4_DESTINATION: u16 = 2;
        pub(in super::super) const V6_SOURCE: u16 = 3;
        pub(in super::super) const V6_DESTINATION: u16 = 4;
    }

    /// `CTA_PROTO_*`.
    pub(super) mod protocol {
        pub(in super::super) const NUMBER: u16 = 1;
        pub(in super::super) const SOURCE_PORT: u16 = 2;
        pub(in super::super) const DESTINATION_PORT: u16 = 3;
    }

    /// `CTA_FILTER_*`.
    pub(super) mod filter {
        pub(in super::super) const ORIGINAL_FLAGS: u16 = 1;
        /// `CTA_FILTER_F_CTA_PROTO_NUM`: compare the protocol number.
        pub(in super::super) const PROTOCOL_NUMBER: u32 = 1 << 3;
    }
}

const UDP: u8 = libc::IPPROTO_UDP as u8;
/// Attempts of a dump that changes interrupt; the entries of the last attempt are used.
const ATTEMPTS: usize = 3;
/// Maximum entries in one [`FlowReport::Found`]: the engine answers within the time of a small commit.
const FLOWS: usize = 512;

/// Address families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Families {
    /// IPv4.
    pub(crate) ipv4: bool,
    /// IPv6.
    pub(crate) ipv6: bool,
}

impl Families {
    /// Both.
    pub(crate) const ALL: Self = Self { ipv4: true, ipv6: true };
}

/// A UDP entry of the conntrack table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpFlow {
    /// Destination of the client's packets.
    pub destination: SocketAddr,
    /// Source of the replies.
    pub backend: SocketAddr,
}

/// A report of a pass over the conntrack table.
#[derive(Debug)]
pub enum FlowReport {
    /// Asks which of these entries are stale.
    Found {
        /// The entries.
        flows: Vec<UdpFlow>,
        /// Gets one answer per entry, in their order.
        stale: oneshot::Sender<Vec<bool>>,
    },
    /// The pass ended.
    Done {
        /// Number of deleted entries, or the reason to repeat the pass.
        deleted: io::Result<usize>,
        /// Duration of the pass.
        took: Duration,
    },
}

/// A conntrack table that passes examine.
pub(crate) trait FlowTable: Send {
    /// Begins a pass and returns at once. The pass sends reports, at last [`FlowReport::Done`]; no other pass begins
    /// before that.
    fn begin(&mut self, families: Families);
}

/// The kernel's conntrack table.
pub(crate) struct Conntrack {
    socket: Socket,
}

/// Handle of the thread that examines the table. The thread ends when the handle is dropped.
pub(crate) struct Reconciler(SyncSender<Families>);

/// Returns which entries are stale; `None` if the receiver of the reports has ended.
type Judge<'a> = &'a mut dyn FnMut(Vec<UdpFlow>) -> Option<Vec<bool>>;

/// The attributes by which the kernel deletes exactly one entry.
struct Entry {
    original: Vec<u8>,
    id: Option<Vec<u8>>,
    zone: Option<Vec<u8>>,
}

impl Conntrack {
    /// Opens the table of the calling thread's network namespace.
    ///
    /// # Errors
    /// No netlink socket can be opened.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Conntrack { socket: Socket::open(libc::NETLINK_NETFILTER, 0)? })
    }

    /// Makes the kernel load connection tracking if it is a module, as any request of a process with CAP_NET_ADMIN
    /// does.
    ///
    /// # Errors
    /// The module does not exist, or the process must not load it.
    pub(crate) fn load(&mut self) -> io::Result<()> {
        let any_family = netfilter_header(libc::AF_UNSPEC as u8, 0);
        self.socket.request(cta::GET_STATISTICS, libc::NLM_F_ACK, |writer| writer.header(&any_family), |_| ())
    }

    /// Deletes the stale entries of a family; returns their number.
    fn family(&mut self, ipv4: bool, judge: Judge<'_>) -> io::Result<usize> {
        let family = if ipv4 { libc::AF_INET } else { libc::AF_INET6 } as u8;
        let (mut stale, mut whole, mut filtered) = (Vec::new(), false, true);
        for _ in 0..ATTEMPTS {
            stale.clear();
            match self.dump(family, filtered, judge, &mut stale) {
                Ok(()) => {
                    whole = true;
                    break;
                }
                // A kernel before 5.8 has no filter; `udp_entry` selects UDP in any case.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) && filtered =>
                {
                    filtered = false;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOBUFS)) => {}
                Err(error) => return Err(error),
            }
        }
        let mut deleted = 0;
        for entry in &stale {
            deleted += usize::from(self.delete(family, entry)?);
        }
        if whole {
            Ok(deleted)
        } else {
            Err(io::Error::other(
                "every dump was interrupted; only the entries that were read are reconciled",
            ))
        }
    }

    /// Adds the stale entries of a family to `stale`.
    fn dump(
        &mut self,
        family: u8,
        filtered: bool,
        judge: Judge<'_>,
        stale: &mut Vec<Entry>,
    ) -> io::Result<()> {
        let (mut flows, mut entries) = (Vec::new(), Vec::new());
        let request = |writer: &mut Writer| {
            writer.header(&netfilter_header(family, 0));
            if filtered {
                only_udp(writer);
            }
        };
        self.socket.request(cta::GET, libc::NLM_F_DUMP, request, |message| {
            if let Some((flow, entry)) = udp_entry(message) {
                flows.push(flow);
                entries.push(entry);
            }
            if flows.len() == FLOWS {
                keep_stale(&mut flows, &mut entries, judge, stale);
            }
        })?;
        keep_stale(&mut flows, &mut entries, judge, stale);
        Ok(())
    }

    /// Deletes an entry; returns false if it was gone already.
    fn delete(&mut self, family: u8, entry: &Entry) -> io::Result<bool> {
        let request = |writer: &mut Writer| {
            writer.header(&netfilter_header(family, 0));
            writer.nest(cta::TUPLE_ORIGINAL, |writer| writer.header(&entry.original));
            if let Some(id) = &entry.id {
                writer.attribute(cta::ID, id);
            }
            if let Some(zone) = &entry.zone {
                writer.attribute(cta::ZONE, zone);
            }
        };
        match self.socket.request(cta::DELETE, libc::NLM_F_ACK, request, |_| ()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Moves the stale entries to `stale`. Without an answer no entry is stale: the agent is stopping.
fn keep_stale(flows: &mut Vec<UdpFlow>, entries: &mut Vec<Entry>, judge: Judge<'_>, stale: &mut Vec<Entry>) {
    let verdicts = if flows.is_empty() { None } else { judge(std::mem::take(flows)) };
    let judged = entries.drain(..).zip(verdicts.unwrap_or_default());
    stale.extend(judged.filter_map(|(entry, is_stale)| is_stale.then_some(entry)));
}

impl Reconciler {
    /// Starts the thread, which sends its reports by `report` until that breaks.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(
        mut table: Conntrack,
        report: impl Fn(FlowReport) -> ControlFlow<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, passes) = sync_channel::<Families>(1);
        std::thread::Builder::new().name("conntrack".into()).spawn(move || {
            while let Ok(families) = passes.recv() {
                let started = Instant::now();
                let deleted = pass(&mut table, families, &report);
                if report(FlowReport::Done { deleted, took: started.elapsed() }).is_break() {
                    return;
                }
            }
        })?;
        Ok(Reconciler(sender))
    }
}

impl FlowTable for Reconciler {
    fn begin(&mut self, families: Families) {
        // The channel has room: a pass begins only after the previous one is done.
        if self.0.try_send(families).is_err() {
            tracing::error!("the conntrack thread has ended; stale UDP flows remain until a restart");
        }
    }
}

fn pass(
    table: &mut Conntrack,
    families: Families,
    report: &impl Fn(FlowReport) -> ControlFlow<()>,
) -> io::Result<usize> {
    let mut judge = |flows| {
        let (stale, answer) = oneshot::channel();
        report(FlowReport::Found { flows, stale })
            .is_continue()
            .then(|| answer.blocking_recv().ok())
            .flatten()
    };
    let mut deleted = 0;
    for (ipv4, wanted) in [(true, families.ipv4), (false, families.ipv6)] {
        if wanted {
            deleted += table.family(ipv4, &mut judge)?;
        }
    }
    Ok(deleted)
}

/// Restricts a dump to UDP.
fn only_udp(writer: &mut Writer) {
    writer.nest(cta::TUPLE_ORIGINAL, |writer| {
        writer.nest(cta::tuple::PROTOCOL, |writer| writer.attribute(cta::protocol::NUMBER, &[UDP]));
    });
    writer.nest(cta::FILTER, |writer| {
        writer.attribute(cta::filter::ORIGINAL_FLAGS, &cta::filter::PROTOCOL_NUMBER.to_ne_bytes());
    });
}

/// Reads an entry; `None` if it is not UDP.
/// Reads a message as an entry, for fuzzing.
pub(super) fn read_message(message: &Message<'_>) {
    let _ = udp_entry(message);
}

fn udp_entry(message: &Message<'_>) -> Option<(UdpFlow, Entry)> {
    let attributes = message.attributes();
    let original = find(attributes, cta::TUPLE_ORIGINAL)?;
    let reply = find(attributes, cta::TUPLE_REPLY)?;
    let protocol = find_path(original, &[cta::tuple::PROTOCOL, cta::protocol::NUMBER])?;
    if protocol.first() != Some(&UDP) {
        return None;
    }
    let destination = address(original, cta::ip::V4_DESTINATION, cta::ip::V6_DESTINATION)?;
    let backend = address(reply, cta::ip::V4_SOURCE, cta::ip::V6_SOURCE)?;
    let flow = UdpFlow {
        destination: SocketAddr::new(destination, port(original, cta::protocol::DESTINATION_PORT)?),
        backend: SocketAddr::new(backend, port(reply, cta::protocol::SOURCE_PORT)?),
    };
    let entry = Entry {
        original: original.to_vec(),
        id: find(attributes, cta::ID).map(<[u8]>::to_vec),
        zone: find(attributes, cta::ZONE).map(<[u8]>::to_vec),
    };
    Some((flow, entry))
}

fn address(tuple: &[u8], v4: u16, v6: u16) -> Option<IpAddr> {
    let addresses = find(tuple, cta::tuple::IP)?;
    if let Some(bytes) = find(addresses, v4) {
        return <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    }
    <[u8; 16]>::try_from(find(addresses, v6)?).ok().map(IpAddr::from)
}

fn port(tuple: &[u8], kind: u16) -> Option<u16> {
    let bytes = find_path(tuple, &[cta::tuple::PROTOCOL, kind])?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}
