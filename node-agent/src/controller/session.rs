//! Sessions with a controller: connects, sends Hello, receives updates, sends acknowledgements, and reconnects.
//!
//! Sessions never access the kernel, so losing the controller affects no packet. Attempts go through the addresses in
//! random order, with timeouts and backoff; a GoAway's `retry_after` overrides the backoff.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use switchtower_proto::DRAIN_GATE;
use switchtower_proto::tls::{ClientIdentity, SERVER_NAME, client_config};
use switchtower_proto::v1::controller_message::Message as FromController;
use switchtower_proto::v1::fleet_client::FleetClient;
use switchtower_proto::v1::{
    AgentMessage, ControllerMessage, GoAway, GoAwayReason, Hello, Ping, Pong, Welcome,
    agent_message::Message as FromAgent,
};
use switchtower_telemetry::{span, spans};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tracing::Instrument as _;

mod answers;
mod heartbeat;
mod trust;

use crate::controller::backoff::{self, Backoff, FailureKind, full_jitter};
use crate::controller::bootstrap::{BootstrapError, Controllers};
use crate::controller::certificate::NodeCertificate;
use crate::controller::choice::Choice;
use crate::controller::link::{Absence, Contact};
use crate::drain::requests::{Link, Requests};
use crate::engine::{AgentStatus, Command, Event};
use crate::metrics::Metrics;
use crate::state::FEATURES;
use crate::storage::files::{Content, StateFiles};
use answers::Answers;
use heartbeat::Heartbeats;
pub(crate) use trust::Distrust;

/// Supported versions of the protocol.
pub(crate) const VERSIONS: &[u32] = &[1];
/// Maximum size of a message in bytes: a part of 1 MiB with its frame.
const MESSAGE_LIMIT: usize = 2 << 20;
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Long enough for one lost SYN, which the kernel retransmits after a second. For a host that comes back, a new attempt
/// is faster than the kernel's later retransmissions.
const TCP_DEADLINE: Duration = Duration::from_millis(2_500);
const WELCOME_DEADLINE: Duration = Duration::from_secs(15);
/// Interval between checks for silence.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// The controller pings every 15 seconds. After this long without a message the agent pings too.
const QUIET: Duration = Duration::from_secs(20);
/// Timeout of a stream without any message.
const SILENCE: Duration = Duration::from_secs(30);
/// Maximum delay that a GoAway may request.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(300);

/// Error that ended a session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// Bootstrap input is missing or invalid.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// TLS cannot be set up.
    #[error("set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No connection.
    #[error("connect to {address}: {}", distrust.and_then(Distrust::advice).as_ref().unwrap_or(reason))]
    Connect {
        /// host:port.
        address: String,
        /// Error with its causes.
        reason: String,
        /// Fault of the controller's certificate, if that is the cause.
        distrust: Option<Distrust>,
    },
    /// The controller refused the stream.
    #[error("the controller refused the stream: {code}: {detail}")]
    Refused {
        /// The gRPC code.
        code: tonic::Code,
        /// Message of the controller.
        detail: String,
    },
    /// The controller sent a GoAway.
    #[error("the controller closed the stream ({reason:?}): {detail}")]
    GoAway {
        /// Reason of the GoAway.
        reason: GoAwayReason,
        /// Message of the controller.
        detail: String,
        /// Delay before the next attempt.
        retry_after: Duration,
    },
    /// The stream ended.
    #[error("the stream ended")]
    Ended,
    /// No message arrived in time.
    #[error("no message from the controller for {} s", SILENCE.as_secs())]
    Silent,
    /// The controller violated the protocol.
    #[error("the controller violated the protocol: {0}")]
    Protocol(&'static str),
    /// The engine has stopped.
    #[error("the agent is stopping")]
    Stopping,
}

