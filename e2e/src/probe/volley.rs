//! Sends many probes at once: non-blocking sockets on one thread, with a single wait for all of them.
//!
//! A thousand silent destinations take as long as one. Each shot has its own source port, chosen by the caller: a
//! reused port would match the connection tracking entry of an earlier shot, and thus an earlier choice of backend.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::{ProbeResult, Transport, parse, sctp};

/// Spare ports for shots whose own port is in use, below those of node ports. Each is used once in ten thousand such
/// shots; an ephemeral port may have been used a moment ago for the same destination.
const SPARE_PORTS: std::ops::Range<u16> = 20_000..30_000;
/// Maximum number of spare ports tried for one shot.
const SPARES: usize = 32;
/// Factor by which the timeout exceeds the slowest answer.
const SLOWEST: u32 = 4;
/// Maximum timeout after slow answers.
const LONGEST: Duration = Duration::from_secs(3);

/// One probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shot {
    pub transport: Transport,
    pub to: SocketAddr,
    /// Source port; a spare one is used if this one is in use.
    pub source_port: u16,
}

/// A shot whose outcome is pending.
struct Flight {
    index: usize,
    shot: Shot,
    socket: Socket,
    connected: bool,
    answer: Vec<u8>,
}

/// Sends all shots from the calling thread's namespace and waits until each has an outcome; shots still pending after
/// `timeout` count as silence. Slow answers, a sign of a busy machine, extend the timeout.
///
/// # Errors
/// A socket fails for a reason unrelated to the network, or an answer is not a pod's.
pub fn volley(shots: &[Shot], timeout: Duration) -> Result<Vec<ProbeResult>> {
    let start = Instant::now();
    let mut deadline = start + timeout;
    let mut outcomes = vec![ProbeResult::Silence; shots.len()];
    let mut flying = Vec::new();
    for (index, shot) in shots.iter().enumerate() {
        match open(index, *shot).with_context(|| format!("a probe of {}", shot.to))? {
            Ok(flight) => flying.push(flight),
            Err(outcome) => outcomes[index] = outcome,
        }
    }
    while !flying.is_empty() {
        let ready = wait(&flying, deadline)?;
        // In reverse, so that swap_remove only moves shots that were already visited.
        for at in (0..flying.len()).rev().filter(|at| ready[*at]) {
            let to = flying[at].shot.to;
            if let Some(outcome) = flying[at].step().with_context(|| format!("a probe of {to}"))? {
                outcomes[flying[at].index] = outcome;
                flying.swap_remove(at);
                deadline = deadline.max(start + (start.elapsed() * SLOWEST).min(LONGEST));
            }
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Ok(outcomes)
}

/// A connected UDP socket that sends repeatedly: an existing flow.
#[derive(Debug)]
pub struct Flow(Socket);

impl Flow {
    /// Opens the flow in the calling thread's namespace.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open(to: SocketAddr, source_port: u16) -> Result<Self> {
        let shot = Shot { transport: Transport::Udp, to, source_port };
        let socket = bound(shot).with_context(|| format!("a flow to {to}"))?;
        socket.connect(&to.into()).with_context(|| format!("a flow to {to}"))?;
        Ok(Self(socket))
    }

    /// Sends a datagram on each flow and waits until each has an outcome, as [`volley`] does.
    ///
    /// # Errors
    /// As [`volley`].
    pub fn ask_all(flows: &[&Self], timeout: Duration) -> Result<Vec<ProbeResult>> {
        let deadline = Instant::now() + timeout;
        let mut outcomes = vec![ProbeResult::Silence; flows.len()];
        let mut flying = Vec::new();
        for (index, Flow(socket)) in flows.iter().enumerate() {
            let socket = socket.try_clone()?;
            let to = socket.peer_addr()?.as_socket().context("the flow has no peer")?;
            let shot = Shot { transport: Transport::Udp, to, source_port: 0 };
            // Discard late answers to earlier datagrams.
            while socket.recv(&mut [MaybeUninit::uninit(); 256]).is_ok() {}
            drop(socket.take_error());
            let mut flight = Flight { index, shot, socket, connected: true, answer: Vec::new() };
            match flight.ask()? {
                Some(outcome) => outcomes[index] = outcome,
                None => flying.push(flight),
            }
        }
        while !flying.is_empty() && Instant::now() < deadline {
            let ready = wait(&flying, deadline)?;
            for at in (0..flying.len()).rev().filter(|at| ready[*at]) {
                if let Some(outcome) = flying[at].step()? {
                    outcomes[flying[at].index] = outcome;
                    flying.swap_remove(at);
                }
            }
        }
        Ok(outcomes)
    }
}

/// Flights that have an event. Returns after the deadline at the latest.
fn wait(flying: &[Flight], deadline: Instant) -> Result<Vec<bool>> {
    let wanted = |flight: &Flight| if flight.connected { libc::POLLIN } else { libc::POLLOUT };
    let mut polled: Vec<_> = flying
        .iter()
        .map(|flight| libc::pollfd { fd: flight.socket.as_raw_fd(), events: wanted(flight), revents: 0 })
        .collect();
    let left = deadline.saturating_duration_since(Instant::now());
    let milliseconds = libc::c_int::try_from(left.as_millis() + 1)?;
    // SAFETY: the length passed is the array's length.
    let count = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, milliseconds) };
    if count < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        bail!("waiting for answers: {}", io::Error::last_os_error());
    }
    Ok(polled.iter().map(|polled| polled.revents != 0).collect())
}

