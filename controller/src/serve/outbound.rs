//! Stream of messages from a session to its connection.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use switchtower_proto::v1::ControllerMessage;
use tokio::sync::mpsc;
use tonic::Status;

use crate::session::Batch;

/// Messages of batches, one by one. All messages of a batch are ready at once, so that the connection writes them in
/// one frame.
pub(super) struct Flattened {
    batches: mpsc::Receiver<Batch>,
    current: std::vec::IntoIter<ControllerMessage>,
}

impl Flattened {
    pub(super) fn new(batches: mpsc::Receiver<Batch>) -> Self {
        Self { batches, current: Vec::new().into_iter() }
    }
}

impl Stream for Flattened {
    type Item = Result<ControllerMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(message) = self.current.next() {
                return Poll::Ready(Some(Ok(message)));
            }
            match ready!(self.batches.poll_recv(context)) {
                Some(batch) => self.current = batch.into_iter(),
                None => return Poll::Ready(None),
            }
        }
    }
}
