//! Detects kube-proxy's rules in legacy iptables, which nf_tables does not show.
//!
//! Source: `include/uapi/linux/netfilter_ipv4/ip_tables.h` and its IPv6 counterpart. A request for a table creates it, so
//! only tables are read that exist according to `/proc/net/ip_tables_names`.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`; those of IPv6 are equal.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// Length of a table's name.
const NAME: usize = 32;
/// `struct ipt_getinfo`: name, `valid_hooks`, `hook_entry` (5), `underflow` (5), `num_entries`, size.
const INFO: usize = NAME + 4 + 5 * 4 + 5 * 4 + 4 + 4;
/// Offset of the entries in `struct ipt_get_entries`: name, size, padding.
const ENTRIES: usize = NAME + 8;
/// Maximum size of entries that are read, in bytes. Only kube-proxy writes more.
const LIMIT: usize = 64 << 20;
/// Name of a chain of kube-proxy, as an entry contains it.
const CHAIN: &[u8] = b"KUBE-SERVICES\0";

/// A family with its tables.
struct Family {
    names: &'static str,
    domain: libc::c_int,
    level: libc::c_int,
}

const FAMILIES: [Family; 2] = [
    Family { names: "/proc/thread-self/net/ip_tables_names", domain: libc::AF_INET, level: libc::IPPROTO_IP },
    Family {
        names: "/proc/thread-self/net/ip6_tables_names",
        domain: libc::AF_INET6,
        level: libc::IPPROTO_IPV6,
    },
];

/// Detects rules in the network namespace of the calling thread.
#[derive(Debug, Default)]
pub(super) struct LegacyTables {
    /// Description of each family's table when it was last read, and the result: an unchanged table is not read again.
    known: [Option<([u8; INFO], bool)>; 2],
}

impl LegacyTables {
    /// Returns whether a table `nat` contains kube-proxy's chain.
    ///
    /// # Errors
    /// The kernel refused the request.
    pub(super) fn present(&mut self) -> io::Result<bool> {
        for (family, known) in FAMILIES.iter().zip(&mut self.known) {
            // Without the modules of legacy iptables the file does not exist.
            let names = fs::read_to_string(family.names).unwrap_or_default();
            if !names.lines().any(|name| name == "nat") {
                *known = None;
                continue;
            }
            let socket = socket(family.domain)?;
            let mut info = [0; INFO];
            info[..3].copy_from_slice(b"nat");
            get(&socket, family.level, GET_INFO, &mut info)?;
            let found = match known {
                Some((described, found)) if *described == info => *found,
                _ => contains_chain(&socket, family.level, &info)?,
            };
            *known = Some((info, found));
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn contains_chain(socket: &OwnedFd, level: libc::c_int, info: &[u8; INFO]) -> io::Result<bool> {
    let size = u32::from_ne_bytes([info[INFO - 4], info[INFO - 3], info[INFO - 2], info[INFO - 1]]);
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    if length > LIMIT {
        return Ok(true);
    }
    let mut request = vec![0; ENTRIES + length];
    request[..3].copy_from_slice(b"nat");
    request[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
    match get(socket, level, GET_ENTRIES, &mut request) {
        Ok(()) => Ok(request[ENTRIES..].windows(CHAIN.len()).any(|window| window == CHAIN)),
        // The table changed in between: it is in use.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        Err(error) => Err(error),
    }
}

fn socket(domain: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let descriptor = unsafe { libc::socket(domain, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Fills the buffer, whose length the kernel requires exactly.
fn get(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to the buffer, which has that many.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn chain_of_kube_proxy_found_in_legacy_tables() {
        // SAFETY: no memory is passed; this thread ends with the test.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
        let mut tables = LegacyTables::default();
        assert!(!tables.present().unwrap());
        let names = || fs::read_to_string(FAMILIES[0].names).unwrap_or_default();
        assert!(!names().contains("nat"), "the question creates no table");
        for program in ["iptables-legacy", "ip6tables-legacy"] {
            let run = |option: &str, chain: &str| {
                let status = Command::new(program).args(["-w", "-t", "nat", option, chain]).status();
                assert!(status.unwrap().success(), "{program}, of the package iptables, {option} {chain}");
            };
            run("-N", "KUBE-KUBELET-CANARY");
            assert!(!tables.present().unwrap(), "the kubelet's chain");
            run("-N", "KUBE-SERVICES");
            assert!(tables.present().unwrap(), "{program}");
            run("-X", "KUBE-SERVICES");
            assert!(!tables.present().unwrap());
        }
    }
}
