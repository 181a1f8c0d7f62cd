//! Detects changes of our tables by other processes.
//!
//! The kernel announces every transaction to the group NFNLGRP_NFTABLES. Our own announcements carry the port id of the
//! dataplane's socket and are skipped; those of other tables are skipped by the table's name. After an overflow of the
//! receive buffer the tables must be compared.

use std::io;
use std::time::Duration;

use super::layout::TABLE;
use super::{batch, nfta};
use crate::kernel::netlink::Socket;
use crate::kernel::netlink::wire::{Message, find_string, netfilter_type};

/// Receive buffer in bytes: room for the announcements of a large foreign transaction.
const BUFFER: i32 = 4 << 20;

/// A change of our tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Another process changed one of our tables.
    Changed,
    /// One of our tables was deleted, by name or by `nft flush ruleset`.
    TableDeleted,
    /// Announcements were lost: compare the tables.
    Overflow,
}

/// Listens for changes of nf_tables in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    own_port: u32,
}

impl Monitor {
    /// Joins the group; changes by the socket with port id `own_port` (`Nft::port`) cause no notice.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open(own_port: u32) -> io::Result<Self> {
        let socket = batch::open()?;
        let _ = socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER);
        socket.set_option(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, libc::NFNLGRP_NFTABLES)?;
        Ok(Monitor { socket, own_port })
    }

    /// Waits for a notice, at most `timeout`; `None` if no change concerned our tables.
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
            match self.socket.wait(Some(left)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }

    /// Reads the queued announcements without waiting; returns the most severe notice, if any.
    ///
    /// # Errors
    /// The socket failed.
    pub fn drain(&mut self) -> io::Result<Option<Notice>> {
        let mut found = None;
        loop {
            match self.socket.receive() {
                Ok(Some(messages)) => {
                    let foreign = messages.filter(|message| message.port != self.own_port);
                    for notice in foreign.filter_map(|message| notice(&message)) {
                        if found != Some(Notice::TableDeleted) {
                            found = Some(notice);
                        }
                    }
                }
                Ok(None) => return Ok(found),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    found.get_or_insert(Notice::Overflow);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Returns the notice of one announcement; `None` if it does not concern our tables.
pub(super) fn notice(message: &Message<'_>) -> Option<Notice> {
    const FIRST: u16 = netfilter_type(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWTABLE);
    const DELETED: u16 = netfilter_type(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_DELTABLE);
    /// The announcement of a generation, which has a number where the others have the name of a table.
    const GENERATION: u16 = netfilter_type(libc::NFNL_SUBSYS_NFTABLES, libc::NFT_MSG_NEWGEN);
    // Tables, chains, rules, sets and elements have the name of their table in the same attribute.
    let ours = (FIRST..GENERATION).contains(&message.kind)
        && find_string(message.attributes(), nfta::table::NAME) == Some(TABLE);
    ours.then_some(if message.kind == DELETED { Notice::TableDeleted } else { Notice::Changed })
}
