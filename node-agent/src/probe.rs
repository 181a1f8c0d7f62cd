//! Probes of a trial: TCP connections from the node's own network through the data plane.
//!
//! [`crate::state`] decides which probes run, when, and what their results mean; this module has the sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use switchtower_proto::v1::Probe;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::state::{Measured, ProbeOutcome, Round, Seen, Target};

/// Attempts of one connection before it counts as failed: a trial must not fail because a node is under load or an
/// endpoint is being removed.
const ATTEMPTS: usize = 3;
/// Delay between two attempts.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// Connections per round that compare the source, since backends may see different ones.
const CONNECTIONS: usize = 8;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum bytes of an answer that are read.
const ANSWER: usize = 4096;
/// Maximum length of the line that is used, in bytes.
const LINE: usize = 256;

/// Results of one round of probes.
#[derive(Debug)]
pub(crate) struct RoundResults {
    /// Number of the [`Round`].
    pub(crate) number: u64,
    /// One result per target.
    pub(crate) measured: Vec<Measured>,
}

/// Runs rounds of probes.
pub(crate) trait Prober: Send {
    /// Starts a round and returns at once; its [`RoundResults`] follow.
    fn start(&self, round: Round);
}

/// Probes by TCP on the agent's runtime.
#[derive(Debug)]
pub(crate) struct TcpProber {
    runtime: tokio::runtime::Handle,
    results: mpsc::Sender<RoundResults>,
}

impl TcpProber {
    /// Creates a prober that sends its results to `results`.
    pub(crate) fn new(runtime: tokio::runtime::Handle, results: mpsc::Sender<RoundResults>) -> Self {
        TcpProber { runtime, results }
    }
}

impl Prober for TcpProber {
    fn start(&self, Round { number, targets }: Round) {
        let results = self.results.clone();
        self.runtime.spawn(async move {
            let measured = join_all(targets.iter().map(measure)).await;
            // A receiver that has ended needs no results.
            let _ = results.send(RoundResults { number, measured }).await;
        });
    }
}

async fn measure(target: &Target) -> Measured {
    let Target { probe, address, absent } = target;
    let outcome = match (address, absent) {
        (Some(address), None) => probe_all(probe, *address).await,
        (_, absent) => ProbeOutcome::Absent { detail: absent.clone().unwrap_or_default() },
    };
    Measured { probe: probe.name.clone(), address: *address, outcome }
}

async fn probe_all(probe: &Probe, address: SocketAddr) -> ProbeOutcome {
    let connections = if probe.compare_source { CONNECTIONS } else { 1 };
    let mut seen = Seen::new();
    for _ in 0..connections {
        match probe_with_retries(probe, address).await {
            Ok(Some((backend, source))) => {
                seen.entry(backend).or_default().insert(source);
            }
            Ok(None) => {}
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(match error.kind() {
                    io::ErrorKind::TimedOut => libc::ETIMEDOUT,
                    _ => 0,
                });
                return ProbeOutcome::Failed { errno, detail: format!("{address}: {error}") };
            }
        }
    }
    ProbeOutcome::Passed { seen }
}

