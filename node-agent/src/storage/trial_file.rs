//! Record of a trial of settings across a restart of the agent.
//!
//! It has a few kilobytes and is written whenever the trial's status changes; unless the disk stalls, before the kernel
//! follows. After a crash the next agent therefore knows the settings in force and the failures. The snapshot file is
//! written less often, and does not cover trials.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use prost::Message;
use switchtower_proto::v1::{Settings, TrialPhase};

use crate::state::{Measured, ProbeOutcome, TrialRecord};

/// Name and version of the format.
const MAGIC: &[u8; 8] = b"SWTRIAL1";
const CHECKSUM: usize = 32;
/// Maximum size of the file in bytes.
const SIZE_LIMIT: u64 = 16 << 20;

/// The file of a state directory.
#[derive(Debug, Clone)]
pub(crate) struct TrialFile {
    path: PathBuf,
}

/// Unusable trial file.
#[derive(Debug, thiserror::Error)]
#[error("trial file {path}: {source}")]
pub(crate) struct TrialFileError {
    /// The file.
    pub(crate) path: PathBuf,
    /// Cause; [`io::ErrorKind::InvalidData`] if it is damaged or of another version.
    pub(crate) source: io::Error,
}

#[derive(Clone, PartialEq, Message)]
struct Content {
    #[prost(message, required, tag = "1")]
    tried: Settings,
    #[prost(message, required, tag = "2")]
    in_force: Settings,
    #[prost(enumeration = "TrialPhase", tag = "3")]
    phase: i32,
    #[prost(message, repeated, tag = "4")]
    before: Vec<Row>,
    #[prost(message, repeated, tag = "5")]
    after: Vec<Row>,
    #[prost(message, optional, tag = "6")]
    again: Option<Rows>,
}

#[derive(Clone, PartialEq, Message)]
struct Rows {
    #[prost(message, repeated, tag = "1")]
    rows: Vec<Row>,
}

#[derive(Clone, PartialEq, Message)]
struct Row {
    #[prost(string, tag = "1")]
    probe: String,
    #[prost(string, tag = "2")]
    address: String,
    #[prost(enumeration = "Kind", tag = "3")]
    kind: i32,
    #[prost(int32, tag = "4")]
    errno: i32,
    #[prost(string, tag = "5")]
    detail: String,
    #[prost(message, repeated, tag = "6")]
    seen: Vec<SeenBy>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Kind {
    Absent = 0,
    Passed = 1,
    Failed = 2,
}

#[derive(Clone, PartialEq, Message)]
struct SeenBy {
    #[prost(string, tag = "1")]
    backend: String,
    #[prost(string, repeated, tag = "2")]
    sources: Vec<String>,
}

impl TrialFile {
    /// Returns the file in `directory`, which the first write creates.
    pub(crate) fn new(directory: &Path) -> Self {
        TrialFile { path: directory.join("trial") }
    }

    fn failed(&self, source: io::Error) -> TrialFileError {
        TrialFileError { path: self.path.clone(), source }
    }

    /// Returns its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Encodes a record as the content of the file.
    pub(crate) fn encode(record: &TrialRecord) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(content(record).encode_to_vec());
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        bytes
    }

    /// Reads the record; `None` if there is no file.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or is of another version.
    pub(crate) fn read(&self) -> Result<Option<TrialRecord>, TrialFileError> {
        let unusable = |what: &str| self.failed(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
        match std::fs::metadata(&self.path) {
            Ok(metadata) if metadata.len() > SIZE_LIMIT => return Err(unusable("it is too large")),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed(error)),
        }
        let bytes = std::fs::read(&self.path).map_err(|error| self.failed(error))?;
        let Some(end) = bytes.len().checked_sub(CHECKSUM) else { return Err(unusable("it is too short")) };
        let (content, checksum) = bytes.split_at(end);
        if blake3::hash(content).as_bytes() != checksum {
            return Err(unusable("its checksum does not match its content"));
        }
        let Some(content) = content.strip_prefix(MAGIC) else {
            return Err(unusable("it is of another version"));
        };
        let content = Content::decode(content).map_err(|error| unusable(&error.to_string()))?;
        record(content).map(Some).ok_or_else(|| unusable("it lacks the phase of the trial"))
    }
}

