//! The session against a controller in this process, over TLS, with a kernel in memory.

use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::*;

use super::*;
use crate::engine::{Engine, Parts};
use crate::health::Health;
use crate::kernel::conntrack::{Families, FlowTable};
use crate::kernel::inspector::QueryError;
use crate::state::limits;
use crate::storage::snapshot::SnapshotFile;
use crate::testing::controller::{FakeController, FakeStream};
use crate::testing::{self, Fleet, MemoryKernel, deflate, frontend};

struct NoFlows;

impl FlowTable for NoFlows {
    fn begin(&mut self, _: Families) {}
}

/// An agent without its process: engine, session, files.
struct Agent {
    kernel: MemoryKernel,
    directory: tempfile::TempDir,
    stop: watch::Sender<bool>,
    connected: Metrics,
    contact: Contact,
}

impl Agent {
    fn start(controller: &FakeController) -> Self {
        let directory = tempfile::tempdir().unwrap();
        controller.write_files(directory.path());
        Self::start_in(directory, MemoryKernel::default())
    }

    fn start_in(directory: tempfile::TempDir, kernel: MemoryKernel) -> Self {
        let path = directory.path().to_path_buf();
        let files = StateFiles::start().unwrap();
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let parts = Parts {
            dataplane: Box::new(kernel.clone()),
            flows: Box::new(NoFlows),
            snapshot: Some(SnapshotFile::new(&path, "node-1")),
            files: files.clone(),
            snapshot_limit: None,
            health: Health::default(),
            metrics: metrics.clone(),
            host_addresses: vec!["192.0.2.1".parse().unwrap()],
            controllers: Vec::new(),
            sysctls: crate::kernel::sysctl::Sysctls::new(&path),
            log: testing::log(),
            prober: Box::new(testing::NotingProber::default()),
            trial: None,
            questions: crate::kernel::inspector::Inspector::none(),
            traces: crate::traces::Traces::none(),
            initial_mode: ProxyMode::Active,
            drain_gate: watch::Sender::default(),
        };
        let (commands, received) = mpsc::channel(16);
        let handle = tokio::runtime::Handle::current();
        std::thread::spawn(move || Engine::start(parts).run(received, &handle));
        let (stop, stopped) = watch::channel(false);
        let state = Some(path.join("state"));
        let controllers = Controllers::new(Vec::new(), Some(path.clone()), None, path.join("token"), state);
        let identity = Identity { node_name: "node-1".into(), kernel_version: "6.1".into(), files };
        let (contact, drains) = (Contact::default(), Requests::default());
        let agent = Agent { kernel, directory, stop, connected: metrics.clone(), contact: contact.clone() };
        tokio::spawn(run(Context { controllers, identity, commands, metrics, contact, drains }, stopped));
        agent
    }
}

