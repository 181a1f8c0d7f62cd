//! A TCP forwarder between two programs whose link can be cut, slowed down or made half-open, separately for each client
//! address. The kernel of the test machines has no netem.
//!
//! A half-open link loses nothing: like TCP across a partition, it delivers the bytes afterwards.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Size of a buffer, which bounds the throughput of a slow link.
const BUFFER: usize = 64 << 10;

/// Direction of bytes on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// Condition of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Condition {
    #[default]
    Whole,
    /// Connections are reset, new ones too.
    Cut,
    /// Nothing passes in this direction, and both ends keep their connection.
    HalfOpen(Direction),
    /// Nothing passes in either direction, and both ends keep their connection.
    Silent,
    /// Everything arrives this much later.
    Slow(Duration),
}

impl Condition {
    fn stops(self, direction: Direction) -> bool {
        match self {
            Self::Silent => true,
            Self::HalfOpen(stopped) => stopped == direction,
            Self::Whole | Self::Cut | Self::Slow(_) => false,
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Conditions {
    of_client: HashMap<IpAddr, Condition>,
    of_others: Condition,
}

impl Conditions {
    fn of(&self, client: IpAddr) -> Condition {
        self.of_client.get(&client).copied().unwrap_or(self.of_others)
    }
}

/// A running forwarder, which ends on drop.
#[derive(Debug)]
pub struct Forwarder {
    address: SocketAddr,
    conditions: watch::Sender<Conditions>,
    runtime: Option<Runtime>,
}

impl Forwarder {
    /// Listens and forwards connections to a server. All links are whole at first.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn start(listen: SocketAddr, server: SocketAddr) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime
            .block_on(TcpListener::bind(listen))
            .with_context(|| format!("listening on {listen} for {server}"))?;
        let address = listener.local_addr()?;
        let conditions = watch::Sender::new(Conditions::default());
        let seen = conditions.subscribe();
        runtime.spawn(accept(listener, server, seen));
        Ok(Self { address, conditions, runtime: Some(runtime) })
    }

    /// Address that clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets the condition of the links of all clients.
    pub fn set(&self, condition: Condition) {
        self.conditions.send_modify(|conditions| {
            conditions.of_client.clear();
            conditions.of_others = condition;
        });
    }

    /// Sets the condition of the links of one client.
    pub fn set_client(&self, client: IpAddr, condition: Condition) {
        self.conditions.send_modify(|conditions| {
            conditions.of_client.insert(client, condition);
        });
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, server: SocketAddr, conditions: watch::Receiver<Conditions>) {
    loop {
        let Ok((client, peer)) = listener.accept().await else { continue };
        tokio::spawn(forward(client, peer.ip(), server, conditions.clone()));
    }
}

async fn forward(
    client: TcpStream,
    peer: IpAddr,
    server: SocketAddr,
    conditions: watch::Receiver<Conditions>,
) {
    // Closed with RST: the peer notices at once.
    let reset = |stream: &TcpStream| SockRef::from(stream).set_linger(Some(Duration::ZERO));
    drop(reset(&client));
    if conditions.borrow().of(peer) == Condition::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(server).await else { return };
    drop(reset(&server));
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(from_client, to_server, Direction::ToServer, peer, conditions.clone()) => {}
        () = pump(from_server, to_client, Direction::ToClient, peer, conditions) => {}
    }
}

/// Copies one direction until it ends or the link is cut.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    direction: Direction,
    peer: IpAddr,
    mut conditions: watch::Receiver<Conditions>,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let condition = conditions.borrow_and_update().of(peer);
        if condition == Condition::Cut {
            return;
        }
        if condition.stops(direction) {
            if conditions.changed().await.is_err() {
                return;
            }
            continue;
        }
        tokio::select! {
            // First: what arrives after a change passes under the new condition.
            biased;
            changed = conditions.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer) => {
                let Ok(length @ 1..) = read else { return };
                if let Condition::Slow(delay) = condition {
                    tokio::time::sleep(delay).await;
                }
                if to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
    const SOON: Duration = Duration::from_millis(200);

    fn echo() -> SocketAddr {
        let listener = TcpListener::bind(ANY).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        address
    }

    fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    }

    #[test]
    fn links_break_and_recover() {
        let forwarder = Forwarder::start(ANY.into(), echo()).unwrap();
        let open = || {
            let stream = TcpStream::connect(forwarder.address()).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream
        };
        let mut stream = open();
        exchange(&mut stream).unwrap();
        for condition in [
            Condition::Silent,
            Condition::HalfOpen(Direction::ToServer),
            Condition::HalfOpen(Direction::ToClient),
        ] {
            forwarder.set(condition);
            assert!(exchange(&mut stream).is_err(), "{condition:?}");
            forwarder.set(Condition::Whole);
            stream.read_exact(&mut [0]).unwrap();
            exchange(&mut stream).unwrap();
        }
        forwarder.set(Condition::Slow(SOON));
        assert!(exchange(&mut stream).is_err(), "it takes two times {SOON:?}");
        stream.set_read_timeout(Some(SOON * 10)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        forwarder.set_client(Ipv4Addr::LOCALHOST.into(), Condition::Cut);
        assert!(exchange(&mut stream).is_err() && exchange(&mut open()).is_err());
        forwarder.set(Condition::Whole);
        exchange(&mut open()).unwrap();
    }
}
