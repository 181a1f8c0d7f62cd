//! Notices when someone else changes our tables.
//!
//! The kernel announces every transaction to the group NFNLGRP_NFTABLES. Our own carry the port id of the
//! dataplane's socket and are skipped; what concerns other tables is skipped by the table's name. An overflow
//! of the receive buffer means that nothing is known: the tables are then to be verified.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use super::layout::TABLE;
use super::netlink::{DELETE_TABLE, SUBSYSTEM, Socket};
use super::wire::{Messages, find_string};

/// `NFNLGRP_NFTABLES`.
const GROUP: i32 = 7;
/// Room for the announcements of a large foreign transaction.
const BUFFER: i32 = 4 << 20;

/// What was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Someone else changed one of our tables.
    Changed,
    /// One of our tables was deleted, by name or by `nft flush ruleset`.
    TableDeleted,
    /// Announcements were lost: verify the tables.
    Overflow,
}

/// Listens for changes of nf_tables in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    own_port: u32,
}

impl Monitor {
    /// Listens; `own_port` is the port id of the dataplane's socket (`Nft::port`), whose changes are not told.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open(own_port: u32) -> io::Result<Self> {
        let socket = Socket::open()?;
        let _ = socket.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER);
        socket.option(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, GROUP)?;
        Ok(Monitor { socket, own_port })
    }

    /// Waits for a notice, at most `timeout`; `None` if nothing concerned our tables.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<Option<Notice>> {
        let deadline = std::time::Instant::now() + timeout;
        loop {
            if let Some(notice) = self.drain()? {
                return Ok(Some(notice));
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.poll(left)?;
        }
    }

    /// Reads what is queued, without waiting: the gravest notice, if any. For use with an event loop that
    /// watches [`Monitor::as_raw_fd`].
    ///
    /// # Errors
    /// The socket failed.
    pub fn drain(&mut self) -> io::Result<Option<Notice>> {
        let mut found = None;
        loop {
            let length = match self.socket.receive(false) {
                Ok(Some(length)) => length,
                Ok(None) => return Ok(found),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    found.get_or_insert(Notice::Overflow);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for message in Messages(self.socket.received(length)) {
                let foreign = message.kind & 0xff00 == SUBSYSTEM && message.port != self.own_port;
                // Tables, chains, rules, sets and elements alike name their table in attribute 1; the
                // announcement of a generation (type 15) has a number there.
                let kind = message.kind & 0xff;
                if foreign && kind < 15 && find_string(message.attributes(), 1) == Some(TABLE) {
                    let notice = if kind == DELETE_TABLE { Notice::TableDeleted } else { Notice::Changed };
                    found =
                        Some(if found == Some(Notice::TableDeleted) { Notice::TableDeleted } else { notice });
                }
            }
        }
    }

    fn poll(&self, timeout: Duration) -> io::Result<()> {
        let mut descriptor = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1);
        // SAFETY: one valid pollfd, which outlives the call.
        if unsafe { libc::poll(&raw mut descriptor, 1, milliseconds) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.descriptor().as_raw_fd()
    }
}

impl std::os::fd::AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(self.socket.descriptor())
    }
}
