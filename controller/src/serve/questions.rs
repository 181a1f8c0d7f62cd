//! Questions about a node's kernel, asked over the agent's stream (fleet.proto: Query, Answer).
//!
//! What holds: one question at a time per node, so many per minute, and an answer of bounded length; who asks
//! waits for its turn and for the answer no longer than [`PATIENCE`]. An agent can only ever answer what was
//! asked of its own node.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use switchtower_proto::v1::{Answer, Query};
use tokio::sync::{Semaphore, oneshot};

use super::fleet::Fleet;

/// Longest time from a question to its answer, waiting for the turn included.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// Questions per second to one node, on average.
const RATE: f64 = 2.0;
/// Questions to one node at once.
const BURST: f64 = 20.0;
/// Longest answer, in bytes; as in fleet.proto.
const ANSWER: usize = 16 << 20;

/// What is asked; fleet.proto says what there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// "lookup", "frontends", ….
    pub what: &'static str,
    /// As the question has it.
    pub filter: String,
    /// Most items; 0: the agent's default.
    pub limit: u32,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// No such Node.
    #[error("there is no Node {0}, or it is left out by the controller's --node-selector")]
    UnknownNode(String),
    /// Its agent is away.
    #[error("the agent of {0} is not connected: what its kernel holds cannot be asked now")]
    NotConnected(String),
    /// Too many questions.
    #[error("{0} was asked too often in the last seconds; try again in a moment")]
    TooOften(String),
    /// The agent does not answer.
    #[error("the agent of {node} did not answer within {seconds} s", node = .0, seconds = PATIENCE.as_secs())]
    TimedOut(String),
    /// The stream ended meanwhile.
    #[error("the stream of {0} ended before it answered")]
    Ended(String),
    /// The answer is longer than agreed.
    #[error("the answer of {0} is longer than {ANSWER} bytes")]
    TooLong(String),
    /// What the agent says.
    #[error("the agent of {node} says: {text}")]
    Agent {
        /// The node.
        node: String,
        /// Its words.
        text: String,
    },
}

/// What became of a question, without the node's name.
#[derive(Debug)]
enum Failure {
    TooLong,
    Agent(String),
}

type Outcome = Result<Vec<u8>, Failure>;

/// Where questions to one stream lie until it takes them.
#[derive(Debug)]
pub(super) struct Desk {
    turn: Semaphore,
    allowance: Mutex<(f64, Instant)>,
    waiting: Mutex<Option<(Question, oneshot::Sender<Outcome>)>>,
}

impl Default for Desk {
    fn default() -> Self {
        Self {
            turn: Semaphore::new(1),
            allowance: Mutex::new((BURST, Instant::now())),
            waiting: Mutex::default(),
        }
    }
}

impl Desk {
    fn allowed(&self, now: Instant) -> bool {
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        let refilled = allowance.0 + now.duration_since(allowance.1).as_secs_f64() * RATE;
        *allowance = (refilled.min(BURST), now);
        if allowance.0 < 1.0 {
            return false;
        }
        allowance.0 -= 1.0;
        true
    }

    fn put(&self, question: Question) -> oneshot::Receiver<Outcome> {
        let (answer, answered) = oneshot::channel();
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some((question, answer));
        answered
    }

