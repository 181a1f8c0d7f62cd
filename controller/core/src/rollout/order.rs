//! Order in which nodes are touched.
//!
//! Round-robin over topology domains, the one with the fewest touched nodes first; within a domain by the SHA-256 of
//! the rollout's and the node's UID. Every rollout therefore starts with other nodes, and a restarted controller
//! continues with the same ones.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use super::FleetNode;

type Domain<'a> = Vec<Option<&'a str>>;

/// One domain: how many of its nodes are touched, and the candidates with their hashes.
#[derive(Default)]
struct Group<'a> {
    touched: usize,
    candidates: Vec<(Vec<u8>, &'a FleetNode)>,
}

/// Values of the keys' labels; nodes without a label are a domain of their own.
fn domain<'a>(node: &'a FleetNode, keys: &[String]) -> Domain<'a> {
    keys.iter().map(|key| node.labels.get(key).map(String::as_str)).collect()
}

/// The candidates in the order in which they are touched. `touched`: nodes of the step that already are.
pub(super) fn order<'a>(
    seed: &str,
    keys: &[String],
    touched: impl Iterator<Item = &'a FleetNode>,
    candidates: impl Iterator<Item = &'a FleetNode>,
) -> Vec<&'a FleetNode> {
    let mut domains: HashMap<Domain<'a>, Group<'a>> = HashMap::new();
    for node in touched {
        domains.entry(domain(node, keys)).or_default().touched += 1;
    }
    for node in candidates {
        let hash = Sha256::new().chain_update(seed).chain_update([0]).chain_update(&*node.uid).finalize();
        domains.entry(domain(node, keys)).or_default().candidates.push((hash.to_vec(), node));
    }
    let mut ranked = Vec::new();
    for Group { touched, mut candidates } in domains.into_values() {
        candidates.sort_by(|(one, a), (other, b)| one.cmp(other).then_with(|| a.name.cmp(&b.name)));
        ranked
            .extend(candidates.into_iter().enumerate().map(|(at, (hash, node))| (touched + at, hash, node)));
    }
    ranked.sort_by(|(rank, hash, node), (other_rank, other_hash, other)| {
        rank.cmp(other_rank).then_with(|| hash.cmp(other_hash)).then_with(|| node.name.cmp(&other.name))
    });
    ranked.into_iter().map(|(.., node)| node).collect()
}
