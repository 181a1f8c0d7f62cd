//! The nf_tables netlink socket: sends a batch as one transaction, dumps, and nothing else.
//!
//! A batch is handled inside `send()`: all replies are queued when it returns, so they are read without
//! waiting. The socket belongs to the network namespace of the thread that opened it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::wire::{Attributes, FULL_HEADER, HEADER, Messages, Received, Writer, find};

pub(crate) const NEW_TABLE: u16 = 0;
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const DELETE_TABLE: u16 = 2;
pub(crate) const NEW_CHAIN: u16 = 3;
pub(crate) const GET_CHAIN: u16 = 4;
pub(crate) const DELETE_CHAIN: u16 = 5;
pub(crate) const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const DELETE_RULE: u16 = 8;
pub(crate) const NEW_SET: u16 = 9;
pub(crate) const GET_SET: u16 = 10;
pub(crate) const DELETE_SET: u16 = 11;
pub(crate) const NEW_ELEMENT: u16 = 12;
pub(crate) const GET_ELEMENT: u16 = 13;
pub(crate) const DELETE_ELEMENT: u16 = 14;
pub(crate) const GET_GENERATION: u16 = 16;

/// `NFNL_SUBSYS_NFTABLES`, in the high byte of the message type.
pub(crate) const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
/// `NLM_F_CREATE`.
pub(crate) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`: a rule goes to the end of its chain.
pub(crate) const APPEND: u16 = 0x800;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// `NLM_F_ACK_TLVS`: attributes follow the quoted header of an error.
const HAS_ATTRIBUTES: u16 = 0x200;
/// `NLM_F_DUMP_INTR`: the ruleset changed while it was dumped.
const DUMP_INTERRUPTED: u16 = 0x10;
/// `NLMSGERR_ATTR_OFFS`.
const ERROR_OFFSET: u16 = 2;
/// How often a dump that others disturb is begun again.
const DUMP_ATTEMPTS: usize = 50;

/// One transaction, being written.
#[derive(Debug)]
pub(crate) struct Batch {
    writer: Writer,
    /// Start of each message in the buffer; the index is its sequence number (0 is the begin message).
    starts: Vec<usize>,
    next_set: u32,
}

/// An operation that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Index of the message, as [`Batch::len`] was before it was written.
    pub(crate) message: usize,
    /// The error number, positive.
    pub(crate) errno: i32,
    /// Offset of the offending attribute from the start of the message, if the kernel told.
    pub(crate) offset: Option<usize>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        let mut batch = Batch { writer: Writer::default(), starts: vec![0], next_set: 0 };
        batch.writer.message(BATCH_BEGIN, REQUEST, 0, (0, 10), |_| ());
        batch
    }

    /// Number of messages, the begin message included: the index that the next one gets.
    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }

    /// Appends an operation on nf_tables of address family `family`.
    pub(crate) fn push(&mut self, kind: u16, flags: u16, family: u8, body: impl FnOnce(&mut Writer)) {
        self.starts.push(self.writer.bytes.len());
        let sequence = (self.starts.len() - 1) as u32;
        self.writer.message(SUBSYSTEM | kind, REQUEST | flags, sequence, (family, 0), body);
    }

    /// A number that names a set within this batch.
    pub(crate) fn set_id(&mut self) -> u32 {
        self.next_set += 1;
        self.next_set
    }

    /// Which attribute of a message's element list the offset lies in, counted from 0.
    pub(crate) fn element_at(&self, failure: &Failure) -> Option<usize> {
        let start = *self.starts.get(failure.message)?;
        let offset = failure.offset?;
        let length = u32::from_ne_bytes(self.writer.bytes.get(start..start + 4)?.try_into().ok()?) as usize;
        let message = self.writer.bytes.get(start..start + length)?;
        let list = find(message.get(FULL_HEADER..)?, 3)?;
        let list_start = list.as_ptr() as usize - message.as_ptr() as usize;
        let mut position = list_start;
        for (index, (_, value)) in Attributes(list).enumerate() {
            let next = position + (value.len() + 4).next_multiple_of(4);
            if (position..next).contains(&offset) {
                return Some(index);
            }
            position = next;
        }
        None
    }

    /// Ends the batch: its last operation asks for the acknowledgement that says "committed".
    fn finish(&mut self) {
        if let Some(last) = self.starts.last().filter(|_| self.starts.len() > 1) {
            self.writer.bytes[last + 6] |= ACKNOWLEDGE as u8;
        }
        let sequence = self.starts.len() as u32;
        self.writer.message(BATCH_END, REQUEST, sequence, (0, 10), |_| ());
    }
}

/// An open netlink socket.
#[derive(Debug)]
pub(crate) struct Socket {
    descriptor: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        let (kind, protocol) = (libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER);
        // SAFETY: plain system call; the result is checked before it becomes an owned descriptor.
        let descriptor = unsafe {
            let number = libc::socket(libc::AF_NETLINK, kind, protocol);
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(number)
        };
        let socket = Socket { descriptor, buffer: vec![0; 1 << 16], sequence: 0 };
        // Errors quote the header only (a message may be 64 KiB long), and say which attribute was wrong.
        socket.option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        socket.option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)?;
        // Without CAP_NET_ADMIN these fail, and so will the first commit, which then says EPERM.
        let _ = socket.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 8 << 20);
        // SAFETY: zero is a valid sockaddr_nl: the kernel chooses the port id.
        let address = unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            address.nl_family = libc::AF_NETLINK as u16;
            address
        };
        let length = std::mem::size_of_val(&address) as u32;
        // SAFETY: the address outlives the call and its length is right.
        let bound = unsafe { libc::bind(socket.descriptor.as_raw_fd(), (&raw const address).cast(), length) };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
    }

    pub(crate) fn option(&self, level: i32, name: i32, value: i32) -> io::Result<()> {
        let length = std::mem::size_of::<i32>() as u32;
        // SAFETY: the value outlives the call and its length is right.
        let result = unsafe {
            libc::setsockopt(self.descriptor.as_raw_fd(), level, name, (&raw const value).cast(), length)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }

    /// The port id by which the kernel's notifications name this socket.
    pub(crate) fn port(&self) -> io::Result<u32> {
        // SAFETY: zero is a valid sockaddr_nl; the kernel fills it.
        unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            let mut length = std::mem::size_of_val(&address) as u32;
            let descriptor = self.descriptor.as_raw_fd();
            if libc::getsockname(descriptor, (&raw mut address).cast(), &raw mut length) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(address.nl_pid)
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: pointer and length are those of the slice.
            let sent =
                unsafe { libc::send(self.descriptor.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Receives one datagram into the buffer; `None` if there is none and `wait` is false.
    pub(crate) fn receive(&mut self, wait: bool) -> io::Result<Option<usize>> {
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        loop {
            // SAFETY: pointer and length are those of the buffer.
            let received = unsafe {
                let buffer = self.buffer.as_mut_ptr().cast();
                libc::recv(self.descriptor.as_raw_fd(), buffer, self.buffer.len(), flags)
            };
            if received >= 0 {
                return Ok(Some(received as usize));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }

    pub(crate) fn received(&self, length: usize) -> &[u8] {
        &self.buffer[..length]
    }

    /// Drops everything that is queued.
    fn discard(&mut self) -> io::Result<()> {
        loop {
            match self.receive(false) {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a batch, unless it is empty. `Ok(failures)` empty: committed; otherwise nothing of it was applied.
    ///
    /// # Errors
    /// The socket failed.
    pub(crate) fn commit(&mut self, batch: &mut Batch) -> io::Result<Vec<Failure>> {
        if batch.starts.len() == 1 {
            // No operation would ask for the acknowledgement: everything was refused, or was there already.
            return Ok(Vec::new());
        }
        batch.finish();
        let last = batch.starts.len() - 1;
        let size = i32::try_from(batch.writer.bytes.len() + (1 << 16)).unwrap_or(i32::MAX);
        // Above the default send buffer a batch fails with EMSGSIZE. Without the capability the send says why.
        let _ = self.option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size);
        // Replies to an earlier transaction carry the same sequence numbers.
        self.discard()?;
        self.send(&batch.writer.bytes)?;
        let (mut failures, mut committed, mut overflow) = (Vec::new(), false, None);
        loop {
            let length = match self.receive(false) {
                Ok(Some(length)) => length,
                Ok(None) => break,
                // The replies that fit are still queued.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    overflow = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for message in Messages(&self.buffer[..length]).filter(|message| message.kind == ERROR) {
                match failure(&message) {
                    Some(failure) if failure.errno != 0 => failures.push(failure),
                    Some(failure) => committed |= failure.message == last,
                    None => {}
                }
            }
        }
        if failures.is_empty() && !committed {
            if let Some(error) = overflow {
                return Err(error);
            }
            return Err(io::Error::other("the kernel did not answer the transaction"));
        }
        Ok(failures)
    }

    /// Sends a request and calls `each` with every answer. Begins again when the ruleset changed meanwhile:
    /// `restart` is called first, to forget what was seen.
    ///
    /// # Errors
    /// The socket failed, or the kernel refused the request (its error number, ENOENT if absent).
    pub(crate) fn request(
        &mut self,
        (kind, family, dump): (u16, u8, bool),
        body: impl Fn(&mut Writer),
        mut each: impl FnMut(&Received<'_>),
    ) -> io::Result<()> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut answers: Vec<Vec<u8>> = Vec::new();
            if self.exchange((kind, family, dump), &body, &mut answers)? {
                for datagram in &answers {
                    Messages(datagram)
                        .filter(|message| message.kind > DONE)
                        .for_each(|message| each(&message));
                }
                return Ok(());
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the ruleset changed during every attempt to dump it",
        ))
    }

    /// One attempt; false if the dump was interrupted.
    fn exchange(
        &mut self,
        (kind, family, dump): (u16, u8, bool),
        body: &impl Fn(&mut Writer),
        answers: &mut Vec<Vec<u8>>,
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut writer = Writer::default();
        let flags = REQUEST | if dump { DUMP } else { ACKNOWLEDGE };
        writer.message(SUBSYSTEM | kind, flags, sequence, (family, 0), body);
        self.send(&writer.bytes)?;
        let mut whole = true;
        while let Some(length) = self.receive(true)? {
            let mut done = false;
            for message in Messages(&self.buffer[..length]).filter(|message| message.sequence == sequence) {
                whole &= message.flags & DUMP_INTERRUPTED == 0;
                done |= message.kind == DONE || message.kind == ERROR;
                if message.kind == ERROR {
                    match failure(&message).map(|failure| failure.errno) {
                        Some(libc::EINTR | libc::EAGAIN) => whole = false,
                        Some(errno) if errno != 0 => return Err(io::Error::from_raw_os_error(errno)),
                        _ => {}
                    }
                }
            }
            answers.push(self.buffer[..length].to_vec());
            if done {
                break;
            }
        }
        Ok(whole)
    }
}

/// Reads an error message (errno 0: an acknowledgement).
fn failure(message: &Received<'_>) -> Option<Failure> {
    let word = |at: usize| -> Option<[u8; 4]> { message.payload.get(at..at + 4)?.try_into().ok() };
    let errno = -i32::from_ne_bytes(word(0)?);
    let offset = (message.flags & HAS_ATTRIBUTES != 0)
        .then(|| find(message.payload.get(4 + HEADER..)?, ERROR_OFFSET))
        .flatten()
        .and_then(|value| Some(u32::from_ne_bytes(value.try_into().ok()?) as usize));
    Some(Failure { message: message.sequence as usize, errno, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_that_do_not_fit_are_not_taken_for_later_ones() {
        let thread = std::thread::spawn(|| {
            // SAFETY: plain system call; only this thread gets a network namespace of its own.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
            let mut socket = Socket::open().unwrap();
            socket.option(libc::SOL_SOCKET, libc::SO_RCVBUF, 4096).unwrap();
            let mut refused = Batch::new();
            for _ in 0..5000 {
                refused.push(DELETE_TABLE, 0, 2, |writer| writer.string(1, "absent"));
            }
            match socket.commit(&mut refused) {
                Ok(failures) => assert!((1..5000).contains(&failures.len()), "{}", failures.len()),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS)),
            }
            let mut batch = Batch::new();
            batch.push(NEW_TABLE, CREATE, 2, |writer| writer.string(1, "present"));
            assert_eq!(socket.commit(&mut batch).unwrap(), Vec::new());
        });
        thread.join().unwrap();
    }
}
