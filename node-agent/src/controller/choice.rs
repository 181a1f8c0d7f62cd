//! Choice of the replica for the next attempt to connect.
//!
//! The order is random, so that the agents spread over the replicas. Each known address gets an attempt before any gets a
//! second one, and a replica that was just lost is tried last.

use std::collections::VecDeque;

use rand::seq::SliceRandom as _;

/// Addresses that are still to be tried.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    left: VecDeque<String>,
    last: Option<String>,
}

impl Choice {
    /// Returns the address of the next attempt; `None` if none is known.
    pub(crate) fn next(&mut self, known: &[String]) -> Option<String> {
        self.left.retain(|address| known.contains(address));
        if self.left.is_empty() {
            let mut order = known.to_vec();
            order.shuffle(&mut rand::rng());
            if let Some(at) = order.iter().position(|address| Some(address) == self.last.as_ref()) {
                let last = order.remove(at);
                order.push(last);
            }
            self.left = order.into();
        }
        self.last = self.left.pop_front();
        self.last.clone()
    }

    /// A stream was open: the next attempts begin with all other addresses.
    pub(crate) fn connected(&mut self) {
        self.left.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn known(addresses: &[&str]) -> Vec<String> {
        addresses.iter().map(|&address| address.to_owned()).collect()
    }

    #[test]
    fn each_address_tried_once_per_round() {
        let (mut choice, known) = (Choice::default(), known(&["a:1", "b:1", "c:1"]));
        for _ in 0..50 {
            let round: BTreeSet<String> = (0..3).filter_map(|_| choice.next(&known)).collect();
            assert_eq!(round.len(), 3);
        }
        assert_eq!(choice.next(&[]), None);
    }

    #[test]
    fn lost_replica_tried_last() {
        for _ in 0..50 {
            let (mut choice, known) = (Choice::default(), known(&["a:1", "b:1", "c:1"]));
            let first = choice.next(&known);
            choice.connected();
            assert_ne!(choice.next(&known), first);
            assert_ne!(choice.next(&known), first);
            assert_eq!(choice.next(&known), first);
        }
        let alone = known(&["a:1"]);
        let mut choice = Choice::default();
        choice.next(&alone);
        choice.connected();
        assert_eq!(choice.next(&alone).as_deref(), Some("a:1"), "there is no other");
    }

    #[test]
    fn removed_address_not_tried() {
        let mut choice = Choice::default();
        choice.next(&known(&["a:1", "b:1"]));
        assert_eq!(choice.next(&known(&["c:1"])).as_deref(), Some("c:1"));
    }

    #[test]
    fn agents_spread_over_replicas() {
        let known = known(&["a:1", "b:1", "c:1"]);
        let mut counts = BTreeMap::<String, u32>::new();
        for _ in 0..3_000 {
            *counts.entry(Choice::default().next(&known).unwrap()).or_default() += 1;
        }
        assert!(counts.len() == 3 && counts.values().all(|count| (800..1_200).contains(count)), "{counts:?}");
    }
}
