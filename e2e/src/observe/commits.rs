//! Commit times of nf_tables transactions in a namespace, from the kernel's notifications.
//!
//! Both proxies are measured by the same external events.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::lab::namespace::Namespace;

const NFNLGRP_NFTABLES: u32 = 7;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN` (linux/netfilter/nf_tables.h): the last message of a transaction.
const NEW_GENERATION: u16 = 10 << 8 | 15;

/// Listener for the commits in one namespace.
#[derive(Debug)]
pub struct Commits {
    heard: Receiver<Instant>,
}

impl Commits {
    /// Starts to listen.
    ///
    /// # Errors
    /// The socket cannot be opened in the namespace.
    pub fn listen(namespace: &Namespace) -> Result<Self> {
        let socket = namespace.run(open)?.context("listening to nf_tables")?;
        let (tell, heard) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 1 << 20];
            loop {
                // SAFETY: the length passed is the buffer's length.
                let length =
                    unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
                let now = Instant::now();
                match usize::try_from(length) {
                    Ok(length) if ends_a_transaction(&buffer[..length]) && tell.send(now).is_err() => return,
                    // An overflow loses element messages of a huge transaction; a later NEWGEN message still arrives.
                    _ => {}
                }
            }
        });
        Ok(Self { heard })
    }

    /// Discards the commits received so far.
    pub fn forget(&self) {
        while self.heard.try_recv().is_ok() {}
    }

    /// The next commit, or `None` after the timeout.
    pub fn next(&self, timeout: Duration) -> Option<Instant> {
        self.heard.recv_timeout(timeout).ok()
    }

    /// The last commit before a pause of `quiet`; `None` without a commit within `timeout`.
    pub fn last(&self, timeout: Duration, quiet: Duration) -> Option<Instant> {
        let mut last = self.next(timeout)?;
        loop {
            match self.heard.recv_timeout(quiet) {
                Ok(later) => last = later,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Some(last),
            }
        }
    }
}

fn open() -> std::io::Result<OwnedFd> {
    // SAFETY: plain system calls; the descriptor is owned as soon as it exists.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let descriptor = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER);
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(descriptor);
        let size: libc::c_int = 256 << 20;
        libc::setsockopt(
            descriptor,
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_groups = 1 << (NFNLGRP_NFTABLES - 1);
        let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        if libc::bind(descriptor, (&raw const address).cast(), length) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(socket)
    }
}

fn ends_a_transaction(mut messages: &[u8]) -> bool {
    while let Some(header) = messages.get(..16) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        if u16::from_ne_bytes([header[4], header[5]]) == NEW_GENERATION {
            return true;
        }
        messages = messages.get(length.max(16).next_multiple_of(4)..).unwrap_or_default();
    }
    false
}
