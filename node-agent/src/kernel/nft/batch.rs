//! nf_tables transactions and requests on a netlink socket.

use std::io;

use super::nfta;
use crate::kernel::netlink::wire::{
    Attributes, Header, MESSAGE_HEADER, Message, Messages, Writer, find, netfilter_header, netfilter_type,
};
use crate::kernel::netlink::{Reply, Socket};

/// Attempts of a request whose dump changes interrupt.
const DUMP_ATTEMPTS: usize = 50;
/// Receive buffer in bytes: room for one error per message of a large batch.
const RECEIVE_BUFFER: i32 = 8 << 20;
/// Room in the send buffer beyond the batch itself, in bytes.
const SEND_RESERVE: usize = 1 << 16;
/// Offset of the low byte of `nlmsghdr.nlmsg_flags`.
const FLAGS_OFFSET: usize = std::mem::offset_of!(libc::nlmsghdr, nlmsg_flags);

/// Opens a socket for nf_tables in the network namespace of the calling thread.
pub(crate) fn open() -> io::Result<Socket> {
    let socket = Socket::open(libc::NETLINK_NETFILTER, 0)?;
    // Without CAP_NET_ADMIN this fails, and the first commit then reports EPERM.
    let _ = socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER);
    Ok(socket)
}

/// One transaction under construction.
#[derive(Debug)]
pub(crate) struct Batch {
    writer: Writer,
    /// Start of each message in the buffer; the index is its sequence number (0 is the begin message).
    starts: Vec<usize>,
    next_set: u32,
}

