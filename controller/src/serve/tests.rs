//! Real streams over TLS against a fake reviewer: what an agent sees.

mod held;
mod hostile;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use switchtower_admin_api::ChangeReport;
use switchtower_core::compiled::Compiled;
use switchtower_core::layer::HealthCheckPlacement;
use switchtower_core::model::LayerId;
use switchtower_core::propagation::{Change as Followed, Publication};
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::controller_message::Message as ToAgent;
use switchtower_proto::v1::fleet_client::FleetClient;
use switchtower_proto::v1::query::Kind;
use switchtower_proto::v1::{
    Ack, Answer, ApplyTimings, Change, Cidr, ControllerMessage, FrontendsQuery, Hello, Nack, NackReason,
    NodeRecord, Part, Settings, Source, Stamp, Update, View,
};
use tokio::net::TcpStream;
use tokio_stream::wrappers::ReceiverStream;

use super::keys::Keys;
use super::keys::tests::Published;
use super::review::{Review, Reviewer};
use super::*;
use crate::authority::nodes::NodeCertificates;
use crate::authority::{self, Authority};
use crate::fleet::queries::QueryError;
use crate::fleet::{Parts as FleetParts, SettingsAssignment, SettingsName};
use crate::propagation::Propagation;
use crate::replicas::service::ReplicaKeys;
use crate::status::{Floors, Registry as _};

mod certified;
mod load;
mod queries;
mod refused;

const USER: &str = "system:serviceaccount:switchtower-system:switchtower-node-agent";

/// Accepts what the token's key says: user@node.
struct Fake;

impl Reviewer for Fake {
    fn review<'a>(&'a self, token: &'a str, audience: &'a str) -> Review<'a> {
        Box::pin(async move {
            let header = URL_SAFE_NO_PAD.decode(token.split_once('.').unwrap().0).unwrap();
            let header: serde_json::Value = serde_json::from_slice(&header).unwrap();
            let (user, node) = header["kid"].as_str().unwrap().split_once('@').unwrap();
            if user == "down" {
                return Err("connection refused".to_owned());
            }
            if user == "refused" {
                let error = Some("token has expired".to_owned());
                return Ok(TokenReviewStatus { error, ..TokenReviewStatus::default() });
            }
            let mut extra =
                BTreeMap::from([("authentication.kubernetes.io/pod-uid".to_owned(), vec!["u".to_owned()])]);
            if !node.is_empty() {
                extra.insert("authentication.kubernetes.io/node-name".to_owned(), vec![node.to_owned()]);
            }
            let user =
                UserInfo { username: Some(user.to_owned()), extra: Some(extra), ..UserInfo::default() };
            Ok(TokenReviewStatus {
                authenticated: Some(true),
                audiences: Some(vec![audience.to_owned()]),
                user: Some(user),
                error: None,
            })
        })
    }
}

/// Expires in 2030 for the audience switchtower.
fn token(user: &str, node: &str) -> String {
    const UNTIL_2030: &str = "eyJhdWQiOlsic3dpdGNodG93ZXIiXSwiZXhwIjoxOTAwMDAwMDAwLCJrdWJlcm5ldGVzLmlvIjp7InBvZCI6eyJuYW1lIjoiYSIsInVpZCI6InUifX19";
    token_with(user, node, UNTIL_2030)
}

/// A token with these claims, in base64url.
fn token_with(user: &str, node: &str, claims: &str) -> String {
    let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"ES256","kid":"{user}@{node}"}}"#));
    format!("{header}.{claims}.c2ln")
}

struct Lab {
    fleet: Arc<Fleet>,
    floors: Floors,
    propagation: Arc<Propagation>,
    metrics: StreamMetrics,
    authority: Authority,
    address: SocketAddr,
}