    fn take(&self) -> Option<(Question, oneshot::Sender<Outcome>)> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Fleet {
    /// Asks a node's agent.
    ///
    /// # Errors
    /// It is not connected, or does not answer.
    pub async fn ask(self: &Arc<Self>, node: &str, question: Question) -> Result<Vec<u8>, QuestionError> {
        if !self.knows(node) {
            return Err(QuestionError::UnknownNode(node.to_owned()));
        }
        let signal = self.signal(node).ok_or_else(|| QuestionError::NotConnected(node.to_owned()))?;
        let asked = async {
            let _turn =
                signal.desk.turn.acquire().await.map_err(|_| QuestionError::Ended(node.to_owned()))?;
            if !signal.desk.allowed(Instant::now()) {
                return Err(QuestionError::TooOften(node.to_owned()));
            }
            let answered = signal.desk.put(question);
            signal.notify.notify_one();
            match answered.await {
                Ok(Ok(payload)) => Ok(payload),
                Ok(Err(Failure::TooLong)) => Err(QuestionError::TooLong(node.to_owned())),
                Ok(Err(Failure::Agent(text))) => Err(QuestionError::Agent { node: node.to_owned(), text }),
                Err(_) => Err(QuestionError::Ended(node.to_owned())),
            }
        };
        let ended = async {
            // A stream that ends leaves its desk behind: nobody would take the question.
            while self.signal(node).is_some_and(|now| Arc::ptr_eq(&now, &signal)) {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(QuestionError::Ended(node.to_owned()))
        };
        let answer = async {
            tokio::select! {
                answer = asked => answer,
                ended = ended => ended,
            }
        };
        let late = || QuestionError::TimedOut(node.to_owned());
        tokio::time::timeout(PATIENCE, answer).await.map_err(|_| late())?
    }
}

/// The question that a stream's agent is answering.
#[derive(Debug, Default)]
pub(super) struct Asking {
    number: u64,
    running: Option<(oneshot::Sender<Outcome>, Vec<u8>)>,
}

impl Asking {
    /// The next question for the agent, if the one before is answered or nobody waits for it any more.
    pub(super) fn next(&mut self, desk: &Desk) -> Option<Query> {
        if self.running.as_ref().is_some_and(|(answer, _)| !answer.is_closed()) {
            return None;
        }
        let (Question { what, filter, limit }, answer) = desk.take()?;
        self.number += 1;
        self.running = Some((answer, Vec::new()));
        Some(Query { id: self.number, what: what.to_owned(), filter, limit })
    }

    /// Takes a part of the answer. What was not asked, or is not waited for any more, is passed over.
    pub(super) fn take(&mut self, part: Answer) {
        if part.id != self.number {
            return;
        }
        let Some((answer, mut payload)) = self.running.take() else { return };
        let outcome = if !part.error.is_empty() {
            Err(Failure::Agent(part.error.chars().take(512).collect()))
        } else if payload.len() + part.part.len() > ANSWER {
            Err(Failure::TooLong)
        } else {
            payload.extend(part.part);
            if !part.last {
                self.running = Some((answer, payload));
                return;
            }
            Ok(payload)
        };
        // Who asked may have given up.
        let _ = answer.send(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        Question { what: "lookup", filter: "10.96.0.1:80/TCP".to_owned(), limit: 0 }
    }

    fn part(id: u64, part: &[u8], last: bool) -> Answer {
        Answer { id, part: part.to_vec(), last, error: String::new() }
    }

    #[test]
    fn parts_are_joined_and_strangers_passed_over() {
        let (desk, mut asking) = (Desk::default(), Asking::default());
        assert_eq!(asking.next(&desk), None);
        let mut answered = desk.put(question());
        let query = asking.next(&desk).unwrap();
        assert_eq!((query.id, query.what.as_str(), query.limit), (1, "lookup", 0));
        asking.take(part(7, b"not asked", true));
        asking.take(part(1, b"one ", false));
        assert!(asking.next(&desk).is_none());
        asking.take(part(1, b"answer", true));
        assert_eq!(answered.try_recv().unwrap().unwrap(), b"one answer");
        asking.take(part(1, b"twice", true));
    }

    #[test]
    fn an_answer_that_nobody_waits_for_makes_room() {
        let (desk, mut asking) = (Desk::default(), Asking::default());
        drop(desk.put(question()));
        assert_eq!(asking.next(&desk).unwrap().id, 1);
        let mut answered = desk.put(question());
        assert_eq!(asking.next(&desk).unwrap().id, 2);
        asking.take(part(1, b"late", true));
        asking.take(Answer { id: 2, error: "no".to_owned(), ..Answer::default() });
        assert!(matches!(answered.try_recv().unwrap(), Err(Failure::Agent(text)) if text == "no"));
    }

    #[test]
    fn answers_have_a_bound() {
        let (desk, mut asking) = (Desk::default(), Asking::default());
        let mut answered = desk.put(question());
        asking.next(&desk).unwrap();
        asking.take(part(1, &vec![0; ANSWER], false));
        asking.take(part(1, b"x", true));
        assert!(matches!(answered.try_recv().unwrap(), Err(Failure::TooLong)));
    }

    #[test]
    fn a_node_is_not_asked_too_often() {
        let (desk, now) = (Desk::default(), Instant::now());
        let asked = (0..100).filter(|_| desk.allowed(now)).count();
        assert_eq!(asked, BURST as usize);
        assert!(desk.allowed(now + Duration::from_secs(1)));
    }
}
