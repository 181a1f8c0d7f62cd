//! A TCP segment that belongs to a connection but not into its window.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

// linux/tcp.h.
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQUENCE: i32 = 21;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
/// Without the window probe that leaving with 0 would send.
const REPAIR_OFF_SILENTLY: i32 = -1;

/// Larger than any window.
const FAR: u32 = 500_000_000;
const ACK: u8 = 0x10;
const TCP: u8 = 6;

/// Sends, to the peer of `stream` and from its own address, an acknowledgement whose sequence number is far ahead
/// of the window. Must run in the network namespace of the stream; needs root.
pub fn send_far_ahead_of_the_window(stream: &TcpStream) {
    let (SocketAddr::V4(own), SocketAddr::V4(peer)) =
        (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
    else {
        panic!("this is for IPv4")
    };
    let (sent, received) = sequence_numbers(stream);
    let mut segment = Vec::new();
    segment.extend(own.port().to_be_bytes());
    segment.extend(peer.port().to_be_bytes());
    segment.extend(sent.wrapping_add(FAR).to_be_bytes());
    segment.extend(received.to_be_bytes());
    // Header length 5 (in units of 32 bits), window, checksum to be set, no urgent data.
    segment.extend([5 << 4, ACK, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&segment, *own.ip(), *peer.ip());
    segment[16..18].copy_from_slice(&sum.to_be_bytes());

    // SAFETY: a plain system call; the descriptor is owned from here on.
    let socket = unsafe {
        let descriptor = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(TCP));
        assert!(descriptor >= 0, "a raw socket needs root: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(descriptor)
    };
    let to = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(peer.ip().octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: the buffer and the address live during the call, and their lengths are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            segment.as_ptr().cast(),
            segment.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as u32,
        )
    };
    assert_eq!(sent, segment.len() as isize, "{}", std::io::Error::last_os_error());
}

/// The next sequence numbers that the stream's kernel sends and expects.
fn sequence_numbers(stream: &TcpStream) -> (u32, u32) {
    let descriptor = stream.as_raw_fd();
    let set = |option: i32, value: i32| {
        // SAFETY: the value lives during the call, and its length is given.
        let result = unsafe {
            libc::setsockopt(
                descriptor,
                libc::IPPROTO_TCP,
                option,
                (&raw const value).cast(),
                size_of::<i32>() as u32,
            )
        };
        assert_eq!(result, 0, "TCP_REPAIR needs root: {}", std::io::Error::last_os_error());
    };
    let number = |queue: i32| {
        set(TCP_REPAIR_QUEUE, queue);
        let (mut value, mut length) = (0_u32, size_of::<u32>() as u32);
        // SAFETY: both live during the call, and the value has the length that is given.
        let result = unsafe {
            libc::getsockopt(
                descriptor,
                libc::IPPROTO_TCP,
                TCP_QUEUE_SEQUENCE,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        value
    };
    set(TCP_REPAIR, 1);
    let numbers = (number(SEND_QUEUE), number(RECEIVE_QUEUE));
    set(TCP_REPAIR, REPAIR_OFF_SILENTLY);
    numbers
}

/// RFC 9293 3.1: over the pseudo-header and the segment, whose checksum field is zero.
fn checksum(segment: &[u8], source: Ipv4Addr, destination: Ipv4Addr) -> u16 {
    let length = u16::try_from(segment.len()).unwrap().to_be_bytes();
    let pseudo = [&source.octets()[..], &destination.octets(), &[0, TCP], &length];
    let words = pseudo.concat().into_iter().chain(segment.iter().copied()).collect::<Vec<_>>();
    let sum: u32 = words.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
