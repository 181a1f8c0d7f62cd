//! The messages from a session to its connection, as gRPC frames.
//!
//! tonic keeps a buffer for each stream that is as large as the stream's largest message: a snapshot, which an agent
//! receives once. Here each batch has a buffer of its own, and all streams share the payloads of snapshots.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use http::{HeaderMap, HeaderValue};
use hyper::body::Frame;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use switchtower_proto::v1::controller_message::Message;
use switchtower_proto::v1::{ControllerMessage, Part};
use tokio::sync::mpsc;

use crate::session::Batch;

/// Payloads of at least this size are not copied, in bytes.
const SHARED: usize = 16 << 10;
/// Length of the prefix of a gRPC message: flags, then the length.
const PREFIX: usize = 5;
/// Field of a part in a message, and of the payload in a part (`fleet.proto`).
const PART: u32 = 3;
const PAYLOAD: u32 = 3;

/// HTTP/2 frames of one stream, which ends with status OK when the session ends.
pub(super) struct Outbound {
    batches: mpsc::Receiver<Batch>,
    frames: VecDeque<Bytes>,
    ended: bool,
}

impl Outbound {
    pub(super) fn new(batches: mpsc::Receiver<Batch>) -> Self {
        Self { batches, frames: VecDeque::new(), ended: false }
    }
}

impl Stream for Outbound {
    type Item = Result<Frame<Bytes>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(frame))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            match ready!(self.batches.poll_recv(context)) {
                Some(batch) => self.frames = encode(&batch),
                None => {
                    self.ended = true;
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", HeaderValue::from_static("0"));
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
            }
        }
    }
}

/// Encodes all messages of a batch, in one frame if no payload is shared.
fn encode(batch: &[ControllerMessage]) -> VecDeque<Bytes> {
    let copied = |message: &ControllerMessage| {
        message.encoded_len() - shared(message).map_or(0, |part| part.payload.len())
    };
    let capacity = batch.iter().map(|message| PREFIX + copied(message)).sum();
    let (mut frames, mut frame) = (VecDeque::new(), BytesMut::with_capacity(capacity));
    for message in batch {
        prefix(message.encoded_len(), &mut frame);
        if let Some(part) = shared(message) {
            head(part, &mut frame);
            frames.push_back(frame.split().freeze());
            frames.push_back(part.payload.clone());
        } else {
            message.encode_raw(&mut frame);
        }
    }
    frames.extend((!frame.is_empty()).then(|| frame.freeze()));
    frames
}

fn prefix(length: usize, frame: &mut BytesMut) {
    frame.put_u8(0);
    frame.put_u32(length as u32);
}

/// Returns the part of a message if its payload is not copied.
fn shared(message: &ControllerMessage) -> Option<&Part> {
    match &message.message {
        Some(Message::Part(part)) if part.payload.len() >= SHARED => Some(part),
        _ => None,
    }
}

/// Encodes a message with a part up to its payload, which is the last field.
fn head(part: &Part, frame: &mut BytesMut) {
    encode_key(PART, WireType::LengthDelimited, frame);
    encode_varint(part.encoded_len() as u64, frame);
    Part { payload: Bytes::new(), ..*part }.encode_raw(frame);
    encode_key(PAYLOAD, WireType::LengthDelimited, frame);
    encode_varint(part.payload.len() as u64, frame);
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::{LayerKind, PartKind, Ping, UpdateEnd};

    use super::*;

    fn part(length: usize) -> ControllerMessage {
        let (layer, kind) = (LayerKind::Cluster as i32, PartKind::SnapshotDeflate as i32);
        let payload = Bytes::from(vec![7; length]);
        ControllerMessage { message: Some(Message::Part(Part { layer, kind, payload })) }
    }

    fn messages(lengths: &[usize]) -> Batch {
        let first = ControllerMessage { message: Some(Message::Ping(Ping::default())) };
        let last = ControllerMessage { message: Some(Message::UpdateEnd(UpdateEnd { to: 9 })) };
        [first].into_iter().chain(lengths.iter().map(|length| part(*length))).chain([last]).collect()
    }

    #[test]
    fn frames_contain_the_messages_of_a_batch() {
        let lengths: [&[usize]; 4] = [&[], &[0, 1, SHARED - 1], &[SHARED], &[SHARED, 3, 1 << 20, 1 << 21]];
        for lengths in lengths {
            let batch = messages(lengths);
            let mut expected = Vec::new();
            for message in &batch {
                expected.push(0);
                expected.extend((message.encoded_len() as u32).to_be_bytes());
                expected.extend(message.encode_to_vec());
            }
            let frames = encode(&batch);
            let shared = lengths.iter().filter(|length| **length >= SHARED).count();
            assert_eq!(frames.len(), 2 * shared + 1, "{lengths:?}");
            assert!(frames.into_iter().flatten().eq(expected), "{lengths:?}");
        }
    }

    #[test]
    fn snapshots_are_not_copied() {
        let batch = messages(&[SHARED]);
        let Some(Message::Part(part)) = &batch[1].message else { panic!("{:?}", batch[1]) };
        assert_eq!(encode(&batch)[1].as_ptr(), part.payload.as_ptr());
    }
}
