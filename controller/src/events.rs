//! Events about objects with problems.
//!
//! Publishing costs up to two requests, so it has a bounded queue and a rate limit. Events that do not fit are counted
//! and dropped; nothing waits for them.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use prometheus::{IntCounterVec, Opts, Registry};
use switchtower_core::compiled::{PodIdentity, Problem, ProblemObject, ProblemReason};
use tokio::sync::mpsc;

use crate::lease::{Fence, Turns};

/// Capacity of the queue.
const QUEUE: usize = 1_000;
/// Minimum interval between Events: ten per second.
const INTERVAL: Duration = Duration::from_millis(100);
/// Interval after which an unchanged problem is published again.
const REPEAT: Duration = Duration::from_secs(3_600);
/// Timeout of one Event.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum number of known problems, for the detection of repetitions.
const REMEMBERED: usize = 10_000;
/// Maximum length of an Event's note in the API, in bytes.
const NOTE_BYTES: usize = 1_024;

/// Time for which a replica that is not the leader keeps problems of compiled objects: the leader may end before it has
/// published its own.
const HELD: Duration = Duration::from_secs(60);

/// Replica that publishes a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Publisher {
    /// Every replica finds the problem; the leader publishes it.
    Leader,
    /// An agent reported the problem to this replica only.
    This,
}

/// Sender of problems. Never blocks.
#[derive(Debug, Clone)]
pub struct EventSink {
    queue: mpsc::Sender<(Publisher, Problem)>,
    outcomes: IntCounterVec,
}

impl EventSink {
    /// Queues into a channel of a test.
    #[cfg(test)]
    pub(crate) fn to(queue: mpsc::Sender<(Publisher, Problem)>) -> Self {
        let outcomes = IntCounterVec::new(Opts::new("events", "Events."), &["outcome"]).unwrap();
        Self { queue, outcomes }
    }

    /// Queues problems of compiled objects. Counts and drops those that do not fit.
    pub fn report(&self, problems: impl IntoIterator<Item = Problem>) {
        problems.into_iter().for_each(|problem| self.queue(Publisher::Leader, problem));
    }

    /// Queues a problem that an agent reported.
    pub fn report_of_agent(&self, problem: Problem) {
        self.queue(Publisher::This, problem);
    }

    fn queue(&self, publisher: Publisher, problem: Problem) {
        if self.queue.try_send((publisher, problem)).is_err() {
            self.outcomes.with_label_values(&["dropped"]).inc();
        }
    }
}

/// Creates the queue and the task that publishes its problems. `client` must not be fenced.
///
/// # Errors
/// The name of the counter is already registered.
pub fn publisher(
    client: Client,
    replica: &str,
    fence: Fence,
    registry: &Registry,
) -> Result<(EventSink, impl Future<Output = ()> + use<>), prometheus::Error> {
    let outcomes = IntCounterVec::new(
        Opts::new("switchtower_events_total", "Kubernetes Events about objects, by outcome."),
        &["outcome"],
    )?;
    registry.register(Box::new(outcomes.clone()))?;
    let (queue, problems) = mpsc::channel(QUEUE);
    let reporter = Reporter { controller: "switchtower-controller".into(), instance: Some(replica.into()) };
    let recorder = Recorder::new(client.clone(), reporter);
    let task = publish(client, recorder, Queue::new(problems, fence), outcomes.clone());
    Ok((EventSink { queue, outcomes }, task))
}

/// Problems in the order of publication. Those of the leader wait until this replica is the leader, at most for [`HELD`].
struct Queue {
    problems: mpsc::Receiver<(Publisher, Problem)>,
    fence: Fence,
    turns: Turns,
    held: VecDeque<(tokio::time::Instant, Problem)>,
}

impl Queue {
    fn new(problems: mpsc::Receiver<(Publisher, Problem)>, fence: Fence) -> Self {
        Self { problems, turns: fence.turns(), fence, held: VecDeque::new() }
    }

