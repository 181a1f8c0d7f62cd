//! Plain HTTP GET, for metrics and health endpoints.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Sends a GET and returns the whole response: status line, headers, body.
///
/// # Errors
/// The server does not answer.
pub fn http_get(address: SocketAddr, path: &str) -> Result<String> {
    get(address, path, "")
}

/// Sends a GET with further header lines, each terminated by CRLF.
///
/// # Errors
/// The server does not answer.
pub fn get(address: SocketAddr, path: &str, headers: &str) -> Result<String> {
    let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2))
        .with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n{headers}\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
