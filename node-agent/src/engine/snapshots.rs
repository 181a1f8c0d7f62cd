//! Content of the state directory at start, and the schedule of the snapshot file. Other threads read and write files;
//! the engine encodes the view.

use std::time::{Duration, Instant, SystemTime};

use switchtower_telemetry::{span, spans};

use super::Engine;
use crate::engine::Parts;
use crate::state::TrialRecord;
use crate::storage::files::{self, Content};
use crate::storage::snapshot::{Restored, SnapshotError, SnapshotFile};
use crate::storage::trial_file::TrialFile;

/// Time without a command after which a changed view is written.
const QUIET: Duration = Duration::from_secs(1);
/// Minimum interval between two writes.
const INTERVAL: Duration = Duration::from_secs(30);
/// Maximum interval between two writes of a view that keeps changing.
const LATEST: Duration = Duration::from_secs(60);
/// Interval between two confirmations of an unchanged view. The file's age is the time without an agent that held the
/// view.
const CONFIRM: Duration = Duration::from_secs(3600);
/// Timeout of the last write.
const LAST_WRITE: Duration = Duration::from_secs(5);
/// Timeout of the first read.
const FIRST_READ: Duration = Duration::from_secs(10);

/// Content of the state directory at start.
#[derive(Default)]
pub(super) struct StoredState {
    pub(super) view: Option<Restored>,
    /// The view is older than the limit.
    pub(super) expired: bool,
    pub(super) trial: Option<TrialRecord>,
}

/// Times that decide when the snapshot file is written.
#[derive(Debug)]
pub(super) struct Schedule {
    /// The file is older than the view.
    stale: bool,
    started: Instant,
    last_command: Instant,
    last_write: Option<Instant>,
}

impl Schedule {
    pub(super) fn new(now: Instant) -> Self {
        Self { stale: false, started: now, last_command: now, last_write: None }
    }

    /// Notes a command: writes wait for a quiet moment.
    pub(super) fn command(&mut self, now: Instant) {
        self.last_command = now;
    }

    /// Notes a commit; `is_new` if the view differs from the committed one before.
    pub(super) fn committed(&mut self, is_new: bool) {
        self.stale |= is_new || self.last_write.is_none();
    }

    /// Marks the file as older than the view.
    pub(super) fn invalidate(&mut self) {
        self.stale = true;
    }

    /// Returns the time to write a stale file.
    fn write_at(&self) -> Instant {
        let earliest = self.last_write.map_or(self.started, |last| last + INTERVAL);
        earliest.max(self.last_command + QUIET).min(self.last_write.unwrap_or(self.started) + LATEST)
    }

    /// Returns the time to confirm a current file.
    fn confirm_at(&self) -> Instant {
        self.last_write.unwrap_or(self.started) + CONFIRM
    }
}

/// Reads the state directory. Unusable files, and a disk that does not answer in time, count as absent.
pub(super) fn read(parts: &Parts) -> StoredState {
    let (snapshot, trial, limit) = (parts.snapshot.clone(), parts.trial.clone(), parts.snapshot_limit);
    let stored = files::within(FIRST_READ, move || read_all(snapshot.as_ref(), trial.as_ref(), limit));
    stored.unwrap_or_else(|| {
        tracing::warn!(
            limit_s = FIRST_READ.as_secs(),
            "timeout while reading the state directory; the agent starts as on a new node"
        );
        StoredState::default()
    })
}

fn read_all(
    snapshot: Option<&SnapshotFile>,
    trial: Option<&TrialFile>,
    limit: Option<Duration>,
) -> StoredState {
    let age = snapshot.and_then(|file| file.age(SystemTime::now()).ok());
    let view = match snapshot.map(SnapshotFile::read).transpose() {
        Ok(view) => view,
        Err(error @ SnapshotError::OtherNode { .. }) => {
            tracing::warn!(%error, "the state directory is ignored");
            return StoredState::default();
        }
        Err(error) => {
            tracing::warn!(%error, "the snapshot file is ignored");
            None
        }
    };
    // An unusable file leaves the desired settings in force.
    let trial = trial.map(TrialFile::read).transpose().unwrap_or_else(|error| {
        tracing::warn!(%error, "the trial file is ignored");
        None
    });
    let expired = age.zip(limit).is_some_and(|(age, limit)| age > limit);
    StoredState { view: view.flatten(), expired, trial: trial.flatten() }
}

impl Engine {
    /// Returns the time of the next write or confirmation; `None` without a state directory or a committed view.
    pub(super) fn snapshot_due(&self) -> Option<Instant> {
        self.parts.snapshot.as_ref()?;
        if self.snapshots.stale {
            return Some(self.snapshots.write_at());
        }
        self.kernel_holds_view().then(|| self.snapshots.confirm_at())
    }

    /// Writes a changed view, or confirms an unchanged one.
    pub(super) fn keep_snapshot(&mut self) {
        if self.snapshots.stale {
            return self.write_snapshot();
        }
        self.snapshots.last_write = Some(Instant::now());
        if let Some(file) = &self.parts.snapshot {
            self.parts.files.put(file.path(), Content::Touched, None);
        }
    }

    /// Writes a changed view and waits for the disk, before the agent exits.
    pub(super) fn write_last_snapshot(&mut self) {
        if self.snapshots.stale {
            self.write_snapshot();
        }
        if !self.parts.files.flush(LAST_WRITE) {
            tracing::warn!("timeout while writing the snapshot file; it is older than the kernel's state");
        }
    }

    /// Encodes and writes the view. Other walks over the whole view run here too: at most once per [`INTERVAL`].
    pub(super) fn write_snapshot(&mut self) {
        self.parts.metrics.programming.without_local(self.state.without_local_endpoints());
        let Some(file) = &self.parts.snapshot else { return };
        self.snapshots.last_write = Some(Instant::now());
        let generation = i64::try_from(self.state.generation()).unwrap_or(i64::MAX);
        let span = span!("switchtower.snapshot.write", switchtower.generation = generation);
        match span.in_scope(|| SnapshotFile::encode(&self.state, &self.refused)) {
            Ok(bytes) => {
                self.snapshots.stale = false;
                let metrics = self.parts.metrics.clone();
                let written = Box::new(move || metrics.snapshot());
                self.parts.files.put(file.path(), Content::Bytes(bytes), Some(written));
            }
            Err(error) => {
                spans::failed(&span, &error);
                tracing::warn!(%error, "cannot encode the view for the snapshot file");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_written_when_quiet_and_never_much_later() {
        let started = Instant::now();
        let at = |seconds| started + Duration::from_secs(seconds);
        let due = |started, last_write, last_command| {
            Schedule { stale: true, started, last_command, last_write }.write_at()
        };
        assert_eq!(due(started, None, at(3)), at(4), "the first soon");
        assert_eq!(due(started, Some(at(10)), at(12)), at(40), "not too often");
        assert_eq!(due(started, Some(at(10)), at(45)), at(46), "when it is quiet");
        // A steady stream of commands.
        assert_eq!(due(started, Some(at(10)), at(69)), at(70));
        assert_eq!(due(started, Some(at(10)), at(500)), at(70));
        assert_eq!(due(started, None, at(59)), at(60));
    }
}
