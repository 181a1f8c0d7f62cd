//! The objects of one kind as the API server has them.

use std::collections::BTreeMap;

use kube::runtime::watcher;
use kube::{Resource, ResourceExt as _};

/// Objects by name. Of two versions of an object the newer one counts, whichever way it came, but for complete lists.
#[derive(Debug)]
pub(super) struct Objects<K> {
    known: BTreeMap<String, K>,
    /// A list that is not complete yet.
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

    /// Nothing is known for sure until a list is complete.
    pub(super) fn distrust(&mut self) {
        (self.synced, self.listing) = (false, None);
    }

    /// A complete list.
    pub(super) fn replace(&mut self, objects: Vec<K>) {
        self.known = objects.into_iter().map(|object| (object.name_any(), object)).collect();
        self.synced = true;
    }

    /// What the watch says. True: it may be news.
    pub(super) fn take(&mut self, event: watcher::Event<K>) -> bool {
        match event {
            watcher::Event::Init => self.listing = Some(BTreeMap::new()),
            watcher::Event::InitApply(object) => {
                self.listing.get_or_insert_default().insert(object.name_any(), object);
            }
            watcher::Event::InitDone => {
                // As a whole: after a restore of etcd older versions are what there is. What was written meanwhile
                // comes as the next event.
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

    /// An object as the API server answered. True: it is news.
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
    fn newer_versions_count_and_lists_replace() {
        let mut objects = Objects::default();
        assert!(objects.put(object("a", "1", 5)));
        assert!(!objects.take(watcher::Event::Apply(object("a", "1", 4))), "an echo of the past");
        assert!(objects.take(watcher::Event::Apply(object("a", "2", 1))), "another object of that name");
        assert!(!objects.take(watcher::Event::Delete(object("a", "1", 6))), "of the one before");
        assert!(!objects.synced());
        objects.take(watcher::Event::Init);
        objects.take(watcher::Event::InitApply(object("b", "3", 7)));
        assert!(objects.get("a").is_some(), "nothing goes before the list is complete");
        assert!(objects.take(watcher::Event::InitDone));
        assert!(objects.get("a").is_none() && objects.get("b").is_some() && objects.synced());
        objects.take(watcher::Event::Init);
        objects.take(watcher::Event::InitApply(object("b", "3", 2)));
        objects.take(watcher::Event::InitDone);
        assert_eq!(objects.get("b").and_then(|known| known.resource_version()), Some("2".to_owned()));
    }
}
