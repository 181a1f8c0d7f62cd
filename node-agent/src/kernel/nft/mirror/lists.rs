//! Lists of allowed sources: frontends with the same ranges share one.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Mirror, QUARANTINE};
use crate::kernel::nft::allocate::Allocator;
use crate::kernel::nft::element::{Data, Element, Range};

/// List numbers are the upper bits of a value, as pools are.
const LISTS: u32 = (1 << 19) - 1;

#[derive(Debug)]
struct List<const N: usize> {
    ranges: Arc<[Range<N>]>,
    references: u32,
}

/// The lists in use. A list never changes: other ranges are another list.
#[derive(Debug)]
pub(super) struct SourceLists<const N: usize> {
    numbers: Allocator,
    by_ranges: HashMap<Arc<[Range<N>]>, u32>,
    by_number: HashMap<u32, List<N>>,
    /// Numbers of lists in the kernel that no frontend uses yet.
    adopted: HashMap<Vec<Range<N>>, u32>,
}

impl<const N: usize> Default for SourceLists<N> {
    fn default() -> Self {
        SourceLists {
            numbers: Allocator::new(LISTS, QUARANTINE),
            by_ranges: HashMap::new(),
            by_number: HashMap::new(),
            adopted: HashMap::new(),
        }
    }
}

impl<const N: usize> SourceLists<N> {
    /// Number and ranges of each list.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &[Range<N>])> {
        self.by_number.iter().map(|(number, list)| (*number, &*list.ranges))
    }

    /// Takes over the numbers that a kernel holds, before any list is in use.
    pub(super) fn adopt(&mut self, lists: HashMap<Vec<Range<N>>, u32>) {
        self.numbers.adopt(&lists.values().map(|number| number - 1).collect());
        self.adopted = lists;
    }

    /// Frees the adopted numbers that no frontend uses.
    pub(super) fn forget_adopted(&mut self) {
        for number in std::mem::take(&mut self.adopted).into_values() {
            self.numbers.release(number - 1);
        }
    }
}

impl<const N: usize> Mirror<N> {
    /// Numbers of the lists in use.
    pub(crate) fn source_lists(&self) -> impl Iterator<Item = u32> {
        self.lists.all().map(|(number, _)| number)
    }

    /// Returns a reference to the list of these sorted ranges; `None` if no number is left.
    pub(super) fn acquire_list(&mut self, ranges: &[Range<N>]) -> Option<u32> {
        if let Some(number) = self.lists.by_ranges.get(ranges).copied() {
            if let Some(list) = self.lists.by_number.get_mut(&number) {
                list.references += 1;
            }
            return Some(number);
        }
        let number = match self.lists.adopted.remove(ranges) {
            Some(number) => number,
            None => self.lists.numbers.allocate()? + 1,
        };
        let ranges: Arc<[Range<N>]> = ranges.into();
        self.lists.by_ranges.insert(Arc::clone(&ranges), number);
        self.put(Element::SourceList(number), None, Some(Data::Present));
        for range in &*ranges {
            self.put(Element::Source(number, *range), None, Some(Data::Present));
        }
        self.lists.by_number.insert(number, List { ranges, references: 1 });
        Some(number)
    }

    /// Releases a reference; removes the list with the last one.
    pub(super) fn release_list(&mut self, number: u32) {
        let Some(list) = self.lists.by_number.get_mut(&number) else { return };
        list.references -= 1;
        if list.references > 0 {
            return;
        }
        let Some(list) = self.lists.by_number.remove(&number) else { return };
        self.lists.by_ranges.remove(&list.ranges);
        self.lists.numbers.release(number - 1);
        self.freed = true;
        for range in &*list.ranges {
            self.put(Element::Source(number, *range), Some(Data::Present), None);
        }
        self.put(Element::SourceList(number), Some(Data::Present), None);
    }
}
