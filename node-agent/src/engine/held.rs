//! Removals held by the delete budget: reports and release.

use super::Engine;

impl Engine {
    /// Updates the metric, and logs `added` further removals.
    pub(super) fn held_changed(&mut self, added: usize) {
        let held = self.state.held();
        self.parts.metrics.held.set(held as i64);
        if added > 0 {
            tracing::warn!(
                added,
                held,
                generation = self.state.generation(),
                "the delete budget holds removals; if they are intended, release them with \
                 `kubectl switchtower release-held`"
            );
        }
    }

    /// Releases held removals of generations below `before`, by a commit without a new generation.
    pub(super) fn release_held(&mut self, before: u64) {
        let held = self.state.held();
        let released = self.state.release_held(before);
        if self.state.held() == held {
            return;
        }
        tracing::info!(released = held - self.state.held(), before, "released held removals");
        self.held_changed(0);
        self.flow_checks.add(released.udp);
        self.health_checks_changed |= released.health_checks;
        if !self.confidence.must_compare() {
            self.pending.extend(released.changes);
        }
        self.snapshots.invalidate();
        // The deviations change with the commit, so it needs another acknowledgement.
        self.acknowledgement.due = true;
        self.queue_and_sync();
    }
}
