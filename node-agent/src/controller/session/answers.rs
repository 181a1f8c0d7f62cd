//! Answers to a controller's queries, in a separate task: a long answer does not delay updates.

use std::sync::Arc;

use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::{AgentMessage, Answer, Query};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::engine::Command;
use crate::kernel::inspector::QueryError;

/// Maximum payload of one part in bytes.
const PART: usize = 128 << 10;

/// Answers the queries of one stream; dropping it cancels a running answer.
pub(super) struct Answers {
    commands: mpsc::Sender<Command>,
    out: mpsc::Sender<AgentMessage>,
    turn: Arc<Semaphore>,
    running: Option<JoinHandle<()>>,
}

impl Answers {
    pub(super) fn new(commands: mpsc::Sender<Command>, out: mpsc::Sender<AgentMessage>) -> Self {
        Answers { commands, out, turn: Arc::new(Semaphore::new(1)), running: None }
    }

    /// Starts an answer; refuses a second concurrent query, so there is at most one task.
    pub(super) fn begin(&mut self, query: Query) {
        let Ok(turn) = self.turn.clone().try_acquire_owned() else {
            // Only a controller that violates the protocol gets this, so a full queue may drop it.
            let refusal = part(query.id, Vec::new(), true, QueryError::Busy.to_string());
            let _ = self.out.try_send(refusal);
            return;
        };
        self.running = Some(tokio::spawn(answer(self.commands.clone(), self.out.clone(), query, turn)));
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

fn part(id: u64, part: Vec<u8>, last: bool, error: String) -> AgentMessage {
    AgentMessage { message: Some(FromAgent::Answer(Answer { id, part, last, error })) }
}

/// Queries the engine and sends its answer in parts. Releases the permit before sending the last part: a controller
/// that has it may send the next query.
async fn answer(
    commands: mpsc::Sender<Command>,
    out: mpsc::Sender<AgentMessage>,
    query: Query,
    turn: OwnedSemaphorePermit,
) {
    let id = query.id;
    let (reply, answered) = oneshot::channel();
    if commands.send(Command::Ask { query, answer: reply }).await.is_err() {
        return;
    }
    let (payload, error) = match answered.await {
        Ok(Ok(payload)) => (payload, String::new()),
        Ok(Err(error)) => (Vec::new(), error),
        Err(_) => return,
    };
    // The remainder, possibly empty, is the last part.
    let parts = payload.chunks_exact(PART);
    let rest = parts.remainder();
    for bytes in parts {
        if out.send(part(id, bytes.to_vec(), false, String::new())).await.is_err() {
            return;
        }
    }
    drop(turn);
    // The stream may have ended.
    let _ = out.send(part(id, rest.to_vec(), true, error)).await;
}