impl Lab {
    async fn start(limits: Limits) -> Self {
        let upstream = Arc::new(|| Some(Duration::ZERO));
        let floors = Floors::default();
        let parts = FleetParts { upstream, floors: floors.clone(), ..FleetParts::for_tests() };
        let (metrics, propagation) = (parts.metrics.clone(), parts.propagation.clone());
        let fleet = Fleet::new(parts);
        let keys = Keys::new(Published::new(Err("no keys")), &prometheus::Registry::new()).unwrap();
        let (namespace, account) = ("switchtower-system", "switchtower-node-agent");
        let authenticator = Authenticator::new(Fake, Arc::new(keys), "switchtower", namespace, account);
        let authority = Authority::new(authority::generate().unwrap());
        let config = Arc::new(ServerTls::from_pointee(tls::server_config(&authority).unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let replica = ReplicaService::new(axum::Router::new(), ReplicaKeys::new(&authority));
        let certificates = NodeCertificates::new(&authority).unwrap();
        let limits = Limits { certificates: Some(certificates), ..limits };
        let server = Server::new(fleet.clone(), Arc::new(authenticator), limits, replica);
        tokio::spawn(server.serve(listener, config, metrics.clone(), std::future::pending()));
        let lab = Self { fleet, floors, propagation, metrics, authority, address };
        for node in ["n1", "n2"] {
            lab.add_node(node);
        }
        lab
    }

    fn add_node(&self, name: &str) {
        let record = NodeRecord { name: name.to_owned(), eligible: true, ..NodeRecord::default() };
        self.publish(LayerId::Node(name.into()), Op::Node(record));
    }

    fn publish(&self, layer: LayerId, op: Op) {
        static COUNT: AtomicU64 = AtomicU64::new(1);
        let received = crate::propagation::unix_nanoseconds(std::time::SystemTime::now());
        let change = Followed {
            id: COUNT.fetch_add(1, Ordering::Relaxed),
            object: format!("{layer:?}").into(),
            service: None,
            received,
            triggered: None,
            trace: crate::propagation::new_trace(),
            origin: None,
        };
        let publication =
            Publication { changes: vec![change], total: 1, compiling: received, published: received };
        let changes = BTreeMap::from([(layer, vec![Change { change: Some(op) }])]);
        let compiled = Compiled { changes, ..Compiled::default() };
        self.fleet.publish(compiled, publication, Source::default());
    }

    /// The latest change and what became of it, once `holds`.
    async fn followed(&self, holds: impl Fn(&ChangeReport) -> bool) -> ChangeReport {
        for _ in 0..1_000 {
            if let Some(report) = self.propagation.changes(1, |_| true).pop().filter(|report| holds(report)) {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not reached: {:?}", self.propagation.changes(1, |_| true));
    }

    /// A change that concerns every node.
    fn change(&self, number: u8) {
        let cidr = Cidr { address: vec![10, number, 0, 0], prefix_length: 16 };
        self.publish(LayerId::Cluster, Op::ServiceCidr(cidr));
    }

    fn roots(&self) -> rustls::RootCertStore {
        self.authority.roots().unwrap()
    }

    fn client_config(&self) -> Arc<rustls::ClientConfig> {
        Arc::new(switchtower_proto::tls::client_config(self.roots(), None).unwrap())
    }

    async fn dial(&self, token: &str) -> Result<Agent, Status> {
        self.dial_with(self.client_config(), token).await
    }

    async fn dial_with(&self, config: Arc<rustls::ClientConfig>, token: &str) -> Result<Agent, Status> {
        let (connector, address) = (tokio_rustls::TlsConnector::from(config), self.address);
        let dial = tower::service_fn(move |_: http::Uri| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from(tls::SERVER_NAME).unwrap();
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://controller");
        let channel = endpoint.connect_with_connector(dial).await.unwrap();
        let (out, messages) = mpsc::channel(1_024);
        let mut request = Request::new(ReceiverStream::new(messages));
        if !token.is_empty() {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let inbound = FleetClient::new(channel).connect(request).await?.into_inner();
        Ok(Agent { out, inbound, session: 0 })
    }

    async fn agent(&self, node: &str) -> Agent {
        self.dial(&token(USER, node)).await.unwrap()
    }

    async fn until(&self, node: &str, holds: impl Fn(&crate::status::Observation) -> bool) {
        for _ in 0..1_000 {
            if self.fleet.observe(node).is_some_and(|known| holds(&known)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not reached: {:?}", self.fleet.observe(node));
    }
}

struct Agent {
    out: mpsc::Sender<AgentMessage>,
    inbound: Streaming<ControllerMessage>,
    session: u64,
}

fn hello(node: &str) -> Hello {
    let features = vec![HealthCheckPlacement::FEATURE.to_owned()];
    Hello { versions: vec![1], features, node_name: node.to_owned(), ..Hello::default() }
}

impl Agent {
    async fn send(&self, message: FromAgent) {
        self.out.send(AgentMessage { message: Some(message) }).await.unwrap();
    }

    async fn next(&mut self) -> ToAgent {
        let next = tokio::time::timeout(Duration::from_secs(10), self.inbound.message());
        next.await.expect("a message in time").unwrap().expect("no end").message.unwrap()
    }

    async fn welcome(&mut self, hello: Hello) -> bool {
        self.send(FromAgent::Hello(hello)).await;
        let ToAgent::Welcome(welcome) = self.next().await else { panic!("Welcome") };
        self.session = welcome.session;
        welcome.resumed
    }

    async fn update(&mut self) -> (Update, Vec<Part>) {
        let ToAgent::Update(update) = self.next().await else { panic!("Update") };
        let mut parts = Vec::new();
        loop {
            match self.next().await {
                ToAgent::Part(part) => parts.push(part),
                ToAgent::UpdateEnd(end) => {
                    assert_eq!(end.to, update.to);
                    return (update, parts);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn ack(&self, update: &Update) {
        let Update { to, digest, .. } = update.clone();
        let timings =
            ApplyTimings { plan_microseconds: 3, commit_microseconds: 5, ..ApplyTimings::default() };
        let timings = Some(timings);
        let ack = Ack { session: self.session, generation: to, digest, timings, ..Ack::default() };
        self.send(FromAgent::Ack(ack)).await;
    }

    async fn nack(&self, update: &Update, reason: NackReason) {
        let kept = update.from.unwrap_or(0);
        let nack = Nack {
            session: self.session,
            generation: update.to,
            reason: reason as i32,
            kept,
            ..Nack::default()
        };
        self.send(FromAgent::Nack(nack)).await;
    }

    async fn sent_away(&mut self) -> GoAwayReason {
        loop {
            if let ToAgent::GoAway(go_away) = self.next().await {
                return go_away.reason();
            }
        }
    }

    /// Connects and takes the first snapshot.
    async fn settled(lab: &Lab, node: &str) -> (Self, Update) {
        let mut agent = lab.agent(node).await;
        assert!(!agent.welcome(hello(node)).await);
        let (update, _) = agent.update().await;
        agent.ack(&update).await;
        lab.until(node, |known| known.applied == update.to).await;
        (agent, update)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_precedes_deltas_and_changes_are_combined() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    assert_eq!(first.from, None);
    lab.change(1);
    let (second, parts) = agent.update().await;
    assert_eq!((second.from, second.to, parts.len()), (Some(first.to), first.to + 1, 1));
    (2..7).for_each(|number| lab.change(number));
    lab.until("n1", |known| known.desired == second.to + 5 && known.applied == first.to).await;
    agent.ack(&second).await;
    let (third, parts) = agent.update().await;
    assert_eq!(
        (third.from, third.to, third.changes_total, parts.len()),
        (Some(second.to), second.to + 5, 5, 1)
    );
    agent.ack(&third).await;
    lab.until("n1", |known| known.applied == third.to && known.behind_since.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connected_agents_learn_replicas_that_start_later() {
    let (peers, sender) = crate::peers::Peers::new(vec!["192.0.2.1:9443".to_owned()]);
    let limits = Limits { peers, ping: Duration::from_millis(50), ..Limits::default() };
    let lab = Lab::start(limits).await;
    let (mut agent, _) = Agent::settled(&lab, "n1").await;
    let both = vec!["192.0.2.1:9443".to_owned(), "192.0.2.2:9443".to_owned()];
    sender.send(both.clone()).unwrap();
    let mut sent = Vec::new();
    while sent.iter().position(|peers: &Vec<String>| !peers.is_empty()).is_none_or(|at| sent.len() < at + 3) {
        let ToAgent::Ping(ping) = agent.next().await else { continue };
        sent.push(ping.peers);
    }
    sent.retain(|peers| !peers.is_empty());
    assert_eq!(sent, [both], "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_assignment_is_followed_like_any_change() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    let (_other, _) = Agent::settled(&lab, "n2").await;
    let name: SettingsName = ("default".into(), 7);
    let settings = Settings { profile: "default".into(), revision: 7, ..crate::fleet::builtin_settings() };
    lab.fleet.set_settings(&BTreeMap::from([(name.clone(), settings)]));
    let assignment = SettingsAssignment { node: "n1".into(), settings: name.clone(), trace: Some(0xaf7) };
    lab.fleet.assign_settings([assignment.clone(), assignment]);
    let report = lab.followed(|report| report.object == "ProxyRollout default-7").await;
    assert_eq!((report.trace_id.as_str(), report.eligible), ("00000000000000000000000000000af7", 1));
    let (update, _) = agent.update().await;
    assert_eq!((update.from, report.all), (Some(first.to), None));
    agent.ack(&update).await;
    lab.until("n1", |known| known.settings.as_ref() == Some(&name) && known.settings_took.is_some()).await;
    let report = lab.followed(|report| report.all.is_some()).await;
    assert_eq!((report.object.as_str(), report.slowest[0].node.as_str()), ("ProxyRollout default-7", "n1"));
    assert_eq!(report.slowest[0].commit, Some(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn recreated_node_keeps_its_stream() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    let record = NodeRecord { name: "n1".to_owned(), zone: "z".to_owned(), ..NodeRecord::default() };
    let layer = LayerId::Node("n1".into());
    let changes = BTreeMap::from([(layer.clone(), vec![Change { change: Some(Op::Node(record)) }])]);
    let compiled = Compiled { changes, removed: vec![layer], ..Compiled::default() };
    lab.fleet.publish(compiled, Publication::default(), Source::default());
    assert!(lab.fleet.knows("n1"));
    let (second, parts) = agent.update().await;
    assert_eq!((second.from, parts.len()), (Some(first.to), 1), "the new record");
    agent.ack(&second).await;
    lab.until("n1", |known| known.applied == second.to).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnecting_agent_resumes() {
    let lab = Lab::start(Limits::default()).await;
    let (agent, first) = Agent::settled(&lab, "n1").await;
    drop(agent);
    lab.until("n1", |known| known.lost_since.is_some()).await;
    lab.change(1);
    lab.until("n1", |known| known.desired == first.to + 1).await;
    let mut agent = lab.agent("n1").await;
    assert!(agent.welcome(Hello { view: Some(view(&first)), ..hello("n1") }).await);
    let (second, _) = agent.update().await;
    assert_eq!(second.from, Some(first.to));
    agent.ack(&second).await;
    lab.until("n1", |known| known.applied == second.to).await;
    // Without the token of this process, the digest alone says that nothing is missing.
    let mut again = lab.agent("n1").await;
    let kernel = Some(Stamp { generation: second.to, digest: second.digest.clone() });
    let without_token = View { resume: None, ..view(&second) };
    assert!(again.welcome(Hello { view: Some(without_token), kernel, ..hello("n1") }).await);
    assert_eq!(agent.sent_away().await, GoAwayReason::Superseded);
    lab.until("n1", |known| known.acknowledged && known.applied == second.to && known.desired == second.to)
        .await;
}

/// View of a Hello after this update.
fn view(update: &Update) -> View {
    View {
        digest: update.digest.clone(),
        generation: update.to,
        resume: update.resume.clone(),
        source: update.source,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn view_missing_in_kernel_does_not_count_as_synced() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    lab.change(1);
    let (second, _) = agent.update().await;
    agent.nack(&second, NackReason::Kernel).await;
    lab.until("n1", |known| known.failure.is_some()).await;
    drop(agent);
    lab.until("n1", |known| known.lost_since.is_some()).await;
    // It reconnects: it has the update, and its kernel still refuses it.
    let kernel = Some(Stamp { generation: first.to, digest: first.digest.clone() });
    let mut agent = lab.agent("n1").await;
    assert!(agent.welcome(Hello { view: Some(view(&second)), kernel, ..hello("n1") }).await);
    agent.nack(&second, NackReason::Kernel).await;
    lab.until("n1", |known| known.failure.is_some()).await;
    let known = lab.fleet.observe("n1").unwrap();
    assert_eq!((known.acknowledged, known.applied, known.desired), (false, first.to, second.to));
    agent.ack(&second).await;
    lab.until("n1", |known| known.acknowledged && known.applied == second.to && known.failure.is_none())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kernel_ahead_of_view_keeps_its_generation() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    (1..4).for_each(|number| lab.change(number));
    let mut last = first.clone();
    while last.to < first.to + 3 {
        (last, _) = agent.update().await;
        agent.ack(&last).await;
    }
    lab.until("n1", |known| known.applied == last.to).await;
    drop(agent);
    // Killed between the commit and the file: the view is the first one, the kernel holds the last.
    let kernel = Stamp { generation: last.to, digest: last.digest.clone() };
    let mut agent = lab.agent("n1").await;
    assert!(agent.welcome(Hello { view: Some(view(&first)), kernel: Some(kernel), ..hello("n1") }).await);
    let (missed, _) = agent.update().await;
    assert_eq!((missed.from, missed.to), (Some(first.to), last.to), "the same content has the same number");
    agent.ack(&missed).await;
    lab.change(9);
    let (next, _) = agent.update().await;
    assert_eq!((next.from, next.to), (Some(last.to), last.to + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_typed() {
    let lab = Lab::start(Limits::default()).await;
    let lab_ref = &lab;
    let dialed = |token: String| async move {
        lab_ref.dial(&token).await.err().map(|status| status.message().to_owned())
    };
    let cases = [
        ("no_token", String::new()),
        ("malformed_token", "x".to_owned()),
        ("foreign_service_account", token("system:serviceaccount:default:other", "n1")),
        ("not_pod_bound", token(USER, "")),
        ("unknown_node", token(USER, "n9")),
        ("review_unavailable", token("down", "n1")),
    ];
    for (reason, token) in cases {
        let message = dialed(token).await.expect(reason);
        assert!(message.starts_with(reason), "{reason}: {message}");
        assert_eq!(lab.metrics.refusals(reason), 1, "{reason}");
    }
    let stamp = Stamp { generation: u64::MAX / 2, digest: vec![0; 16] };
    let hostile = [
        (GoAwayReason::NodeNameMismatch, FromAgent::Hello(hello("n2"))),
        (GoAwayReason::Version, FromAgent::Hello(Hello { versions: vec![9], ..hello("n1") })),
        (GoAwayReason::GenerationOutOfRange, FromAgent::Hello(Hello { kernel: Some(stamp), ..hello("n1") })),
        (GoAwayReason::Malformed, FromAgent::Ack(Ack::default())),
        (
            GoAwayReason::Malformed,
            FromAgent::Hello(Hello { agent_version: "x".repeat(1 << 20), ..hello("n1") }),
        ),
    ];
    for (reason, message) in hostile {
        let mut agent = lab.agent("n1").await;
        agent.send(message).await;
        assert_eq!(agent.sent_away().await, reason);
    }
    let mut plain = TcpStream::connect(lab.address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut plain, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    while lab.metrics.refusals("plaintext") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Nothing of it harmed the others.
    Agent::settled(&lab, "n2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_on_flood_false_ack_and_deleted_node() {
    let lab = Lab::start(Limits { messages_per_second: 5.0, ..Limits::default() }).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    for _ in 0..100 {
        agent.send(FromAgent::Pong(Default::default())).await;
    }
    assert_eq!(agent.sent_away().await, GoAwayReason::Malformed);
    let (mut agent, update) = Agent::settled(&lab, "n1").await;
    assert!(update.to > first.to, "numbers go on");
    agent.ack(&Update { to: update.to + 1, ..update }).await;
    assert_eq!(agent.sent_away().await, GoAwayReason::Malformed);
    let (mut agent, _) = Agent::settled(&lab, "n1").await;
    let removed = vec![LayerId::Node("n1".into())];
    lab.fleet.publish(Compiled { removed, ..Compiled::default() }, Publication::default(), Source::default());
    assert_eq!(agent.sent_away().await, GoAwayReason::NodeDeleted);
}

#[tokio::test(flavor = "multi_thread")]
async fn change_is_followed_to_every_connected_node() {
    let lab = Lab::start(Limits::default()).await;
    let (mut first, _) = Agent::settled(&lab, "n1").await;
    let (mut second, _) = Agent::settled(&lab, "n2").await;
    lab.change(1);
    let report = lab.followed(|report| report.eligible == 2).await;
    assert_eq!((report.acknowledged, &report.waiting[..]), (0, &["n1".to_owned(), "n2".to_owned()][..]));
    let (update, _) = first.update().await;
    first.nack(&update, NackReason::FromMismatch).await;
    let (update, _) = first.update().await;
    assert_eq!(update.from, None, "the snapshot that follows");
    first.ack(&update).await;
    let report = lab.followed(|report| report.acknowledged == 1).await;
    assert_eq!((report.all, report.refusals[0].reason.as_str()), (None, "FromMismatch"));
    let node = &report.slowest[0];
    assert_eq!((node.node.as_str(), node.plan, node.commit), ("n1", Some(3), Some(5)));
    assert!(node.sending.unwrap() + node.round_trip.unwrap() <= node.after + 1, "{node:?}");
    assert!(report.published <= node.after && report.half.unwrap() == node.after, "{report:?}");
    // The other one goes instead of acknowledging: all that are left hold it.
    second.update().await;
    drop(second);
    let report = lab.followed(|report| report.excluded == 1).await;
    assert_eq!((report.outstanding, report.all), (0, Some(node.after)));
    assert_eq!(report.compiled_together, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_agents_come_at_once() {
    let lab = Arc::new(Lab::start(Limits::default()).await);
    (0..500).for_each(|node| lab.add_node(&format!("m{node}")));
    let started = std::time::Instant::now();
    let agents: Vec<_> = (0..500)
        .map(|node| {
            let lab = lab.clone();
            tokio::spawn(async move { Agent::settled(&lab, &format!("m{node}")).await.0 })
        })
        .collect();
    let mut open = Vec::new();
    for agent in agents {
        open.push(agent.await.unwrap());
    }
    println!("500 agents settled after {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn session_is_higher_than_that_of_another_replica() {
    let lab = Lab::start(Limits::default()).await;
    let mut agent = lab.agent("n1").await;
    agent.welcome(Hello { session: 41, ..hello("n1") }).await;
    assert_eq!(agent.session, 42);
}
