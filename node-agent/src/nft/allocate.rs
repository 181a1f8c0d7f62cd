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

/// The dispatch codes in use.
///
/// A size without a free code takes the next larger existing size of its kind, the pool's slots then hold some
/// members twice. A quarter of the codes is kept for kinds and sizes without one, then rounded up to a power of two:
/// affinity timeouts, of which there may be any number, share codes rather than take what others need. When nothing
/// is left at all, the largest size of the kind serves some of the members.
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

    /// A code for pools of `size` slots, and whether it is new. The code's size may be larger. Where codes are short it
    /// may be smaller, and of another affinity timeout: [`Codes::pick`] tells. `None` if no code will do.
    pub(crate) fn acquire(&mut self, kind: Kind, size: u32) -> Option<(u32, bool)> {
        let exact = Pick { kind, size };
        let total = self.last + 1 - FIRST_CODE;
        let rounded = Pick { kind, size: size.checked_next_power_of_two().unwrap_or(size) };
        let existing = |code: u32| (code, false);
        let (code, new) = self
            .by_pick
            .get(&exact)
            .copied()
            .map(existing)
            .or_else(|| self.create(exact, total - total / 4))
            .or_else(|| self.at_least(exact).map(existing))
            .or_else(|| self.with_another_timeout(exact, true).map(existing))
            .or_else(|| self.create(rounded, total))
            .or_else(|| self.at_most(exact).map(existing))
            .or_else(|| self.with_another_timeout(exact, false).map(existing))?;
        self.entries.get_mut(&code)?.references += 1;
        Some((code, new))
    }

    /// The smallest size of the same kind that holds as many.
    fn at_least(&self, wanted: Pick) -> Option<u32> {
        let next = self.by_pick.range(wanted..).next();
        next.filter(|(pick, _)| pick.kind == wanted.kind).map(|(_, code)| *code)
    }

    /// The largest size of the same kind that holds fewer.
    fn at_most(&self, wanted: Pick) -> Option<u32> {
        let next = self.by_pick.range(..wanted).next_back();
        next.filter(|(pick, _)| pick.kind == wanted.kind).map(|(_, code)| *code)
    }

    /// A code of the nearest other affinity timeout, the smallest that holds as many, or the largest that does not.
    fn with_another_timeout(&self, wanted: Pick, as_many: bool) -> Option<u32> {
        let (seconds, local) = wanted.kind.affinity?;
        let fitting = self.by_pick.iter().filter_map(|(pick, code)| {
            let (other, of_local) = pick.kind.affinity?;
            let same = pick.kind.masquerade == wanted.kind.masquerade && of_local == local;
            let fits = same && (pick.size >= wanted.size) == as_many;
            fits.then_some((pick, other.abs_diff(seconds), *code))
        });
        let found = if as_many {
            fitting.min_by_key(|(pick, difference, _)| (*difference, pick.size))
        } else {
            fitting.min_by_key(|(pick, difference, _)| (std::cmp::Reverse(pick.size), *difference))
        };
        found.map(|(_, _, code)| code)
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
        assert_eq!(size(&mut codes, 17), Some(16), "some of the members rather than none");
        let other = Kind { masquerade: Masquerade::Always, affinity: None };
        assert_eq!(codes.acquire(other, 1), None, "nothing of the kind");
    }

    #[test]
    fn any_number_of_affinity_timeouts_leaves_codes_to_others() {
        let mut codes = Codes::new(4095);
        let sticky = |seconds| Kind { masquerade: Masquerade::ClusterIp, affinity: Some((seconds, false)) };
        let mut pick = |kind, size| {
            let (code, _) = codes.acquire(kind, size)?;
            codes.pick(code)
        };
        for seconds in 1..=5_000 {
            let picked = pick(sticky(seconds), 3).unwrap();
            assert_eq!(picked.size, 3);
            let exact = picked.kind == sticky(seconds);
            assert_eq!(exact, seconds <= 3_069, "the timeout of {seconds} s");
        }
        assert_eq!(pick(sticky(4_000), 3).unwrap().kind, sticky(3_069), "the nearest");
        // Sizes, and kinds that nobody else has.
        for size in [1, 3, 100, 60_000] {
            for masquerade in [Masquerade::Never, Masquerade::ClusterIp, Masquerade::Always] {
                for affinity in [None, Some((7, true))] {
                    assert!(pick(Kind { masquerade, affinity }, size).unwrap().size >= size);
                }
            }
        }
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
