//! Allocates the numbers of service ports, backends and lists of sources.
//!
//! A freed number is not reused soon: a packet that crosses a commit may still carry it, and must miss rather than hit
//! another element.

use std::collections::{BTreeSet, VecDeque};

/// Allocates indexes below a limit.
#[derive(Debug)]
pub(crate) struct Allocator {
    next: u32,
    limit: u32,
    free: VecDeque<u32>,
    quarantine: usize,
}

impl Allocator {
    /// Allocates 0..limit; the last `quarantine` freed ones only when no other is left.
    pub(crate) fn new(limit: u32, quarantine: usize) -> Self {
        Allocator { next: 0, limit, free: VecDeque::new(), quarantine }
    }

    /// Returns a free index; `None` if all are in use.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        if self.free.len() > self.quarantine || self.next >= self.limit {
            return self.free.pop_front();
        }
        self.next += 1;
        Some(self.next - 1)
    }

    pub(crate) fn release(&mut self, index: u32) {
        self.free.push_back(index);
    }

    /// Marks these as in use, and no others.
    pub(crate) fn adopt(&mut self, used: &BTreeSet<u32>) {
        self.next = used.last().map_or(0, |last| last + 1);
        let gaps = (0..self.next).filter(|index| !used.contains(index));
        self.free = gaps.take(1 << 16).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_numbers_reused_last() {
        let mut numbers = Allocator::new(4, 1);
        assert_eq!([0, 1, 2].map(|_| numbers.allocate()), [0, 1, 2].map(Some));
        numbers.release(0);
        assert_eq!(numbers.allocate(), Some(3), "an unused one first");
        assert_eq!(numbers.allocate(), Some(0), "then the freed one");
        assert_eq!(numbers.allocate(), None);
    }

    #[test]
    fn adopted_numbers_used_and_gaps_free() {
        let mut numbers = Allocator::new(10, 0);
        numbers.adopt(&BTreeSet::from([0, 2]));
        assert_eq!([numbers.allocate(), numbers.allocate()], [Some(1), Some(3)]);
    }
}
