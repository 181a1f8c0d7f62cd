//! A forwarder that hands what the server sends to its clients at one byte per second, after a handshake at full speed.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Bytes at full speed: the TLS handshake and the HTTP/2 settings.
const FAST: usize = 4_096;
/// Receive buffer towards the server, so that it notices after a few updates.
const RECEIVE_BUFFER: u32 = 4_096;

/// Ends with all connections when it is dropped.
pub(super) struct Trickle {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Trickle {
    /// Forwards connections to `server`.
    pub(super) fn start(runtime: &Runtime, server: SocketAddr) -> Result<Self> {
        let _entered = runtime.enter();
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let listener = socket.listen(1_024)?;
        let address = listener.local_addr()?;
        let accepting = runtime.spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(forward(client, server));
            }
        });
        Ok(Self { address, accepting })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Trickle {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Ends with the first error of either side.
async fn forward(client: TcpStream, server: SocketAddr) {
    let Ok(server) = connect(server).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = tokio::io::copy(&mut from_client, &mut to_server);
    let down = async {
        let mut fast = (&mut from_server).take(FAST as u64);
        tokio::io::copy(&mut fast, &mut to_client).await?;
        loop {
            to_client.write_u8(from_server.read_u8().await?).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let _: (_, std::io::Result<()>) = tokio::join!(up, down);
}

async fn connect(server: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.connect(server).await
}
