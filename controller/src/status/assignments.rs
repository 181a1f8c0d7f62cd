//! Stored and requested assignments of settings to nodes, shared by the writer of rows and the rollouts.
//!
//! Invariants: a request lasts until the row contains it. A concurrent write of the row by another client cancels the
//! request, and the rollout decides again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use switchtower_crds::ProfileAssignment;
use tokio::sync::Notify;

use crate::sync::lock;

/// Assignment in the row in the API server.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StoredAssignment {
    /// `spec.profile`.
    pub profile: Option<ProfileAssignment>,
    /// An agent has connected since the row was created.
    pub had_agent: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// All rows were read: a node without an entry in `stored` has no assignment.
    loaded: bool,
    stored: HashMap<Arc<str>, StoredAssignment>,
    requested: HashMap<Arc<str>, ProfileAssignment>,
    /// Nodes with a request that the writer has not seen.
    pending: BTreeSet<Arc<str>>,
}

/// Assignments of all nodes. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Assignments {
    inner: Arc<Mutex<Inner>>,
    requests: Arc<Notify>,
    rows: Arc<Notify>,
}

impl Assignments {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Requests that rows name these revisions.
    pub fn request(&self, requested: BTreeMap<Arc<str>, ProfileAssignment>) {
        if requested.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for (node, assignment) in requested {
            if inner.requested.get(&node).is_some_and(|known| is_same_move(known, &assignment)) {
                continue;
            }
            inner.pending.insert(node.clone());
            inner.requested.insert(node, assignment);
        }
        drop(inner);
        self.requests.notify_one();
    }

    /// Records that all rows were read.
    pub(crate) fn set_loaded(&self) {
        self.lock().loaded = true;
        self.rows.notify_one();
    }

    /// Returns true once all rows were read; until then a node without a known assignment may have one.
    #[must_use]
    pub fn loaded(&self) -> bool {
        self.lock().loaded
    }

    /// Returns the requested assignment of a node, or the stored one if none is requested, and the stored row.
    #[must_use]
    pub fn of(&self, node: &str) -> (Option<ProfileAssignment>, StoredAssignment) {
        let inner = self.lock();
        let stored = inner.stored.get(node).cloned().unwrap_or_default();
        (inner.requested.get(node).cloned().or_else(|| stored.profile.clone()), stored)
    }

    /// Returns all stored assignments.
    #[must_use]
    pub fn stored(&self) -> Vec<(Arc<str>, ProfileAssignment)> {
        let inner = self.lock();
        let named = inner.stored.iter().filter_map(|(node, row)| Some((node.clone(), row.profile.clone()?)));
        named.collect()
    }

    /// Waits until the assignment in a row changes. Cancel-safe.
    pub async fn row_changed(&self) {
        self.rows.notified().await;
    }

    /// Waits for requests and returns the nodes. Cancel-safe.
    pub(super) async fn next_requests(&self) -> Vec<Arc<str>> {
        loop {
            let pending = std::mem::take(&mut self.lock().pending);
            if !pending.is_empty() {
                return pending.into_iter().collect();
            }
            self.requests.notified().await;
        }
    }

    /// Returns the requested assignment of a node if it differs from `stored`.
    pub(super) fn requested(
        &self,
        node: &str,
        stored: Option<&ProfileAssignment>,
    ) -> Option<ProfileAssignment> {
        self.lock().requested.get(node).filter(|requested| !contains(stored, requested)).cloned()
    }

    /// Records the row in the API server. Completes the request that it contains.
    pub(crate) fn set(&self, node: &Arc<str>, row: &StoredAssignment) {
        let mut inner = self.lock();
        if inner.requested.get(node).is_some_and(|requested| contains(row.profile.as_ref(), requested)) {
            inner.requested.remove(node);
        }
        let before = inner.stored.insert(node.clone(), row.clone());
        drop(inner);
        if before.as_ref() != Some(row) {
            self.rows.notify_one();
        }
    }

    /// Cancels the request of a node: another client wrote the row after the request was made.
    pub(super) fn cancel(&self, node: &str) {
        self.lock().requested.remove(node);
        self.rows.notify_one();
    }

    /// Cancels all requests: this replica is not the leader any more.
    pub(super) fn cancel_all(&self) {
        let mut inner = self.lock();
        inner.requested.clear();
        inner.pending.clear();
        drop(inner);
        self.rows.notify_one();
    }

    /// Removes a node without a row.
    pub(super) fn remove(&self, node: &str) {
        let mut inner = self.lock();
        let known = inner.stored.remove(node).is_some() | inner.requested.remove(node).is_some();
        drop(inner);
        if known {
            self.rows.notify_one();
        }
    }
}

/// Returns true for the same revision with the same previous revision, regardless of the time of assignment.
fn is_same_move(one: &ProfileAssignment, other: &ProfileAssignment) -> bool {
    (&one.name, one.revision, &one.previous) == (&other.name, other.revision, &other.previous)
}

/// Returns true if the row contains the requested assignment.
///
/// A CRD without the field `previous` drops it: a row without the field counts as equal, otherwise the writer would
/// never stop. A stored `previous` that is not requested always differs.
fn contains(stored: Option<&ProfileAssignment>, requested: &ProfileAssignment) -> bool {
    let without = |from: &ProfileAssignment| ProfileAssignment { previous: None, ..from.clone() };
    stored.is_some_and(|stored| {
        let previous = stored.previous.is_none() || stored.previous == requested.previous;
        previous && without(stored) == without(requested)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use switchtower_crds::PreviousRevision;

    fn assignment(revision: i64) -> ProfileAssignment {
        ProfileAssignment {
            name: "default".into(),
            revision,
            assigned_at: None,
            trace_id: None,
            previous: None,
        }
    }

    #[tokio::test]
    async fn request_lasts_until_the_row_contains_it() {
        let assignments = Assignments::default();
        let node: Arc<str> = "n".into();
        assert_eq!(assignments.of("n").0, None);
        assignments.request(BTreeMap::from([(node.clone(), assignment(2))]));
        assert_eq!(assignments.next_requests().await, std::slice::from_ref(&node));
        assert_eq!(assignments.of("n").0, Some(assignment(2)));
        let row = |revision| StoredAssignment { profile: Some(assignment(revision)), had_agent: true };
        assignments.set(&node, &row(1));
        assert_eq!(assignments.requested("n", Some(&assignment(1))), Some(assignment(2)));
        assignments.set(&node, &row(2));
        assert_eq!(assignments.requested("n", Some(&assignment(2))), None);
        assert_eq!(assignments.of("n"), (Some(assignment(2)), row(2)));
        let previous = PreviousRevision { name: "other".into(), revision: 1 };
        let remembers = ProfileAssignment { previous: Some(previous), ..assignment(3) };
        assignments.request(BTreeMap::from([(node.clone(), remembers)]));
        assignments.set(&node, &row(3));
        assert_eq!(assignments.requested("n", Some(&assignment(3))), None, "an older CRD drops the field");
        let stale = ProfileAssignment {
            previous: Some(PreviousRevision { name: "base".into(), revision: 1 }),
            ..assignment(4)
        };
        assignments.request(BTreeMap::from([(node.clone(), assignment(4))]));
        assert_eq!(assignments.requested("n", Some(&stale)), Some(assignment(4)), "a leftover is removed");
        assignments.cancel("n");
        assignments.set(&node, &row(2));
        assignments.request(BTreeMap::from([(node.clone(), assignment(3))]));
        assignments.cancel("n");
        assert_eq!(assignments.of("n").0, Some(assignment(2)));
        assignments.remove("n");
        assert_eq!(assignments.of("n").0, None);
    }
}
