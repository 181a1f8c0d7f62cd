//! Requests that wait for the controller, across streams: each new stream repeats them.
//!
//! Invariants: an address is asked for once at a time, and further requests for it share the answer; the number of
//! addresses is bounded; a request whose client is gone is withdrawn.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use switchtower_proto::address_bytes;
use switchtower_proto::v1::{DrainAnswer, DrainCancel, DrainQuery, agent_message::Message as FromAgent};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

/// Maximum number of addresses that wait; the controller accepts twice as many.
const ADDRESSES: usize = 512;
/// Time that the controller has for its answer after the timeout.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Outcome of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The controller's answer.
    Answered(DrainAnswer),
    /// No controller answered in time, or the agent stops.
    NoController,
    /// Too many addresses wait.
    Busy,
}

#[derive(Debug)]
struct Waiting {
    address: IpAddr,
    deadline: Instant,
    replies: Vec<oneshot::Sender<Outcome>>,
}

impl Waiting {
    fn reply(self, outcome: &Outcome) {
        for reply in self.replies {
            // The client may be gone.
            let _ = reply.send(outcome.clone());
        }
    }
}

#[derive(Debug)]
enum Message {
    Query(u64),
    Cancel(u64),
}

#[derive(Debug, Default)]
struct Shared {
    last: u64,
    waiting: BTreeMap<u64, Waiting>,
    addresses: HashMap<IpAddr, u64>,
    /// Messages for the open stream.
    outbox: VecDeque<Message>,
    /// The controller of the open stream supports the drain gate.
    connected: bool,
    stopping: bool,
}

impl Shared {
    fn take(&mut self, id: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        self.addresses.remove(&waiting.address);
        Some(waiting)
    }

    fn post(&mut self, message: Message) {
        if self.connected {
            self.outbox.push_back(message);
        }
    }
}

/// Requests of all pods of the node.
#[derive(Debug, Clone, Default)]
pub struct Requests {
    shared: Arc<Mutex<Shared>>,
    posted: Arc<Notify>,
}

/// Withdraws a request whose client is gone.
struct Withdraw<'a> {
    requests: &'a Requests,
    id: u64,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        let mut shared = self.requests.lock();
        let Some(waiting) = shared.waiting.get_mut(&self.id) else { return };
        waiting.replies.retain(|reply| !reply.is_closed());
        if waiting.replies.is_empty() {
            shared.take(self.id);
            shared.post(Message::Cancel(self.id));
            self.requests.posted.notify_one();
        }
    }
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the controller's answer about an address, at most a second longer than `timeout`.
    pub async fn wait(&self, address: IpAddr, timeout: Duration) -> Outcome {
        let deadline = Instant::now() + timeout;
        let (reply, answered) = oneshot::channel();
        let id = {
            let mut shared = self.lock();
            if shared.stopping {
                return Outcome::NoController;
            }
            match shared.addresses.get(&address).copied() {
                Some(id) => {
                    if let Some(waiting) = shared.waiting.get_mut(&id) {
                        waiting.replies.push(reply);
                    }
                    id
                }
                None if shared.waiting.len() >= ADDRESSES => return Outcome::Busy,
                None => {
                    shared.last += 1;
                    let id = shared.last;
                    shared.waiting.insert(id, Waiting { address, deadline, replies: vec![reply] });
                    shared.addresses.insert(address, id);
                    shared.post(Message::Query(id));
                    id
                }
            }
        };
        self.posted.notify_one();
        // Dropped after `answered`, so that it finds the channel closed.
        let _withdraw = Withdraw { requests: self, id };
        match tokio::time::timeout_at(deadline + ANSWER_TIME, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Outcome::NoController,
        }
    }

    /// Begins a stream: repeats all requests if the controller supports them.
    pub fn connected(&self, supported: bool) -> Link {
        let mut shared = self.lock();
        shared.connected = supported;
        shared.outbox.clear();
        if supported {
            let all: Vec<u64> = shared.waiting.keys().copied().collect();
            shared.outbox.extend(all.into_iter().map(Message::Query));
        }
        drop(shared);
        Link(self.clone())
    }

    /// Ends every request, for the shutdown of the agent.
    pub fn stop(&self) {
        let mut shared = self.lock();
        shared.stopping = true;
        shared.addresses.clear();
        for (_, waiting) in std::mem::take(&mut shared.waiting) {
            waiting.reply(&Outcome::NoController);
        }
    }
}

/// The requests on an open stream; dropping it ends the stream's part.
#[derive(Debug)]
pub struct Link(Requests);

