//! What people ask about the kernel, through the controller: read by a thread and a socket of its own, so that
//! no update waits for an answer.
//!
//! Questions are answered one after another, and who comes while one waits is told so. The kernel is read anew for
//! every question.

use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use prost::Message as _;
use switchtower_proto::v1::{KernelTable, Query};
use switchtower_telemetry::{span, spans};
use tokio::sync::oneshot;

use crate::kernel::nft::{FrontendQuery, KernelReader};

/// Frontends or elements in an answer, if the question does not say.
const DEFAULT_LIMIT: usize = 1_000;
/// Most frontends or elements in an answer.
const LIMIT: usize = 100_000;
/// Most frontends in one lookup.
const LOOKUPS: usize = 256;
/// Longest answer, in bytes.
pub(crate) const ANSWER: usize = 16 << 20;

/// Takes an answer, or why there is none.
pub type Reply = oneshot::Sender<Result<Vec<u8>, String>>;

/// A question that cannot be answered, in words for whoever asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// Not one of the known questions.
    #[error(
        "this agent answers \"counts\", \"stamp\", \"lookup\", \"frontends\", \"elements\" and \"rules\", not {0:?}; \
         is it older than the controller?"
    )]
    Unknown(String),
    /// A name of a frontend that is none.
    #[error("{0:?} is no frontend: write ADDRESS:PORT/TCP, [ADDRESS]:PORT/UDP, or :PORT/TCP for a NodePort")]
    Frontend(String),
    /// Too many at once.
    #[error("{0} frontends at once are too many, at most {LOOKUPS}")]
    TooMany(usize),
    /// The answer is too long.
    #[error("the answer has {0} bytes, more than {ANSWER}; ask for less with a filter or a limit")]
    TooLong(usize),
    /// The kernel could not be read.
    #[error("read the kernel's tables by netlink: {0}")]
    Kernel(String),
    /// Somebody else asks.
    #[error("this node is answering another question; try again in a moment")]
    Busy,
    /// Nobody reads the kernel.
    #[error("this agent cannot read its kernel's tables; its log says why")]
    Unavailable,
}

/// Where questions go.
#[derive(Debug)]
pub struct Questions(Option<SyncSender<(Query, Reply)>>);

impl Questions {
    /// Starts the thread. It ends when this is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(mut reader: KernelReader) -> io::Result<Self> {
        // One waits while the thread is still on its way back from the one before.
        let (sender, questions) = sync_channel::<(Query, Reply)>(1);
        std::thread::Builder::new().name("questions".into()).spawn(move || {
            while let Ok((query, reply)) = questions.recv() {
                let answered = traced(&mut reader, &query).map_err(|error| error.to_string());
                // The session that asked may be gone.
                let _ = reply.send(answered);
            }
        })?;
        Ok(Questions(Some(sender)))
    }

    /// Refuses every question.
    pub fn none() -> Self {
        Questions(None)
    }

    /// Hands a question over; it is refused at once if others are before it.
    pub fn ask(&self, query: &Query, reply: Reply) {
        let refused = match &self.0 {
            None => Some((reply, QuestionError::Unavailable)),
            Some(sender) => match sender.try_send((query.clone(), reply)) {
                Ok(()) => None,
                Err(TrySendError::Full((_, reply))) => Some((reply, QuestionError::Busy)),
                Err(TrySendError::Disconnected((_, reply))) => Some((reply, QuestionError::Unavailable)),
            },
        };
        if let Some((reply, error)) = refused {
            let _ = reply.send(Err(error.to_string()));
        }
    }
}

/// Answers, and tells so as a span.
fn traced(reader: &mut KernelReader, query: &Query) -> Result<Vec<u8>, QuestionError> {
    let span = span!("switchtower.question", otel.kind = "server", switchtower.question = &*query.what);
    let answered = span.in_scope(|| answer(reader, query));
    if let Err(error) = &answered {
        spans::failed(&span, error);
    }
    answered
}

fn answer(reader: &mut KernelReader, query: &Query) -> Result<Vec<u8>, QuestionError> {
    let limit = match query.limit as usize {
        0 => DEFAULT_LIMIT,
        limit => limit.min(LIMIT),
    };
    let table = match query.what.as_str() {
        "lookup" => reader.lookup(&parse_lookups(&query.filter)?),
        "frontends" => reader.frontends(limit),
        "elements" => reader.elements(&query.filter, limit),
        "rules" => reader.chains(),
        other => return Err(QuestionError::Unknown(other.chars().take(64).collect())),
    };
    encode(&table.map_err(|error| QuestionError::Kernel(error.to_string()))?)
}

fn encode(table: &KernelTable) -> Result<Vec<u8>, QuestionError> {
    let length = table.encoded_len();
    if length > ANSWER {
        return Err(QuestionError::TooLong(length));
    }
    Ok(table.encode_to_vec())
}

fn parse_lookups(filter: &str) -> Result<Vec<FrontendQuery>, QuestionError> {
    let names: Vec<&str> = filter.split(',').filter(|name| !name.is_empty()).collect();
    if names.len() > LOOKUPS {
        return Err(QuestionError::TooMany(names.len()));
    }
    let wrong = |name: &str| QuestionError::Frontend(name.chars().take(64).collect());
    names.into_iter().map(|name| parse_lookup(name).ok_or_else(|| wrong(name))).collect()
}

/// `10.96.0.10:80/TCP`, `[fd96::10]:80/UDP`, `:30080/TCP`.
fn parse_lookup(name: &str) -> Option<FrontendQuery> {
    let (at, protocol) = name.rsplit_once('/')?;
    let protocol = match protocol {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        _ => return None,
    };
    let (address, port) = at.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let address = match address {
        "" => None,
        v6 if v6.starts_with('[') => {
            Some(v6.strip_prefix('[')?.strip_suffix(']')?.parse::<std::net::Ipv6Addr>().ok()?.into())
        }
        v4 => Some(v4.parse::<std::net::Ipv4Addr>().ok()?.into()),
    };
    Some(FrontendQuery { address, protocol, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_frontends() {
        let query = |address: Option<&str>, protocol, port| FrontendQuery {
            address: address.map(|address| address.parse().unwrap()),
            protocol,
            port,
        };
        let filter = "10.96.0.10:80/TCP,[fd96::10]:53/UDP,:30080/SCTP";
        let wanted =
            [query(Some("10.96.0.10"), 6, 80), query(Some("fd96::10"), 17, 53), query(None, 132, 30080)];
        assert_eq!(parse_lookups(filter).unwrap(), wanted);
        assert_eq!(parse_lookups("").unwrap(), []);
        for wrong in
            ["10.96.0.10", "10.96.0.10:80", "10.96.0.10:0/TCP", "fd96::10:53/UDP", "x:80/TCP", "/TCP"]
        {
            assert_eq!(parse_lookups(wrong), Err(QuestionError::Frontend(wrong.to_owned())), "{wrong}");
        }
        let many = vec!["10.96.0.10:80/TCP"; 257].join(",");
        assert_eq!(parse_lookups(&many), Err(QuestionError::TooMany(257)));
    }

    #[test]
    fn without_a_reader_there_is_an_answer_too() {
        let (reply, answered) = oneshot::channel();
        Questions::none().ask(&Query::default(), reply);
        let error = answered.blocking_recv().unwrap().unwrap_err();
        assert_eq!(error, QuestionError::Unavailable.to_string());
    }
}
