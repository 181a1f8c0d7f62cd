//! Packets, and what came back: the only proof that counts.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::lab::namespace::Namespace;

pub mod sctp;
pub mod volley;

/// How long a probe waits before it says that nothing came back. More than a second: where the ICMP error comes
/// back while `connect` still holds the socket, Linux forgets it, and only the second SYN is refused.
pub const PATIENCE: Duration = Duration::from_millis(1500);

/// The transport of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// A new connection.
    Tcp,
    /// A datagram from a new port.
    Udp,
    /// The INIT of a new association, from a raw socket.
    Sctp,
}

/// What a client sees.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// A backend answered.
    Reply {
        /// The backend's name.
        backend: String,
        /// The client's address as the backend sees it.
        source: IpAddr,
    },
    /// The network or the host refused, at once.
    Refused,
    /// Nothing came back in time.
    Silence,
}

impl Outcome {
    /// The backend that answered, if one did.
    pub fn backend(&self) -> Option<&str> {
        match self {
            Self::Reply { backend, .. } => Some(backend),
            Self::Refused | Self::Silence => None,
        }
    }

    /// The client's address as the backend saw it, if one answered.
    pub fn source(&self) -> Option<IpAddr> {
        match self {
            Self::Reply { source, .. } => Some(*source),
            Self::Refused | Self::Silence => None,
        }
    }
}

impl fmt::Display for Outcome {
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
pub fn send(from: &Namespace, transport: Transport, to: SocketAddr) -> Result<Outcome> {
    send_patiently(from, transport, to, PATIENCE)
}

/// Sends one probe and waits for `patience`.
///
/// # Errors
/// As [`send`].
pub fn send_patiently(
    from: &Namespace,
    transport: Transport,
    to: SocketAddr,
    patience: Duration,
) -> Result<Outcome> {
    from.run(|| once(transport, to, patience))?
}

/// Sends `count` probes one after another and counts who answered; `refused` and `no answer` count too.
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
            let outcome = once(transport, to, PATIENCE)?;
            let name = outcome.backend().map_or_else(|| outcome.to_string(), str::to_owned);
            *counts.entry(name).or_default() += 1;
        }
        Ok(counts)
    })?
}

/// Sends one probe from the calling thread's namespace.
///
/// # Errors
/// The answer is not a pod's, or a socket fails in a way that says nothing about the network.
pub fn once(transport: Transport, to: SocketAddr, patience: Duration) -> Result<Outcome> {
    let answer = match transport {
        Transport::Tcp => tcp(to, patience),
        Transport::Udp => udp(to, patience),
        Transport::Sctp => {
            let shot = volley::Shot { transport, to, source_port: rand::random_range(33_000..=u16::MAX) };
            let outcome = volley::volley(&[shot], patience)?.pop();
            return Ok(outcome.unwrap_or(Outcome::Silence));
        }
    };
    match answer {
        Ok(text) => parse(&text),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Ok(Outcome::Silence),
            _ => bail!("a probe of {to}: {error}"),
        },
    }
}

fn parse(text: &str) -> Result<Outcome> {
    let fields: Vec<_> = text.split_whitespace().collect();
    match fields[..] {
        [backend, source] => Ok(Outcome::Reply { backend: backend.to_owned(), source: source.parse()? }),
        _ => bail!("an answer that no pod gives: {text:?}"),
    }
}

fn tcp(to: SocketAddr, patience: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut text = String::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {
        text.push(char::from(byte[0]));
    }
    Ok(text)
}

fn udp(to: SocketAddr, patience: Duration) -> io::Result<String> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(patience))?;
    match socket.send(b"?\n") {
        Ok(_) => (),
        // The output hook dropped or refused it; what follows, an ICMP error or nothing, tells which.
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
    /// Opens it from a namespace.
    ///
    /// # Errors
    /// It cannot be opened, or the answer is not a pod's.
    pub fn open(from: &Namespace, to: SocketAddr) -> Result<Self> {
        let stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut connection = Self { stream, backend: String::new() };
        connection.backend = connection.line()?.split_whitespace().next().unwrap_or_default().to_owned();
        Ok(connection)
    }

    /// Who answered when it was opened.
    pub fn backend(&self) -> &str {
        &self.backend
    }

    /// Sends a line and waits for its echo.
    ///
    /// # Errors
    /// The connection is broken, or the echo does not come or is another.
    pub fn exchange(&mut self) -> Result<()> {
        self.stream.write_all(b"still there?\n")?;
        let line = self.line()?;
        if line != "still there?" {
            bail!("the echo is another: {line:?}");
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
