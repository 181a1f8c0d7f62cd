//! In a laboratory's node: backends that keep connections, and clients that watch them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Namespace;

const TIMEOUT: Duration = Duration::from_secs(2);

/// A backend that sends "name, address of the peer" in a line and then echoes lines.
pub fn serve_lines(namespace: &Namespace, name: &'static str, port: u16) {
    let listener = namespace.run(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            std::thread::spawn(move || -> std::io::Result<()> {
                writeln!(stream, "{name} {}", peer.ip())?;
                let mut lines = BufReader::new(stream.try_clone()?);
                let mut line = String::new();
                while lines.read_line(&mut line)? > 0 {
                    stream.write_all(line.as_bytes())?;
                    line.clear();
                }
                Ok(())
            });
        }
    });
}

/// Asks a backend once, from the calling thread's namespace: its name and the source that it sees.
pub fn ask(to: &str) -> std::io::Result<(String, IpAddr)> {
    Connection::try_open(to).map(|connection| connection.backend)
}

/// A connection that stays open.
pub struct Connection {
    lines: BufReader<TcpStream>,
    backend: (String, IpAddr),
}

impl Connection {
    pub fn open(to: &str) -> Self {
        Self::try_open(to).unwrap_or_else(|error| panic!("{to}: {error}"))
    }

    fn try_open(to: &str) -> std::io::Result<Self> {
        let address: SocketAddr = to.parse().unwrap();
        let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let (name, source) = line.trim().split_once(' ').ok_or(std::io::ErrorKind::UnexpectedEof)?;
        Ok(Connection { lines, backend: (name.to_owned(), source.parse().unwrap()) })
    }

    /// Sends a line and takes its echo.
    pub fn exchange(&mut self, text: &str) {
        let mut line = String::new();
        let sent = writeln!(self.lines.get_mut(), "{text}");
        let result = sent.and_then(|()| self.lines.read_line(&mut line));
        assert_eq!((result.map_err(|error| error.to_string()), line.trim()), (Ok(text.len() + 1), text));
    }
}

/// Sends requests to an address continuously and records the longest time without an answer.
pub struct Watcher {
    stop: Arc<AtomicBool>,
    gap: Arc<Mutex<Gap>>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Gap {
    since: Option<Instant>,
    longest: Duration,
}

impl Watcher {
    /// Watches from the calling thread's namespace.
    pub fn start(to: &str) -> Self {
        assert!(ask(to).is_ok(), "{to} answers at first");
        let (stop, gap) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Gap::default())));
        let (ending, noted, to) = (stop.clone(), gap.clone(), to.to_owned());
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            while !ending.load(Ordering::Relaxed) {
                let answered = ask(&to).is_ok();
                let mut gap = noted.lock().unwrap();
                if answered {
                    if gap.since.take().is_some() {
                        gap.longest = gap.longest.max(last.elapsed());
                    }
                    last = Instant::now();
                } else {
                    gap.since.get_or_insert(last);
                }
                drop(gap);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Watcher { stop, gap, thread }
    }

    /// Waits for a failure and the next success; returns the time from the last success before to that one.
    pub fn longest_gap(self, deadline: Duration) -> Duration {
        let until = Instant::now() + deadline;
        let longest = loop {
            let gap = self.gap.lock().unwrap();
            if gap.since.is_none() && !gap.longest.is_zero() {
                break gap.longest;
            }
            drop(gap);
            assert!(Instant::now() < until, "no gap that ended within {deadline:?}");
            std::thread::sleep(Duration::from_millis(20));
        };
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        longest
    }
}
