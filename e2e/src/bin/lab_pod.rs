//! Server of a laboratory pod. It answers each TCP connection, UDP datagram and SCTP INIT with one line: its name and
//! the client's address as it sees it. Further data of a TCP client is echoed.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use switchtower_e2e::probe::sctp;

#[derive(Parser)]
struct Arguments {
    /// Name to answer with.
    #[arg(long)]
    name: String,
    /// TCP ports.
    #[arg(long, value_delimiter = ',')]
    tcp: Vec<u16>,
    /// UDP ports.
    #[arg(long, value_delimiter = ',')]
    udp: Vec<u16>,
    /// SCTP ports.
    #[arg(long, value_delimiter = ',')]
    sctp: Vec<u16>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let name: Arc<str> = arguments.name.into();
    let mut servers = Vec::new();
    for port in arguments.tcp {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
        let listener = listener.with_context(|| format!("listening on TCP port {port}"))?;
        let name = Arc::clone(&name);
        servers.push(std::thread::spawn(move || serve_tcp(&listener, &name)));
    }
    for port in arguments.udp {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port));
        let socket = socket.with_context(|| format!("listening on UDP port {port}"))?;
        let name = Arc::clone(&name);
        servers.push(std::thread::spawn(move || serve_udp(&socket, &name)));
    }
    for ipv6 in [false, true].into_iter().filter(|_| !arguments.sctp.is_empty()) {
        let socket = sctp::listen(ipv6).context("listening for SCTP")?;
        let (name, ports) = (Arc::clone(&name), arguments.sctp.clone());
        servers.push(std::thread::spawn(move || {
            sctp::serve(&socket, ipv6, &ports, |client| answer(&name, client))
        }));
    }
    for server in servers {
        drop(server.join());
    }
    Ok(())
}

fn answer(name: &str, client: SocketAddr) -> String {
    let address = match client.ip() {
        IpAddr::V6(address) => address.to_canonical(),
        address @ IpAddr::V4(_) => address,
    };
    format!("{name} {address}\n")
}

fn serve_tcp(listener: &TcpListener, name: &Arc<str>) {
    for stream in listener.incoming().flatten() {
        let name = Arc::clone(name);
        // The client may have gone away.
        std::thread::spawn(move || drop(converse(stream, &name)));
    }
}

fn converse(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let client = stream.peer_addr()?;
    stream.write_all(answer(name, client).as_bytes())?;
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

fn serve_udp(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 1024];
    loop {
        if let Ok((_, client)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(answer(name, client).as_bytes(), client));
        }
    }
}