/// Starts a controller and an agent that has acknowledged its first view.
async fn synced() -> (FakeController, Agent, FakeStream, Fleet) {
    let mut controller = FakeController::start(SERVER_NAME).await;
    let agent = Agent::start(&controller);
    let mut stream = controller.accept().await;
    stream.welcome(1, &[]).await;
    let fleet = Fleet::new(10, 2);
    stream.update(fleet.snapshot()).await;
    stream.ack().await;
    (controller, agent, stream, fleet)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hello_update_ack_and_resume() {
    let mut controller = FakeController::start(SERVER_NAME).await;
    let agent = Agent::start(&controller);
    let mut stream = controller.accept().await;
    assert_eq!(stream.authorization, "Bearer the-token");
    assert_eq!((stream.hello.node_name.as_str(), stream.hello.versions.as_slice()), ("node-1", &[1][..]));
    assert!(stream.hello.view.is_none() && stream.hello.kernel.is_none());
    stream.welcome(7, &["192.0.2.9:9443".into()]).await;

    let mut fleet = Fleet::new(100, 3);
    stream.update(fleet.snapshot()).await;
    let ack = stream.ack().await;
    assert_eq!((ack.session, ack.generation), (7, 1));
    assert_eq!(ack.digest, fleet.digest.to_bytes());
    assert_eq!((ack.timings.unwrap().services, ack.timings.unwrap().endpoints), (100, 300));
    stream.update(fleet.add_endpoint(5, 6)).await;
    assert_eq!(stream.ack().await.generation, 2);
    assert_eq!(agent.connected.connected.get(), 1);
    assert!(agent.contact.state().connected);

    // A replica that started after the Welcome.
    let peers = vec!["192.0.2.10:9443".to_owned()];
    stream.send(FromController::Ping(Ping { peers, ..Ping::default() })).await;
    assert!(matches!(stream.next().await, Some(FromAgent::Pong(_))));

    // The stream breaks; the agent reconnects with its view, and a delta continues from there.
    drop(stream);
    let mut stream = controller.accept().await;
    let view = stream.hello.view.clone().unwrap();
    assert_eq!((view.generation, view.digest), (2, fleet.digest.to_bytes().to_vec()));
    assert_eq!(view.resume.unwrap().revision, 2);
    assert_eq!(stream.hello.kernel.clone().unwrap().generation, 2);
    stream.welcome(8, &[]).await;
    stream.update(fleet.add_endpoint(6, 6)).await;
    let ack = stream.ack().await;
    assert_eq!((ack.session, ack.generation), (8, 3));
    assert_eq!(agent.kernel.lock().commits[1..], [1, 1]);
    let remembered = std::fs::read_to_string(agent.directory.path().join("state/controllers")).unwrap();
    assert_eq!(remembered, "192.0.2.10:9443\n");
    agent.stop.send(true).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_updates_refused_and_stream_kept() {
    let (_controller, agent, mut stream, mut fleet) = synced().await;

    let next = || Update { from: Some(1), to: 2, digest: vec![0; 16], ..Update::default() };
    let part = |kind: PartKind, payload: Vec<u8>| Part {
        layer: LayerKind::Cluster as i32,
        kind: kind as i32,
        payload: payload.into(),
    };
    let cases = [
        (Update { from: Some(9), ..next() }, vec![], NackReason::FromMismatch),
        (next(), vec![], NackReason::DigestMismatch),
        (next(), vec![part(PartKind::Delta, vec![0x0a, 0xff, 0x01])], NackReason::Malformed),
        // A length of 2^35: announced, never allocated.
        (
            next(),
            vec![part(PartKind::Delta, vec![0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01])],
            NackReason::Malformed,
        ),
        (next(), vec![part(PartKind::SnapshotDeflate, vec![0xff; 40])], NackReason::Malformed),
        (next(), vec![part(PartKind::Delta, vec![0; limits::PART + 1])], NackReason::OverLimit),
        (
            next(),
            vec![part(PartKind::SnapshotDeflate, deflate(&vec![0; limits::INFLATED + 1]))],
            NackReason::OverLimit,
        ),
        (next(), vec![part(PartKind::Delta, Vec::new()); limits::PARTS + 1], NackReason::OverLimit),
        (Update { required_features: vec!["x".into()], ..next() }, vec![], NackReason::UnknownFeature),
    ];
    for (update, parts, reason) in cases {
        stream.update((update, parts)).await;
        let nack = stream.nack().await;
        assert_eq!((nack.reason, nack.kept, nack.session), (reason as i32, 1, 1), "{}", nack.detail);
    }
    assert_eq!(agent.kernel.lock().commits.len(), 1);
    stream.update(fleet.add_endpoint(1, 5)).await;
    assert_eq!(stream.ack().await.generation, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_over_four_mebibytes_split_into_parts() {
    let (_controller, agent, mut stream, mut fleet) = synced().await;
    // A delta of many thousand frontends, uncompressed.
    let (mut update, mut parts, mut bytes) = (None, Vec::new(), 0);
    let mut number = 1_000;
    while bytes < 5 << 20 {
        let mut changes = Vec::new();
        for _ in 0..6_000 {
            let mut added = frontend(number % 60_000);
            added.key.as_mut().unwrap().port = 1_000 + number / 60_000;
            fleet.digest.add(LayerKind::Cluster, switchtower_proto::digest::ItemRef::Frontend(&added));
            changes.push(Change { change: Some(Kind::Frontend(added)) });
            number += 1;
        }
        let payload = prost::Message::encode_to_vec(&Segment { changes });
        assert!(payload.len() <= limits::PART);
        bytes += payload.len();
        parts.push(Part { layer: 1, kind: PartKind::Delta as i32, payload: payload.into() });
        update.get_or_insert(Update { from: Some(1), to: 2, ..Update::default() });
    }
    let update = Update { digest: fleet.digest.to_bytes().to_vec(), ..update.unwrap() };
    stream.update((update, parts)).await;
    assert_eq!(stream.ack().await.generation, 2);
    assert_eq!(agent.kernel.lock().frontends.len(), 10 + number as usize - 1_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goodbyes_are_honoured() {
    let mut controller = FakeController::start(SERVER_NAME).await;
    let _agent = Agent::start(&controller);
    for reason in [GoAwayReason::Overloaded, GoAwayReason::NodeNameMismatch, GoAwayReason::StaleReplica] {
        let stream = controller.accept().await;
        let began = Instant::now();
        let retry_after_milliseconds = 300;
        let goodbye = GoAway { reason: reason as i32, detail: "later".into(), retry_after_milliseconds };
        stream.send(FromController::GoAway(goodbye)).await;
        let mut stream = controller.accept().await;
        assert!(began.elapsed() >= Duration::from_millis(300), "{reason:?} reconnected too early");
        // After the Welcome it is the same.
        stream.welcome(1, &[]).await;
        let goodbye = GoAway { reason: reason as i32, detail: String::new(), retry_after_milliseconds: 0 };
        stream.send(FromController::GoAway(goodbye)).await;
        assert!(stream.next().await.is_none(), "the agent leaves");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusing_kernel_reported_and_acknowledged_later() {
    let mut controller = FakeController::start(SERVER_NAME).await;
    let directory = tempfile::tempdir().unwrap();
    controller.write_files(directory.path());
    let kernel = MemoryKernel::default();
    kernel.lock().fail = Some(libc::EPERM);
    let agent = Agent::start_in(directory, kernel);
    let mut stream = controller.accept().await;
    stream.welcome(1, &[]).await;
    stream.update(Fleet::new(3, 1).snapshot()).await;
    let nack = stream.nack().await;
    assert_eq!((nack.reason, nack.errno), (NackReason::Kernel as i32, libc::EPERM));
    agent.kernel.lock().fail = None;
    assert_eq!(stream.ack().await.generation, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_and_pings_are_answered() {
    let mut controller = FakeController::start(SERVER_NAME).await;
    let _agent = Agent::start(&controller);
    let mut stream = controller.accept().await;
    stream.welcome(1, &[]).await;
    stream.send(FromController::Ping(Ping { sequence: 42, ..Ping::default() })).await;
    assert!(matches!(stream.next().await, Some(FromAgent::Pong(Pong { sequence: 42 }))));
    let query = Query { id: 9, kind: Some(query::Kind::Chains(ChainsQuery {})) };
    stream.send(FromController::Query(query)).await;
    match stream.next().await {
        Some(FromAgent::Answer(answer)) => {
            assert_eq!((answer.id, answer.last), (9, true));
            assert_eq!(answer.error, QueryError::Unavailable.to_string(), "this kernel has no reader");
        }
        other => panic!("expected an Answer, got {other:?}"),
    }
}

#[test]
fn lost_connection_is_no_refusal() {
    let refused = |code| SessionError::Refused { code, detail: String::new() }.failure();
    for code in [tonic::Code::Unknown, tonic::Code::Unavailable] {
        assert_eq!(refused(code), FailureKind::Away, "{code:?}");
    }
    for code in [tonic::Code::Unauthenticated, tonic::Code::PermissionDenied] {
        assert_eq!(refused(code), FailureKind::Refused, "{code:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_sent_at_the_requested_interval() {
    let mut controller = FakeController::start(SERVER_NAME).await;
    let _agent = Agent::start(&controller);
    let mut stream = controller.accept().await;
    assert!(stream.hello.features.iter().any(|feature| feature == switchtower_proto::HEARTBEAT));
    let welcome = Welcome { version: 1, session: 1, heartbeat_milliseconds: 1_000, ..Welcome::default() };
    stream.send(FromController::Welcome(welcome)).await;
    let began = Instant::now();
    for _ in 0..2 {
        assert!(matches!(stream.next().await, Some(FromAgent::Pong(Pong { sequence: 0 }))));
    }
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_pinned_name_under_the_right_authority_is_trusted() {
    for (name, own_authority) in [("another-name", true), (SERVER_NAME, false)] {
        let mut controller = FakeController::start(name).await;
        let other = FakeController::start(SERVER_NAME).await;
        let directory = tempfile::tempdir().unwrap();
        controller.write_files(directory.path());
        if !own_authority {
            std::fs::write(directory.path().join("ca.crt"), &other.ca).unwrap();
        }
        let path = directory.path();
        let controllers =
            Controllers::new(Vec::new(), Some(path.to_path_buf()), None, path.join("token"), None);
        let attempt = || connect(&controllers, "controller:9443", vec![controller.address], None);
        let refused = attempt().await;
        let refused = refused.map(|_| ()).unwrap_err();
        assert_eq!(refused.reason(), "ControllerUntrusted", "{name}: {refused}");
        // During a rotation the file holds both authorities, and every attempt reads it again.
        std::fs::write(path.join("ca.crt"), format!("{}{}", other.ca, controller.ca)).unwrap();
        assert_eq!(attempt().await.is_ok(), name == SERVER_NAME);
        assert!(
            tokio::time::timeout(Duration::from_millis(50), controller.accept()).await.is_err(),
            "no Hello arrived"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_clock_reported_as_clock_skew() {
    let (now, day) = (std::time::SystemTime::now(), Duration::from_secs(24 * 3_600));
    for (validity, text) in [
        (
            (now + 3 * day / 2, now + 10 * day),
            "is behind: the controller's certificate becomes valid in 1 d 1",
        ),
        ((now - 10 * day, now - 3 * day / 2), "is ahead: the controller's certificate expired 1 d 12 h ago"),
    ] {
        let controller = FakeController::start_valid(SERVER_NAME, validity).await;
        let directory = tempfile::tempdir().unwrap();
        controller.write_files(directory.path());
        let path = directory.path();
        let controllers =
            Controllers::new(Vec::new(), Some(path.to_path_buf()), None, path.join("token"), None);
        let refused = connect(&controllers, "controller:9443", vec![controller.address], None)
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(refused.reason(), "ClockSkew", "{refused}");
        assert!(refused.to_string().contains(text), "{refused}");
    }
}
