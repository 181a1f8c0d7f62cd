//! Answers the controller's queries about the kernel's tables.
//!
//! A thread with its own socket reads the kernel for every query, so that no update waits for an answer. It answers one
//! query after another; while one waits, further ones fail with [`QueryError::Busy`].

use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use prost::Message as _;
use switchtower_proto::v1::{KernelTable, Query};
use switchtower_telemetry::{span, spans};
use tokio::sync::oneshot;

use crate::kernel::nft::{FrontendQuery, KernelReader};

/// Maximum frontends or elements in an answer if the query sets no limit.
const DEFAULT_LIMIT: usize = 1_000;
/// Maximum limit of a query.
const LIMIT: usize = 100_000;
/// Maximum frontends in one lookup.
const LOOKUPS: usize = 256;
/// Maximum length of an answer in bytes.
pub(crate) const ANSWER: usize = 16 << 20;

/// Receives the answer, or the reason why there is none.
pub(crate) type Reply = oneshot::Sender<Result<Vec<u8>, String>>;

/// The reason why a query has no answer; the message is for the user who sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueryError {
    /// Unknown kind of query.
    #[error(
        "this agent answers \"counts\", \"stamp\", \"lookup\", \"frontends\", \"elements\" and \"rules\", not {0:?}; \
         is it older than the controller?"
    )]
    Unknown(String),
    /// Malformed name of a frontend.
    #[error(
        "{0:?} is not a frontend: write ADDRESS:PORT/TCP, [ADDRESS]:PORT/UDP, or :PORT/TCP for a NodePort"
    )]
    Frontend(String),
    /// Too many frontends in one lookup.
    #[error("{0} frontends exceed the maximum of {LOOKUPS} per query")]
    TooMany(usize),
    /// The answer exceeds the maximum length.
    #[error("the answer has {0} bytes, more than {ANSWER}; set a filter or a lower limit")]
    TooLong(usize),
    /// The kernel could not be read.
    #[error("cannot read the kernel's tables by netlink: {0}")]
    Kernel(String),
    /// Another query is being answered.
    #[error("this node is answering another query; retry in a moment")]
    Busy,
    /// The reading thread does not run.
    #[error("this agent cannot read its kernel's tables; see its log")]
    Unavailable,
}

/// Handle of the thread that answers queries. The thread ends when the handle is dropped.
#[derive(Debug)]
pub(crate) struct Inspector(Option<SyncSender<(Query, Reply)>>);

impl Inspector {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(mut reader: KernelReader) -> io::Result<Self> {
        // One query waits while the thread still sends the previous answer.
        let (sender, queries) = sync_channel::<(Query, Reply)>(1);
        std::thread::Builder::new().name("inspector".into()).spawn(move || {
            while let Ok((query, reply)) = queries.recv() {
                let answered = traced(&mut reader, &query).map_err(|error| error.to_string());
                // The session that sent the query may have ended.
                let _ = reply.send(answered);
            }
        })?;
        Ok(Inspector(Some(sender)))
    }

    /// Creates an inspector that fails every query.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Inspector(None)
    }

    /// Queues a query; fails it at once if another one waits.
    pub(crate) fn ask(&self, query: &Query, reply: Reply) {
        let refused = match &self.0 {
            None => Some((reply, QueryError::Unavailable)),
            Some(sender) => match sender.try_send((query.clone(), reply)) {
                Ok(()) => None,
                Err(TrySendError::Full((_, reply))) => Some((reply, QueryError::Busy)),
                Err(TrySendError::Disconnected((_, reply))) => Some((reply, QueryError::Unavailable)),
            },
        };
        if let Some((reply, error)) = refused {
            let _ = reply.send(Err(error.to_string()));
        }
    }
}

/// Answers a query within a span.
fn traced(reader: &mut KernelReader, query: &Query) -> Result<Vec<u8>, QueryError> {
    let span = span!("switchtower.question", otel.kind = "server", switchtower.question = &*query.what);
    let answered = span.in_scope(|| answer(reader, query));
    if let Err(error) = &answered {
        spans::failed(&span, error);
    }
    answered
}

fn answer(reader: &mut KernelReader, query: &Query) -> Result<Vec<u8>, QueryError> {
    let limit = match query.limit as usize {
        0 => DEFAULT_LIMIT,
        limit => limit.min(LIMIT),
    };
    let table = match query.what.as_str() {
        "lookup" => reader.lookup(&parse_lookups(&query.filter)?),
        "frontends" => reader.frontends(limit),
        "elements" => reader.elements(&query.filter, limit),
        "rules" => reader.chains(),
        other => return Err(QueryError::Unknown(other.chars().take(64).collect())),
    };
    encode(&table.map_err(|error| QueryError::Kernel(error.to_string()))?)
}

fn encode(table: &KernelTable) -> Result<Vec<u8>, QueryError> {
    let length = table.encoded_len();
    if length > ANSWER {
        return Err(QueryError::TooLong(length));
    }
    Ok(table.encode_to_vec())
}

fn parse_lookups(filter: &str) -> Result<Vec<FrontendQuery>, QueryError> {
    let names: Vec<&str> = filter.split(',').filter(|name| !name.is_empty()).collect();
    if names.len() > LOOKUPS {
        return Err(QueryError::TooMany(names.len()));
    }
    let wrong = |name: &str| QueryError::Frontend(name.chars().take(64).collect());
    names.into_iter().map(|name| parse_lookup(name).ok_or_else(|| wrong(name))).collect()
}

/// Parses `10.96.0.10:80/TCP`, `[fd96::10]:80/UDP` or `:30080/TCP`.
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
    fn frontend_names_parsed() {
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
            assert_eq!(parse_lookups(wrong), Err(QueryError::Frontend(wrong.to_owned())), "{wrong}");
        }
        let many = vec!["10.96.0.10:80/TCP"; 257].join(",");
        assert_eq!(parse_lookups(&many), Err(QueryError::TooMany(257)));
    }

    #[test]
    fn query_without_reader_fails() {
        let (reply, answered) = oneshot::channel();
        Inspector::none().ask(&Query::default(), reply);
        let error = answered.blocking_recv().unwrap().unwrap_err();
        assert_eq!(error, QueryError::Unavailable.to_string());
    }
}
