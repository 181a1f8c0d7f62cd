//! A connection that the gate can close: further reads and writes return an error.

use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tonic::transport::server::Connected;

use super::gate::{Rejection, Ticket};
use crate::authority::nodes::Certified;

/// A byte stream with its ticket of the gate, which may close it.
pub(crate) struct Connection<S> {
    stream: S,
    ticket: Arc<Ticket>,
    closed: oneshot::Receiver<Rejection>,
    over: bool,
    certified: Option<Certified>,
}

impl<S> Connection<S> {
    pub(crate) fn new(stream: S, ticket: Arc<Ticket>, closed: oneshot::Receiver<Rejection>) -> Self {
        Self { stream, ticket, closed, over: false, certified: None }
    }

    /// The peer has proven with a certificate that it is the agent of a node.
    pub(crate) fn certified(self, certified: Option<Certified>) -> Self {
        Self { certified, ..self }
    }

    /// Returns an error once the gate has closed the connection. Registers the task to be woken then.
    fn check(&mut self, context: &mut Context<'_>) -> Result<(), Error> {
        self.over = self.over || Pin::new(&mut self.closed).poll(context).is_ready();
        if self.over { Err(Error::new(ErrorKind::ConnectionAborted, "closed by the gate")) } else { Ok(()) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), Error>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Error>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        // A peer that reads nothing must not block the shutdown.
        self.check(context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize, Error>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// The connection of a request, as a request extension.
#[derive(Clone)]
pub(crate) struct Origin {
    pub(crate) ticket: Arc<Ticket>,
    /// Node that the peer's certificate names.
    pub(crate) certified: Option<Certified>,
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        Origin { ticket: self.ticket.clone(), certified: self.certified.clone() }
    }
}
