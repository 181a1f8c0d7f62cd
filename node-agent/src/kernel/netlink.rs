//! The netlink socket of the agent: nf_tables, conntrack and interface addresses.
//!
//! A socket belongs to the network namespace of the thread that opened it. The kernel handles a request inside
//! `send()`: acknowledgements and the first part of a dump are queued when it returns.

pub(super) mod wire;

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use wire::{Header, MESSAGE_HEADER, Message, Messages, Writer, find};

/// Time without an answer after which a request fails.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Size of the receive buffer of one datagram; the kernel fills at most 32 KiB per part of a dump.
const DATAGRAM: usize = 1 << 16;
/// `NLMSGERR_ATTR_OFFS` of `linux/netlink.h`.
const ERROR_ATTRIBUTE_OFFSET: u16 = 2;

/// A netlink socket with its receive buffer.
#[derive(Debug)]
pub(super) struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// An error message or acknowledgement of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    /// Sequence number of the request.
    pub(super) sequence: u32,
    /// The error number, positive; 0 for an acknowledgement.
    pub(super) errno: i32,
    /// Offset of the offending attribute from the start of the request, if the kernel reported it.
    pub(super) offset: Option<usize>,
}

impl Reply {
    /// Reads an `NLMSG_ERROR` or `NLMSG_DONE` message; `None` for other types.
    pub(super) fn read(message: &Message<'_>) -> Option<Self> {
        let kind = i32::from(message.kind);
        if kind != libc::NLMSG_ERROR && kind != libc::NLMSG_DONE {
            return None;
        }
        let errno =
            message.payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes).wrapping_neg());
        let has_attributes = i32::from(message.flags) & libc::NLM_F_ACK_TLVS != 0;
        let offset = has_attributes
            .then(|| find(message.payload.get(4 + MESSAGE_HEADER..)?, ERROR_ATTRIBUTE_OFFSET))
            .flatten()
            .and_then(|value| Some(u32::from_ne_bytes(value.try_into().ok()?) as usize));
        Some(Reply { sequence: message.sequence, errno, offset })
    }
}

impl Socket {
    /// Opens a socket of a `NETLINK_*` protocol that receives the multicast groups of a bit mask.
    ///
    /// # Errors
    /// The kernel lacks the protocol, or the process has too many open files.
    pub(super) fn open(protocol: i32, groups: i32) -> io::Result<Self> {
        // SAFETY: plain system call; the result is checked before it becomes an owned descriptor.
        let descriptor = unsafe {
            let number = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol);
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(number)
        };
        // SAFETY: all zero is a valid sockaddr_nl; it outlives the call and its length is right.
        let bound = unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            address.nl_family = libc::AF_NETLINK as u16;
            address.nl_groups = groups as u32;
            libc::bind(descriptor.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = Socket { descriptor, sequence: 0, buffer: vec![0; DATAGRAM] };
        // Errors quote the header only (a message may be 64 KiB long) and name the offending attribute.
        socket.set_option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        socket.set_option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1)?;
        Ok(socket)
    }

    /// Sets an integer socket option.
    pub(super) fn set_option(&self, level: i32, name: i32, value: i32) -> io::Result<()> {
        let (descriptor, length) = (self.descriptor.as_raw_fd(), size_of::<i32>() as u32);
        // SAFETY: the value outlives the call and its length is right.
        let result = unsafe { libc::setsockopt(descriptor, level, name, (&raw const value).cast(), length) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Returns the port id by which the kernel's notifications identify this socket.
    pub(super) fn port(&self) -> io::Result<u32> {
        // SAFETY: zero is a valid sockaddr_nl; the kernel fills it.
        unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            let mut length = size_of_val(&address) as u32;
            let descriptor = self.descriptor.as_raw_fd();
            if libc::getsockname(descriptor, (&raw mut address).cast(), &raw mut length) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(address.nl_pid)
        }
    }

    /// Waits for a message; `None` waits without a limit. Returns false after `timeout`.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let milliseconds =
            timeout.map_or(-1, |timeout| i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1));
        let mut descriptor =
            libc::pollfd { fd: self.descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that outlives the call.
        match unsafe { libc::poll(&raw mut descriptor, 1, milliseconds) } {
            -1 => Err(io::Error::last_os_error()),
            ready => Ok(ready > 0),
        }
    }

    /// Sends messages that a [`Writer`] built.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            let descriptor = self.descriptor.as_raw_fd();
            // SAFETY: pointer and length are those of the slice.
            if unsafe { libc::send(descriptor, bytes.as_ptr().cast(), bytes.len(), 0) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Receives one queued datagram without waiting; `None` if none is queued.
    ///
    /// # Errors
    /// ENOBUFS: messages were lost; those that fit are still queued.
    pub(super) fn receive(&mut self) -> io::Result<Option<Messages<'_>>> {
        let received = self.receive_length()?;
        Ok(received.map(|length| Messages(&self.buffer[..length])))
    }

    fn receive_length(&mut self) -> io::Result<Option<usize>> {
        loop {
            // SAFETY: pointer and length are those of the buffer.
            let received = unsafe {
                let buffer = self.buffer.as_mut_ptr().cast();
                libc::recv(self.descriptor.as_raw_fd(), buffer, self.buffer.len(), libc::MSG_DONTWAIT)
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

    /// Drops all queued messages; returns whether there were any, lost ones included.
    pub(super) fn discard(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match self.receive_length() {
                Ok(None) => return Ok(any),
                Ok(Some(_)) => any = true,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends one request and calls `each` with every answer. `flags` are `NLM_F_ACK` or `NLM_F_DUMP`, without which
    /// the end of the answers could not be recognized.
    ///
    /// # Errors
    /// The socket failed, the kernel refused the request (its error number), or it did not answer in time. EINTR: a
    /// change interrupted the dump, which may lack entries. ENOBUFS: answers were lost.
    pub(super) fn request(
        &mut self,
        kind: u16,
        flags: i32,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(&Message<'_>),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut writer = Writer::default();
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        writer.message(Header { kind, flags, sequence: self.sequence }, body);
        self.send(&writer.bytes)?;
        let mut interrupted = false;
        loop {
            let Some(length) = self.receive_length()? else {
                match self.wait(Some(ANSWER_TIMEOUT)) {
                    Ok(false) => return Err(io::Error::from(io::ErrorKind::TimedOut)),
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                    _ => continue,
                }
            };
            // Answers to an earlier request that failed may still be queued.
            let sequence = self.sequence;
            let messages = Messages(&self.buffer[..length]).filter(|message| message.sequence == sequence);
            for message in messages {
                interrupted |= i32::from(message.flags) & libc::NLM_F_DUMP_INTR != 0;
                match Reply::read(&message) {
                    None => each(&message),
                    Some(Reply { errno: 0, .. }) if interrupted => {
                        return Err(io::Error::from_raw_os_error(libc::EINTR));
                    }
                    Some(Reply { errno: 0, .. }) => return Ok(()),
                    Some(Reply { errno, .. }) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }
}
