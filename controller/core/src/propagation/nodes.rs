//! A set of nodes by their slots: one bit each.

/// Slots in the set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NodeSet {
    words: Vec<u64>,
    count: usize,
}

impl NodeSet {
    /// Adds a slot; returns whether it was absent.
    pub(super) fn insert(&mut self, slot: usize) -> bool {
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let added = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.count += usize::from(added);
        added
    }

    /// Removes a slot; returns whether it was present.
    pub(super) fn remove(&mut self, slot: usize) -> bool {
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        let present = self.words.get(word).is_some_and(|bits| bits & bit != 0);
        if present {
            self.words[word] &= !bit;
            self.count -= 1;
        }
        present
    }

    pub(super) fn contains(&self, slot: usize) -> bool {
        self.words.get(slot / 64).is_some_and(|bits| bits & (1 << (slot % 64)) != 0)
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The slots in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        self.words.iter().enumerate().flat_map(|(word, bits)| {
            (0..64).filter(move |bit| bits & (1 << bit) != 0).map(move |bit| word * 64 + bit)
        })
    }
}
