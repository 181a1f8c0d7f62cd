//! Entry points of the fuzz targets in `fuzz/`: input from the controller and from the kernel.
//!
//! Invariants: no input causes a panic, and a refused update leaves the view as it was.

use std::time::Instant;

use prost::Message as _;
use switchtower_proto::v1::ControllerMessage;
use switchtower_proto::v1::controller_message::Message;

use crate::state::{RefusedUpdate, State};

/// Reads records of a length (u16, little-endian) and a `ControllerMessage` of that length, as an agent does that had
/// no view before.
pub fn update(bytes: &[u8]) {
    let messages = messages(bytes);
    let mut state = State::new();
    let announced = play(&mut state, &messages, None);
    // Random content never has the announced digest. With the right one the update is applied.
    if let Err(actual) = announced {
        let _ = play(&mut state, &messages, Some(&actual));
    }
    let _ = (state.view(), state.held_items().count(), state.stored_holds());
}

fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let decoded = ControllerMessage::decode(&rest[..length]);
        messages.extend(decoded.ok().and_then(|message| message.message));
        bytes = &rest[length..];
    }
    messages
}

/// Plays updates. Returns the digest of the first content that differs from its announcement.
fn play(state: &mut State, messages: &[Message], digest: Option<&[u8]>) -> Result<(), Vec<u8>> {
    for message in messages {
        let seen = |state: &State| (state.digest(), state.generation(), state.counts().items, state.held());
        let before = seen(state);
        let result = match message.clone() {
            Message::Update(mut update) => {
                update.digest = digest.map_or(update.digest, <[u8]>::to_vec);
                state.begin(&update)
            }
            Message::Part(part) => state.part(&part),
            Message::UpdateEnd(end) => state.end(&end, Instant::now()).map(drop),
            Message::ReleaseHeld(release) => {
                state.release_held(release.before);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(refusal) = result {
            assert_eq!(before, seen(state), "a refusal has an effect");
            if let Some(actual) = actual_digest(&refusal) {
                return Err(actual);
            }
        }
    }
    Ok(())
}

/// Reads the digest of the content from the message of a refusal.
fn actual_digest(refusal: &RefusedUpdate) -> Option<Vec<u8>> {
    let (_, rest) = refusal.detail.split_once("the content has digest ")?;
    let number = u128::from_str_radix(rest.get(..32)?, 16).ok()?;
    Some(number.to_le_bytes().to_vec())
}

/// Reads a datagram as answers to all requests that the agent sends to the kernel.
pub fn netlink(bytes: &[u8]) {
    crate::kernel::read_datagram(bytes);
}

#[cfg(test)]
mod tests;