async fn probe_with_retries(probe: &Probe, address: SocketAddr) -> io::Result<Option<(String, IpAddr)>> {
    let timeout = match probe.timeout_milliseconds {
        0 => DEFAULT_TIMEOUT,
        milliseconds => Duration::from_millis(u64::from(milliseconds)),
    };
    let mut attempt = 1;
    loop {
        let result = tokio::time::timeout(timeout, probe_once(probe, address)).await.unwrap_or_else(|_| {
            let text = format!("no answer within {} ms", timeout.as_millis());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        });
        if result.is_ok() || attempt == ATTEMPTS {
            return result;
        }
        attempt += 1;
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

/// Makes one connection; with `compare_source` returns the backend's name and the source that it saw.
async fn probe_once(probe: &Probe, address: SocketAddr) -> io::Result<Option<(String, IpAddr)>> {
    let mut stream = TcpStream::connect(address).await?;
    if !probe.compare_source {
        return Ok(None);
    }
    if !probe.http_path.is_empty() {
        let request = format!("GET {} HTTP/1.0\r\nHost: {address}\r\n\r\n", probe.http_path);
        stream.write_all(request.as_bytes()).await?;
    }
    let mut answer = Vec::new();
    let mut buffer = [0; 512];
    loop {
        if let Some(line) = answer_line(&answer, !probe.http_path.is_empty(), false) {
            return parse_line(&line).map(Some);
        }
        let length = stream.read(&mut buffer).await?;
        answer.extend_from_slice(&buffer[..length]);
        if length == 0 || answer.len() > ANSWER {
            let line = answer_line(&answer, !probe.http_path.is_empty(), true).unwrap_or_default();
            return parse_line(&line).map(Some);
        }
    }
}

/// Returns the first line of the answer, or with HTTP that of the body; `None` while it is incomplete.
fn answer_line(answer: &[u8], http: bool, ended: bool) -> Option<String> {
    let text = String::from_utf8_lossy(answer);
    let body = if http {
        let at = text.find("\r\n\r\n").map(|at| at + 4).or_else(|| text.find("\n\n").map(|at| at + 2))?;
        &text[at..]
    } else {
        &text
    };
    match body.split_once('\n') {
        Some((line, _)) => Some(line.to_owned()),
        None if ended || body.len() > LINE => Some(body.to_owned()),
        None => None,
    }
}

/// Splits a line into the backend's name and the source address that it saw.
fn parse_line(line: &str) -> io::Result<(String, IpAddr)> {
    let line: String = line.chars().take(LINE).collect();
    let parsed = line.split_whitespace().enumerate().find_map(|(at, word)| {
        let with_port = word.parse::<SocketAddr>().map(|address| address.ip());
        Some((at, word.parse::<IpAddr>().or(with_port).ok()?.to_canonical()))
    });
    let Some((at, source)) = parsed else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the answer {line:?} names no source address"),
        ));
    };
    let others = line.split_whitespace().enumerate().filter(|(other, _)| *other != at).map(|(_, word)| word);
    Ok((others.collect::<Vec<_>>().join(" "), source))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn plain_and_http_answers_parsed() {
        let source: IpAddr = "10.1.2.3".parse().unwrap();
        assert_eq!(parse_line("web-1 10.1.2.3").unwrap(), ("web-1".to_owned(), source));
        assert_eq!(parse_line("10.1.2.3:4711\r").unwrap(), (String::new(), source));
        assert_eq!(parse_line("[::ffff:10.1.2.3]:80 a b").unwrap(), ("a b".to_owned(), source));
        assert!(parse_line("hello").is_err());
        let http = b"HTTP/1.0 200 OK\r\nX: 1\r\n\r\n10.1.2.3:80";
        assert_eq!(answer_line(http, true, false), None, "more may come");
        assert_eq!(answer_line(http, true, true), Some("10.1.2.3:80".to_owned()));
        assert_eq!(answer_line(b"HTTP/1.0 200 OK\r\n", true, true), None);
        assert_eq!(answer_line(b"a 10.1.2.3\nrest", false, false), Some("a 10.1.2.3".to_owned()));
    }

    fn target(address: SocketAddr, compare_source: bool) -> Target {
        let probe = Probe { name: "p".into(), compare_source, timeout_milliseconds: 200, ..Probe::default() };
        Target { probe, address: Some(address), absent: None }
    }

    #[tokio::test]
    async fn connections_measured() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, peer)) = listener.accept().await {
                let _ = stream.write_all(format!("a {}\n", peer.ip()).as_bytes()).await;
            }
        });
        let seen = measure(&target(address, true)).await.outcome;
        let expected: Seen = BTreeMap::from([("a".to_owned(), [address.ip()].into())]);
        assert_eq!(seen, ProbeOutcome::Passed { seen: expected });
        let unheard: SocketAddr = "127.0.0.1:1".parse().unwrap();
        match measure(&target(unheard, false)).await.outcome {
            ProbeOutcome::Failed { errno, .. } => assert_eq!(errno, libc::ECONNREFUSED),
            other => panic!("no process listens there: {other:?}"),
        }
    }
}
