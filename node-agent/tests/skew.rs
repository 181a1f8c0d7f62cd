//! Version skew: the agent applies the updates that controllers of recorded versions sent (docs/upgrading.md).
//!
//! Files in `skew` contain messages of a controller, each after its length (u32, little-endian): a snapshot, and one delta of
//! each kind. `SWITCHTOWER_RECORD=VERSION cargo test -p switchtower-node-agent --test skew` records the current ones; do this
//! for each release, and never change a recorded file.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use prost::Message as _;
use switchtower_node_agent::state::State;
use switchtower_node_agent_testing::fleet::{Fleet, frontend, node_record, settings};
use switchtower_proto::v1::controller_message::Message;
use switchtower_proto::v1::{ControllerMessage, NodeRecord, Part, Settings, Update, UpdateEnd};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/skew")
}

/// A snapshot and deltas of all layers.
fn updates() -> Vec<(Update, Vec<Part>)> {
    let mut fleet = Fleet::new(20, 3);
    vec![
        fleet.snapshot(),
        fleet.add_endpoint(3, 7),
        fleet.add_frontend(frontend(40)),
        fleet.replace_node(NodeRecord { zone: "b".into(), ..node_record() }),
        fleet.replace_settings(Settings { masquerade_all: true, ..settings() }),
        fleet.remove(5..7, true),
    ]
}

fn record(path: &Path) {
    let mut bytes = Vec::new();
    let mut put = |message: Message| {
        let encoded = ControllerMessage { message: Some(message) }.encode_to_vec();
        bytes.extend(u32::try_from(encoded.len()).unwrap().to_le_bytes());
        bytes.extend(encoded);
    };
    for (update, parts) in updates() {
        let to = update.to;
        put(Message::Update(update));
        parts.into_iter().for_each(|part| put(Message::Part(part)));
        put(Message::UpdateEnd(UpdateEnd { to }));
    }
    fs::create_dir_all(folder()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Applies a recorded session; returns the number of updates.
fn play(mut bytes: &[u8]) -> usize {
    let mut state = State::new();
    let mut updates = 0;
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let (message, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        bytes = rest;
        match ControllerMessage::decode(message).unwrap().message.unwrap() {
            Message::Update(update) => state.begin(&update).unwrap(),
            Message::Part(part) => state.part(&part).unwrap(),
            // The agent compares the digest of the content with that of the update.
            Message::UpdateEnd(end) => {
                state.end(&end, Instant::now()).unwrap();
                updates += 1;
                assert_eq!(state.generation(), end.to);
            }
            other => panic!("{other:?}"),
        }
    }
    updates
}

#[test]
fn updates_of_recorded_versions_are_applied() {
    if let Some(version) = std::env::var_os("SWITCHTOWER_RECORD") {
        record(&folder().join(format!("{}.frames", version.display())));
    }
    let files: Vec<_> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!files.is_empty());
    for file in files {
        assert_eq!(play(&fs::read(&file).unwrap()), updates().len(), "{}", file.display());
    }
}
