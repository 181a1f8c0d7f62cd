//! The stored objects of one kind.

use std::collections::BTreeMap;

use kube::runtime::watcher;
use kube::{Resource, ResourceExt as _};

/// Objects by name. The newer of two versions wins regardless of its source, except that a complete list replaces all.
#[derive(Debug)]
pub(super) struct Objects<K> {
    known: BTreeMap<String, K>,
    /// The incomplete list.
    listing: Option<BTreeMap<String, K>>,
    synced: bool,
}

impl<K> Default for Objects<K> {
    fn default() -> Self {
        Self { known: BTreeMap::new(), listing: None, synced: false }
    }
}

impl<K: Resource> Objects<K> {
    pub(super) fn synced(&self) -> bool {
        self.synced
    }

    pub(super) fn get(&self, name: &str) -> Option<&K> {
        self.known.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &K> {
        self.known.values()
    }

    /// Marks all objects as outdated until the next complete list.
    pub(super) fn invalidate(&mut self) {
        (self.synced, self.listing) = (false, None);
    }

    /// Replaces all objects by a complete list.
    pub(super) fn replace(&mut self, objects: Vec<K>) {
        self.known = objects.into_iter().map(|object| (object.name_any(), object)).collect();
        self.synced = true;
    }

    /// Applies an event of the watch. Returns true if objects changed.
    pub(super) fn apply(&mut self, event: watcher::Event<K>) -> bool {
        match event {
            watcher::Event::Init => self.listing = Some(BTreeMap::new()),
            watcher::Event::InitApply(object) => {
                self.listing.get_or_insert_default().insert(object.name_any(), object);
            }
            watcher::Event::InitDone => {
                // The list replaces newer versions too: after a restore of etcd older versions are current. Writes
                // since the list arrive as the next events.
                self.known = self.listing.take().unwrap_or_default();
                self.synced = true;
                return true;
            }
            watcher::Event::Apply(object) => return self.put(object),
            watcher::Event::Delete(object) => {
                let same = |known: &K| known.uid() == object.uid();
                if self.known.get(&object.name_any()).is_some_and(same) {
                    self.known.remove(&object.name_any());
                    return true;
                }
            }
        }
        false
    }

    /// Stores an object from the API server. Returns true if it is newer than the known one.
    pub(super) fn put(&mut self, object: K) -> bool {
        let name = object.name_any();
        let old = self.known.get(&name).filter(|known| known.uid() == object.uid());
        if old.is_some_and(|known| version(known) >= version(&object)) {
            return false;
        }
        self.known.insert(name, object);
        true
    }
}

/// resourceVersions of one resource are comparable integers (KEP-5504).
fn version<K: Resource>(object: &K) -> u64 {
    object.resource_version().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;

    fn object(name: &str, uid: &str, version: u64) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.name = Some(name.into());
        object.metadata.uid = Some(uid.into());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    #[test]
    fn newer_versions_win_and_lists_replace() {
        let mut objects = Objects::default();
        assert!(objects.put(object("a", "1", 5)));
        assert!(!objects.apply(watcher::Event::Apply(object("a", "1", 4))), "an older version");
        assert!(objects.apply(watcher::Event::Apply(object("a", "2", 1))), "another object of that name");
        assert!(!objects.apply(watcher::Event::Delete(object("a", "1", 6))), "the previous object");
        assert!(!objects.synced());
        objects.apply(watcher::Event::Init);
        objects.apply(watcher::Event::InitApply(object("b", "3", 7)));
        assert!(objects.get("a").is_some(), "objects stay until the list is complete");
        assert!(objects.apply(watcher::Event::InitDone));
        assert!(objects.get("a").is_none() && objects.get("b").is_some() && objects.synced());
        objects.apply(watcher::Event::Init);
        objects.apply(watcher::Event::InitApply(object("b", "3", 2)));
        objects.apply(watcher::Event::InitDone);
        assert_eq!(objects.get("b").and_then(|known| known.resource_version()), Some("2".to_owned()));
    }
}
