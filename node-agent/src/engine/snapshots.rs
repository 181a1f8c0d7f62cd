//! What is read from the state directory at start, and when the snapshot file is written. Other threads read and write;
//! the view is encoded here.

use std::time::{Duration, Instant, SystemTime};

use switchtower_telemetry::{span, spans};

use super::Engine;
use crate::engine::Parts;
use crate::state::TrialRecord;
use crate::storage::files::{self, Content};
use crate::storage::snapshot::{Restored, SnapshotFile};
use crate::storage::trial_file::TrialFile;

/// It is written after this time without a command ...
const QUIET: Duration = Duration::from_secs(1);
/// ... at most this often ...
const INTERVAL: Duration = Duration::from_secs(30);
/// ... and at the latest after this time, however busy the agent is.
const LATEST: Duration = Duration::from_secs(60);
/// A view that does not change is confirmed this often: the file's age is the time that no agent had the view in force.
const CONFIRM: Duration = Duration::from_secs(3600);
/// How long the end of the agent waits for the disk.
const LAST_WRITE: Duration = Duration::from_secs(5);

/// How long the start waits for the disk.
const FIRST_READ: Duration = Duration::from_secs(10);

/// What an earlier agent left in the state directory.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) view: Option<Restored>,
    /// The view is older than the limit.
    pub(super) expired: bool,
    pub(super) trial: Option<TrialRecord>,
}

/// Reads the state directory. What is unusable, or not read in time, is as good as absent.
pub(super) fn read(parts: &Parts) -> Kept {
    let (snapshot, trial, limit) = (parts.snapshot.clone(), parts.trial.clone(), parts.snapshot_limit);
    let kept = files::within(FIRST_READ, move || read_all(snapshot.as_ref(), trial.as_ref(), limit));
    kept.unwrap_or_else(|| {
        tracing::warn!(
            limit_s = FIRST_READ.as_secs(),
            "the state directory cannot be read in time; the agent starts as on a new node"
        );
        Kept::default()
    })
}

fn read_all(snapshot: Option<&SnapshotFile>, trial: Option<&TrialFile>, limit: Option<Duration>) -> Kept {
    let age = snapshot.and_then(|file| file.age(SystemTime::now()).ok());
    let view = snapshot.map(SnapshotFile::read).transpose().unwrap_or_else(|error| {
        tracing::warn!(%error, "the snapshot file is ignored");
        None
    });
    // An unusable file leaves the desired settings in force.
    let trial = trial.map(TrialFile::read).transpose().unwrap_or_else(|error| {
        tracing::warn!(%error, "the trial file is ignored");
        None
    });
    let expired = age.zip(limit).is_some_and(|(age, limit)| age > limit);
    Kept { view: view.flatten(), expired, trial: trial.flatten() }
}

/// When changes are written that came in since the file was written (`last`) or the agent started.
fn due(started: Instant, last: Option<Instant>, last_command: Instant) -> Instant {
    let earliest = last.map_or(started, |last| last + INTERVAL);
    earliest.max(last_command + QUIET).min(last.unwrap_or(started) + LATEST)
}

impl Engine {
    /// When the file has to be written; `None` if it is current or there is none.
    pub(super) fn snapshot_due(&self) -> Option<Instant> {
        self.parts.snapshot.as_ref()?;
        if self.dirty {
            return Some(due(self.started, self.last_snapshot, self.last_command));
        }
        self.kernel_holds_view().then(|| self.last_snapshot.unwrap_or(self.started) + CONFIRM)
    }

    /// Writes the view if it changed, or confirms the file.
    pub(super) fn keep_snapshot(&mut self) {
        if self.dirty {
            return self.write_snapshot();
        }
        self.last_snapshot = Some(Instant::now());
        if let Some(file) = &self.parts.snapshot {
            self.parts.files.put(file.path(), Content::Touched, None);
        }
    }

    /// The last write before the agent ends.
    pub(super) fn write_last_snapshot(&mut self) {
        if self.dirty {
            self.write_snapshot();
        }
        if !self.parts.files.flush(LAST_WRITE) {
            tracing::warn!(
                "the snapshot file is older than what the kernel holds: the disk did not take it in time"
            );
        }
    }

    /// What walks the whole view is done here, at most every [`INTERVAL`].
    pub(super) fn write_snapshot(&mut self) {
        self.parts.metrics.programming.without_local(self.state.without_local_endpoints());
        let Some(file) = &self.parts.snapshot else { return };
        self.last_snapshot = Some(Instant::now());
        let generation = i64::try_from(self.state.generation()).unwrap_or(i64::MAX);
        let span = span!("switchtower.snapshot.write", switchtower.generation = generation);
        match span.in_scope(|| SnapshotFile::encode(&self.state, &self.refused)) {
            Ok(bytes) => {
                self.dirty = false;
                let metrics = self.parts.metrics.clone();
                let written = Box::new(move || metrics.snapshot());
                self.parts.files.put(file.path(), Content::Bytes(bytes), Some(written));
            }
            Err(error) => {
                spans::failed(&span, &error);
                tracing::warn!(%error, "the view cannot be encoded for the snapshot file");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_when_it_is_quiet_and_never_much_later() {
        let started = Instant::now();
        let at = |seconds| started + Duration::from_secs(seconds);
        assert_eq!(due(started, None, at(3)), at(4), "the first soon");
        assert_eq!(due(started, Some(at(10)), at(12)), at(40), "not too often");
        assert_eq!(due(started, Some(at(10)), at(45)), at(46), "when it is quiet");
        // Commands that never stop.
        assert_eq!(due(started, Some(at(10)), at(69)), at(70));
        assert_eq!(due(started, Some(at(10)), at(500)), at(70));
        assert_eq!(due(started, None, at(59)), at(60));
    }
}
