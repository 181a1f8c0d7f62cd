//! The destination of a redirected TCP connection before its translation, from connection tracking.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use tokio::net::TcpStream;

/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST` of linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h.
const ORIGINAL_DESTINATION: libc::c_int = 80;

/// Returns the address to which the peer connected.
///
/// # Errors
/// Connection tracking does not know the connection.
pub(crate) fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    if stream.local_addr()?.is_ipv4() {
        // SAFETY: all zeros is a valid sockaddr_in.
        let address: libc::sockaddr_in = option(stream, libc::SOL_IP, unsafe { std::mem::zeroed() })?;
        let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
        Ok((ip, u16::from_be(address.sin_port)).into())
    } else {
        // SAFETY: all zeros is a valid sockaddr_in6.
        let address: libc::sockaddr_in6 = option(stream, libc::SOL_IPV6, unsafe { std::mem::zeroed() })?;
        let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
        Ok((ip, u16::from_be(address.sin6_port)).into())
    }
}

fn option<T>(stream: &TcpStream, level: libc::c_int, mut value: T) -> io::Result<T> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and `value` and `length` live through the call with their own sizes.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            level,
            ORIGINAL_DESTINATION,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
