//! Follows the rows in the API server, which any replica may have written.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use kube::ResourceExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use switchtower_crds::ProxyStatus;

use super::super::Registry;
use super::super::requests::Stored;
use super::{Entry, Writer};
use crate::watch::Lean;

pub(super) type RowEvents =
    Pin<Box<dyn Stream<Item = Result<watcher::Event<Lean<ProxyStatus>>, watcher::Error>> + Send>>;

impl<R: Registry> Writer<R> {
    pub(super) fn watch_rows(&self) -> RowEvents {
        Box::pin(watcher(self.api.clone(), watcher::Config::default()).default_backoff())
    }

    /// Handles a row that a client created, changed or deleted. Writes of this process also arrive here; they change
    /// nothing.
    pub(super) fn row_event(&mut self, event: Result<watcher::Event<Lean<ProxyStatus>>, watcher::Error>) {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        match event {
            Ok(Init) => self.listing = Some(HashSet::new()),
            Ok(InitDone) => self.listed(),
            Ok(InitApply(object)) => {
                let name: Arc<str> = object.name_any().into();
                self.listing.get_or_insert_default().insert(name.clone());
                self.row_seen(&name, object.into(), true);
            }
            Ok(Apply(object)) => self.row_seen(&object.name_any().into(), object.into(), false),
            Ok(Delete(object)) => {
                let name: Arc<str> = object.name_any().into();
                let Some(entry) = self.entries.get_mut(&name) else { return };
                let uid = entry.stored.as_ref().map(|stored| stored.uid.as_str());
                if uid.is_some() && object.uid().as_deref() == uid {
                    entry.row_gone();
                    self.consider(&name);
                }
            }
            Err(error) => tracing::debug!(%error, "failed to watch ProxyStatus; retrying"),
        }
    }

    /// Handles a version of a row. One in a list is the current one, even if it is older, as after a restore of etcd.
    fn row_seen(&mut self, name: &Arc<str>, row: Stored, listed: bool) {
        let entry = self.entries.entry(name.clone()).or_default();
        let known = entry.stored.as_ref();
        let is_same = known.is_some_and(|known| known.version == row.version && known.uid == row.uid);
        let is_old =
            !listed && known.is_some_and(|known| known.uid == row.uid && row.number() < known.number());
        if is_same || is_old {
            return;
        }
        if entry.in_flight {
            entry.outdated |= listed;
            entry.seen = entry.seen.max(row.number());
            return;
        }
        (entry.outdated, entry.seen) = (false, None);
        self.publish(name, &row);
        self.entries.entry(name.clone()).or_default().stored = Some(row);
        self.consider(name);
    }

    /// Removes rows that are missing in a complete list: they were deleted while the watch was down. A row that was
    /// created since is found when the writer tries to create it.
    fn listed(&mut self) {
        let Some(listed) = self.listing.take() else { return };
        let missing = |(name, entry): &(&Arc<str>, &mut Entry)| {
            entry.stored.is_some() && !entry.in_flight && !listed.contains(*name)
        };
        let gone: Vec<Arc<str>> = self
            .entries
            .iter_mut()
            .filter(missing)
            .map(|(name, entry)| {
                entry.row_gone();
                name.clone()
            })
            .collect();
        gone.iter().for_each(|name| self.consider(name));
    }
}
