//! Numbers that elements refer to each other by: service ports, backends, dispatch codes.
//!
//! A number that became free is not given out again soon: a packet that crosses a commit may still carry it,
//! and must miss rather than hit something else.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::ruleset::{FIRST_CODE, Kind, Pick};

/// Gives out indexes below a limit.
#[derive(Debug)]
pub(crate) struct Allocator {
    next: u32,
    limit: u32,
    free: VecDeque<u32>,
    quarantine: usize,
}

impl Allocator {
    /// Gives out 0..limit; the last `quarantine` freed ones only when nothing else is left.
    pub(crate) fn new(limit: u32, quarantine: usize) -> Self {
        Allocator { next: 0, limit, free: VecDeque::new(), quarantine }
    }

    /// The next index; `None` if all are in use.
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

/// How many commits an unused code and its chain stay: sizes come back (3, 2, 3), and a packet on its way may
/// still carry the code.
const KEEP_UNUSED: u64 = 16;

#[derive(Debug)]
struct Entry {
    pick: Pick,
    references: u32,
    /// The commit at which the last reference went.
    unused_since: u64,
}

/// The dispatch codes in use. A size without a free code takes the next larger existing size of its kind, the
/// pool's slots then hold some members twice; a quarter of the codes is kept for sizes larger than any
/// existing one, then rounded up to a power of two.
#[derive(Debug)]
pub(crate) struct Codes {
    entries: HashMap<u32, Entry>,
    by_pick: BTreeMap<Pick, u32>,
    last: u32,
    clock: u64,
}

impl Codes {
    /// Codes from [`FIRST_CODE`] to `last`.
    pub(crate) fn new(last: u32) -> Self {
        Codes { entries: HashMap::new(), by_pick: BTreeMap::new(), last, clock: 0 }
    }

    /// Makes known a code that the kernel holds already.
    pub(crate) fn adopt(&mut self, code: u32, pick: Pick) {
        if (FIRST_CODE..=self.last).contains(&code) && !self.by_pick.contains_key(&pick) {
            self.by_pick.insert(pick, code);
            self.entries.insert(code, Entry { pick, references: 0, unused_since: 0 });
        }
    }

    pub(crate) fn pick(&self, code: u32) -> Option<Pick> {
        self.entries.get(&code).map(|entry| entry.pick)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (u32, Pick)> {
        self.entries.iter().map(|(code, entry)| (*code, entry.pick))
    }

    /// A code for pools of `size` slots, and whether it is new. The code's size may be larger. `None` if no
    /// code is left.
    pub(crate) fn acquire(&mut self, kind: Kind, size: u32) -> Option<(u32, bool)> {
        let exact = Pick { kind, size };
        let total = self.last + 1 - FIRST_CODE;
        let found = self.by_pick.get(&exact).copied();
        let found = found.map(|code| (code, false)).or_else(|| self.create(exact, total - total / 4));
        let found = found.or_else(|| {
            let next = self.by_pick.range(exact..).next();
            next.filter(|(pick, _)| pick.kind == kind).map(|(_, code)| (*code, false))
        });
        let rounded = Pick { kind, size: size.checked_next_power_of_two().unwrap_or(size) };
        let (code, new) = found.or_else(|| self.create(rounded, total))?;
        self.entries.get_mut(&code)?.references += 1;
        Some((code, new))
    }

    fn create(&mut self, pick: Pick, limit: u32) -> Option<(u32, bool)> {
        if self.entries.len() as u32 >= limit {
            return None;
        }
        let code = (FIRST_CODE..=self.last).find(|code| !self.entries.contains_key(code))?;
        self.entries.insert(code, Entry { pick, references: 0, unused_since: self.clock });
        self.by_pick.insert(pick, code);
        Some((code, true))
    }

    /// Gives a reference back.
    pub(crate) fn release(&mut self, code: u32) {
        if let Some(entry) = self.entries.get_mut(&code) {
            entry.references = entry.references.saturating_sub(1);
            entry.unused_since = self.clock;
        }
    }

    /// Counts a commit and takes away the codes that have been unused for long (all unused ones of earlier
    /// commits when codes are short).
    pub(crate) fn expire(&mut self) -> Vec<(u32, Pick)> {
        self.clock += 1;
        let total = self.last + 1 - FIRST_CODE;
        let short = self.entries.len() as u32 * 2 > total;
        let keep = if short { 2 } else { KEEP_UNUSED };
        let clock = self.clock;
        let expired: Vec<(u32, Pick)> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.references == 0 && entry.unused_since + keep < clock)
            .map(|(code, entry)| (*code, entry.pick))
            .collect();
        for (code, pick) in &expired {
            self.entries.remove(code);
            self.by_pick.remove(pick);
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::ruleset::Masquerade;

    const PLAIN: Kind = Kind { masquerade: Masquerade::Never, affinity: None };

    #[test]
    fn freed_numbers_rest_until_nothing_else_is_left() {
        let mut numbers = Allocator::new(4, 1);
        assert_eq!([0, 1, 2].map(|_| numbers.allocate()), [0, 1, 2].map(Some));
        numbers.release(0);
        assert_eq!(numbers.allocate(), Some(3), "a fresh one first");
        assert_eq!(numbers.allocate(), Some(0), "then the one that rested");
        assert_eq!(numbers.allocate(), None);
    }

    #[test]
    fn adopted_numbers_are_in_use_and_gaps_are_free() {
        let mut numbers = Allocator::new(10, 0);
        numbers.adopt(&BTreeSet::from([0, 2]));
        assert_eq!([numbers.allocate(), numbers.allocate()], [Some(1), Some(3)]);
    }

    #[test]
    fn a_size_without_a_code_takes_the_next_larger_one_or_a_power_of_two() {
        // Four codes, one of them kept for sizes larger than any.
        let mut codes = Codes::new(FIRST_CODE + 3);
        for size in [2, 5, 9] {
            assert!(codes.acquire(PLAIN, size).is_some_and(|(_, new)| new));
        }
        let size = |codes: &mut Codes, size| {
            codes.acquire(PLAIN, size).and_then(|(code, _)| codes.pick(code)).map(|pick| pick.size)
        };
        assert_eq!(size(&mut codes, 5), Some(5));
        assert_eq!(size(&mut codes, 3), Some(5));
        assert_eq!(size(&mut codes, 10), Some(16));
        assert_eq!(size(&mut codes, 11), Some(16));
        assert_eq!(size(&mut codes, 17), None);
    }

    #[test]
    fn unused_codes_expire_and_used_ones_do_not() {
        let mut codes = Codes::new(4095);
        let (used, _) = codes.acquire(PLAIN, 1).unwrap();
        let (unused, _) = codes.acquire(PLAIN, 2).unwrap();
        codes.release(unused);
        let expired: Vec<u32> = (0..40).flat_map(|_| codes.expire()).map(|(code, _)| code).collect();
        assert_eq!(expired, [unused]);
        assert!(codes.pick(used).is_some());
    }
}