impl SessionError {
    /// Returns the CamelCase reason for the conditions of the node's `ProxyStatus`.
    #[must_use]
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Bootstrap(error) => error.reason(),
            Self::Tls(_) => "BootstrapInvalid",
            Self::Connect { distrust, .. } => distrust.map_or("ControllerUnreachable", Distrust::reason),
            Self::Refused { .. } => "ControllerRefused",
            Self::GoAway { .. } => "SentAway",
            Self::Ended | Self::Silent => "StreamLost",
            Self::Protocol(_) => "ProtocolError",
            Self::Stopping => "Stopping",
        }
    }

    /// Returns whether a later attempt may succeed without other files, credentials or version.
    #[must_use]
    pub(crate) fn absence(&self) -> Absence {
        use tonic::Code;
        match self {
            Self::Bootstrap(_)
            | Self::Tls(_)
            | Self::Connect { distrust: Some(_), .. }
            | Self::Protocol(_) => Absence::Unusable,
            Self::Refused { code, .. } => match code {
                Code::Unauthenticated
                | Code::PermissionDenied
                | Code::InvalidArgument
                | Code::FailedPrecondition
                | Code::Unimplemented => Absence::Unusable,
                _ => Absence::ControllerAway,
            },
            Self::Connect { .. } | Self::GoAway { .. } | Self::Ended | Self::Silent | Self::Stopping => {
                Absence::ControllerAway
            }
        }
    }
}

impl SessionError {
    /// Returns true if the controller could not accept the token, which the certificate of the node may replace.
    fn is_about_the_token(&self) -> bool {
        use tonic::Code;
        matches!(self, Self::Refused { code: Code::Unavailable | Code::Unauthenticated, .. })
    }

    /// Returns the kind of failure for the backoff.
    fn failure(&self) -> FailureKind {
        use tonic::Code;
        match self {
            // A lost connection has the code Unknown. No controller sends that.
            Self::Refused { code: Code::Unavailable | Code::Unknown, .. } => FailureKind::Away,
            // Tokens and certificates change rarely, so frequent retries would only load the controller.
            Self::Refused { .. } => FailureKind::Refused,
            Self::Connect { distrust: Some(_), .. } | Self::Tls(_) | Self::Protocol(_) => {
                FailureKind::Refused
            }
            _ => FailureKind::Away,
        }
    }
}

/// Identity of this agent in Hello.
#[derive(Clone)]
pub struct Identity {
    /// Name of the Node; the controller compares it with the token.
    pub node_name: String,
    /// Release of the running kernel.
    pub kernel_version: String,
    /// Writes the file of peers.
    pub files: StateFiles,
}

/// The parts of the agent that every session uses.
pub struct Context {
    /// Addresses and credentials of the controllers.
    pub controllers: Controllers,
    /// Content of Hello.
    pub identity: Identity,
    /// Queue of the engine.
    pub commands: mpsc::Sender<Command>,
    /// The agent's metrics.
    pub metrics: Metrics,
    /// Status of the connection, for `/connection`.
    pub contact: Contact,
    /// Requests of the drain gate.
    pub drains: Requests,
}

/// State that one session leaves for the next.
struct Memory {
    choice: Choice,
    /// Number of the last session, 0 if there was none.
    session: u64,
    /// `None` if no key can be generated.
    certificate: Option<NodeCertificate>,
    backoff: Backoff,
}

