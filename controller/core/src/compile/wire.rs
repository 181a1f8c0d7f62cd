//! Addresses and prefixes as the protocol has them.

use std::net::IpAddr;

use ipnet::IpNet;
use switchtower_proto::v1::{Cidr, Endpoint, Family};

pub(super) fn family(address: IpAddr) -> Family {
    if address.is_ipv6() { Family::Ipv6 } else { Family::Ipv4 }
}

pub(super) fn address(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn endpoint((ip, port): (IpAddr, u16)) -> Endpoint {
    Endpoint { address: address(ip), port: port.into() }
}

pub(super) fn cidr(net: IpNet) -> Cidr {
    Cidr { address: address(net.trunc().addr()), prefix_length: net.prefix_len().into() }
}