/// Opens a shot's socket and sends its first packet. The inner error is an immediate outcome.
fn open(index: usize, shot: Shot) -> io::Result<Result<Flight, ProbeResult>> {
    let socket = bound(shot)?;
    let connected = match socket.connect(&target(shot).into()) {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => false,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return Ok(Err(ProbeResult::Refused));
        }
        Err(error) => return Err(error),
    };
    let mut flight = Flight { index, shot, socket, connected, answer: Vec::new() };
    Ok(match flight.ask()? {
        Some(outcome) => Err(outcome),
        None => Ok(flight),
    })
}

/// The address without a port for raw sockets, which have none.
fn target(shot: Shot) -> SocketAddr {
    let port = if shot.transport == Transport::Sctp { 0 } else { shot.to.port() };
    SocketAddr::new(shot.to.ip(), port)
}

fn bound(shot: Shot) -> io::Result<Socket> {
    let ipv6 = shot.to.is_ipv6();
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = match shot.transport {
        Transport::Tcp => Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?,
        Transport::Udp => Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?,
        Transport::Sctp => sctp::socket(ipv6)?,
    };
    socket.set_nonblocking(true)?;
    match shot.transport {
        Transport::Tcp => {
            // Closes with RST, which leaves no connection on either side.
            socket.set_linger(Some(Duration::ZERO))?;
            queue_errors(&socket, ipv6)?;
        }
        Transport::Udp => (),
        Transport::Sctp => return queue_errors(&socket, ipv6).map(|()| socket),
    }
    let any = |port| {
        if ipv6 {
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))
        } else {
            (Ipv4Addr::UNSPECIFIED, port).into()
        }
    };
    let own = std::iter::once(shot.source_port);
    let mut result = Ok(());
    for port in own.chain(std::iter::repeat_with(spare_port).take(SPARES)) {
        result = socket.bind(&any(port).into());
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    result.map(|()| socket)
}

fn spare_port() -> u16 {
    static USED: AtomicU16 = AtomicU16::new(0);
    SPARE_PORTS.start + USED.fetch_add(1, Ordering::Relaxed) % (SPARE_PORTS.end - SPARE_PORTS.start)
}

