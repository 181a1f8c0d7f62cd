//! Requests that wait for the controller, across streams: each new stream repeats them.
//!
//! Invariants: a pod is asked for once at a time, and further requests for it share the answer; the number of pods and
//! the rate of messages are bounded; a request whose client is gone is withdrawn.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use switchtower_proto::address_bytes;
use switchtower_proto::v1::{
    self, DrainAnswer, DrainCancel, DrainQuery, agent_message::Message as FromAgent,
};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::pace::Pace;
use super::{Pod, PodName};

/// Maximum number of pods that wait; the controller accepts twice as many.
const PODS: usize = 512;
/// Time that the controller has for its answer after the timeout.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Outcome of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum GateAnswer {
    /// The controller's answer.
    Answered(DrainAnswer),
    /// No controller answered in time, or the agent stops.
    NoController,
    /// Too many pods wait.
    Busy,
}

#[derive(Debug)]
struct Waiting {
    pod: Pod,
    deadline: Instant,
    replies: Vec<oneshot::Sender<GateAnswer>>,
}

impl Waiting {
    fn reply(self, outcome: &GateAnswer) {
        for reply in self.replies {
            // The client may be gone.
            let _ = reply.send(outcome.clone());
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    last: u64,
    waiting: BTreeMap<u64, Waiting>,
    pods: HashMap<Pod, u64>,
    /// Queries that the open stream has not sent, in order. Requests that are withdrawn leave it.
    unsent: BTreeSet<u64>,
    /// Queries to cancel on the open stream: at most as many as were sent.
    canceled: VecDeque<u64>,
    /// The controller of the open stream supports the drain gate.
    connected: bool,
    stopping: bool,
}

impl Shared {
    fn take(&mut self, id: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        self.pods.remove(&waiting.pod);
        Some(waiting)
    }

    fn withdraw(&mut self, id: u64) {
        self.take(id);
        if !self.unsent.remove(&id) && self.connected {
            self.canceled.push_back(id);
        }
    }

    fn next(&mut self) -> Option<FromAgent> {
        if let Some(id) = self.canceled.pop_front() {
            return Some(FromAgent::DrainCancel(DrainCancel { id }));
        }
        loop {
            let id = self.unsent.pop_first()?;
            let Some(Waiting { pod, deadline, .. }) = self.waiting.get(&id) else { continue };
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            return Some(FromAgent::DrainQuery(DrainQuery {
                id,
                address: address_bytes(pod.address()),
                timeout_milliseconds: u32::try_from(left).unwrap_or(u32::MAX),
                host_pod: match pod {
                    Pod::Address(_) => None,
                    Pod::Host { name: PodName { namespace, name }, .. } => {
                        Some(v1::PodName { namespace: namespace.clone(), name: name.clone() })
                    }
                },
            }));
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
            shared.withdraw(self.id);
            self.requests.posted.notify_one();
        }
    }
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the controller's answer about a pod, at most a second longer than `timeout`.
    pub(crate) async fn wait(&self, pod: &Pod, timeout: Duration) -> GateAnswer {
        let deadline = Instant::now() + timeout;
        let (reply, answered) = oneshot::channel();
        let id = {
            let mut shared = self.lock();
            if shared.stopping {
                return GateAnswer::NoController;
            }
            match shared.pods.get(pod).copied() {
                Some(id) => {
                    if let Some(waiting) = shared.waiting.get_mut(&id) {
                        waiting.replies.push(reply);
                    }
                    id
                }
                None if shared.waiting.len() >= PODS => return GateAnswer::Busy,
                None => {
                    shared.last += 1;
                    let id = shared.last;
                    shared.waiting.insert(id, Waiting { pod: pod.clone(), deadline, replies: vec![reply] });
                    shared.pods.insert(pod.clone(), id);
                    if shared.connected {
                        shared.unsent.insert(id);
                    }
                    id
                }
            }
        };
        self.posted.notify_one();
        // Dropped after `answered`, so that it finds the channel closed.
        let _withdraw = Withdraw { requests: self, id };
        match tokio::time::timeout_at(deadline + ANSWER_TIME, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => GateAnswer::NoController,
        }
    }

    /// Begins a stream: repeats all requests if the controller supports them.
    pub(crate) fn connected(&self, supported: bool) -> Link {
        let mut shared = self.lock();
        shared.connected = supported;
        shared.canceled.clear();
        shared.unsent = if supported { shared.waiting.keys().copied().collect() } else { BTreeSet::new() };
        drop(shared);
        Link { requests: self.clone(), pace: Mutex::new(Pace::new()) }
    }

    /// Ends every request, for the shutdown of the agent.
    pub(crate) fn stop(&self) {
        let mut shared = self.lock();
        shared.stopping = true;
        shared.pods.clear();
        for (_, waiting) in std::mem::take(&mut shared.waiting) {
            waiting.reply(&GateAnswer::NoController);
        }
    }
}

/// The requests on an open stream; dropping it ends the stream's part.
#[derive(Debug)]
pub(crate) struct Link {
    requests: Requests,
    pace: Mutex<Pace>,
}

impl Link {
    /// Returns the next message for the controller; waits while there is none, or too many were sent.
    pub(crate) async fn next(&self) -> FromAgent {
        loop {
            let posted = self.requests.posted.notified();
            match self.take() {
                Ok(Some(message)) => return message,
                Ok(None) => posted.await,
                Err(pause) => tokio::time::sleep(pause).await,
            }
        }
    }

    fn take(&self) -> Result<Option<FromAgent>, Duration> {
        let mut shared = self.requests.lock();
        if shared.unsent.is_empty() && shared.canceled.is_empty() {
            return Ok(None);
        }
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Ok(shared.next())
    }

    /// Takes the controller's answer; ignores one that no request waits for.
    pub(crate) fn answered(&self, answer: DrainAnswer) {
        let mut shared = self.requests.lock();
        let Some(waiting) = shared.take(answer.id) else { return };
        shared.unsent.remove(&answer.id);
        drop(shared);
        waiting.reply(&GateAnswer::Answered(answer));
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut shared = self.requests.lock();
        shared.connected = false;
        shared.unsent.clear();
        shared.canceled.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use switchtower_proto::v1::DrainVerdict;

    use super::*;

    const POD: Pod = Pod::Address(IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 7)));
    const SECOND: Duration = Duration::from_secs(1);

    fn ask(requests: &Requests, pod: Pod) -> tokio::task::JoinHandle<GateAnswer> {
        let requests = requests.clone();
        tokio::spawn(async move { requests.wait(&pod, 10 * SECOND).await })
    }

    fn numbered(index: usize) -> Pod {
        Pod::Address(IpAddr::from([10, 0, (index >> 8) as u8, index as u8]))
    }

    fn host_pod(name: &str) -> Pod {
        let name = PodName { namespace: "default".into(), name: name.into() };
        Pod::Host { address: IpAddr::from([192, 0, 2, 1]), name }
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
        let outcome = GateAnswer::Answered(drained(sent.id));
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (outcome.clone(), outcome));
        link.answered(drained(sent.id));
    }

