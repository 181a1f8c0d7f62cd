//! A thousand hostile connections of each kind alongside hundreds of agents, each with its own address.

use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use super::super::keys::tests::Signer;
use super::*;

const HOSTILE: usize = 1_000;
/// Fewer where the handshakes of a build without optimization would be most of the test.
const AGENTS: usize = if cfg!(debug_assertions) { 200 } else { 500 };
/// Addresses that hostile connections come from: as many pods.
const PODS: usize = 8;
/// Maximum time until all agents are connected. On a busy machine, a multiple of the time that they need without
/// hostile connections.
const DEADLINE: Duration = Duration::from_secs(5);
const TIMES: u32 = 5;
/// One of these tests at a time: they measure.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Behavior of a hostile connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    IdleTcp,
    /// A ClientHello, and nothing after it.
    HalfOpenTls,
    IdleTls,
    /// HTTP/2 with pings that are answered, without a request.
    Pings,
    /// Requests with forged tokens.
    ForgedTokens,
    /// Sends pings for ever and reads none of the answers.
    SlowReader,
}

/// Takes a token's word for everything, and counts.
#[derive(Clone, Default)]
struct Believing(Arc<AtomicUsize>);

impl Reviewer for Believing {
    fn review<'a>(&'a self, token: &'a str, audience: &'a str) -> Review<'a> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            // Approximate latency of an API server.
            tokio::time::sleep(Duration::from_millis(5)).await;
            let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
            let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
            let node = claims.pointer("/kubernetes.io/node/name").unwrap().as_str().unwrap().to_owned();
            let extra = BTreeMap::from([
                ("authentication.kubernetes.io/pod-uid".to_owned(), vec!["u".to_owned()]),
                ("authentication.kubernetes.io/node-name".to_owned(), vec![node]),
            ]);
            let user =
                UserInfo { username: Some(USER.to_owned()), extra: Some(extra), ..UserInfo::default() };
            let audiences = Some(vec![audience.to_owned()]);
            Ok(TokenReviewStatus { authenticated: Some(true), audiences, user: Some(user), error: None })
        })
    }
}

fn claims(node: &str) -> String {
    format!(
        r#"{{"aud":["switchtower"],"exp":1900000000,"sub":"{USER}","kubernetes.io":{{"node":{{"name":"{node}"}},"pod":{{"uid":"u"}}}}}}"#
    )
}

fn node_name(number: usize) -> String {
    format!("m{number}")
}

fn node_address(number: usize) -> IpAddr {
    IpAddr::from([127, 1, (number / 250) as u8, (number % 250) as u8 + 1])
}

fn pod_address(number: usize) -> IpAddr {
    IpAddr::from([127, 0, 2, (number % PODS) as u8 + 1])
}

/// A server with the nodes of all agents, their keys, and the key of a forger.
struct Field {
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
    signer: Signer,
    forger: Signer,
    reviews: Believing,
}

impl Field {
    async fn start(published: bool) -> Arc<Self> {
        let lab = Lab::start(Limits::default()).await;
        for number in 0..AGENTS {
            let IpAddr::V4(address) = node_address(number) else { unreachable!() };
            let addresses = vec![address.octets().to_vec()];
            let record = NodeRecord { name: node_name(number), addresses, ..NodeRecord::default() };
            lab.publish(LayerId::Node(node_name(number).as_str().into()), Op::Node(record));
        }
        let (signer, forger) = (Signer::new("k"), Signer::new("k"));
        let source = Published::new(if published { Ok(signer.set()) } else { Err("404 not found") });
        let keys = Keys::new(source, &prometheus::Registry::new()).unwrap();
        let (namespace, account) = ("switchtower-system", "switchtower-node-agent");
        let reviews = Believing::default();
        let authenticator =
            Authenticator::new(reviews.clone(), Arc::new(keys), "switchtower", namespace, account);
        let tls = Arc::new(ServerTls::from_pointee(tls::server_config(&lab.authority).unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let replica = ReplicaService::new(axum::Router::new(), ReplicaKeys::new(&lab.authority));
        let server = Server::new(lab.fleet.clone(), Arc::new(authenticator), Limits::default(), replica);
        tokio::spawn(server.serve(listener, tls, lab.metrics.clone(), std::future::pending()));
        Arc::new(Self { address, config: lab.client_config(), signer, forger, reviews })
    }

    async fn connect(&self, from: IpAddr) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(from, 0))?;
        socket.connect(self.address).await
    }