/// Makes the kernel queue ICMP errors. An error that arrives while `connect` still holds the socket is otherwise
/// lost, and only the second SYN, a second later, is refused.
fn queue_errors(socket: &Socket, ipv6: bool) -> io::Result<()> {
    let (level, option) =
        if ipv6 { (libc::SOL_IPV6, libc::IPV6_RECVERR) } else { (libc::SOL_IP, libc::IP_RECVERR) };
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is an int, and its length is given.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Flight {
    /// Sends the first data; TCP has already sent its SYN.
    fn ask(&mut self) -> io::Result<Option<ProbeResult>> {
        let sent = match self.shot.transport {
            Transport::Tcp => return Ok(None),
            Transport::Udp => self.socket.send(b"?\n"),
            Transport::Sctp => self.socket.send(&sctp::init(self.shot.source_port, self.shot.to.port())),
        };
        match sent {
            Ok(_) => Ok(None),
            Err(error) => match error.kind() {
                // The output hook dropped or rejected it; an ICMP error or its absence shows which.
                io::ErrorKind::PermissionDenied => Ok(None),
                io::ErrorKind::ConnectionRefused => Ok(Some(ProbeResult::Refused)),
                _ => Err(error),
            },
        }
    }

    /// Processes what has arrived; `None` while the outcome is open.
    fn step(&mut self) -> Result<Option<ProbeResult>> {
        match self.shot.transport {
            Transport::Sctp => self.step_sctp(),
            Transport::Tcp => self.step_tcp(),
            Transport::Udp => self.receive(),
        }
    }

    fn step_tcp(&mut self) -> Result<Option<ProbeResult>> {
        if !self.connected {
            if let Some(error) = self.socket.take_error()? {
                // Any error ends the connection.
                return Ok(refused(error)?.or(Some(ProbeResult::Silence)));
            }
            if let Some((error, _)) = queued_error(&self.socket)? {
                return refused(error);
            }
            self.connected = true;
            return Ok(None);
        }
        self.receive()
    }

    fn receive(&mut self) -> Result<Option<ProbeResult>> {
        let mut buffer = [MaybeUninit::uninit(); 256];
        match self.socket.recv(&mut buffer) {
            Ok(length) => {
                self.answer.extend(sctp::initialized(&buffer[..length]));
                let complete = length == 0 || self.answer.contains(&b'\n');
                complete.then(|| parse(&String::from_utf8_lossy(&self.answer))).transpose()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => refused(error),
        }
    }

    /// Every raw socket of the namespace receives every answer and error from its peer: the ports identify the shot.
    fn step_sctp(&mut self) -> Result<Option<ProbeResult>> {
        drop(self.socket.take_error());
        while let Some((error, packet)) = queued_error(&self.socket)? {
            if packet.get(..2) == Some(&self.shot.source_port.to_be_bytes()) {
                return refused(error);
            }
        }
        let mut buffer = [MaybeUninit::uninit(); 2048];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let packet = sctp::initialized(&buffer[..length]);
            if let Some(text) = sctp::answer(&packet, self.shot.to.is_ipv6(), self.shot.source_port) {
                return parse(&text).map(Some);
            }
        }
        Ok(None)
    }
}

/// Interprets a socket error: refused, or no outcome yet (a router has no route at the moment).
fn refused(error: io::Error) -> Result<Option<ProbeResult>> {
    match error.raw_os_error() {
        // The host has no such port or protocol.
        Some(libc::ECONNREFUSED | libc::ENOPROTOOPT | libc::EPROTO) => Ok(Some(ProbeResult::Refused)),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ETIMEDOUT) => Ok(None),
        _ => Err(error.into()),
    }
}

/// The next ICMP error in a socket's queue, and the packet that caused it from its transport header on.
fn queued_error(socket: &Socket) -> io::Result<Option<(io::Error, Vec<u8>)>> {
    let mut packet = [0u8; 256];
    // Aligned as required for control messages.
    let mut control = [0u64; 64];
    let mut part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: all pointers are to live buffers of the given lengths.
    let length = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
    };
    let Ok(length) = usize::try_from(length) else {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    };
    // SAFETY: the kernel filled the header; CMSG_FIRSTHDR gives null or a message inside the control buffer, and
    // an error queue's first message starts with a sock_extended_err, whose first field is the errno.
    let errno = unsafe {
        let message = libc::CMSG_FIRSTHDR(&raw const header);
        if message.is_null() {
            return Ok(None);
        }
        libc::CMSG_DATA(message).cast::<u32>().read_unaligned()
    };
    Ok(Some((io::Error::from_raw_os_error(errno.cast_signed()), packet[..length].to_vec())))
}
