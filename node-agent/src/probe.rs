//! Runs the probes of a trial: TCP connections from the node's own network through the data plane.
//!
//! Which probes run, when, and what follows from the results is decided in [`crate::state`]; here are sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use switchtower_proto::v1::Probe;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::engine::Command;
use crate::state::{Measured, Outcome, Round, Seen, Target};

/// Attempts of one connection before it counts as failed, and the pause between them: a node under load, or an
/// endpoint that goes at this moment, is not what a trial looks for.
const ATTEMPTS: usize = 3;
const PAUSE: Duration = Duration::from_millis(250);
/// Questions for the source in one round, because backends differ in what they see.
const QUESTIONS: usize = 8;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest answer that is read; its first line is 256 bytes at most.
const ANSWER: usize = 4096;
const LINE: usize = 256;

/// Runs rounds of probes.
pub trait Prober: Send {
    /// Starts a round. Its results come to the engine as [`Command::Probed`].
    fn start(&self, round: Round);
}

/// Probes by TCP, on the agent's runtime.
#[derive(Debug)]
pub struct TcpProber {
    runtime: tokio::runtime::Handle,
    results: mpsc::Sender<Command>,
}

impl TcpProber {
    /// Results go to `results`.
    pub fn new(runtime: tokio::runtime::Handle, results: mpsc::Sender<Command>) -> Self {
        TcpProber { runtime, results }
    }
}

impl Prober for TcpProber {
    fn start(&self, Round { number, targets }: Round) {
        let results = self.results.clone();
        self.runtime.spawn(async move {
            let measured = join_all(targets.iter().map(measure)).await;
            // An engine that is gone needs no results.
            let _ = results.send(Command::Probed { number, measured }).await;
        });
    }
}

async fn measure(target: &Target) -> Measured {
    let Target { probe, address, absent } = target;
    let outcome = match (address, absent) {
        (Some(address), None) => ask_all(probe, *address).await,
        (_, absent) => Outcome::Absent { detail: absent.clone().unwrap_or_default() },
    };
    Measured { probe: probe.name.clone(), address: *address, outcome }
}

async fn ask_all(probe: &Probe, address: SocketAddr) -> Outcome {
    let questions = if probe.compare_source { QUESTIONS } else { 1 };
    let mut seen = Seen::new();
    for _ in 0..questions {
        match ask_patiently(probe, address).await {
            Ok(Some((backend, source))) => {
                seen.entry(backend).or_default().insert(source);
            }
            Ok(None) => {}
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(match error.kind() {
                    io::ErrorKind::TimedOut => libc::ETIMEDOUT,
                    _ => 0,
                });
                return Outcome::Failed { errno, detail: format!("{address}: {error}") };
            }
        }
    }
    Outcome::Passed { seen }
}

async fn ask_patiently(probe: &Probe, address: SocketAddr) -> io::Result<Option<(String, IpAddr)>> {
    let deadline = match probe.timeout_milliseconds {
        0 => DEFAULT_TIMEOUT,
        milliseconds => Duration::from_millis(u64::from(milliseconds)),
    };
    let mut attempt = 1;
    loop {
        let result = tokio::time::timeout(deadline, ask(probe, address)).await.unwrap_or_else(|_| {
            let text = format!("no answer within {} ms", deadline.as_millis());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        });
        if result.is_ok() || attempt == ATTEMPTS {
            return result;
        }
        attempt += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// One connection; with `compare_source` what the backend calls itself, and the source that it sees.
async fn ask(probe: &Probe, address: SocketAddr) -> io::Result<Option<(String, IpAddr)>> {
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
            return understand(&line).map(Some);
        }
        let length = stream.read(&mut buffer).await?;
        answer.extend_from_slice(&buffer[..length]);
        if length == 0 || answer.len() > ANSWER {
            let line = answer_line(&answer, !probe.http_path.is_empty(), true).unwrap_or_default();
            return understand(&line).map(Some);
        }
    }
}

/// The line that counts: the first, or with HTTP the first of the body. `None`: it is not whole yet.
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

fn understand(line: &str) -> io::Result<(String, IpAddr)> {
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
    fn answers_of_both_kinds_are_understood() {
        let source: IpAddr = "10.1.2.3".parse().unwrap();
        assert_eq!(understand("web-1 10.1.2.3").unwrap(), ("web-1".to_owned(), source));
        assert_eq!(understand("10.1.2.3:4711\r").unwrap(), (String::new(), source));
        assert_eq!(understand("[::ffff:10.1.2.3]:80 a b").unwrap(), ("a b".to_owned(), source));
        assert!(understand("hello").is_err());
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
    async fn connections_are_measured() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, peer)) = listener.accept().await {
                let _ = stream.write_all(format!("a {}\n", peer.ip()).as_bytes()).await;
            }
        });
        let seen = measure(&target(address, true)).await.outcome;
        let expected: Seen = BTreeMap::from([("a".to_owned(), [address.ip()].into())]);
        assert_eq!(seen, Outcome::Passed { seen: expected });
        let unheard: SocketAddr = "127.0.0.1:1".parse().unwrap();
        match measure(&target(unheard, false)).await.outcome {
            Outcome::Failed { errno, .. } => assert_eq!(errno, libc::ECONNREFUSED),
            other => panic!("nobody listens there: {other:?}"),
        }
    }
}