    /// Returns the next problem to publish; `None` when all senders are dropped.
    async fn next(&mut self) -> Option<Problem> {
        loop {
            while self.held.front().is_some_and(|(since, _)| since.elapsed() > HELD) {
                self.held.pop_front();
            }
            if self.fence.is_open()
                && let Some((_, problem)) = self.held.pop_front()
            {
                return Some(problem);
            }
            tokio::select! {
                received = self.problems.recv() => match received? {
                    (Publisher::Leader, problem) if !self.fence.is_open() => {
                        if self.held.len() == QUEUE {
                            self.held.pop_front();
                        }
                        self.held.push_back((tokio::time::Instant::now(), problem));
                    }
                    (_, problem) => return Some(problem),
                },
                () = self.turns.changed() => {}
            }
        }
    }
}

async fn publish(client: Client, recorder: Recorder, mut queue: Queue, outcomes: IntCounterVec) {
    let mut known = Known::default();
    while let Some(problem) = queue.next().await {
        if !known.is_new(&problem, Instant::now()) {
            outcomes.with_label_values(&["repeated"]).inc();
            continue;
        }
        log(&problem);
        let published = tokio::time::timeout(TIMEOUT, publish_one(&client, &recorder, &problem)).await;
        let outcome = match published {
            Ok(Ok(Published::Yes)) => "published",
            Ok(Ok(Published::ObjectGone)) => "gone",
            Ok(Err(error)) => {
                tracing::debug!(%error, "failed to publish an Event; its text is in the log");
                "failed"
            }
            Err(_) => {
                tracing::debug!("publishing an Event timed out; its text is in the log");
                "failed"
            }
        };
        outcomes.with_label_values(&[outcome]).inc();
        tokio::time::sleep(INTERVAL).await;
    }
}

fn log(problem: &Problem) {
    let Problem { object, reason, message } = problem;
    match object {
        ProblemObject::Service(key) => {
            tracing::warn!(kind = "Service", namespace = %key.namespace, name = %key.name, ?reason, message, "object has a problem");
        }
        ProblemObject::EndpointSlice(key) => {
            tracing::warn!(kind = "EndpointSlice", namespace = %key.namespace, name = %key.name, ?reason, message, "object has a problem");
        }
        ProblemObject::Node(name) => {
            tracing::warn!(kind = "Node", name, ?reason, message, "object has a problem");
        }
        ProblemObject::Pod { node, pod } => {
            tracing::warn!(kind = "Pod", %node, %pod, ?reason, message, "object has a problem");
        }
    }
}

/// Result of publishing an Event.
enum Published {
    Yes,
    /// The object of the Event does not exist any more.
    ObjectGone,
}

/// Publishes one Event. Reads the UID of its object first, without which `kubectl describe` does not find the Event:
/// problems are rare, so keeping the UIDs of all objects is not worth the memory.
async fn publish_one(
    client: &Client,
    recorder: &Recorder,
    problem: &Problem,
) -> Result<Published, kube::Error> {
    let reference = match &problem.object {
        ProblemObject::Service(key) => {
            reference(&Api::<Service>::namespaced(client.clone(), &key.namespace), &key.name).await?
        }
        ProblemObject::EndpointSlice(key) => {
            reference(&Api::<EndpointSlice>::namespaced(client.clone(), &key.namespace), &key.name).await?
        }
        ProblemObject::Node(name) => reference(&Api::<Node>::all(client.clone()), name).await?,
        ProblemObject::Pod { node, pod } => pod_reference(client, node, pod).await?,
    };
    let Some(reference) = reference else { return Ok(Published::ObjectGone) };
    let event = Event {
        type_: EventType::Warning,
        reason: reason(problem.reason).to_owned(),
        note: Some(shorten(&problem.message, NOTE_BYTES)),
        action: action(problem.reason).to_owned(),
        secondary: None,
    };
    recorder.publish(&event, &reference).await?;
    Ok(Published::Yes)
}

