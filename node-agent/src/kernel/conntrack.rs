//! Reconciles UDP conntrack entries: after an endpoint went away, its flows must find another one.
//!
//! Only UDP is ever touched, as in kube-proxy: TCP flows to a removed endpoint end by themselves. One dump per
//! family, filtered to UDP by the kernel where it can, and one request per entry that goes. All by a thread of its
//! own: a dump takes as long as the machine's whole table takes, whatever this network namespace has in it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::engine::{Command, Families, FlowReport, FlowTable, UdpFlow};
use crate::kernel::netlink::{ACK, DUMP, NESTED, NetlinkSocket, attribute, put};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const GET_STATISTICS: u16 = SUBSYSTEM | 5;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const FILTER_ORIGINAL_FLAGS: u16 = 1;
/// CTA_FILTER_F_CTA_PROTO_NUM.
const FILTER_PROTOCOL: u32 = 1 << 3;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const UDP: u8 = 17;
/// A dump that changes disturb is begun anew this often; what it gave until then is used.
const ATTEMPTS: usize = 3;
/// Entries in one question to the engine: it answers within the time of a small commit.
const FLOWS: usize = 512;

/// The kernel's conntrack table.
pub struct Conntrack {
    socket: NetlinkSocket,
}

/// The thread that looks through it. It ends when this is dropped.
pub struct Reconciler(SyncSender<Families>);

/// Says which entries are stale; `None`: nobody is there to say it.
type Judge<'a> = &'a mut dyn FnMut(Vec<UdpFlow>) -> Option<Vec<bool>>;