/// An operation that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RefusedMessage {
    /// Index of the message, as [`Batch::len`] was before it was written.
    pub(crate) message: usize,
    /// The error number, positive.
    pub(crate) errno: i32,
    /// Offset of the offending attribute from the start of the message, if the kernel reported it.
    pub(crate) offset: Option<usize>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        let mut batch = Batch { writer: Writer::default(), starts: vec![0], next_set: 0 };
        batch.delimiter(libc::NFNL_MSG_BATCH_BEGIN, 0);
        batch
    }

    /// Returns the number of messages, the begin message included: the index of the next one.
    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }

    /// Returns the messages written so far.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.writer.bytes
    }

    /// Appends an operation (`NFT_MSG_*`) with `NLM_F_*` flags on the tables of an address family.
    pub(crate) fn push(&mut self, operation: i32, flags: i32, family: u8, body: impl FnOnce(&mut Writer)) {
        let header = Header {
            kind: netfilter_type(libc::NFNL_SUBSYS_NFTABLES, operation),
            flags: (libc::NLM_F_REQUEST | flags) as u16,
            sequence: self.starts.len() as u32,
        };
        self.starts.push(self.writer.bytes.len());
        self.writer.message(header, |writer| {
            writer.header(&netfilter_header(family, 0));
            body(writer);
        });
    }

    /// Returns a number that identifies a set within this batch.
    pub(crate) fn set_id(&mut self) -> u32 {
        self.next_set += 1;
        self.next_set
    }

    /// Returns the index of the entry of a message's element list that the failure's offset lies in.
    pub(crate) fn element_at(&self, failure: &RefusedMessage) -> Option<usize> {
        let start = *self.starts.get(failure.message)?;
        let offset = failure.offset?;
        let message = Messages(self.writer.bytes.get(start..)?).next()?;
        let list = find(message.attributes(), nfta::element_list::ELEMENTS)?;
        let payload_start = message.payload.as_ptr() as usize;
        let mut position = MESSAGE_HEADER + list.as_ptr() as usize - payload_start;
        for (index, (_, value)) in Attributes(list).enumerate() {
            let next = position + (value.len() + 4).next_multiple_of(4);
            if (position..next).contains(&offset) {
                return Some(index);
            }
            position = next;
        }
        None
    }

    /// Describes the object of a refused message, and the expression if the kernel reported it.
    pub(crate) fn describe(&self, failure: &RefusedMessage) -> Option<String> {
        let start = *self.starts.get(failure.message).filter(|_| failure.message > 0)?;
        let bytes = self.writer.bytes.get(start..)?;
        let message = Messages(bytes).next()?;
        let family = if message.payload.first() == Some(&(libc::NFPROTO_IPV6 as u8)) { "ip6" } else { "ip" };
        let text = |attribute| {
            let value = String::from_utf8_lossy(find(message.attributes(), attribute)?);
            Some(value.trim_end_matches('\0').to_owned())
        };
        let kind = i32::from(message.kind & 0xff);
        let object = match kind {
            libc::NFT_MSG_NEWTABLE | libc::NFT_MSG_DELTABLE => format!("table {}", text(nfta::table::NAME)?),
            libc::NFT_MSG_NEWSET | libc::NFT_MSG_DELSET => format!("set {}", text(nfta::set::NAME)?),
            libc::NFT_MSG_NEWCHAIN | libc::NFT_MSG_DELCHAIN => format!("chain {}", text(nfta::chain::NAME)?),
            libc::NFT_MSG_NEWRULE | libc::NFT_MSG_DELRULE => {
                let expression = failure.offset.and_then(|offset| expression(bytes, offset));
                let with = expression.map(|name| format!(" with expression {name}")).unwrap_or_default();
                format!("rule of chain {}{with}", text(nfta::rule::CHAIN)?)
            }
            libc::NFT_MSG_NEWSETELEM | libc::NFT_MSG_DELSETELEM => {
                format!("elements of {}", text(nfta::element_list::SET)?)
            }
            _ => return None,
        };
        Some(format!("{object} in family {family}"))
    }

    /// Ends the batch: its last operation requests the acknowledgement that confirms the commit.
    fn finish(&mut self) {
        if let Some(last) = self.starts.last().filter(|_| self.starts.len() > 1) {
            let flags = &mut self.writer.bytes[last + FLAGS_OFFSET..][..2];
            let old = u16::from_ne_bytes([flags[0], flags[1]]);
            flags.copy_from_slice(&(old | libc::NLM_F_ACK as u16).to_ne_bytes());
        }
        self.delimiter(libc::NFNL_MSG_BATCH_END, self.starts.len() as u32);
    }

    fn delimiter(&mut self, kind: i32, sequence: u32) {
        let header = Header { kind: kind as u16, flags: libc::NLM_F_REQUEST as u16, sequence };
        // A batch names its subsystem in the resource id.
        let subsystem = netfilter_header(libc::AF_UNSPEC as u8, libc::NFNL_SUBSYS_NFTABLES as u16);
        self.writer.message(header, |writer| writer.header(&subsystem));
    }

    /// Sends the batch, unless it is empty. `Ok(failures)` empty: committed; otherwise nothing of it was applied.
    ///
    /// # Errors
    /// The socket failed.
    pub(crate) fn commit(&mut self, socket: &mut Socket) -> io::Result<Vec<RefusedMessage>> {
        if self.starts.len() == 1 {
            // No operation would request the acknowledgement: everything was refused, or was there already.
            return Ok(Vec::new());
        }
        self.finish();
        let last = self.starts.len() - 1;
        let size = i32::try_from(self.writer.bytes.len() + SEND_RESERVE).unwrap_or(i32::MAX);
        // Above the default send buffer a batch fails with EMSGSIZE. Without the capability `send` reports that.
        let _ = socket.set_option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size);
        // Replies to an earlier transaction carry the same sequence numbers.
        socket.discard()?;
        socket.send(&self.writer.bytes)?;
        let (mut failures, mut committed, mut overflow) = (Vec::new(), false, None);
        loop {
            match socket.receive() {
                Ok(Some(messages)) => {
                    for reply in messages.filter_map(|message| Reply::read(&message)) {
                        let message = reply.sequence as usize;
                        match reply.errno {
                            0 => committed |= message == last,
                            errno => failures.push(RefusedMessage { message, errno, offset: reply.offset }),
                        }
                    }
                }
                Ok(None) => break,
                // The replies that fit are still queued.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => overflow = Some(error),
                Err(error) => return Err(error),
            }
        }
        if failures.is_empty() && !committed {
            let unanswered = || io::Error::other("the kernel did not answer the transaction");
            return Err(overflow.unwrap_or_else(unanswered));
        }
        Ok(failures)
    }
}

