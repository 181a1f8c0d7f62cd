//! Answers to a controller's questions, beside the stream's own messages: a long answer holds up no update.

use std::sync::Arc;

use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::{AgentMessage, Answer, Query};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::engine::Command;
use crate::kernel::inspector::QueryError;

/// Most bytes of payload in one part.
const PART: usize = 128 << 10;

/// Answers the questions of one stream; what is not sent yet ends with it.
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

    /// Begins to answer; a second question meanwhile is refused, and so bounded to one task.
    pub(super) fn begin(&mut self, query: Query) {
        let Ok(turn) = self.turn.clone().try_acquire_owned() else {
            // A controller that keeps to the protocol never sees this, so a full queue may swallow it.
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

/// Asks the engine and sends its answer in parts. Whoever is gone meanwhile needs no answer. The turn ends before
/// the last part is sent: whoever has that may ask again.
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
    // What is left after the whole parts, possibly nothing, ends the answer.
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
