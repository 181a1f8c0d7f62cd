//! When the snapshot file is written.

use std::time::{Duration, Instant};

use switchtower_telemetry::{span, spans};

use super::Engine;

/// It is written after this time without a command ...
const QUIET: Duration = Duration::from_secs(1);
/// ... at most this often ...
const INTERVAL: Duration = Duration::from_secs(30);
/// ... and at the latest after this time, however busy the agent is.
const LATEST: Duration = Duration::from_secs(60);

/// When changes are written that came in since the file was written (`last`) or the agent started.
fn due(started: Instant, last: Option<Instant>, last_command: Instant) -> Instant {
    let earliest = last.map_or(started, |last| last + INTERVAL);
    earliest.max(last_command + QUIET).min(last.unwrap_or(started) + LATEST)
}

impl Engine {
    /// When the file has to be written; `None` if it is current or there is none.
    pub(super) fn snapshot_due(&self) -> Option<Instant> {
        let wanted = self.dirty && self.parts.snapshot.is_some();
        wanted.then(|| due(self.started, self.last_snapshot, self.last_command))
    }

    /// What walks the whole view is done here, at most every [`INTERVAL`].
    pub(super) fn write_snapshot(&mut self) {
        self.parts.metrics.programming.without_local(self.state.without_local_endpoints());
        let Some(file) = &self.parts.snapshot else { return };
        self.last_snapshot = Some(Instant::now());
        let generation = i64::try_from(self.state.generation()).unwrap_or(i64::MAX);
        let span = span!("switchtower.snapshot.write", switchtower.generation = generation);
        match span.in_scope(|| file.write(&self.state, &self.refused)) {
            Ok(()) => {
                self.dirty = false;
                self.parts.metrics.snapshot();
            }
            Err(error) => {
                spans::failed(&span, &error);
                tracing::warn!(%error, "the snapshot file could not be written");
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
