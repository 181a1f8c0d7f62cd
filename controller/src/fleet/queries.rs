//! Queries about a node's kernel, sent over the agent's stream (fleet.proto: Query, Answer).
//!
//! Invariants: one query at a time per node, at a limited rate, with an answer of limited length. A caller waits at
//! most [`QUERY_TIMEOUT`], including the wait for its turn. An agent can only answer queries about its own node.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use switchtower_proto::v1::query::Kind;
use switchtower_proto::v1::{Answer, Query};
use tokio::sync::{Semaphore, oneshot};

use super::Fleet;
use crate::sync::lock;
use crate::token_bucket::{Rate, TokenBucket};

/// Timeout of a query, including the wait for its turn.
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(15);
/// Maximum rate of queries to one node.
const RATE: Rate = Rate { per_second: 2.0, burst: 20.0 };
/// Maximum length of an answer in bytes, as in fleet.proto.
const ANSWER: usize = 16 << 20;

/// Reason for a missing answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// No such Node.
    #[error("Node {0} does not exist or does not match the controller's --node-selector")]
    UnknownNode(String),
    /// The agent is not connected.
    #[error("the agent of {0} is not connected, so its kernel cannot be queried")]
    NotConnected(String),
    /// The rate limit is exceeded.
    #[error("too many queries to {0}; retry in a few seconds")]
    TooOften(String),
    /// The agent did not answer in time.
    #[error("the agent of {node} did not answer within {seconds} s", node = .0, seconds = QUERY_TIMEOUT.as_secs())]
    TimedOut(String),
    /// The stream ended first.
    #[error("the stream of {0} ended before it answered")]
    Ended(String),
    /// The answer is too long.
    #[error("the answer of {0} is longer than {ANSWER} bytes")]
    TooLong(String),
    /// The agent reported an error.
    #[error("the agent of {node} reported: {text}")]
    Agent {
        /// The node.
        node: String,
        /// The agent's message.
        text: String,
    },
}

/// Error of a query, without the node's name.
#[derive(Debug)]
enum AnswerError {
    TooLong,
    Agent(String),
}

type AnswerResult = Result<Vec<u8>, AnswerError>;

/// Queries that wait for the stream of one node.
#[derive(Debug)]
pub(crate) struct QueryQueue {
    turn: Semaphore,
    allowance: Mutex<TokenBucket>,
    waiting: Mutex<Option<(Kind, oneshot::Sender<AnswerResult>)>>,
}

impl Default for QueryQueue {
    fn default() -> Self {
        Self {
            turn: Semaphore::new(1),
            allowance: Mutex::new(TokenBucket::new(RATE, Instant::now())),
            waiting: Mutex::default(),
        }
    }
}

impl QueryQueue {
    fn allowed(&self, now: Instant) -> bool {
        lock(&self.allowance).take(now)
    }

    fn put(&self, query: Kind) -> oneshot::Receiver<AnswerResult> {
        let (answer, answered) = oneshot::channel();
        *lock(&self.waiting) = Some((query, answer));
        answered
    }

    fn take(&self) -> Option<(Kind, oneshot::Sender<AnswerResult>)> {
        lock(&self.waiting).take()
    }
}

