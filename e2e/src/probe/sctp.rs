//! The first two packets of an SCTP association, over raw sockets.
//!
//! The laboratory's kernel forwards, translates and tracks SCTP but has no SCTP sockets. A client sends INIT, a pod
//! answers INIT ACK with its line of text as the state cookie, and nothing follows. The layout of the packets is in
//! RFC 9260, sections 3.1 and 3.3.

use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const STATE_COOKIE: u16 = 7;
/// Length of the common header, and of the fixed part of an INIT chunk.
const HEADER: usize = 12;
const CHUNK: usize = 20;
/// Initiate tag: any value except zero. It may be constant, since an association ends with its first answer.
const TAG: u32 = 0x5eed_5eed;

pub(super) fn socket(ipv6: bool) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    Socket::new(domain, Type::from(libc::SOCK_RAW), Some(Protocol::from(libc::IPPROTO_SCTP)))
}

/// Encodes the first packet of an association.
pub(super) fn init(source_port: u16, port: u16) -> Vec<u8> {
    packet(source_port, port, 0, INIT, &[])
}

/// The text of an INIT ACK for the receiver's `port`; `None` for any other packet.
pub(super) fn answer(mut packet: &[u8], ipv6: bool, port: u16) -> Option<String> {
    if !ipv6 {
        packet = without_header(packet)?;
    }
    let wanted = packet.get(2..4)? == port.to_be_bytes() && *packet.get(HEADER)? == INIT_ACK;
    let parameter = packet.get(HEADER + CHUNK..).filter(|_| wanted)?;
    let kind = u16::from_be_bytes([*parameter.first()?, *parameter.get(1)?]);
    let length = usize::from(u16::from_be_bytes([*parameter.get(2)?, *parameter.get(3)?]));
    let text = parameter.get(4..length).filter(|_| kind == STATE_COOKIE)?;
    Some(String::from_utf8_lossy(text).into_owned())
}

/// Opens the socket from which [`serve`] answers, in a pod.
///
/// # Errors
/// The process lacks the right, or the kernel lacks raw SCTP sockets.
pub fn listen(ipv6: bool) -> io::Result<Socket> {
    socket(ipv6)
}

/// Answers every INIT to one of `ports` with the line that `text` returns for the client's address.
pub fn serve(socket: &Socket, ipv6: bool, ports: &[u16], text: impl Fn(SocketAddr) -> String) -> ! {
    let mut buffer = [MaybeUninit::uninit(); 2048];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
        let Some(client) = client.as_socket() else { continue };
        let received: Vec<u8> = initialized(&buffer[..length]);
        if let Some(reply) = reply(&received, ipv6, ports, || text(client)) {
            // The client may have gone away.
            drop(socket.send_to(&reply, &SocketAddr::new(client.ip(), 0).into()));
        }
    }
}

fn reply(packet: &[u8], ipv6: bool, ports: &[u16], text: impl FnOnce() -> String) -> Option<Vec<u8>> {
    let packet = if ipv6 { packet } else { without_header(packet)? };
    let word = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (client, port) = (word(0)?, word(2)?);
    let tag = packet.get(HEADER + 4..HEADER + 8)?;
    let tag = u32::from_be_bytes([tag[0], tag[1], tag[2], tag[3]]);
    if !ports.contains(&port) || *packet.get(HEADER)? != INIT {
        return None;
    }
    let text = text();
    let mut cookie = STATE_COOKIE.to_be_bytes().to_vec();
    cookie.extend((text.len() as u16 + 4).to_be_bytes());
    cookie.extend(text.as_bytes());
    cookie.resize(cookie.len().next_multiple_of(4), 0);
    Some(self::packet(port, client, tag, INIT_ACK, &cookie))
}

fn packet(source_port: u16, port: u16, tag: u32, kind: u8, parameters: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(source_port.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([kind, 0]);
    packet.extend(((CHUNK + parameters.len()) as u16).to_be_bytes());
    packet.extend(TAG.to_be_bytes());
    // Receive window in bytes, outbound and inbound streams, initial sequence number.
    packet.extend(65_536u32.to_be_bytes());
    packet.extend(1u16.to_be_bytes());
    packet.extend(1u16.to_be_bytes());
    packet.extend(1u32.to_be_bytes());
    packet.extend(parameters);
    // The checksum is the only little-endian field.
    let checksum = checksum(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&checksum);
    packet
}

/// CRC-32C (RFC 9260, appendix A), a bit at a time.
fn checksum(packet: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in packet {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// Strips the IP header, which a raw IPv4 socket delivers too.
fn without_header(packet: &[u8]) -> Option<&[u8]> {
    packet.get(usize::from(*packet.first()? & 0xf) * 4..)
}

/// The bytes that the kernel wrote.
pub(super) fn initialized(buffer: &[MaybeUninit<u8>]) -> Vec<u8> {
    // SAFETY: callers pass the part of a buffer that a system call reported as written.
    buffer.iter().map(|byte| unsafe { byte.assume_init() }).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc32c() {
        // The check value of CRC-32C.
        assert_eq!(checksum(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn sctp_init_answered_by_the_served_port_only() {
        let sent = init(40_000, 80);
        let reply = |ports: &[u16]| reply(&sent, true, ports, || "p1 10.0.0.1\n".to_owned());
        let answered = reply(&[80]).unwrap();
        assert_eq!(answer(&answered, true, 40_000).unwrap(), "p1 10.0.0.1\n");
        assert_eq!(answer(&answered, true, 40_001), None);
        assert_eq!(reply(&[81]), None);
        assert_eq!(answer(&sent, true, 80), None);
    }
}
