//! Replays the corpora of `fuzz/`, and mutations of them.
//!
//! `SWITCHTOWER_UPDATE=1` writes the generated seeds again; `SWITCHTOWER_FUZZ_MUTATIONS` is the number of mutations of
//! each file (200).

use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use switchtower_proto::v1::{Part, ReleaseHeld, Update, UpdateEnd};

use super::*;
use crate::testing::{self, Fleet};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

/// Writes or compares a seed.
fn seed(target: &str, name: &str, bytes: &[u8]) {
    let path = corpus(target).join(name);
    if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
        fs::write(&path, bytes).unwrap();
    }
    assert!(path.exists(), "{} is missing; run this test with SWITCHTOWER_UPDATE=1", path.display());
}

/// Returns a mutation: changed, removed, repeated and inserted bytes.
fn mutated(bytes: &[u8], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..random.random_range(1..6) {
        let at = random.random_range(0..=bytes.len());
        let end = random.random_range(at..=bytes.len().min(at + 16));
        match random.random_range(0..5) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            3 => bytes.insert(at, random.random()),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = if random.random() {
                        random.random()
                    } else {
                        *byte ^ (1 << random.random_range(0..8))
                    };
                }
            }
        }
    }
    bytes
}

fn replay(target: &str, run: impl Fn(&[u8])) {
    let mutations = std::env::var("SWITCHTOWER_FUZZ_MUTATIONS").map_or(200, |text| text.parse().unwrap());
    let mut random = StdRng::seed_from_u64(1);
    let mut files: Vec<PathBuf> =
        fs::read_dir(corpus(target)).unwrap().map(|one| one.unwrap().path()).collect();
    files.sort_unstable();
    assert!(!files.is_empty());
    for file in files {
        let bytes = fs::read(&file).unwrap();
        run(&bytes);
        for _ in 0..mutations {
            run(&mutated(&bytes, &mut random));
        }
    }
}

fn records(updates: Vec<(Update, Vec<Part>)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |message: Message| {
        let encoded = ControllerMessage { message: Some(message) }.encode_to_vec();
        bytes.extend(u16::try_from(encoded.len()).unwrap().to_le_bytes());
        bytes.extend(encoded);
    };
    for (update, parts) in updates {
        let to = update.to;
        put(Message::Update(update));
        parts.into_iter().for_each(|part| put(Message::Part(part)));
        put(Message::UpdateEnd(UpdateEnd { to }));
    }
    put(Message::ReleaseHeld(ReleaseHeld { before: 3 }));
    bytes
}

#[test]
fn updates_of_the_corpus_and_their_mutations_handled() {
    let mut fleet = Fleet::new(4, 2);
    let snapshot = fleet.snapshot();
    seed("update", "snapshot", &records(vec![snapshot.clone()]));
    let deltas = vec![snapshot, fleet.add_endpoint(1, 5), fleet.remove(0..2, true)];
    seed("update", "deltas", &records(deltas));
    let mut fleet = Fleet::new(2, 1);
    let trial = vec![fleet.snapshot(), fleet.replace_settings(testing::settings_on_trial(1_000))];
    seed("update", "settings", &records(trial));
    let mut fleet = Fleet::new(150, 1);
    let held = vec![fleet.snapshot(), fleet.remove(0..140, true)];
    seed("update", "mass-removal", &records(held));
    replay("update", update);
}

#[test]
fn right_digest_found_for_changed_content() {
    let fleet = Fleet::new(4, 2);
    let (mut update, parts) = fleet.snapshot();
    update.digest = vec![7; 16];
    let messages = messages(&records(vec![(update, parts)]));
    let mut state = State::new();
    let actual = play(&mut state, &messages, None).unwrap_err();
    assert_eq!(actual, fleet.digest.to_bytes());
    assert_eq!(play(&mut state, &messages, Some(&actual)), Ok(()));
    assert!(state.is_loaded());
}

#[test]
fn datagrams_of_the_corpus_and_their_mutations_handled() {
    for (name, bytes) in crate::kernel::example_datagrams() {
        seed("netlink", name, &bytes);
    }
    replay("netlink", netlink);
}
