//! Readable names of addresses and protocols.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Formats `10.0.0.1` or `fd00::1`.
pub(crate) fn address(bytes: &[u8]) -> IpAddr {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ipv4Addr::from(bytes).into();
    }
    <[u8; 16]>::try_from(bytes).map_or(Ipv4Addr::UNSPECIFIED.into(), |bytes| Ipv6Addr::from(bytes).into())
}

/// Formats `10.0.0.1:80` or `[fd00::1]:80`.
pub(crate) fn socket_address(bytes: &[u8], port: u16) -> SocketAddr {
    SocketAddr::new(address(bytes), port)
}

/// Returns `TCP`, `UDP`, `SCTP`, or the number.
pub(crate) fn protocol(number: u8) -> String {
    match number {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}
