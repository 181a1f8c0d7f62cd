//! Answers the controller's queries about the kernel's tables.
//!
//! A thread with its own socket reads the kernel for every query, so that no update waits for an answer. It answers one
//! query after another; while one waits, further ones fail with [`QueryError::Busy`].

use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use prost::Message as _;
use switchtower_proto::v1::query::Kind;
use switchtower_proto::v1::{Family, FrontendKey, KernelTable, Protocol, Query};
use switchtower_telemetry::{span, spans};
use tokio::sync::oneshot;

use crate::kernel::nft::KernelReader;

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
    #[error("this agent does not know this kind of query; is it older than the controller?")]
    Unknown,
    /// Malformed key of a frontend.
    #[error(
        "frontend {0} of the query is malformed: it needs a family, an address of that family or none, a protocol and a port"
    )]
    Frontend(usize),
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
    let span =
        span!("switchtower.question", otel.kind = "server", switchtower.question = name(query.kind.as_ref()));
    let answered = span.in_scope(|| answer(reader, query));
    if let Err(error) = &answered {
        spans::failed(&span, error);
    }
    answered
}

fn name(kind: Option<&Kind>) -> &'static str {
    match kind {
        Some(Kind::Lookup(_)) => "lookup",
        Some(Kind::Frontends(_)) => "frontends",
        Some(Kind::Elements(_)) => "elements",
        Some(Kind::Chains(_)) => "chains",
        None => "unknown",
    }
}

fn answer(reader: &mut KernelReader, query: &Query) -> Result<Vec<u8>, QueryError> {
    let table = match query.kind.as_ref().ok_or(QueryError::Unknown)? {
        Kind::Lookup(query) => {
            validate(&query.frontends)?;
            reader.lookup(&query.frontends)
        }
        Kind::Frontends(query) => reader.frontends(limit(query.limit)),
        Kind::Elements(query) => reader.elements(&query.text, limit(query.limit)),
        Kind::Chains(_) => reader.chains(),
    };
    encode(&table.map_err(|error| QueryError::Kernel(error.to_string()))?)
}

fn limit(requested: u32) -> usize {
    match requested as usize {
        0 => DEFAULT_LIMIT,
        limit => limit.min(LIMIT),
    }
}

fn encode(table: &KernelTable) -> Result<Vec<u8>, QueryError> {
    let length = table.encoded_len();
    if length > ANSWER {
        return Err(QueryError::TooLong(length));
    }
    Ok(table.encode_to_vec())
}

/// Checks the keys of a lookup.
fn validate(frontends: &[FrontendKey]) -> Result<(), QueryError> {
    if frontends.len() > LOOKUPS {
        return Err(QueryError::TooMany(frontends.len()));
    }
    let malformed = |key: &FrontendKey| {
        let length = match key.family() {
            Family::Ipv4 => 4,
            Family::Ipv6 => 16,
            Family::Unspecified => return true,
        };
        let address = key.address.is_empty() || key.address.len() == length;
        !address || key.protocol() == Protocol::Unspecified || !(1..=65_535).contains(&key.port)
    };
    frontends.iter().position(malformed).map_or(Ok(()), |index| Err(QueryError::Frontend(index)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_keys_validated() {
        let key = |family: Family, address: &[u8], protocol: Protocol, port| FrontendKey {
            family: family.into(),
            address: address.to_vec(),
            protocol: protocol.into(),
            port,
        };
        let valid = key(Family::Ipv4, &[10, 96, 0, 10], Protocol::Tcp, 80);
        let node_port = key(Family::Ipv6, &[], Protocol::Sctp, 30_080);
        assert_eq!(validate(&[valid.clone(), node_port.clone()]), Ok(()));
        assert_eq!(validate(&[]), Ok(()));
        for wrong in [
            FrontendKey { family: Family::Ipv6.into(), ..valid.clone() },
            FrontendKey { family: Family::Unspecified.into(), ..node_port },
            FrontendKey { address: vec![10, 96, 0], ..valid.clone() },
            FrontendKey { protocol: 0, ..valid.clone() },
            FrontendKey { port: 0, ..valid.clone() },
            FrontendKey { port: 65_536, ..valid.clone() },
        ] {
            assert_eq!(validate(&[valid.clone(), wrong.clone()]), Err(QueryError::Frontend(1)), "{wrong:?}");
        }
        assert_eq!(validate(&vec![valid; 257]), Err(QueryError::TooMany(257)));
    }

    #[test]
    fn query_without_reader_fails() {
        let (reply, answered) = oneshot::channel();
        Inspector::none().ask(&Query::default(), reply);
        let error = answered.blocking_recv().unwrap().unwrap_err();
        assert_eq!(error, QueryError::Unavailable.to_string());
    }
}
