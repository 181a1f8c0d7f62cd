//! A controller in this process: real TLS and gRPC; the test decides what it sends.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{Stream, StreamExt as _};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use switchtower_proto::v1::agent_message::Message as FromAgent;
use switchtower_proto::v1::controller_message::Message as FromController;
use switchtower_proto::v1::fleet_server::{Fleet, FleetServer};
use switchtower_proto::v1::*;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

/// Timeout of every expected message, sufficient for updates of megabytes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The listening controller.
pub struct FakeController {
    /// Address on which it listens.
    pub address: SocketAddr,
    /// Certificate of its authority, in PEM.
    pub ca: String,
    streams: mpsc::UnboundedReceiver<FakeStream>,
}

/// One agent's stream, after its Hello.
pub struct FakeStream {
    /// First message of the agent.
    pub hello: Hello,
    /// Value of the header `authorization`.
    pub authorization: String,
    incoming: mpsc::UnboundedReceiver<FromAgent>,
    out: mpsc::Sender<Result<ControllerMessage, Status>>,
}

struct Service(mpsc::UnboundedSender<FakeStream>);

type Outgoing = Pin<Box<dyn Stream<Item = Result<ControllerMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Fleet for Service {
    type ConnectStream = Outgoing;

    async fn connect(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Outgoing>, Status> {
        let authorization = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let authorization = authorization.unwrap_or_default().to_owned();
        let mut incoming = request.into_inner();
        let (out, outgoing) = mpsc::channel(64);
        let streams = self.0.clone();
        tokio::spawn(async move {
            if let Some(Ok(AgentMessage { message: Some(FromAgent::Hello(hello)) })) = incoming.next().await {
                let (heard, received) = mpsc::unbounded_channel();
                let _ =
                    streams.send(FakeStream { hello, authorization, incoming: received, out: out.clone() });
                pass_on(incoming, &heard, &out).await;
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(outgoing))))
    }
}

/// Answers Pings as long as the test keeps the stream, because an agent leaves a silent controller. All other messages
/// go to the test.
async fn pass_on(
    mut incoming: Streaming<AgentMessage>,
    heard: &mpsc::UnboundedSender<FromAgent>,
    out: &mpsc::Sender<Result<ControllerMessage, Status>>,
) {
    loop {
        let message = tokio::select! {
            message = incoming.next() => message,
            () = heard.closed() => return,
        };
        match message {
            Some(Ok(AgentMessage { message: Some(FromAgent::Ping(Ping { sequence, .. })) })) => {
                let pong = ControllerMessage { message: Some(FromController::Pong(Pong { sequence })) };
                let _ = out.send(Ok(pong)).await;
            }
            Some(Ok(AgentMessage { message: Some(message) })) => drop(heard.send(message)),
            _ => return,
        }
    }
}

/// Runs a test that communicates with an agent, on its own thread, so that the controller continues while the test
/// waits for a command.
pub fn block_on<F: Future>(test: F) -> F::Output {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(1).enable_all().build().unwrap().block_on(test)
}

impl FakeController {
    /// Listens on a port of 127.0.0.1 with a certificate for `name`.
    pub async fn start(name: &str) -> Self {
        let now = SystemTime::now();
        let day = Duration::from_secs(24 * 3_600);
        Self::start_valid(name, (now - day, now + day)).await
    }

    /// As [`Self::start`], with a certificate that is valid from and until these times.
    pub async fn start_valid(name: &str, (from, until): (SystemTime, SystemTime)) -> Self {
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, authority_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut certificate = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (certificate.not_before, certificate.not_after) = (from.into(), until.into());
        let certificate = certificate.signed_by(&key, &authority).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, streams) = mpsc::unbounded_channel();
        let service = FleetServer::new(Service(sender));
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(tls(listener, tokio_rustls::TlsAcceptor::from(Arc::new(config))));
        tokio::spawn(serving);
        FakeController { address, ca: authority.pem(), streams }
    }

    /// Accepts the next agent and reads its Hello.
    pub async fn accept(&mut self) -> FakeStream {
        let next = tokio::time::timeout(DEADLINE, self.streams.recv()).await;
        next.expect("an agent connects in time").expect("the controller runs")
    }

    /// Writes ca.crt, controllers and a token into a directory.
    pub fn write_files(&self, directory: &Path) {
        std::fs::write(directory.join("ca.crt"), &self.ca).unwrap();
        std::fs::write(directory.join("controllers"), format!("{}\n", self.address)).unwrap();
        std::fs::write(directory.join("token"), "the-token\n").unwrap();
    }
}

fn tls(
    listener: TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
) -> impl Stream<Item = std::io::Result<tokio_rustls::server::TlsStream<TcpStream>>> {
    futures::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
        loop {
            let (stream, _) = listener.accept().await.ok()?;
            if let Ok(stream) = acceptor.accept(stream).await {
                return Some((Ok(stream), (listener, acceptor)));
            }
        }
    })
}

impl FakeStream {
    /// Sends a message.
    pub async fn send(&self, message: FromController) {
        // The test notices an agent that has left.
        let _ = self.out.send(Ok(ControllerMessage { message: Some(message) })).await;
    }

    /// Accepts the session and names the other controllers.
    pub async fn welcome(&self, session: u64, peers: &[String]) {
        let controller = "fake".to_owned();
        let features = vec![switchtower_proto::DRAIN_GATE.to_owned()];
        let peers = peers.to_vec();
        let welcome = Welcome {
            version: 1,
            session,
            controller,
            peers,
            resumed: false,
            features,
            ..Welcome::default()
        };
        self.send(FromController::Welcome(welcome)).await;
    }

    /// Sends an update with all of its parts.
    pub async fn update(&self, (update, parts): (Update, Vec<Part>)) {
        let to = update.to;
        self.send(FromController::Update(update)).await;
        for part in parts {
            self.send(FromController::Part(part)).await;
        }
        self.send(FromController::UpdateEnd(UpdateEnd { to })).await;
    }

    /// Receives the next message other than Ping; `None` if the agent left.
    pub async fn next(&mut self) -> Option<FromAgent> {
        let message = tokio::time::timeout(DEADLINE, self.incoming.recv()).await;
        message.expect("a message comes in time")
    }

    /// Returns the next acknowledgement; fails on a refusal.
    pub async fn ack(&mut self) -> Ack {
        match self.next().await {
            Some(FromAgent::Ack(ack)) => ack,
            other => panic!("an Ack is due, this came: {other:?}"),
        }
    }

    /// Returns the next refusal; fails on an acknowledgement.
    pub async fn nack(&mut self) -> Nack {
        match self.next().await {
            Some(FromAgent::Nack(nack)) => nack,
            other => panic!("a Nack is due, this came: {other:?}"),
        }
    }
}
