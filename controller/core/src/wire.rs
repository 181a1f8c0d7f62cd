//! Addresses and prefixes as the protocol has them, and back.

use std::net::IpAddr;

use ipnet::IpNet;
use switchtower_proto::v1::{Cidr, Endpoint, Family};

/// The family of an address.
pub fn family(address: IpAddr) -> Family {
    if address.is_ipv6() { Family::Ipv6 } else { Family::Ipv4 }
}

/// 4 or 16 bytes, network order.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An address of 4 or 16 bytes; `None` of any other length.
pub fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

/// An endpoint.
pub fn endpoint((ip, port): (IpAddr, u16)) -> Endpoint {
    Endpoint { address: octets(ip), port: port.into() }
}

/// A prefix, host bits cleared.
pub fn cidr(net: IpNet) -> Cidr {
    Cidr { address: octets(net.trunc().addr()), prefix_length: net.prefix_len().into() }
}

/// A prefix; `None` if its address or length is impossible.
pub fn net(cidr: &Cidr) -> Option<IpNet> {
    IpNet::new(address(&cidr.address)?, cidr.prefix_length.try_into().ok()?).ok()
}