fn content(record: &TrialRecord) -> Content {
    let TrialRecord { tried, in_force, phase, before, after, again } = record;
    let rows = |all: &[Measured]| all.iter().map(row).collect();
    Content {
        tried: tried.clone(),
        in_force: in_force.clone(),
        phase: *phase as i32,
        before: rows(before),
        after: rows(after),
        again: again.as_deref().map(|again| Rows { rows: rows(again) }),
    }
}

fn record(content: Content) -> Option<TrialRecord> {
    let phase = content.phase();
    let Content { tried, in_force, before, after, again, .. } = content;
    let all = |rows: Vec<Row>| rows.into_iter().map(measured).collect();
    let (before, after, again) = (all(before), all(after), again.map(|again| all(again.rows)));
    (phase != TrialPhase::Unspecified).then_some(TrialRecord { tried, in_force, phase, before, after, again })
}

fn row(measured: &Measured) -> Row {
    let Measured { probe, address, outcome } = measured;
    let address = address.map(|address| address.to_string()).unwrap_or_default();
    let (kind, errno, detail, seen) = match outcome {
        ProbeOutcome::Passed { seen } => {
            let seen = seen.iter().map(|(backend, sources)| SeenBy {
                backend: backend.clone(),
                sources: sources.iter().map(ToString::to_string).collect(),
            });
            (Kind::Passed, 0, String::new(), seen.collect())
        }
        ProbeOutcome::Failed { errno, detail } => (Kind::Failed, *errno, detail.clone(), Vec::new()),
        ProbeOutcome::Absent { detail } => (Kind::Absent, 0, detail.clone(), Vec::new()),
    };
    Row { probe: probe.clone(), address, kind: kind as i32, errno, detail, seen }
}

fn measured(row: Row) -> Measured {
    let kind = row.kind();
    let Row { probe, address, errno, detail, seen, .. } = row;
    let outcome = match kind {
        Kind::Passed => {
            let seen = seen.into_iter().map(|SeenBy { backend, sources }| {
                (backend, sources.iter().filter_map(|source| source.parse().ok()).collect())
            });
            ProbeOutcome::Passed { seen: seen.collect() }
        }
        Kind::Failed => ProbeOutcome::Failed { errno, detail },
        Kind::Absent => ProbeOutcome::Absent { detail },
    };
    Measured { probe, address: address.parse::<SocketAddr>().ok(), outcome }
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::Trial;

    use super::*;

    fn example() -> TrialRecord {
        let address = Some("10.96.0.1:443".parse().unwrap());
        let seen = [("a".to_owned(), ["10.0.0.1".parse().unwrap()].into())].into();
        let one = |outcome| Measured { probe: "api".into(), address, outcome };
        TrialRecord {
            tried: Settings {
                profile: "default".into(),
                revision: 2,
                trial: Some(Box::new(Trial { window_milliseconds: 5, ..Trial::default() })),
                ..Settings::default()
            },
            in_force: Settings { profile: "builtin".into(), ..Settings::default() },
            phase: TrialPhase::RolledBack,
            before: vec![one(ProbeOutcome::Passed { seen })],
            after: vec![one(ProbeOutcome::Failed { errno: 111, detail: "refused".into() })],
            again: Some(vec![Measured {
                probe: "api".into(),
                address: None,
                outcome: ProbeOutcome::Absent { detail: "gone".into() },
            }]),
        }
    }

    #[test]
    fn written_file_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let file = TrialFile::new(&directory.path().join("state"));
        assert!(file.read().unwrap().is_none());
        crate::storage::files::replace(file.path(), &TrialFile::encode(&example())).unwrap();
        assert_eq!(file.read().unwrap(), Some(example()));
    }

    #[test]
    fn damaged_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = TrialFile::new(directory.path());
        crate::storage::files::replace(file.path(), &TrialFile::encode(&example())).unwrap();
        let good = std::fs::read(&file.path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            std::fs::write(&file.path, &bad).unwrap();
            assert!(file.read().is_err(), "byte {at} was changed");
            std::fs::write(&file.path, &good[..at]).unwrap();
            assert!(file.read().is_err(), "cut to {at}");
        }
    }
}
