//! Every desired state that existed, by node and generation.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::kernel::Content;

#[derive(Default)]
pub struct History {
    sent: HashMap<(usize, u64, u128), Content>,
    acknowledged: BTreeMap<(usize, u64), u128>,
    assigned: BTreeSet<(usize, u64)>,
}

impl History {
    pub fn sent(&mut self, node: usize, generation: u64, digest: u128, content: Content) {
        if let Some(known) = self.sent.get(&(node, generation, digest)) {
            assert!(*known == content, "equal digests of different content at generation {generation}");
        }
        self.sent.insert((node, generation, digest), content);
    }

    /// The desired state with this stamp.
    pub fn desired(&self, node: usize, (generation, digest): (u64, u128)) -> &Content {
        let known = self.sent.get(&(node, generation, digest));
        known.unwrap_or_else(|| panic!("node {node} holds a generation {generation} that never existed"))
    }

    /// Notes that a node was assigned a revision of the settings.
    pub fn assigned(&mut self, node: usize, revision: u64) {
        self.assigned.insert((node, revision));
    }

    /// Returns true if the node was ever assigned the revision. All nodes start with revision 0.
    pub fn was_assigned(&self, node: usize, revision: u64) -> bool {
        revision == 0 || self.assigned.contains(&(node, revision))
    }

    /// Notes an acknowledgement: a generation has one content.
    pub fn acknowledged(&mut self, node: usize, generation: u64, digest: u128) {
        let known = self.acknowledged.insert((node, generation), digest);
        assert!(known.is_none_or(|known| known == digest), "generation {generation} reused on node {node}");
    }

    /// Forgets acknowledgements above a generation: the node's kernel and its row have both lost them.
    pub fn forget_above(&mut self, node: usize, generation: u64) {
        self.acknowledged.retain(|(known, number), _| *known != node || *number <= generation);
    }
}