impl Link {
    /// Returns the next message for the controller; waits while there is none.
    pub async fn next(&self) -> FromAgent {
        loop {
            if let Some(message) = self.take() {
                return message;
            }
            self.0.posted.notified().await;
        }
    }

    fn take(&self) -> Option<FromAgent> {
        let mut shared = self.0.lock();
        while let Some(message) = shared.outbox.pop_front() {
            match message {
                Message::Cancel(id) => return Some(FromAgent::DrainCancel(DrainCancel { id })),
                Message::Query(id) => {
                    // It may have been withdrawn.
                    let Some(Waiting { address, deadline, .. }) = shared.waiting.get(&id) else { continue };
                    let left = deadline.saturating_duration_since(Instant::now()).as_millis();
                    let address = address_bytes(*address);
                    let timeout_milliseconds = u32::try_from(left).unwrap_or(u32::MAX);
                    return Some(FromAgent::DrainQuery(DrainQuery { id, address, timeout_milliseconds }));
                }
            }
        }
        None
    }

    /// Takes the controller's answer; ignores one that no request waits for.
    pub fn answered(&self, answer: DrainAnswer) {
        if let Some(waiting) = self.0.lock().take(answer.id) {
            waiting.reply(&Outcome::Answered(answer));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut shared = self.0.lock();
        shared.connected = false;
        shared.outbox.clear();
    }
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::DrainVerdict;

    use super::*;

    const POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 7));
    const SECOND: Duration = Duration::from_secs(1);

    fn ask(requests: &Requests, address: IpAddr) -> tokio::task::JoinHandle<Outcome> {
        let requests = requests.clone();
        tokio::spawn(async move { requests.wait(address, 10 * SECOND).await })
    }

    async fn query(link: &Link) -> DrainQuery {
        match tokio::time::timeout(SECOND, link.next()).await.unwrap() {
            FromAgent::DrainQuery(query) => query,
            other => panic!("{other:?}"),
        }
    }

    fn drained(id: u64) -> DrainAnswer {
        DrainAnswer { id, verdict: DrainVerdict::Drained as i32, ..DrainAnswer::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn request_repeated_on_each_stream_until_answered() {
        let requests = Requests::default();
        let first = ask(&requests, POD);
        let link = requests.connected(true);
        let sent = query(&link).await;
        assert_eq!((sent.address.as_slice(), sent.timeout_milliseconds), (&[10, 244, 1, 7][..], 10_000));
        drop(link);
        tokio::time::sleep(4 * SECOND).await;
        let second = ask(&requests, POD);
        tokio::time::sleep(Duration::from_millis(1)).await;
        let link = requests.connected(true);
        let again = query(&link).await;
        assert_eq!(again.id, sent.id);
        assert!((5_900..6_000).contains(&again.timeout_milliseconds), "the rest of the time");
        assert!(tokio::time::timeout(SECOND, link.next()).await.is_err(), "one query per address");
        link.answered(drained(sent.id));
        let outcome = Outcome::Answered(drained(sent.id));
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (outcome.clone(), outcome));
        link.answered(drained(sent.id));
    }

    #[tokio::test(start_paused = true)]
    async fn request_without_controller_ends_after_its_timeout() {
        let requests = Requests::default();
        let began = Instant::now();
        let link = requests.connected(false);
        assert_eq!(requests.wait(POD, 2 * SECOND).await, Outcome::NoController);
        assert_eq!(began.elapsed(), 3 * SECOND);
        assert!(link.take().is_none(), "the controller does not know the messages");
        assert!(requests.lock().waiting.is_empty() && requests.lock().addresses.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn abandoned_request_is_canceled() {
        let requests = Requests::default();
        let link = requests.connected(true);
        let request = ask(&requests, POD);
        let id = query(&link).await.id;
        request.abort();
        let _ = request.await;
        assert_eq!(link.next().await, FromAgent::DrainCancel(DrainCancel { id }));
        assert!(requests.lock().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_addresses_are_bounded_and_end_with_the_agent() {
        let requests = Requests::default();
        let address = |index: usize| IpAddr::from([10, 0, (index >> 8) as u8, index as u8]);
        let all: Vec<_> = (0..ADDRESSES).map(|index| ask(&requests, address(index))).collect();
        // Time advances once all tasks wait.
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(requests.wait(POD, SECOND).await, Outcome::Busy);
        requests.stop();
        for request in all {
            assert_eq!(request.await.unwrap(), Outcome::NoController);
        }
        assert_eq!(requests.wait(POD, SECOND).await, Outcome::NoController);
    }
}