/// Returns the name in the attribute at `offset`; `None` if the attribute is not a name.
fn expression(message: &[u8], offset: usize) -> Option<&str> {
    let length = u16::from_ne_bytes(message.get(offset..offset + 2)?.try_into().ok()?);
    let value = message.get(offset + 4..offset + usize::from(length))?.strip_suffix(&[0])?;
    let name = std::str::from_utf8(value).ok()?;
    (!name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
        .then_some(name)
}

/// A read request: the message (`NFT_MSG_GET*`) and the address family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Get {
    message: i32,
    family: u8,
    flags: i32,
}

impl Get {
    /// Requests one object.
    pub(crate) fn one(message: i32, family: u8) -> Self {
        Get { message, family, flags: libc::NLM_F_ACK }
    }

    /// Requests all objects that match the attributes of the request.
    pub(crate) fn all(message: i32, family: u8) -> Self {
        Get { message, family, flags: libc::NLM_F_DUMP }
    }

    /// Sends the request and calls `each` with every answer, after all of them arrived. Repeats a dump that a change
    /// interrupted.
    ///
    /// # Errors
    /// The socket failed, or the kernel refused the request (its error number, ENOENT if absent).
    pub(crate) fn send(
        self,
        socket: &mut Socket,
        body: impl Fn(&mut Writer),
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let kind = netfilter_type(libc::NFNL_SUBSYS_NFTABLES, self.message);
        for _ in 0..DUMP_ATTEMPTS {
            let mut answers: Vec<Vec<u8>> = Vec::new();
            let request = |writer: &mut Writer| {
                writer.header(&netfilter_header(self.family, 0));
                body(writer);
            };
            let keep = |message: &Message<'_>| answers.push(message.attributes().to_vec());
            match socket.request(kind, self.flags, request, keep) {
                Ok(()) => {
                    answers.iter().for_each(|attributes| each(attributes));
                    return Ok(());
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the ruleset changed during every attempt to dump it",
        ))
    }

    /// Returns whether the object exists.
    ///
    /// # Errors
    /// The socket failed, or the kernel refused the request.
    pub(crate) fn exists(self, socket: &mut Socket, body: impl Fn(&mut Writer)) -> io::Result<bool> {
        match self.send(socket, body, |_| ()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_object_named_with_its_expression() {
        let mut batch = Batch::new();
        let mut offset = 0;
        batch.push(libc::NFT_MSG_NEWRULE, 0, libc::NFPROTO_IPV6 as u8, |writer| {
            let start = writer.bytes.len() - MESSAGE_HEADER - 4;
            writer.string(nfta::rule::TABLE, "switchtower");
            writer.string(nfta::rule::CHAIN, "size-2");
            writer.nest(nfta::rule::EXPRESSIONS, |writer| {
                writer.nest(nfta::list::ENTRY, |writer| {
                    offset = writer.bytes.len() - start;
                    writer.string(nfta::expression::NAME, "numgen");
                });
            });
        });
        let mut failure = RefusedMessage { message: 1, errno: libc::ENOENT, offset: Some(offset) };
        let wanted = "rule of chain size-2 with expression numgen in family ip6";
        assert_eq!(batch.describe(&failure).as_deref(), Some(wanted));
        failure.offset = Some(2);
        assert_eq!(batch.describe(&failure).as_deref(), Some("rule of chain size-2 in family ip6"));
        failure.message = 0;
        assert_eq!(batch.describe(&failure), None);
    }

    #[test]
    fn lost_replies_do_not_reach_the_next_batch() {
        let thread = std::thread::spawn(|| {
            // SAFETY: plain system call; only this thread gets a network namespace of its own.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
            let family = libc::NFPROTO_IPV4 as u8;
            let mut socket = open().unwrap();
            socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUF, 4096).unwrap();
            let mut refused = Batch::new();
            for _ in 0..5000 {
                refused.push(libc::NFT_MSG_DELTABLE, 0, family, |writer| {
                    writer.string(nfta::table::NAME, "absent");
                });
            }
            match refused.commit(&mut socket) {
                Ok(failures) => assert!((1..5000).contains(&failures.len()), "{}", failures.len()),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS)),
            }
            let mut batch = Batch::new();
            batch.push(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, family, |writer| {
                writer.string(nfta::table::NAME, "present");
            });
            assert_eq!(batch.commit(&mut socket).unwrap(), Vec::new());
        });
        thread.join().unwrap();
    }
}