/// What of an entry the kernel needs to delete exactly it.
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
    pub fn open() -> io::Result<Self> {
        Ok(Conntrack { socket: NetlinkSocket::open(libc::NETLINK_NETFILTER, 0)? })
    }

    /// Has the kernel load connection tracking, if that is a module: it does so when it is asked something about it by
    /// somebody with CAP_NET_ADMIN.
    ///
    /// # Errors
    /// There is no such module, or it may not be loaded.
    pub fn load(&mut self) -> io::Result<()> {
        self.socket.request(GET_STATISTICS, ACK, &[libc::AF_UNSPEC as u8, 0, 0, 0], &mut |_| ())
    }

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
                // A kernel before 5.8 has no filter; UDP is picked out below in any case.
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
            Err(io::Error::other("every dump was interrupted; what it gave was used"))
        }
    }

    /// Adds the stale ones of all entries of a family to `stale`.
    fn dump(
        &mut self,
        family: u8,
        filtered: bool,
        judge: Judge<'_>,
        stale: &mut Vec<Entry>,
    ) -> io::Result<()> {
        let mut body = vec![family, 0, 0, 0];
        if filtered {
            put_filter(&mut body);
        }
        let (mut flows, mut entries) = (Vec::new(), Vec::new());
        self.socket.request(GET, DUMP, &body, &mut |message| {
            let Some(attributes) = message.payload.get(4..) else { return };
            let flow = udp_flow(attributes);
            if let Some((flow, original)) = flow.zip(attribute(attributes, TUPLE_ORIGINAL)) {
                flows.push(flow);
                entries.push(Entry {
                    original: original.to_vec(),
                    id: attribute(attributes, ID).map(<[u8]>::to_vec),
                    zone: attribute(attributes, ZONE).map(<[u8]>::to_vec),
                });
            }
            if flows.len() == FLOWS {
                keep_stale(&mut flows, &mut entries, judge, stale);
            }
        })?;
        keep_stale(&mut flows, &mut entries, judge, stale);
        Ok(())
    }

    /// Deletes an entry; false if it is gone already.
    fn delete(&mut self, family: u8, entry: &Entry) -> io::Result<bool> {
        let mut body = vec![family, 0, 0, 0];
        put(&mut body, TUPLE_ORIGINAL | NESTED, &entry.original);
        if let Some(id) = &entry.id {
            put(&mut body, ID, id);
        }
        if let Some(zone) = &entry.zone {
            put(&mut body, ZONE, zone);
        }
        match self.socket.request(DELETE, ACK, &body, &mut |_| ()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Without an answer nothing is stale: the agent is stopping.
fn keep_stale(flows: &mut Vec<UdpFlow>, entries: &mut Vec<Entry>, judge: Judge<'_>, stale: &mut Vec<Entry>) {
    let verdicts = if flows.is_empty() { None } else { judge(std::mem::take(flows)) };
    let judged = entries.drain(..).zip(verdicts.unwrap_or_default());
    stale.extend(judged.filter_map(|(entry, is_stale)| is_stale.then_some(entry)));
}

impl Reconciler {
    /// Starts the thread; what it finds goes to the engine by `commands`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(mut table: Conntrack, commands: mpsc::Sender<Command>) -> io::Result<Self> {
        let (sender, passes) = sync_channel::<Families>(1);
        std::thread::Builder::new().name("conntrack".into()).spawn(move || {
            while let Ok(families) = passes.recv() {
                let started = Instant::now();
                let deleted = pass(&mut table, families, &commands);
                let done = FlowReport::Done { deleted, took: started.elapsed() };
                if commands.blocking_send(Command::Flows(done)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Reconciler(sender))
    }
}

impl FlowTable for Reconciler {
    fn begin(&mut self, families: Families) {
        // There is room: no pass is begun before the one before is done.
        if self.0.try_send(families).is_err() {
            tracing::error!(
                "the thread for conntrack entries has ended; stale UDP flows stay until a restart"
            );
        }
    }
}

fn pass(table: &mut Conntrack, families: Families, commands: &mpsc::Sender<Command>) -> io::Result<usize> {
    let mut judge = |flows| {
        let (stale, answer) = oneshot::channel();
        commands.blocking_send(Command::Flows(FlowReport::Found { flows, stale })).ok()?;
        answer.blocking_recv().ok()
    };
    let mut deleted = 0;
    for (ipv4, wanted) in [(true, families.ipv4), (false, families.ipv6)] {
        if wanted {
            deleted += table.family(ipv4, &mut judge)?;
        }
    }
    Ok(deleted)
}

fn put_filter(body: &mut Vec<u8>) {
    let mut protocol = Vec::new();
    put(&mut protocol, PROTOCOL_NUMBER, &[UDP]);
    let mut tuple = Vec::new();
    put(&mut tuple, TUPLE_PROTOCOL | NESTED, &protocol);
    put(body, TUPLE_ORIGINAL | NESTED, &tuple);
    let mut filter = Vec::new();
    put(&mut filter, FILTER_ORIGINAL_FLAGS, &FILTER_PROTOCOL.to_ne_bytes());
    put(body, FILTER | NESTED, &filter);
}

/// The original destination and the source of replies of a UDP entry.
fn udp_flow(attributes: &[u8]) -> Option<UdpFlow> {
    let original = attribute(attributes, TUPLE_ORIGINAL)?;
    let reply = attribute(attributes, TUPLE_REPLY)?;
    let protocol = attribute(attribute(original, TUPLE_PROTOCOL)?, PROTOCOL_NUMBER)?;
    if protocol.first() != Some(&UDP) {
        return None;
    }
    let destination = SocketAddr::new(address(original, false)?, port(original, DESTINATION_PORT)?);
    let backend = SocketAddr::new(address(reply, true)?, port(reply, SOURCE_PORT)?);
    Some(UdpFlow { destination, backend })
}

fn address(tuple: &[u8], source: bool) -> Option<IpAddr> {
    let addresses = attribute(tuple, TUPLE_IP)?;
    let (v4, v6) = if source { (1, 3) } else { (2, 4) };
    if let Some(bytes) = attribute(addresses, v4) {
        return <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    }
    <[u8; 16]>::try_from(attribute(addresses, v6)?).ok().map(IpAddr::from)
}

fn port(tuple: &[u8], kind: u16) -> Option<u16> {
    let bytes = attribute(attribute(tuple, TUPLE_PROTOCOL)?, kind)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}
