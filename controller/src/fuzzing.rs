//! Entry point of the fuzz target in `fuzz/`: messages of agents.
//!
//! Invariant: no message causes a panic.

use prost::Message as _;
use switchtower_proto::v1::AgentMessage;

/// Decodes an `AgentMessage`, validates and truncates it.
pub fn agent_message(bytes: &[u8]) {
    if let Some(message) = AgentMessage::decode(bytes).ok().and_then(|message| message.message) {
        crate::session::read_message(message);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use switchtower_proto::v1::agent_message::Message;
    use switchtower_proto::v1::{
        Ack, Deviation, Deviations, Hello, Nack, ProbeResult, Report, Stamp, TrialStatus, View,
    };

    use super::*;

    fn deviations() -> Deviations {
        let sample = Deviation { item: "frontend".into(), reason: "no".into(), errno: 22 };
        Deviations { held: 3, refused: 1, samples: vec![sample; 20], ..Deviations::default() }
    }

    fn trial() -> TrialStatus {
        let result = ProbeResult { probe: "p".into(), detail: "\u{1b}[0m".into(), ..ProbeResult::default() };
        TrialStatus { profile: "default".into(), revision: 2, phase: 2, results: vec![result; 3] }
    }

    fn seeds() -> [(&'static str, Message); 4] {
        let hello = Hello {
            versions: vec![1],
            node_name: "n1".into(),
            kernel: Some(Stamp { generation: 7, digest: vec![1; 16] }),
            view: Some(View { generation: 7, digest: vec![1; 16], ..View::default() }),
            addresses: vec![vec![192, 0, 2, 1]],
            deviations: Some(deviations()),
            trial: Some(trial()),
            ..Hello::default()
        };
        let ack =
            Ack { generation: 7, digest: vec![1; 16], deviations: Some(deviations()), ..Ack::default() };
        [
            ("hello", Message::Hello(hello)),
            ("ack", Message::Ack(ack)),
            ("nack", Message::Nack(Nack { generation: 8, reason: 6, errno: 12, ..Nack::default() })),
            ("report", Message::Report(Report { trial: Some(trial()), ..Report::default() })),
        ]
    }

    #[test]
    fn messages_of_the_corpus_and_their_mutations_handled() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/agent_message");
        for (name, message) in seeds() {
            if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
                let bytes = AgentMessage { message: Some(message) }.encode_to_vec();
                fs::write(corpus.join(name), bytes).unwrap();
            }
            assert!(corpus.join(name).exists(), "{name} is missing; run this test with SWITCHTOWER_UPDATE=1");
        }
        let mut random = StdRng::seed_from_u64(1);
        let files = fs::read_dir(&corpus).unwrap().map(|one| one.unwrap().path());
        for file in files.collect::<std::collections::BTreeSet<PathBuf>>() {
            let bytes = fs::read(&file).unwrap();
            agent_message(&bytes);
            for _ in 0..5_000 {
                let mut bytes = bytes.clone();
                for _ in 0..random.random_range(1..6) {
                    let at = random.random_range(0..bytes.len());
                    bytes[at] = random.random();
                }
                agent_message(&bytes);
            }
        }
    }
}