    #[tokio::test(start_paused = true)]
    async fn request_without_controller_ends_after_its_timeout() {
        let requests = Requests::default();
        let began = Instant::now();
        let link = requests.connected(false);
        assert_eq!(requests.wait(&POD, 2 * SECOND).await, GateAnswer::NoController);
        assert_eq!(began.elapsed(), 3 * SECOND);
        assert_eq!(link.take(), Ok(None), "the controller does not know the messages");
        assert!(requests.lock().waiting.is_empty() && requests.lock().pods.is_empty());
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
    async fn waiting_pods_are_bounded_and_end_with_the_agent() {
        let requests = Requests::default();
        let all: Vec<_> = (0..PODS).map(|index| ask(&requests, numbered(index))).collect();
        // Time advances once all tasks wait.
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(requests.wait(&POD, SECOND).await, GateAnswer::Busy);
        requests.stop();
        for request in all {
            assert_eq!(request.await.unwrap(), GateAnswer::NoController);
        }
        assert_eq!(requests.wait(&POD, SECOND).await, GateAnswer::NoController);
    }

    #[tokio::test(start_paused = true)]
    async fn host_network_pods_are_asked_for_one_by_one() {
        let requests = Requests::default();
        let link = requests.connected(true);
        let (first, second) = (ask(&requests, host_pod("a")), ask(&requests, host_pod("b")));
        let (a, b) = (query(&link).await, query(&link).await);
        assert_eq!((&a.address, &a.address), (&vec![192, 0, 2, 1], &b.address));
        assert_eq!(a.host_pod.unwrap(), v1::PodName { namespace: "default".into(), name: "a".into() });
        link.answered(drained(b.id));
        assert_eq!(second.await.unwrap(), GateAnswer::Answered(drained(b.id)));
        assert!(!first.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn all_waiting_pods_survive_a_lost_controller() {
        let requests = Requests::default();
        let all: Vec<_> = (0..500).map(|index| ask(&requests, numbered(index))).collect();
        for _ in 0..2 {
            let link = requests.connected(true);
            let began = Instant::now();
            for _ in 0..500 {
                query(&link).await;
            }
            assert_eq!(began.elapsed(), Duration::ZERO, "the next controller has all of them at once");
        }
        let link = requests.connected(true);
        for _ in 0..500 {
            let query = query(&link).await;
            link.answered(drained(query.id));
        }
        for (request, id) in all.into_iter().zip(1..) {
            assert_eq!(request.await.unwrap(), GateAnswer::Answered(drained(id)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn flood_of_requests_sends_few_messages() {
        let requests = Requests::default();
        let link = requests.connected(true);
        let began = Instant::now();
        let flood = tokio::spawn({
            let requests = requests.clone();
            async move {
                for index in 0..50_000 {
                    // The client leaves at once.
                    let _ = tokio::time::timeout(
                        Duration::from_millis(1),
                        requests.wait(&numbered(index), SECOND),
                    )
                    .await;
                }
            }
        });
        let mut messages = 0_u32;
        while !flood.is_finished() {
            let _ = tokio::time::timeout(SECOND, link.next()).await.map(|_| messages += 1);
        }
        let seconds = began.elapsed().as_secs() as u32;
        assert!(messages <= 600 + 50 * (seconds + 2), "{messages} in {seconds} s");
        let shared = requests.lock();
        assert_eq!((shared.waiting.len(), shared.unsent.len()), (0, 0));
        assert!(shared.canceled.len() <= 1, "{:?}", shared.canceled);
    }
}
