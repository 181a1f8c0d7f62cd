//! Which revision of settings each row names, and which one it is to name: what the rows' writer and the rollouts
//! share.
//!
//! What holds: a wish stands until the row says so, or until somebody else wrote the row meanwhile; then it is
//! forgotten, and whoever wished decides again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use switchtower_crds::ProfileAssignment;
use tokio::sync::Notify;

use crate::sync::lock;

/// What the row in the API server says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StoredAssignment {
    /// `spec.profile`.
    pub profile: Option<ProfileAssignment>,
    /// Some agent has been connected since the row was made.
    pub had_agent: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// All rows were read: what is not stored is in no row.
    loaded: bool,
    stored: HashMap<Arc<str>, StoredAssignment>,
    wanted: HashMap<Arc<str>, ProfileAssignment>,
    /// Wishes that the writer has not looked at.
    news: BTreeSet<Arc<str>>,
}

/// Assignments of all nodes. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Assignments {
    inner: Arc<Mutex<Inner>>,
    wishes: Arc<Notify>,
    rows: Arc<Notify>,
}

impl Assignments {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Rows are to name these revisions.
    pub fn want(&self, wanted: BTreeMap<Arc<str>, ProfileAssignment>) {
        if wanted.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for (node, assignment) in wanted {
            if inner.wanted.get(&node).is_some_and(|known| is_same_move(known, &assignment)) {
                continue;
            }
            inner.news.insert(node.clone());
            inner.wanted.insert(node, assignment);
        }
        drop(inner);
        self.wishes.notify_one();
    }

    /// All rows were read.
    pub(crate) fn set_loaded(&self) {
        self.lock().loaded = true;
        self.rows.notify_one();
    }

    /// All rows were read; until then a node without an assignment may well have one.
    #[must_use]
    pub fn loaded(&self) -> bool {
        self.lock().loaded
    }

    /// What a node's row names or is about to name, and what it names now.
    #[must_use]
    pub fn of(&self, node: &str) -> (Option<ProfileAssignment>, StoredAssignment) {
        let inner = self.lock();
        let stored = inner.stored.get(node).cloned().unwrap_or_default();
        (inner.wanted.get(node).cloned().or_else(|| stored.profile.clone()), stored)
    }

    /// All rows that name a revision.
    #[must_use]
    pub fn stored(&self) -> Vec<(Arc<str>, ProfileAssignment)> {
        let inner = self.lock();
        let named = inner.stored.iter().filter_map(|(node, row)| Some((node.clone(), row.profile.clone()?)));
        named.collect()
    }

    /// Waits until a row says something new about its assignment. May be dropped and called again at any time.
    pub async fn row_changed(&self) {
        self.rows.notified().await;
    }

    /// Nodes whose rows are to be written. May be dropped and called again at any time.
    pub(super) async fn wished(&self) -> Vec<Arc<str>> {
        loop {
            let news = std::mem::take(&mut self.lock().news);
            if !news.is_empty() {
                return news.into_iter().collect();
            }
            self.wishes.notified().await;
        }
    }

    /// What the row is to name, if it is something else than `stored`.
    pub(super) fn wish(&self, node: &str, stored: Option<&ProfileAssignment>) -> Option<ProfileAssignment> {
        self.lock().wanted.get(node).filter(|wanted| !says(stored, wanted)).cloned()
    }

    /// The row in the API server says this.
    pub(crate) fn set(&self, node: &Arc<str>, row: &StoredAssignment) {
        let mut inner = self.lock();
        if inner.wanted.get(node).is_some_and(|wanted| says(row.profile.as_ref(), wanted)) {
            inner.wanted.remove(node);
        }
        let before = inner.stored.insert(node.clone(), row.clone());
        drop(inner);
        if before.as_ref() != Some(row) {
            self.rows.notify_one();
        }
    }

    /// Somebody else wrote the row after the wish was made.
    pub(super) fn forget_wish(&self, node: &str) {
        self.lock().wanted.remove(node);
        self.rows.notify_one();
    }

    /// There is no such row any more.
    pub(super) fn remove(&self, node: &str) {
        let mut inner = self.lock();
        let known = inner.stored.remove(node).is_some() | inner.wanted.remove(node).is_some();
        drop(inner);
        if known {
            self.rows.notify_one();
        }
    }
}

/// The same revision with the same way back, whenever it was decided.
fn is_same_move(one: &ProfileAssignment, other: &ProfileAssignment) -> bool {
    (&one.name, one.revision, &one.previous) == (&other.name, other.revision, &other.previous)
}

/// Whether the row says what it is to say. A CRD that is older than `previous` drops that field: a row without it is
/// taken as it is, or it would be written again and again. A stored `previous` that is not wanted always differs.
fn says(stored: Option<&ProfileAssignment>, wanted: &ProfileAssignment) -> bool {
    let without = |from: &ProfileAssignment| ProfileAssignment { previous: None, ..from.clone() };
    stored.is_some_and(|stored| {
        let previous = stored.previous.is_none() || stored.previous == wanted.previous;
        previous && without(stored) == without(wanted)
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
    async fn a_wish_stands_until_the_row_says_so() {
        let assignments = Assignments::default();
        let node: Arc<str> = "n".into();
        assert_eq!(assignments.of("n").0, None);
        assignments.want(BTreeMap::from([(node.clone(), assignment(2))]));
        assert_eq!(assignments.wished().await, std::slice::from_ref(&node));
        assert_eq!(assignments.of("n").0, Some(assignment(2)));
        let row = |revision| StoredAssignment { profile: Some(assignment(revision)), had_agent: true };
        assignments.set(&node, &row(1));
        assert_eq!(assignments.wish("n", Some(&assignment(1))), Some(assignment(2)));
        assignments.set(&node, &row(2));
        assert_eq!(assignments.wish("n", Some(&assignment(2))), None);
        assert_eq!(assignments.of("n"), (Some(assignment(2)), row(2)));
        let previous = PreviousRevision { name: "other".into(), revision: 1 };
        let remembers = ProfileAssignment { previous: Some(previous), ..assignment(3) };
        assignments.want(BTreeMap::from([(node.clone(), remembers)]));
        assignments.set(&node, &row(3));
        assert_eq!(assignments.wish("n", Some(&assignment(3))), None, "a CRD of before cannot say more");
        let stale = ProfileAssignment {
            previous: Some(PreviousRevision { name: "base".into(), revision: 1 }),
            ..assignment(4)
        };
        assignments.want(BTreeMap::from([(node.clone(), assignment(4))]));
        assert_eq!(assignments.wish("n", Some(&stale)), Some(assignment(4)), "a leftover is removed");
        assignments.forget_wish("n");
        assignments.set(&node, &row(2));
        assignments.want(BTreeMap::from([(node.clone(), assignment(3))]));
        assignments.forget_wish("n");
        assert_eq!(assignments.of("n").0, Some(assignment(2)));
        assignments.remove("n");
        assert_eq!(assignments.of("n").0, None);
    }
}