async fn reference<K>(api: &Api<K>, name: &str) -> Result<Option<ObjectReference>, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let found = api.get_metadata_opt(name).await?;
    Ok(found.map(|object| object_reference::<K>(object.metadata)))
}

fn object_reference<K: Resource<DynamicType = ()>>(metadata: ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        ..ObjectReference::default()
    }
}

/// Finds a pod. Its node must be the one whose agent reported it: an agent cannot cause Events about other nodes' pods.
async fn pod_reference(
    client: &Client,
    node: &str,
    pod: &PodIdentity,
) -> Result<Option<ObjectReference>, kube::Error> {
    let (api, selector) = match pod {
        PodIdentity::Address(address) => (Api::<Pod>::all(client.clone()), format!("status.podIP={address}")),
        PodIdentity::HostNetwork(key) => {
            (Api::<Pod>::namespaced(client.clone(), &key.namespace), format!("metadata.name={}", key.name))
        }
    };
    // The API server's cache has an index of pods by node. Pods that have ended may have the address of a running one.
    let selector = format!("spec.nodeName={node},status.phase=Running,{selector}");
    let found = ListParams::default().match_any().fields(&selector);
    let pods = api.list_metadata(&found).await?.items;
    let only = <[_; 1]>::try_from(pods).ok();
    Ok(only.map(|[pod]| object_reference::<Pod>(pod.metadata)))
}

fn reason(reason: ProblemReason) -> &'static str {
    match reason {
        ProblemReason::AddressConflict => "AddressConflict",
        ProblemReason::ControlPlaneAddress => "ControlPlaneAddress",
        ProblemReason::DuplicatePort => "DuplicatePort",
        ProblemReason::InvalidAddress => "InvalidAddress",
        ProblemReason::InvalidPort => "InvalidPort",
        ProblemReason::IncompleteNode => "IncompleteNode",
        ProblemReason::PodsOutside => "PodsOutside",
        ProblemReason::LimitExceeded => "LimitExceeded",
        ProblemReason::FailedToStartServiceHealthcheck => "FailedToStartServiceHealthcheck",
        ProblemReason::DrainGateTimedOut => "DrainGateTimedOut",
        ProblemReason::DrainGateLastEndpoint => "DrainGateLastEndpoint",
        ProblemReason::DeletionsHeld => "DeletionsHeld",
    }
}

/// Returns the action of the Event.
fn action(reason: ProblemReason) -> &'static str {
    match reason {
        ProblemReason::FailedToStartServiceHealthcheck => "Listen",
        ProblemReason::DrainGateTimedOut | ProblemReason::DrainGateLastEndpoint => "Drain",
        ProblemReason::DeletionsHeld => "Remove",
        _ => "Compile",
    }
}

/// Truncates to at most `limit` bytes, at a character boundary.
pub(crate) fn shorten(text: &str, limit: usize) -> String {
    let end = text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= limit).last();
    text[..end.unwrap_or(0)].to_owned()
}

/// Hash and time of the last Event per problem, so that a Node's heartbeats do not repeat its problem.
#[derive(Debug, Default)]
struct Known(HashMap<(ProblemObject, ProblemReason), (u64, Instant)>);

impl Known {
    fn is_new(&mut self, problem: &Problem, now: Instant) -> bool {
        let mut hasher = DefaultHasher::new();
        problem.message.hash(&mut hasher);
        let hash = hasher.finish();
        let key = (problem.object.clone(), problem.reason);
        if self.0.get(&key).is_some_and(|(known, at)| *known == hash && now.duration_since(*at) < REPEAT) {
            return false;
        }
        if self.0.len() >= REMEMBERED {
            self.0.clear(); // Costs a few repeated Events.
        }
        self.0.insert(key, (hash, now));
        true
    }
}

#[cfg(test)]
mod tests {
    use kube::client::Body;
    use serde_json::json;
    use switchtower_core::model::ObjectKey;