/// Keeps a session with one of the controllers until `stop` becomes true.
pub async fn run(mut context: Context, mut stop: watch::Receiver<bool>) {
    let certificate =
        NodeCertificate::load(context.controllers.state.as_deref(), context.identity.files.clone());
    let mut memory =
        Memory { choice: Choice::default(), session: 0, certificate, backoff: Backoff::default() };
    let mut logged = false;
    loop {
        let result = tokio::select! {
            result = session(&mut context, &mut memory) => result,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        context.metrics.connected.set(0);
        let Err(error) = result;
        if matches!(error, SessionError::Stopping) {
            return;
        }
        if let Some(certificate) = &mut memory.certificate {
            certificate.ended(error.is_about_the_token());
        }
        context.contact.lost(error.reason(), error.absence(), &error.to_string());
        // Missing files, which the kubelet may still be mounting, are cheap to check.
        let waiting = matches!(error, SessionError::Bootstrap(_));
        if waiting {
            memory.backoff = Backoff::default();
        }
        let mut pause = memory.backoff.after(error.failure(), Instant::now());
        if let SessionError::GoAway { retry_after, .. } = &error {
            pause = (*retry_after).min(RETRY_AFTER_LIMIT) + full_jitter(backoff::FIRST, backoff::FIRST, 0);
        }
        if !(waiting && logged) {
            tracing::warn!(%error, retry_in_ms = pause.as_millis() as u64, "no controller; the data plane keeps its last generation");
        }
        logged = waiting;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Resolves a controller's address, and removes frontends that would capture connections to any known controller.
async fn resolve(
    controllers: &mut Controllers,
    address: &str,
    commands: &mpsc::Sender<Command>,
) -> Result<Vec<SocketAddr>, SessionError> {
    let unreachable =
        |reason: String| SessionError::Connect { address: address.to_owned(), reason, distrust: None };
    let found = timeout(CONNECT_DEADLINE, tokio::net::lookup_host(address)).await;
    let found = found.map_err(|_| unreachable("timeout while resolving the name".to_owned()))?;
    let found: Vec<SocketAddr> = found.map_err(|error| unreachable(chain(&error)))?.collect();
    controllers.resolved(address, &found);
    let (done, attempted) = oneshot::channel();
    let command = Command::Controllers { addresses: controllers.known_addresses(), done };
    commands.send(command).await.map_err(|_| SessionError::Stopping)?;
    // A busy engine must not delay the connection: usually no frontend is in the way.
    let _ = timeout(CONNECT_DEADLINE, attempted).await;
    Ok(found)
}

/// Connects to the controller `address` at its resolved addresses `target`.
async fn connect(
    controllers: &Controllers,
    address: &str,
    target: Vec<SocketAddr>,
    identity: Option<ClientIdentity>,
) -> Result<Channel, SessionError> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in controllers.ca()? {
        roots.add(certificate)?;
    }
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config(roots, identity)?));
    let dial = tower::service_fn(move |_: tonic::transport::Uri| {
        let (connector, target) = (connector.clone(), target.clone());
        async move {
            let stream = timeout(TCP_DEADLINE, tokio::net::TcpStream::connect(&*target)).await;
            let stream = stream.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
            stream.set_nodelay(true)?;
            let name = rustls_pki_types::ServerName::try_from(SERVER_NAME).map_err(std::io::Error::other)?;
            let stream = connector.connect(name, stream).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let failed =
        |reason: String, distrust| SessionError::Connect { address: address.to_owned(), reason, distrust };
    // The connector provides TLS; for an https URI tonic would add its own.
    let endpoint = Endpoint::from_shared(format!("http://{SERVER_NAME}"))
        .map_err(|error| failed(chain(&error), None))?
        .http2_keep_alive_interval(QUIET)
        .keep_alive_timeout(PING_INTERVAL)
        .keep_alive_while_idle(true);
    match timeout(CONNECT_DEADLINE, endpoint.connect_with_connector(dial)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(failed(chain(&error), Distrust::of(&error))),
        Err(_) => Err(failed(format!("no answer within {} s", CONNECT_DEADLINE.as_secs()), None)),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

async fn session(
    context: &mut Context,
    memory: &mut Memory,
) -> Result<std::convert::Infallible, SessionError> {
    let span = span!("switchtower.connect", otel.kind = "client", server.address = tracing::field::Empty);
    let opened = open(context, memory).instrument(span.clone()).await;
    if let Err(error) = &opened {
        spans::failed(&span, error);
    }
    // The span covers opening the stream only.
    drop(span);
    let (mut stream, mut incoming) = opened?;
    memory.choice.connected();
    memory.backoff.connected(Instant::now());
    stream.pump(&mut incoming).await
}

/// Returns the request of a stream, with the token.
fn request(
    token: &str,
    outgoing: mpsc::Receiver<AgentMessage>,
) -> Result<tonic::Request<tokio_stream::wrappers::ReceiverStream<AgentMessage>>, SessionError> {
    let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(outgoing));
    let bearer = format!("Bearer {token}").parse();
    let bearer = bearer.map_err(|_| SessionError::Protocol("the token is not ASCII"))?;
    request.metadata_mut().insert("authorization", bearer);
    Ok(request)
}

/// Opens a gRPC stream and waits for its first message.
async fn welcome(
    channel: Channel,
    request: tonic::Request<tokio_stream::wrappers::ReceiverStream<AgentMessage>>,
) -> Result<(Welcome, tonic::Streaming<ControllerMessage>), SessionError> {
    let mut client = FleetClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
    let refused = |status: tonic::Status| SessionError::Refused {
        code: status.code(),
        detail: status.message().to_owned(),
    };
    let opened =
        timeout(WELCOME_DEADLINE, client.connect(request)).await.map_err(|_| SessionError::Silent)?;
    let mut incoming = opened.map_err(refused)?.into_inner();
    let first = timeout(WELCOME_DEADLINE, incoming.next()).await.map_err(|_| SessionError::Silent)?;
    let first = first.ok_or(SessionError::Ended)?.map_err(refused)?;
    match first.message {
        Some(FromController::Welcome(welcome)) => Ok((welcome, incoming)),
        Some(FromController::GoAway(goodbye)) => Err(go_away(goodbye)),
        _ => Err(SessionError::Protocol("the first message is neither Welcome nor GoAway")),
    }
}

/// Opens a stream: reads the bootstrap files, connects, sends Hello and receives Welcome.
async fn open<'a>(
    context: &'a mut Context,
    memory: &mut Memory,
) -> Result<(Stream<'a>, tonic::Streaming<ControllerMessage>), SessionError> {
    let Context { controllers, identity, commands, metrics, contact, drains } = context;
    let token = controllers.token()?;
    let addresses = controllers.addresses()?;
    let address = memory.choice.next(&addresses).ok_or(BootstrapError::NoController)?;
    let target = resolve(controllers, &address, commands).await?;
    let channel = connect(
        controllers,
        &address,
        target,
        memory.certificate.as_ref().and_then(NodeCertificate::identity),
    )
    .await?;
    let (events_sender, events) = mpsc::unbounded_channel();
    let (status, answer) = oneshot::channel();
    let attach = Command::Attach { events: events_sender, status };
    commands.send(attach).await.map_err(|_| SessionError::Stopping)?;
    let status = answer.await.map_err(|_| SessionError::Stopping)?;

    let (out, outgoing) = mpsc::channel(16);
    let hello = AgentMessage { message: Some(FromAgent::Hello(hello(identity, status, memory))) };
    out.send(hello).await.map_err(|_| SessionError::Ended)?;
    let (welcome, incoming) = welcome(channel, request(&token, outgoing)?).await?;
    let Welcome { version, session, controller, peers, resumed, features, certificate, .. } = welcome;
    let heartbeats = Heartbeats::requested(welcome.heartbeat_milliseconds);
    if !VERSIONS.contains(&version) {
        return Err(SessionError::Protocol("it chose a version that the agent did not offer"));
    }
    tracing::info!(%address, controller, session, resumed, "connected");
    tracing::Span::current().record("server.address", address.as_str());
    memory.session = session;
    if let Some(known) = &mut memory.certificate {
        known.received(certificate);
    }
    metrics.connected.set(1);
    contact.made(&address);
    remember(controllers, identity, &peers);
    if resumed {
        commands.send(Command::Resumed).await.map_err(|_| SessionError::Stopping)?;
    }
    let answers = Answers::new(commands.clone(), out.clone());
    let drains = drains.connected(features.iter().any(|feature| feature == DRAIN_GATE));
    Ok((
        Stream {
            controllers,
            identity,
            commands,
            out,
            session,
            events,
            sequence: 0,
            heartbeats,
            answers,
            drains,
        },
        incoming,
    ))
}

/// Keeps the addresses of the replicas, also for the time after a restart without a bootstrap ConfigMap.
fn remember(controllers: &mut Controllers, identity: &Identity, peers: &[String]) {
    if let Some((path, content)) = controllers.remember(peers) {
        identity.files.put(&path, Content::Bytes(content), None);
    }
}

fn go_away(goodbye: GoAway) -> SessionError {
    SessionError::GoAway {
        reason: GoAwayReason::try_from(goodbye.reason).unwrap_or_default(),
        detail: goodbye.detail,
        retry_after: Duration::from_millis(u64::from(goodbye.retry_after_milliseconds)),
    }
}

fn hello(identity: &Identity, status: AgentStatus, memory: &Memory) -> Hello {
    let AgentStatus { kernel, view, addresses, deviations, trial, mode } = status;
    let bytes = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    Hello {
        versions: VERSIONS.to_vec(),
        features: FEATURES.iter().map(|name| (*name).to_owned()).collect(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_version: identity.kernel_version.clone(),
        node_name: identity.node_name.clone(),
        kernel,
        view,
        addresses: addresses.into_iter().take(64).map(bytes).collect(),
        deviations,
        trial,
        mode: mode.into(),
        session: memory.session,
        public_key: memory.certificate.as_ref().map(NodeCertificate::request).unwrap_or_default(),
    }
}

/// An open stream.
struct Stream<'a> {
    controllers: &'a mut Controllers,
    identity: &'a Identity,
    commands: &'a mpsc::Sender<Command>,
    out: mpsc::Sender<AgentMessage>,
    session: u64,
    events: mpsc::UnboundedReceiver<Event>,
    sequence: u64,
    heartbeats: Heartbeats,
    answers: Answers,
    drains: Link,
}

impl Stream<'_> {
    async fn pump(
        &mut self,
        incoming: &mut tonic::Streaming<ControllerMessage>,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut pings = tokio::time::interval(PING_INTERVAL);
        let mut heard = Instant::now();
        loop {
            // Acknowledgements first: a flood of messages must not starve them.
            tokio::select! {
                biased;
                event = self.events.recv() => match event {
                    Some(event) => self.send(self.stamped(event)).await?,
                    None => return Err(SessionError::Stopping),
                },
                message = self.drains.next() => self.send(message).await?,
                () = self.heartbeats.due() => self.send(FromAgent::Pong(Pong { sequence: 0 })).await?,
                _ = pings.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Err(SessionError::Silent);
                    }
                    if heard.elapsed() < QUIET {
                        continue;
                    }
                    self.sequence += 1;
                    let ping = Ping { sequence: self.sequence, ..Ping::default() };
                    self.send(FromAgent::Ping(ping)).await?;
                }
                message = incoming.next() => {
                    heard = Instant::now();
                    let message = message.ok_or(SessionError::Ended)?;
                    let message = message.map_err(|status| SessionError::Refused {
                        code: status.code(),
                        detail: status.message().to_owned(),
                    })?;
                    self.receive(message).await?;
                }
            }
        }
    }

    fn stamped(&self, event: Event) -> FromAgent {
        let session = self.session;
        match event {
            Event::Ack(ack) => FromAgent::Ack(switchtower_proto::v1::Ack { session, ..ack }),
            Event::Nack(nack) => FromAgent::Nack(switchtower_proto::v1::Nack { session, ..nack }),
            Event::Report(report) => FromAgent::Report(switchtower_proto::v1::Report { session, ..report }),
        }
    }

    async fn send(&mut self, message: FromAgent) -> Result<(), SessionError> {
        self.heartbeats.sent();
        let message = AgentMessage { message: Some(message) };
        // A controller that does not read for this long counts as lost.
        match timeout(SILENCE, self.out.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SessionError::Ended),
            Err(_) => Err(SessionError::Silent),
        }
    }

    async fn command(&self, command: Command) -> Result<(), SessionError> {
        self.commands.send(command).await.map_err(|_| SessionError::Stopping)
    }

    async fn receive(&mut self, message: ControllerMessage) -> Result<(), SessionError> {
        match message.message {
            Some(FromController::Update(update)) => self.command(Command::Begin(Box::new(update))).await,
            Some(FromController::Part(part)) => self.command(Command::Part(part)).await,
            Some(FromController::UpdateEnd(end)) => self.command(Command::End(end)).await,
            Some(FromController::ReleaseHeld(release)) => {
                self.command(Command::ReleaseHeld { before: release.before }).await
            }
            Some(FromController::Ping(ping)) => {
                remember(self.controllers, self.identity, &ping.peers);
                self.send(FromAgent::Pong(Pong { sequence: ping.sequence })).await
            }
            Some(FromController::GoAway(goodbye)) => Err(go_away(goodbye)),
            Some(FromController::Query(query)) => {
                self.answers.begin(query);
                Ok(())
            }
            Some(FromController::DrainAnswer(answer)) => {
                self.drains.answered(answer);
                Ok(())
            }
            Some(FromController::Pong(_)) => Ok(()),
            Some(FromController::Welcome(_)) => Err(SessionError::Protocol("a second Welcome")),
            // A message kind of a later version, which this version may ignore.
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
