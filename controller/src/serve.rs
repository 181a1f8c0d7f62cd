//! Serves the node agents: accepts connections, authenticates agents and starts one session per stream.
//!
//! Path of a stream: [`tls`] accepts the connection, `gate` limits unauthenticated connections, [`auth`] derives the
//! node from the credential, `admission` limits the streams, [`crate::session`] runs the protocol on the data of the
//! [`crate::fleet`].
//!
//! Invariants: a node gets only its own view. At most one update per node is unacknowledged and no other is queued, so
//! that a slow node costs no memory and delays no other node. A peer that violates the protocol gets a typed refusal
//! and does not affect others.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::StreamBody;
use switchtower_proto::v1::replica_server::ReplicaServer;
use switchtower_proto::v1::{AgentMessage, GoAwayReason};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::codec::BufferSettings;
use tonic::metadata::{GRPC_CONTENT_TYPE, MetadataMap};
use tonic::server::NamedService;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstDecoder;

mod admission;
pub mod auth;
pub(crate) mod connection;
pub(crate) mod gate;
pub(crate) mod http1;
pub mod keys;
mod outbound;
pub mod review;
pub mod tls;

#[cfg(test)]
mod tests;

use admission::Admission;
use auth::{AgentRejection, Authenticator};
use connection::Origin;
use gate::{Gate, GateLimits, Ticket};
use outbound::Outbound;
use tls::ServerTls;

use crate::fleet::Fleet;
use crate::fleet::metrics::StreamMetrics;
use crate::replicas::service::ReplicaService;
use crate::session::{self, Limits, Session};

/// Maximum size of a message from an agent, in bytes.
const MESSAGE: usize = 256 << 10;
/// Path of the only method.
const CONNECT: &str = "/switchtower.v1.Fleet/Connect";
/// Initial size of the buffer for messages of one agent, which are small, in bytes.
const DECODE_BUFFER: usize = 1 << 10;
/// Batches queued between a session and its connection.
const QUEUE: usize = 4;

/// The gRPC server for agents.
pub struct Server {
    fleet: Arc<Fleet>,
    authenticator: Arc<Authenticator>,
    admission: Arc<Admission>,
    limits: Arc<Limits>,
    replica: ReplicaService,
}

impl Server {
    /// Creates the server; [`Server::serve`] runs it.
    #[must_use]
    pub fn new(
        fleet: Arc<Fleet>,
        authenticator: Arc<Authenticator>,
        limits: Limits,
        replica: ReplicaService,
    ) -> Self {
        let admission = Admission::new(&limits, fleet.metrics().clone());
        Self { fleet, authenticator, admission, limits: Arc::new(limits), replica }
    }

    /// Serves until `shutdown` completes, then ends every stream and gives connections a short time to close.
    ///
    /// # Errors
    /// The server cannot run.
    pub async fn serve(
        self,
        listener: TcpListener,
        tls: Arc<ServerTls>,
        metrics: StreamMetrics,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), tonic::transport::Error> {
        let fleet = self.fleet.clone();
        fleet.accept();
        let gate = Gate::new("agents", GateLimits::agents(), fleet.known().clone(), metrics);
        let incoming = tls::incoming(listener, tls, gate);
        let replica = ReplicaServer::new(self.replica.clone()).max_decoding_message_size(MESSAGE);
        let agents = Agents(Arc::new(self));
        let leave = async move {
            shutdown.await;
            fleet.end_all(GoAwayReason::Shutdown);
        };
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(20)))
            // An agent needs one stream, and a second while it replaces the first.
            .max_concurrent_streams(4)
            .serve_with_incoming_shutdown(Services { agents, replica }, incoming, leave)
            .await
    }
}

/// The services of the port.
#[derive(Clone)]
struct Services {
    agents: Agents,
    replica: ReplicaServer<ReplicaService>,
}

impl tower::Service<http::Request<tonic::body::Body>> for Services {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = tonic::codegen::BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let service = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or_default();
        if service == <ReplicaServer<ReplicaService> as NamedService>::NAME {
            return self.replica.call(request);
        }
        let agents = self.agents.clone();
        Box::pin(async move { Ok(agents.call(request).await) })
    }
}

/// The service `Fleet` of `fleet.proto`. [`outbound`] encodes its responses instead of the generated server.
#[derive(Clone)]
struct Agents(Arc<Server>);

impl Agents {
    async fn call(&self, request: http::Request<tonic::body::Body>) -> http::Response<tonic::body::Body> {
        if request.uri().path() != CONNECT {
            return Status::unimplemented("unknown method").into_http();
        }
        let (parts, body) = request.into_parts();
        let decoder = ProstDecoder::<AgentMessage>::new(BufferSettings::new(DECODE_BUFFER, DECODE_BUFFER));
        let inbound = Streaming::new_request(decoder, body, None, Some(MESSAGE));
        let metadata = MetadataMap::from_headers(parts.headers);
        match self.connect(Request::from_parts(metadata, parts.extensions, inbound)).await {
            Ok(outbound) => {
                let mut response = http::Response::new(tonic::body::Body::new(StreamBody::new(outbound)));
                response.headers_mut().insert(http::header::CONTENT_TYPE, GRPC_CONTENT_TYPE);
                response
            }
            Err(status) => status.into_http(),
        }
    }

    async fn connect(&self, request: Request<Streaming<AgentMessage>>) -> Result<Outbound, Status> {
        let Server { fleet, authenticator, admission, limits, .. } = &*self.0;
        let origin = request.extensions().get::<Origin>().cloned();
        let Some(Origin { ticket, certified }) = origin else {
            return Err(Status::internal("the connection is unknown"));
        };
        if ticket.is_refused() {
            return Err(Status::unauthenticated(
                "a credential on this connection was refused; connect again",
            ));
        }
        let refuse = |refusal: AgentRejection| refused(&ticket, &refusal);
        let credential = authenticator.credential(request.metadata(), certified.as_ref()).map_err(refuse)?;
        let identity = {
            let _turn = ticket.review().await;
            authenticator
                .authenticate(credential, ticket.class(), |node| fleet.knows(node))
                .await
                .map_err(refuse)?
        };
        let (out, outbound) = mpsc::channel(QUEUE);
        let outbound = Outbound::new(outbound);
        // Only authenticated agents count towards the limits of streams.
        let Some(permit) = admission.admit() else {
            // The queue is empty.
            let _ = out.try_send(vec![session::overloaded(limits)]);
            return Ok(outbound);
        };
        let Some(authenticated) = ticket.authenticated() else {
            return Err(Status::unavailable("the connection was closed during the review"));
        };
        let session = Session::new(fleet.clone(), limits.clone(), identity, out);
        tokio::spawn(async move {
            session.run(request.into_inner()).await;
            drop((permit, authenticated));
        });
        Ok(outbound)
    }
}

/// Counts and logs a refusal, and closes the connection if the credential is invalid.
fn refused(ticket: &Ticket, refusal: &AgentRejection) -> Status {
    ticket.refused(refusal.reason(), Some(refusal.to_string()));
    if !matches!(refusal, AgentRejection::ReviewUnavailable(_)) {
        ticket.refuse();
    }
    refusal.status()
}