    use super::*;

    #[test]
    fn unchanged_problem_is_published_once_per_hour() {
        let problem = |message: &str| Problem {
            object: ProblemObject::Node("n1".into()),
            reason: ProblemReason::IncompleteNode,
            message: message.into(),
        };
        let (mut known, start) = (Known::default(), Instant::now());
        assert!(known.is_new(&problem("a"), start));
        assert!(!known.is_new(&problem("a"), start + REPEAT / 2));
        assert!(known.is_new(&problem("b"), start + REPEAT / 2));
        assert!(known.is_new(&problem("b"), start + REPEAT * 2));
    }

    #[tokio::test(start_paused = true)]
    async fn leader_publishes_problems_that_every_replica_finds() {
        let problem = |name: &str| Problem {
            object: ProblemObject::Node(name.into()),
            reason: ProblemReason::IncompleteNode,
            message: String::new(),
        };
        let (sender, problems) = mpsc::channel(QUEUE);
        let (sink, fence) = (EventSink::to(sender), Fence::default());
        let mut queue = Queue::new(problems, fence.clone());
        let soon = async |queue: &mut Queue| {
            tokio::time::timeout(Duration::from_secs(1), queue.next()).await.ok()?
        };
        sink.report([problem("old")]);
        assert_eq!(soon(&mut queue).await, None, "the leader publishes it");
        sink.report_of_agent(problem("reported"));
        assert_eq!(soon(&mut queue).await, Some(problem("reported")));
        tokio::time::advance(HELD).await;
        sink.report([problem("new")]);
        assert_eq!(soon(&mut queue).await, None);
        fence.open_until(tokio::time::Instant::now() + HELD);
        assert_eq!(
            soon(&mut queue).await,
            Some(problem("new")),
            "the leader may have ended before it published it"
        );
        assert_eq!(soon(&mut queue).await, None, "the old one was published");
    }

    #[test]
    fn notes_are_truncated_at_a_character_boundary() {
        assert_eq!(shorten("aé", 2), "a");
        assert_eq!(shorten("aé", 3), "aé");
        assert_eq!(shorten("", 3), "");
    }

    #[tokio::test]
    async fn event_of_a_pod_needs_exactly_one_running_on_the_node() {
        let pod = |name: &str| json!({"metadata": {"namespace": "default", "name": name, "uid": "u1"}});
        let address = PodIdentity::Address("10.244.1.7".parse().unwrap());
        let named = PodIdentity::HostNetwork(ObjectKey { namespace: "default".into(), name: "web".into() });
        let cases = [
            (&address, "/api/v1/pods?", "status.podIP=10.244.1.7", vec![pod("web")], Some("web")),
            (&named, "/api/v1/namespaces/default/pods?", "metadata.name=web", vec![pod("web")], Some("web")),
            (&named, "/api/v1/namespaces/default/pods?", "metadata.name=web", vec![], None),
            (&address, "/api/v1/pods?", "status.podIP=10.244.1.7", vec![pod("a"), pod("b")], None),
        ];
        for (identity, path, selector, pods, expected) in cases {
            let (service, mut api) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
            let client = Client::new(service, "default");
            let answer = async {
                let (request, reply) = api.next_request().await.unwrap();
                let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                    "metadata": {}, "items": pods});
                reply.send_response(http::Response::new(Body::from(list.to_string().into_bytes())));
                request.uri().to_string()
            };
            let (found, uri) = tokio::join!(pod_reference(&client, "n1", identity), answer);
            assert_eq!(found.unwrap().and_then(|found| found.name).as_deref(), expected);
            let uri = uri.replace("%3D", "=").replace("%2C", ",");
            assert!(uri.starts_with(path), "{uri}");
            for part in ["spec.nodeName=n1", "status.phase=Running", selector, "resourceVersion=0"] {
                assert!(uri.contains(part), "{part}: {uri}");
            }
        }
    }
}
