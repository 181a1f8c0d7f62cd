//! Snapshot file: the view for a restarted or rebooted agent without a controller.
//!
//! The file holds the view only; the kernel's stamp decides whether it is current. It is written to a
//! temporary file, synced and renamed (by [`crate::storage::files`]), ends in a checksum, and is ignored with a reason if
//! it is damaged, of another version, or of another node: a disk image may contain the file of the node that it was made
//! from.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use prost::Message;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::{Change, Deviation, LayerKind, Resume, Source, Update};

use crate::kernel::dataplane::Refused;
use crate::state::{RefusedUpdate, State, StoredHolds};

/// Name and version of the format.
const MAGIC: &[u8; 8] = b"SWTVIEW1";
/// Marks the end of the items.
const END: u8 = 0xff;
/// Maximum size of the file in bytes.
const SIZE_LIMIT: u64 = 1 << 30;
const CHECKSUM: usize = 32;

/// Everything except the items.
#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(uint64, tag = "1")]
    generation: u64,
    #[prost(bytes = "vec", tag = "2")]
    digest: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    resume: Option<Resume>,
    #[prost(message, optional, tag = "4")]
    source: Option<Source>,
    #[prost(message, repeated, tag = "5")]
    deviations: Vec<Deviation>,
    #[prost(message, optional, tag = "6")]
    holds: Option<StoredHolds>,
}

/// Unusable snapshot file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// It cannot be read or written.
    #[error("snapshot file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It is damaged, or another version wrote it.
    #[error("snapshot file {path} is not usable: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Fault of the content.
        reason: String,
    },
    /// Its addresses and local endpoints are those of another node.
    #[error(
        "snapshot file {path} is of node {found}, not of {own}; start new nodes with an empty state directory"
    )]
    OtherNode {
        /// The file.
        path: PathBuf,
        /// Name of the Node in the file.
        found: String,
        /// Name of this agent's Node.
        own: String,
    },
}

/// The snapshot file of a state directory.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotFile {
    path: PathBuf,
    node: String,
}

/// View from a snapshot file.
pub(crate) struct Restored {
    /// The view.
    pub(crate) state: State,
    /// Items that the kernel refused when the file was written.
    pub(crate) refused: Vec<Refused>,
}

impl SnapshotFile {
    /// Returns the file of this node in `directory`, which the first write creates.
    pub(crate) fn new(directory: &Path, node: &str) -> Self {
        SnapshotFile { path: Self::path_in(directory), node: node.to_owned() }
    }

    /// Returns the path of the file in a state directory.
    pub(crate) fn path_in(directory: &Path) -> PathBuf {
        directory.join("view.snapshot")
    }

    fn io(&self, source: io::Error) -> SnapshotError {
        SnapshotError::Io { path: self.path.clone(), source }
    }

    fn unusable(&self, reason: impl Into<String>) -> SnapshotError {
        SnapshotError::Unusable { path: self.path.clone(), reason: reason.into() }
    }

    /// Returns its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the time since the last write or confirmation; zero for a time in the future.
    ///
    /// # Errors
    /// There is no file, or its time cannot be read.
    pub(crate) fn age(&self, now: SystemTime) -> io::Result<Duration> {
        Ok(now.duration_since(std::fs::metadata(&self.path)?.modified()?).unwrap_or_default())
    }

    /// Encodes a view as the content of the file.
    ///
    /// # Errors
    /// A record is too large for the format.
    pub(crate) fn encode(state: &State, refused: &[Refused]) -> io::Result<Vec<u8>> {
        let mut out = Vec::from(MAGIC);
        let deviations = refused.iter().map(|Refused { item, reason, errno }| Deviation {
            item: item.clone(),
            reason: reason.clone(),
            errno: *errno,
        });
        let header = Header {
            generation: state.generation(),
            digest: state.digest().to_bytes().to_vec(),
            resume: state.resume().cloned(),
            source: state.source().copied(),
            deviations: deviations.collect(),
            holds: Some(state.stored_holds()),
        };
        put_record(&mut out, &header)?;
        state.export(&mut |layer, change| {
            out.push(layer as u8);
            put_record(&mut out, &change)
        })?;
        out.push(END);
        let checksum = blake3::hash(&out);
        out.extend_from_slice(checksum.as_bytes());
        Ok(out)
    }

