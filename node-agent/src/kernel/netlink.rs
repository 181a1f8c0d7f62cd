//! A plain netlink socket for what is not nf_tables: conntrack entries and interface addresses.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

const REQUEST: u16 = 1;
pub(crate) const ACK: u16 = 4;
pub(crate) const DUMP: u16 = 0x300;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
/// A kernel that does not answer within this is treated as an error.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A socket in the network namespace of the thread that opened it.
pub(crate) struct NetlinkSocket {
    descriptor: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// One message's header and what follows it.
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) payload: &'a [u8],
}

impl NetlinkSocket {
    /// Opens a socket that receives `groups` (a bit mask).
    ///
    /// # Errors
    /// The kernel lacks the protocol, or the process may open no more files.
    pub(crate) fn open(protocol: i32, groups: u32) -> io::Result<Self> {
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
            address.nl_groups = groups;
            let length = size_of_val(&address) as u32;
            libc::bind(descriptor.as_raw_fd(), (&raw const address).cast(), length)
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(NetlinkSocket { descriptor, sequence: 0, buffer: vec![0; 1 << 16] })
    }

    /// Waits for something to read; false after `timeout`, `None` waits for ever.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout =
            timeout.map_or(-1, |timeout| i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1));
        let mut descriptor =
            libc::pollfd { fd: self.descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that outlives the call.
        match unsafe { libc::poll(&raw mut descriptor, 1, timeout) } {
            -1 => Err(io::Error::last_os_error()),
            ready => Ok(ready > 0),
        }
    }

    /// Reads what is there; false if nothing is.
    pub(crate) fn receive(&mut self) -> io::Result<Option<usize>> {
        // SAFETY: pointer and length are those of the buffer.
        let received = unsafe {
            let buffer = self.buffer.as_mut_ptr().cast();
            libc::recv(self.descriptor.as_raw_fd(), buffer, self.buffer.len(), libc::MSG_DONTWAIT)
        };
        if received >= 0 {
            return Ok(Some(received as usize));
        }
        let error = io::Error::last_os_error();
        if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) }
    }

    /// Sends one request and calls `each` with every answer until the last one.
    ///
    /// # Errors
    /// The socket failed, the kernel refused (its error number), or did not answer. EINTR: the dump was
    /// interrupted by a change and may lack entries; ENOBUFS: answers were lost.
    pub(crate) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        each: &mut dyn FnMut(&Message<'_>),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(16 + body.len());
        bytes.extend((16 + body.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((REQUEST | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        // SAFETY: pointer and length are those of the vector.
        let sent = unsafe { libc::send(self.descriptor.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut interrupted = false;
        loop {
            if !self.wait(Some(ANSWER_DEADLINE))? {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            let Some(length) = self.receive()? else { continue };
            let mut rest = &self.buffer[..length];
            while let Some((header, message)) = next_message(&mut rest) {
                if header.sequence != self.sequence {
                    continue;
                }
                interrupted |= header.flags & DUMP_INTERRUPTED != 0;
                match message.kind {
                    MESSAGE_ERROR | MESSAGE_DONE => {
                        let errno =
                            message.payload.first_chunk::<4>().map_or(0, |bytes| -i32::from_ne_bytes(*bytes));
                        if errno > 0 {
                            return Err(io::Error::from_raw_os_error(errno));
                        }
                        return if interrupted {
                            Err(io::Error::from_raw_os_error(libc::EINTR))
                        } else {
                            Ok(())
                        };
                    }
                    _ => each(&message),
                }
            }
        }
    }
}

const DUMP_INTERRUPTED: u16 = 0x10;

struct Header {
    flags: u16,
    sequence: u32,
}

fn next_message<'a>(rest: &mut &'a [u8]) -> Option<(Header, Message<'a>)> {
    let header = rest.first_chunk::<16>()?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let length = word(0) as usize;
    let payload = rest.get(16..length)?;
    let message = Message { kind: u16::from_ne_bytes([header[4], header[5]]), payload };
    let parsed = Header { flags: u16::from_ne_bytes([header[6], header[7]]), sequence: word(8) };
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((parsed, message))
}

/// Appends an attribute.
pub(crate) fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend((value.len() as u16 + 4).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Flag of an attribute that holds attributes.
pub(crate) const NESTED: u16 = 0x8000;

/// The value of the first attribute of a kind.
pub(crate) fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let found = u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff;
        let value = bytes.get(4..length)?;
        if found == kind {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}