    async fn tls(&self, from: IpAddr) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(tls::SERVER_NAME).unwrap();
        tokio_rustls::TlsConnector::from(self.config.clone()).connect(name, self.connect(from).await?).await
    }

    /// Opens a stream.
    async fn stream(self: &Arc<Self>, from: IpAddr, token: &str) -> Result<Agent, String> {
        let field = self.clone();
        let dial = tower::service_fn(move |_: http::Uri| {
            let field = field.clone();
            async move { Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(field.tls(from).await?)) }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://controller");
        let connected = endpoint.connect_with_connector(dial).await;
        let channel = connected.map_err(|error| format!("transport error: {error:?}"))?;
        let (out, messages) = mpsc::channel(16);
        let mut request = Request::new(ReceiverStream::new(messages));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let opened =
            FleetClient::new(channel).connect(request).await.map_err(|error| format!("{error:?}"))?;
        Ok(Agent { out, inbound: opened.into_inner(), session: 0 })
    }

    async fn agent(self: &Arc<Self>, number: usize) -> Result<Agent, String> {
        let token = self.signer.sign(&claims(&node_name(number)));
        // Retries as an agent does, also if the connection ends during the TLS handshake.
        let mut agent = loop {
            match self.stream(node_address(number), &token).await {
                Ok(agent) => break agent,
                Err(error) if error.contains("transport error") => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(error),
            }
        };
        agent.welcome(hello(&node_name(number))).await;
        Ok(agent)
    }

    /// All agents at once; how long each took, sorted.
    async fn agents(self: &Arc<Self>, numbers: std::ops::Range<usize>) -> Vec<Duration> {
        let mut coming = JoinSet::new();
        let started = Instant::now();
        for number in numbers {
            let field = self.clone();
            coming.spawn(async move {
                let agent = tokio::time::timeout(12 * DEADLINE, field.agent(number)).await;
                (number, started.elapsed(), agent)
            });
        }
        let mut took = Vec::new();
        let mut open = Vec::new();
        while let Some(came) = coming.join_next().await {
            let (number, elapsed, agent) = came.unwrap();
            open.push(agent.unwrap_or_else(|_| panic!("agent {number} is not connected in time")).unwrap());
            took.push(elapsed);
        }
        took.sort_unstable();
        took
    }

    /// One hostile connection after the other.
    async fn attack(self: Arc<Self>, kind: Kind, from: IpAddr, opened: Arc<AtomicUsize>) {
        loop {
            opened.fetch_add(1, Ordering::Relaxed);
            // However it ends, the next one follows.
            let _ = self.attack_once(kind, from).await;
            tokio::time::sleep(Duration::from_millis(rand::random_range(1_000..3_000))).await;
        }
    }

    async fn attack_once(self: &Arc<Self>, kind: Kind, from: IpAddr) -> std::io::Result<()> {
        match kind {
            Kind::IdleTcp => until_closed(self.connect(from).await?).await,
            Kind::HalfOpenTls => {
                let name = ServerName::try_from(tls::SERVER_NAME).unwrap();
                let mut hello = Vec::new();
                let mut client = rustls::ClientConnection::new(self.config.clone(), name).unwrap();
                client.write_tls(&mut hello)?;
                let mut stream = self.connect(from).await?;
                stream.write_all(&hello).await?;
                until_closed(stream).await
            }
            Kind::IdleTls => until_closed(self.tls(from).await?).await,
            Kind::Pings => {
                let (reader, mut writer) = tokio::io::split(self.tls(from).await?);
                let drained = tokio::spawn(until_closed(reader));
                writer.write_all(PREFACE).await?;
                while !drained.is_finished() {
                    writer.write_all(PING).await?;
                    writer.flush().await?;
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Ok(())
            }
            Kind::ForgedTokens => {
                let token = self.forger.sign(&claims(&node_name(rand::random_range(0..AGENTS))));
                if let Ok(mut stream) = self.stream(from, &token).await {
                    panic!("a forged token was accepted: {:?}", stream.next().await);
                }
                Ok(())
            }
            Kind::SlowReader => {
                let mut stream = self.tls(from).await?;
                stream.write_all(PREFACE).await?;
                loop {
                    stream.write_all(&PING.repeat(100)).await?;
                    stream.flush().await?;
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }
}

/// HTTP/2's preface and empty settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0switchto";

async fn until_closed(mut stream: impl AsyncRead + Unpin) -> std::io::Result<()> {
    let mut buffer = [0; 1_024];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Keeps up hostile connections from `source`s while `agents` come; prints a row, and returns how long the slowest took.
async fn besieged(
    field: &Arc<Field>,
    label: &str,
    kind: Option<Kind>,
    source: fn(usize) -> IpAddr,
    agents: std::ops::Range<usize>,
) -> Duration {
    let opened = Arc::new(AtomicUsize::new(0));
    let mut attackers = JoinSet::new();
    if let Some(kind) = kind {
        for number in 0..HOSTILE {
            attackers.spawn(field.clone().attack(kind, source(number), opened.clone()));
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let (before, asked) = (opened.load(Ordering::Relaxed), field.reviews.0.load(Ordering::Relaxed));
    let count = agents.len();
    let took = field.agents(agents).await;
    let reviews = field.reviews.0.load(Ordering::Relaxed) - asked;
    println!(
        "{label:<34} {before:>8} {:>9.0} {:>9.0} {reviews:>9}",
        took[count / 2].as_secs_f64() * 1_000.0,
        took[count - 1].as_secs_f64() * 1_000.0,
    );
    assert!(reviews <= count, "{reviews} reviews for {count} agents");
    attackers.shutdown().await;
    took[count - 1]
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_connections_do_not_keep_agents_out() {
    let _alone = ALONE.lock().await;
    let field = Field::start(true).await;
    println!("{:<34} {:>8} {:>9} {:>9} {:>9}", "", "opened", "median", "slowest", "reviews");
    println!("{:<34} {:>8} {:>9} {:>9} {:>9}", "1,000 hostile connections", "before", "ms", "ms", "");
    let alone = besieged(&field, "none", None, pod_address, 0..AGENTS).await;
    let deadline = DEADLINE.max(alone * TIMES);
    for (label, kind) in [
        ("TCP, silent", Kind::IdleTcp),
        ("TLS, half open", Kind::HalfOpenTls),
        ("TLS, idle", Kind::IdleTls),
        ("HTTP/2 pings without a token", Kind::Pings),
        ("forged tokens", Kind::ForgedTokens),
        ("HTTP/2, reads no answer", Kind::SlowReader),
    ] {
        let slowest = besieged(&field, label, Some(kind), pod_address, 0..AGENTS).await;
        assert!(slowest < deadline, "{label}: {slowest:?}, alone {alone:?}");
    }
    // A pod whose address its node translates shares the node's: it is in the way of that node alone.
    let node = |_| node_address(0);
    for (label, kind) in [
        ("TCP, silent, from a node's address", Kind::IdleTcp),
        ("TLS, idle, from a node's address", Kind::IdleTls),
    ] {
        let slowest = besieged(&field, label, Some(kind), node, 1..AGENTS).await;
        assert!(slowest < deadline, "{label}: {slowest:?}, alone {alone:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_forged_tokens_wait_behind_nodes() {
    let _alone = ALONE.lock().await;
    let field = Field::start(false).await;
    // Without keys the reviewer believes what is forged, so that its node identifies the forger.
    let mut attackers = JoinSet::new();
    for number in 0..100 {
        let field = field.clone();
        attackers.spawn(async move {
            loop {
                let token = field.forger.sign(&claims(&format!("unknown-{}", rand::random::<u64>())));
                let _ = field.stream(pod_address(number), &token).await;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        });
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = field.reviews.0.load(Ordering::Relaxed);
    let took = field.agents(0..AGENTS).await;
    let others = field.reviews.0.load(Ordering::Relaxed) - asked - AGENTS;
    println!("without keys: slowest agent {:?}, {others} reviews for others", took[AGENTS - 1]);
    attackers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_behind_one_unknown_address_connects() {
    let _alone = ALONE.lock().await;
    let field = Field::start(true).await;
    let mut coming = JoinSet::new();
    let started = Instant::now();
    for number in 0..AGENTS {
        let field = field.clone();
        coming.spawn(async move {
            let token = field.signer.sign(&claims(&node_name(number)));
            let mut tries = 1;
            loop {
                match field.stream(IpAddr::from([127, 0, 3, 1]), &token).await {
                    Ok(agent) => return (agent, tries),
                    Err(_) => tokio::time::sleep(Duration::from_millis(rand::random_range(0..1_000))).await,
                }
                tries += 1;
            }
        });
    }
    let agents = coming.join_all().await;
    println!(
        "all in after {:?}, {} tries",
        started.elapsed(),
        agents.iter().map(|(_, tries)| tries).sum::<usize>()
    );
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_without_stream_is_closed() {
    let _alone = ALONE.lock().await;
    let field = Field::start(true).await;
    let started = Instant::now();
    until_closed(field.connect(pod_address(0)).await.unwrap()).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(4), "without a ClientHello");
    let started = Instant::now();
    let _ = until_closed(field.tls(pod_address(0)).await.unwrap()).await;
    assert!(started.elapsed() < Duration::from_secs(10), "without a stream");
    let agent = field.agent(0).await.unwrap();
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(!agent.out.is_closed(), "an agent stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_token_do_not_use_the_stream_limit() {
    let limits = Limits { streams_per_second: 0.001, stream_burst: 1.0, ..Limits::default() };
    let lab = Lab::start(limits).await;
    for _ in 0..5 {
        assert!(lab.dial("").await.is_err());
    }
    assert!(!lab.agent("n1").await.welcome(hello("n1")).await);
    assert_eq!(lab.agent("n2").await.sent_away().await, GoAwayReason::Overloaded);
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_distrusting_the_certificate_distinguished() {
    let lab = Lab::start(Limits::default()).await;
    let mut foreign = rustls::RootCertStore::empty();
    let other = authority::generate().unwrap().certificate;
    foreign.add(CertificateDer::from_pem_slice(other.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = |clock: Arc<dyn rustls::time_provider::TimeProvider>, roots| {
        rustls::ClientConfig::builder_with_details(provider.clone(), clock)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    };
    let early = config(Arc::new(LongAgo), lab.roots());
    let distrusting = config(Arc::new(rustls::time_provider::DefaultTimeProvider), foreign);
    for (config, reason) in [(early, "peer_clock_skew"), (distrusting, "peer_distrusts_certificate")] {
        let stream = TcpStream::connect(lab.address).await.unwrap();
        let name = ServerName::try_from(tls::SERVER_NAME).unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        assert!(connector.connect(name, stream).await.is_err());
        let counted = async {
            while lab.metrics.refusals(reason) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let counted = tokio::time::timeout(Duration::from_secs(20), counted).await;
        counted.unwrap_or_else(|_| panic!("{reason}; {} others", lab.metrics.refusals("handshake")));
    }
}

/// A clock that is a day behind.
#[derive(Debug)]
struct LongAgo;

impl rustls::time_provider::TimeProvider for LongAgo {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        let now = rustls_pki_types::UnixTime::now().as_secs();
        Some(rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(now - 24 * 3_600)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sent_generation_is_never_reused() {
    let lab = Lab::start(Limits::default()).await;
    let (mut agent, first) = Agent::settled(&lab, "n1").await;
    lab.change(1);
    let (second, _) = agent.update().await;
    // Sent, and never acknowledged; then the content is the first one again.
    drop(agent);
    lab.until("n1", |known| known.lost_since.is_some()).await;
    let cidr = Cidr { address: vec![10, 1, 0, 0], prefix_length: 16 };
    lab.publish(LayerId::Cluster, Op::ServiceCidrRemoved(cidr));
    let mut agent = lab.agent("n1").await;
    let view = View { resume: None, ..view(&first) };
    assert!(agent.welcome(Hello { view: Some(view), ..hello("n1") }).await);
    let (third, parts) = agent.update().await;
    assert!(third.to > second.to && parts.is_empty(), "{} after {}", third.to, second.to);
    agent.ack(&third).await;
    lab.until("n1", |known| known.applied == third.to).await;
    // An acknowledgement of the same number for other content is false.
    agent.ack(&Update { digest: second.digest, ..third }).await;
    assert_eq!(agent.sent_away().await, GoAwayReason::Malformed);
}