    /// Reads the view; `None` if there is no file.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or is of another version or node.
    pub(crate) fn read(&self) -> Result<Option<Restored>, SnapshotError> {
        let size = match std::fs::metadata(&self.path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(error)),
        };
        if size > SIZE_LIMIT {
            return Err(self.unusable(format!("it has {size} bytes")));
        }
        let bytes = std::fs::read(&self.path).map_err(|error| self.io(error))?;
        let Some(content) = bytes.len().checked_sub(CHECKSUM).map(|end| &bytes[..end]) else {
            return Err(self.unusable("it is too short"));
        };
        if !content.starts_with(MAGIC) {
            return Err(self.unusable("it is of another version"));
        }
        if blake3::hash(content).as_bytes() != &bytes[content.len()..] {
            return Err(self.unusable("its checksum does not match its content"));
        }
        let restored = parse(&content[MAGIC.len()..]).map_err(|reason| self.unusable(reason))?;
        match restored.state.node() {
            Some(node) if node.name != self.node => Err(SnapshotError::OtherNode {
                path: self.path.clone(),
                found: node.name.clone(),
                own: self.node.clone(),
            }),
            _ => Ok(Some(restored)),
        }
    }
}

fn parse(mut rest: &[u8]) -> Result<Restored, String> {
    let header = Header::decode(record(&mut rest)?).map_err(|error| error.to_string())?;
    if Digest::from_bytes(&header.digest).is_none() {
        return Err("its digest is not 16 bytes".into());
    }
    let update = Update {
        to: header.generation,
        digest: header.digest,
        resume: header.resume,
        source: header.source,
        ..Update::default()
    };
    let mut changes = std::iter::from_fn(|| next_change(&mut rest));
    let mut state = State::new();
    state.restore(&update, &mut changes, Instant::now()).map_err(|refusal| refusal.to_string())?;
    if let Some(holds) = &header.holds {
        state.restore_holds(holds).map_err(|malformed| malformed.to_string())?;
    }
    let refused = header.deviations.into_iter().map(|Deviation { item, reason, errno }| Refused {
        item,
        reason,
        errno,
    });
    Ok(Restored { state, refused: refused.collect() })
}

fn next_change(rest: &mut &[u8]) -> Option<Result<(LayerKind, Change), RefusedUpdate>> {
    let (kind, after) = rest.split_first()?;
    *rest = after;
    if *kind == END {
        return None;
    }
    let broken = |detail: String| RefusedUpdate { reason: Default::default(), detail };
    let layer = LayerKind::try_from(i32::from(*kind)).map_err(|error| broken(error.to_string()));
    let change = record(rest)
        .and_then(|bytes| Change::decode(bytes).map_err(|error| error.to_string()))
        .map_err(broken);
    Some(layer.and_then(|layer| Ok((layer, change?))))
}

fn record<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let short = || "it ends inside a record".to_owned();
    let (length, after) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > after.len() {
        return Err(short());
    }
    let (content, after) = after.split_at(length);
    *rest = after;
    Ok(content)
}

fn put_record(out: &mut Vec<u8>, message: &impl Message) -> io::Result<()> {
    let length = message.encoded_len();
    let prefix = u32::try_from(length).map_err(|_| io::Error::other("a record is above 4 GiB"))?;
    out.extend_from_slice(&prefix.to_le_bytes());
    message.encode(out).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn write(file: &SnapshotFile, state: &State, refused: &[Refused]) {
        crate::storage::files::replace(file.path(), &SnapshotFile::encode(state, refused).unwrap()).unwrap();
    }

    #[test]
    fn view_round_trips() {
        let directory = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(directory.path(), "node-1");
        assert!(file.read().unwrap().is_none());
        let state = testing::state(40, 3);
        let refused = vec![Refused { item: "frontend".into(), reason: "no".into(), errno: 22 }];
        write(&file, &state, &refused);
        let restored = file.read().unwrap().unwrap();
        assert_eq!(restored.state.digest(), state.digest());
        assert_eq!(restored.state.generation(), state.generation());
        assert_eq!(restored.state.counts(), state.counts());
        assert_eq!(restored.refused, refused);
    }

    #[test]
    fn file_of_another_node_refused() {
        let directory = tempfile::tempdir().unwrap();
        write(&SnapshotFile::new(directory.path(), "node-1"), &testing::state(3, 2), &[]);
        let read = SnapshotFile::new(directory.path(), "node-2").read();
        let Err(SnapshotError::OtherNode { found, own, .. }) = read else { panic!("it was read") };
        assert_eq!((found.as_str(), own.as_str()), ("node-1", "node-2"));
    }

    #[test]
    fn damaged_file_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(directory.path(), "node-1");
        write(&file, &testing::state(3, 2), &[]);
        let good = std::fs::read(&file.path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            std::fs::write(&file.path, bad).unwrap();
            assert!(file.read().is_err(), "byte {at} was changed");
        }
        for length in 0..good.len() {
            std::fs::write(&file.path, &good[..length]).unwrap();
            assert!(file.read().is_err(), "cut to {length}");
        }
    }
}
