//! Probes: single packets or connections, and their outcome.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::lab::namespace::Namespace;

pub mod sctp;
pub mod volley;

/// Timeout of a probe. More than a second: if the ICMP error arrives while `connect` still holds the socket, Linux
/// drops it, and only the second SYN is refused.
pub const TIMEOUT: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// A new connection.
    Tcp,
    /// A datagram from a new port.
    Udp,
    /// The INIT of a new association, from a raw socket.
    Sctp,
}

/// The outcome as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeResult {
    /// A backend answered.
    Reply {
        backend: String,
        /// The client's address as the backend sees it.
        source: IpAddr,
    },
    /// The network or the host refused immediately.
    Refused,
    /// No answer within the timeout.
    Silence,
}

impl ProbeResult {
    pub fn backend(&self) -> Option<&str> {
        match self {
            Self::Reply { backend, .. } => Some(backend),
            Self::Refused | Self::Silence => None,
        }
    }

    /// The client's address as the backend saw it.
    pub fn source(&self) -> Option<IpAddr> {
        match self {
            Self::Reply { source, .. } => Some(*source),
            Self::Refused | Self::Silence => None,
        }
    }
}

impl fmt::Display for ProbeResult {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply { backend, source } => write!(formatter, "{backend} answered, sees {source}"),
            Self::Refused => formatter.write_str("refused"),
            Self::Silence => formatter.write_str("no answer"),
        }
    }
}

/// Sends one probe from a namespace.
///
/// # Errors
/// The namespace cannot be entered, or the answer is not a pod's.
pub fn send(from: &Namespace, transport: Transport, to: SocketAddr) -> Result<ProbeResult> {
    send_with_timeout(from, transport, to, TIMEOUT)
}

/// Sends one probe with a timeout.
///
/// # Errors
/// As [`send`].
pub fn send_with_timeout(
    from: &Namespace,
    transport: Transport,
    to: SocketAddr,
    timeout: Duration,
) -> Result<ProbeResult> {
    from.run(|| once(transport, to, timeout))?
}

/// Sends `count` probes one after another and counts the backends that answered; `refused` and `no answer` are
/// counted too.
///
/// # Errors
/// As [`send`].
pub fn spread(
    from: &Namespace,
    transport: Transport,
    to: SocketAddr,
    count: usize,
) -> Result<BTreeMap<String, usize>> {
    from.run(|| {
        let mut counts = BTreeMap::new();
        for _ in 0..count {
            let outcome = once(transport, to, TIMEOUT)?;
            let name = outcome.backend().map_or_else(|| outcome.to_string(), str::to_owned);
            *counts.entry(name).or_default() += 1;
        }
        Ok(counts)
    })?
}

/// Sends one probe from the calling thread's namespace.
///
/// # Errors
/// The answer is not a pod's, or a socket fails for a reason unrelated to the network.
pub fn once(transport: Transport, to: SocketAddr, timeout: Duration) -> Result<ProbeResult> {
    let answer = match transport {
        Transport::Tcp => tcp(to, timeout),
        Transport::Udp => udp(to, timeout),
        Transport::Sctp => {
            let shot = volley::Shot { transport, to, source_port: rand::random_range(33_000..=u16::MAX) };
            let outcome = volley::volley(&[shot], timeout)?.pop();
            return Ok(outcome.unwrap_or(ProbeResult::Silence));
        }
    };
    match answer {
        Ok(text) => parse(&text),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Ok(ProbeResult::Refused),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Ok(ProbeResult::Silence),
            _ => bail!("a probe of {to}: {error}"),
        },
    }
}

fn parse(text: &str) -> Result<ProbeResult> {
    let fields: Vec<_> = text.split_whitespace().collect();
    match fields[..] {
        [backend, source] => Ok(ProbeResult::Reply { backend: backend.to_owned(), source: source.parse()? }),
        _ => bail!("not an answer of a pod: {text:?}"),
    }
}

fn tcp(to: SocketAddr, timeout: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    let mut text = String::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {
        text.push(char::from(byte[0]));
    }
    Ok(text)
}

fn udp(to: SocketAddr, timeout: Duration) -> io::Result<String> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(timeout))?;
    match socket.send(b"?\n") {
        Ok(_) => (),
        // The output hook dropped or rejected it; an ICMP error or its absence shows which.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => (),
        Err(error) => return Err(error),
    }
    let mut answer = [0; 256];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// A TCP connection that stays open, to see what happens to it.
#[derive(Debug)]
pub struct LongConnection {
    stream: TcpStream,
    backend: String,
}

impl LongConnection {
    /// Opens the connection from a namespace.
    ///
    /// # Errors
    /// It cannot be opened, or the answer is not a pod's.
    pub fn open(from: &Namespace, to: SocketAddr) -> Result<Self> {
        let stream = from.run(|| TcpStream::connect_timeout(&to, TIMEOUT))??;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut connection = Self { stream, backend: String::new() };
        connection.backend = connection.line()?.split_whitespace().next().unwrap_or_default().to_owned();
        Ok(connection)
    }

    /// The backend that accepted the connection.
    pub fn backend(&self) -> &str {
        &self.backend
    }

    /// Sends a line and waits for its echo.
    ///
    /// # Errors
    /// The connection is broken, or the echo is missing or differs.
    pub fn exchange(&mut self) -> Result<()> {
        self.stream.write_all(b"still there?\n")?;
        let line = self.line()?;
        if line != "still there?" {
            bail!("unexpected echo: {line:?}");
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut text = String::new();
        let mut byte = [0];
        loop {
            if self.stream.read(&mut byte)? == 0 {
                bail!("the peer closed the connection");
            }
            if byte == *b"\n" {
                return Ok(text);
            }
            text.push(char::from(byte[0]));
        }
    }
}
