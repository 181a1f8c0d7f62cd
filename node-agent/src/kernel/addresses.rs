//! What only the node itself knows: the addresses of its interfaces.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::engine::Command;
use crate::kernel::netlink::{DUMP, NetlinkSocket, attribute};

const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
/// RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR.
const GROUPS: u32 = 0x10 | 0x100;
const ATTRIBUTE_ADDRESS: u16 = 1;
const ATTRIBUTE_LOCAL: u16 = 2;
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Reads the addresses of all interfaces and says when they may have changed.
pub struct Addresses {
    notices: NetlinkSocket,
    requests: NetlinkSocket,
}

impl Addresses {
    /// Opens sockets in the network namespace of the calling thread. Notices are received from now on, so that
    /// no change between the first reading and the first waiting is missed.
    ///
    /// # Errors
    /// No netlink socket can be opened.
    pub fn open() -> io::Result<Self> {
        Ok(Addresses {
            notices: NetlinkSocket::open(libc::NETLINK_ROUTE, GROUPS)?,
            requests: NetlinkSocket::open(libc::NETLINK_ROUTE, 0)?,
        })
    }

    /// The addresses now, sorted, loopback excluded.
    ///
    /// # Errors
    /// The dump failed.
    pub fn read(&mut self) -> io::Result<Vec<IpAddr>> {
        for attempt in 0.. {
            let mut addresses = BTreeSet::new();
            let result = self.requests.request(GET_ADDRESS, DUMP, &[0; 8], &mut |message| {
                if message.kind == NEW_ADDRESS
                    && let Some(attributes) = message.payload.get(8..)
                {
                    addresses.extend(address(attributes));
                }
            });
            match result {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) && attempt < 10 => {}
                other => return other.map(|()| addresses.into_iter().collect()),
            }
        }
        Err(io::Error::from(io::ErrorKind::Interrupted))
    }

    /// Waits for a change and drops all notices that are there.
    fn wait(&mut self) -> io::Result<()> {
        self.notices.wait(None)?;
        loop {
            match self.notices.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                // Notices were lost: what they said is read now anyway.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells the engine of every change, until it is gone.
    pub fn follow(mut self, commands: &mpsc::Sender<Command>) {
        loop {
            match self.wait() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "interface addresses cannot be followed; trying again");
                    std::thread::sleep(RETRY);
                }
            }
            // The notices are gone, so nothing else would lead to another reading.
            let addresses = until_read(|| self.read(), RETRY);
            if commands.blocking_send(Command::HostAddresses(addresses)).is_err() {
                return;
            }
        }
    }
}

fn until_read<T>(mut read: impl FnMut() -> io::Result<T>, pause: Duration) -> T {
    loop {
        match read() {
            Ok(value) => return value,
            Err(error) => {
                tracing::error!(%error, "interface addresses cannot be read; trying again");
                std::thread::sleep(pause);
            }
        }
    }
}

/// IFA_LOCAL is the own address of a point-to-point interface, where IFA_ADDRESS is the peer's.
fn address(attributes: &[u8]) -> Option<IpAddr> {
    let bytes =
        attribute(attributes, ATTRIBUTE_LOCAL).or_else(|| attribute(attributes, ATTRIBUTE_ADDRESS))?;
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    (!address.is_loopback()).then_some(address)
}

/// Release of the running kernel.
pub fn kernel_version() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_that_fails_is_repeated_although_no_notice_comes() {
        let mut answers = vec![Ok(7), Err(io::ErrorKind::OutOfMemory), Err(io::ErrorKind::Interrupted)];
        let read = || answers.pop().unwrap().map_err(io::Error::from);
        assert_eq!(until_read(read, Duration::ZERO), 7);
        assert!(answers.is_empty());
    }
}
