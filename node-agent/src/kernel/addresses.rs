//! Addresses of the node's interfaces and the kernel's release.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::time::Duration;

use super::netlink::Socket;
use super::netlink::wire::find;

const GROUPS: i32 = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
/// Length of `ifaddrmsg`, which the kernel's headers define and `libc` does not.
const ADDRESS_HEADER: usize = 8;
/// Attempts of a dump that changes interrupt.
const ATTEMPTS: usize = 10;
/// Delay after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Reads the addresses of all interfaces and follows their changes.
pub(crate) struct Addresses {
    notices: Socket,
    requests: Socket,
}

impl Addresses {
    /// Opens sockets in the network namespace of the calling thread. The kernel queues notices from now on, so that no
    /// change between the first [`Addresses::read`] and [`Addresses::follow`] is missed.
    ///
    /// # Errors
    /// No netlink socket can be opened.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Addresses {
            notices: Socket::open(libc::NETLINK_ROUTE, GROUPS)?,
            requests: Socket::open(libc::NETLINK_ROUTE, 0)?,
        })
    }

    /// Returns the current addresses, sorted, without loopback.
    ///
    /// # Errors
    /// The dump failed.
    pub(crate) fn read(&mut self) -> io::Result<Vec<IpAddr>> {
        for _ in 0..ATTEMPTS {
            let mut addresses = BTreeSet::new();
            let every_address = [0; ADDRESS_HEADER];
            let result = self.requests.request(
                libc::RTM_GETADDR,
                libc::NLM_F_DUMP,
                |writer| writer.header(&every_address),
                |message| {
                    let attributes = message.payload.get(ADDRESS_HEADER..);
                    addresses
                        .extend(attributes.filter(|_| message.kind == libc::RTM_NEWADDR).and_then(address));
                },
            );
            match result {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                other => return other.map(|()| addresses.into_iter().collect()),
            }
        }
        Err(io::Error::from(io::ErrorKind::Interrupted))
    }

    /// Waits for a change and drops all queued notices: a read follows, also for those that were lost.
    fn wait(&mut self) -> io::Result<()> {
        self.notices.wait(None)?;
        self.notices.discard().map(drop)
    }

    /// Reports the addresses after every change, until `report` breaks.
    pub(crate) fn follow(mut self, mut report: impl FnMut(Vec<IpAddr>) -> ControlFlow<()>) {
        loop {
            match self.wait() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot follow interface addresses; will retry");
                    std::thread::sleep(RETRY);
                }
            }
            // The notices were dropped, so nothing else would cause another read.
            let addresses = until_read(|| self.read(), RETRY);
            if report(addresses).is_break() {
                return;
            }
        }
    }
}

/// Repeats a read until it succeeds.
fn until_read<T>(mut read: impl FnMut() -> io::Result<T>, pause: Duration) -> T {
    loop {
        match read() {
            Ok(value) => return value,
            Err(error) => {
                tracing::error!(%error, "cannot read interface addresses; will retry");
                std::thread::sleep(pause);
            }
        }
    }
}

/// Reads a message as an address, for fuzzing.
pub(super) fn read_message(message: &super::netlink::wire::Message<'_>) {
    let _ = message.payload.get(ADDRESS_HEADER..).and_then(address);
}

/// Returns the node's own address: on a point-to-point interface IFA_ADDRESS is that of the peer.
fn address(attributes: &[u8]) -> Option<IpAddr> {
    let bytes = find(attributes, libc::IFA_LOCAL).or_else(|| find(attributes, libc::IFA_ADDRESS))?;
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    (!address.is_loopback()).then_some(address)
}

/// Returns the release of the running kernel, empty if it cannot be read.
pub(crate) fn kernel_version() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_read_repeated_without_notice() {
        let mut answers = vec![Ok(7), Err(io::ErrorKind::OutOfMemory), Err(io::ErrorKind::Interrupted)];
        let read = || answers.pop().unwrap().map_err(io::Error::from);
        assert_eq!(until_read(read, Duration::ZERO), 7);
        assert!(answers.is_empty());
    }
}