impl Fleet {
    /// Sends a query to a node's agent and returns the answer.
    ///
    /// # Errors
    /// The agent is not connected, or does not answer.
    pub async fn ask(self: &Arc<Self>, node: &str, query: Kind) -> Result<Vec<u8>, QueryError> {
        if !self.knows(node) {
            return Err(QueryError::UnknownNode(node.to_owned()));
        }
        let signal = self.signal(node).ok_or_else(|| QueryError::NotConnected(node.to_owned()))?;
        let asked = async {
            let _turn =
                signal.queries.turn.acquire().await.map_err(|_| QueryError::Ended(node.to_owned()))?;
            if !signal.queries.allowed(Instant::now()) {
                return Err(QueryError::TooOften(node.to_owned()));
            }
            let answered = signal.queries.put(query);
            signal.notify.notify_one();
            match answered.await {
                Ok(Ok(payload)) => Ok(payload),
                Ok(Err(AnswerError::TooLong)) => Err(QueryError::TooLong(node.to_owned())),
                Ok(Err(AnswerError::Agent(text))) => Err(QueryError::Agent { node: node.to_owned(), text }),
                Err(_) => Err(QueryError::Ended(node.to_owned())),
            }
        };
        let ended = async {
            // A stream that ends leaves its queue behind, and no other stream takes the query.
            while self.signal(node).is_some_and(|now| Arc::ptr_eq(&now, &signal)) {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(QueryError::Ended(node.to_owned()))
        };
        let answer = async {
            tokio::select! {
                answer = asked => answer,
                ended = ended => ended,
            }
        };
        let late = || QueryError::TimedOut(node.to_owned());
        tokio::time::timeout(QUERY_TIMEOUT, answer).await.map_err(|_| late())?
    }
}

/// The query that an agent is answering.
#[derive(Debug, Default)]
pub(crate) struct PendingQuery {
    number: u64,
    running: Option<(oneshot::Sender<AnswerResult>, Vec<u8>)>,
}

impl PendingQuery {
    /// Returns the next query for the agent if the previous one is answered or its caller gave up.
    pub(crate) fn next(&mut self, queue: &QueryQueue) -> Option<Query> {
        if self.running.as_ref().is_some_and(|(answer, _)| !answer.is_closed()) {
            return None;
        }
        let (kind, answer) = queue.take()?;
        self.number += 1;
        self.running = Some((answer, Vec::new()));
        Some(Query { id: self.number, kind: Some(kind) })
    }

    /// Takes a part of the answer. Ignores answers to other queries and answers that no caller waits for.
    pub(crate) fn take(&mut self, part: Answer) {
        if part.id != self.number {
            return;
        }
        let Some((answer, mut payload)) = self.running.take() else { return };
        let outcome = if !part.error.is_empty() {
            Err(AnswerError::Agent(part.error.chars().take(512).collect()))
        } else if payload.len() + part.part.len() > ANSWER {
            Err(AnswerError::TooLong)
        } else {
            payload.extend(part.part);
            if !part.last {
                self.running = Some((answer, payload));
                return;
            }
            Ok(payload)
        };
        // The caller may have given up.
        let _ = answer.send(outcome);
    }
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::FrontendsQuery;

    use super::*;

    fn query() -> Kind {
        Kind::Frontends(FrontendsQuery { limit: 3 })
    }

    fn part(id: u64, part: &[u8], last: bool) -> Answer {
        Answer { id, part: part.to_vec(), last, error: String::new() }
    }

    #[test]
    fn answer_parts_are_joined_and_unknown_ids_ignored() {
        let (queue, mut pending) = (QueryQueue::default(), PendingQuery::default());
        assert_eq!(pending.next(&queue), None);
        let mut answered = queue.put(query());
        let query = pending.next(&queue).unwrap();
        assert_eq!(query, Query { id: 1, kind: Some(self::query()) });
        pending.take(part(7, b"not asked", true));
        pending.take(part(1, b"one ", false));
        assert!(pending.next(&queue).is_none());
        pending.take(part(1, b"answer", true));
        assert_eq!(answered.try_recv().unwrap().unwrap(), b"one answer");
        pending.take(part(1, b"twice", true));
    }

    #[test]
    fn abandoned_query_makes_room_for_the_next() {
        let (queue, mut pending) = (QueryQueue::default(), PendingQuery::default());
        drop(queue.put(query()));
        assert_eq!(pending.next(&queue).unwrap().id, 1);
        let mut answered = queue.put(query());
        assert_eq!(pending.next(&queue).unwrap().id, 2);
        pending.take(part(1, b"late", true));
        pending.take(Answer { id: 2, error: "no".to_owned(), ..Answer::default() });
        assert!(matches!(answered.try_recv().unwrap(), Err(AnswerError::Agent(text)) if text == "no"));
    }

    #[test]
    fn answer_length_is_limited() {
        let (queue, mut pending) = (QueryQueue::default(), PendingQuery::default());
        let mut answered = queue.put(query());
        pending.next(&queue).unwrap();
        pending.take(part(1, &vec![0; ANSWER], false));
        pending.take(part(1, b"x", true));
        assert!(matches!(answered.try_recv().unwrap(), Err(AnswerError::TooLong)));
    }
}
