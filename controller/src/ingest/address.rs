//! Parsing of addresses as lenient as kube-proxy's, so that objects of old clusters mean the same to both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Parses an IP address as Go's parser before 1.17 did (kube-proxy: `ParseIPSloppy`): leading zeros in an
/// IPv4 part are decimal. An IPv4-mapped IPv6 address is the IPv4 address.
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if !text.contains(':') {
        return parse_ipv4(text).map(IpAddr::V4);
    }
    let address = match text.rsplit_once(':') {
        Some((head, tail)) if tail.contains('.') => {
            format!("{head}:{}", parse_ipv4(tail)?).parse::<Ipv6Addr>().ok()?
        }
        _ => text.parse::<Ipv6Addr>().ok()?,
    };
    Some(address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4))
}

fn parse_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = parse_decimal(parts.next()?, 255)?.try_into().ok()?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// Digits only (no sign), at most `limit`.
fn parse_decimal(text: &str, limit: u32) -> Option<u32> {
    if text.is_empty() || text.len() > 16 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse::<u32>().ok().filter(|value| *value <= limit)
}

/// Parses `ADDRESS/LENGTH`, surrounded by white space or not; host bits are cleared.
#[must_use]
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (address, length) = text.trim().split_once('/')?;
    let address = parse_ip(address)?;
    let limit = if address.is_ipv4() { 32 } else { 128 };
    let length = u8::try_from(parse_decimal(length, limit)?).ok()?;
    IpNet::new(address, length).ok().map(|network| network.trunc())
}

/// At most one address per family, the first of each; the order is kept.
#[must_use]
pub fn one_per_family(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut kept: Vec<IpAddr> = Vec::with_capacity(2);
    for address in addresses {
        if !kept.iter().any(|known| known.is_ipv4() == address.is_ipv4()) {
            kept.push(address);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_leniently() {
        for (text, expected) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.000.001", Some("10.0.0.1")),
            ("fd00::1", Some("fd00::1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:010.0.0.01", Some("10.0.0.1")),
            ("64:ff9b::192.0.2.33", Some("64:ff9b::c000:221")),
            ("", None),
            ("10.0.0", None),
            ("10.0.0.1.2", None),
            ("10.0.0.256", None),
            ("10.0.0.+1", None),
            (" 10.0.0.1", None),
            ("10.0.0.99999999999999999999", None),
            ("fd00::1%eth0", None),
            ("example.org", None),
        ] {
            assert_eq!(parse_ip(text).map(|ip| ip.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn cidrs_are_trimmed_and_truncated() {
        for (text, expected) in [
            ("10.1.2.3/8", Some("10.0.0.0/8")),
            ("  192.0.2.0/24\t", Some("192.0.2.0/24")),
            ("010.0.0.0/08", Some("10.0.0.0/8")),
            ("fd00:1::/64", Some("fd00:1::/64")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("10.0.0.0/33", None),
            ("10.0.0.0", None),
            ("10.0.0.0/-1", None),
            ("::/129", None),
            ("", None),
        ] {
            assert_eq!(parse_cidr(text).map(|net| net.to_string()).as_deref(), expected, "{text:?}");
        }
    }
}
