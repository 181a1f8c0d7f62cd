//! Whether a Hello may begin a stream.

use switchtower_proto::v1::{GoAwayReason, Hello};

/// The schema version that is spoken here.
pub(super) const VERSION: u32 = 1;
/// Highest generation that an agent of a node may claim of which nothing is known, as after its row was deleted: at a
/// thousand changes a second it is reached after 8,900 years.
pub(super) const GENERATION: u64 = 1 << 48;
/// How far a claim may lie above what is known: a controller that fell behind its agents, as after a restore of etcd,
/// fell behind by less.
const AHEAD: u64 = 1 << 32;
/// Longest list and longest string.
const LIST: usize = 64;
const STRING: usize = 256;

/// What is wrong, and the words for people.
pub(super) type Fault = (GoAwayReason, String);

/// Checks a Hello against the limits, the credential's node, and the highest generation that is known of it.
///
/// What is handed out stays within [`AHEAD`] and a stream's changes of the known, so that no node is refused for
/// what it was given.
pub(super) fn check(hello: &Hello, node: &str, known: u64) -> Result<(), Fault> {
    let malformed = |what: &str| Err((GoAwayReason::Malformed, format!("Hello: {what}")));
    // What it says of deviations and of a trial is sanitized where it is taken in.
    let Hello {
        versions,
        features,
        agent_version,
        kernel_version,
        node_name,
        kernel,
        view,
        addresses,
        deviations: _,
        trial: _,
    } = hello;
    if versions.len() > LIST || features.len() > LIST || addresses.len() > LIST {
        return malformed("a list is too long");
    }
    let strings = features.iter().chain([agent_version, kernel_version, node_name]);
    if strings.into_iter().any(|string| string.len() > STRING) {
        return malformed("a string is too long");
    }
    if addresses.iter().any(|address| !matches!(address.len(), 4 | 16)) {
        return malformed("an address has neither 4 nor 16 bytes");
    }
    let digests = kernel.iter().map(|stamp| &stamp.digest).chain(view.iter().map(|view| &view.digest));
    if digests.into_iter().any(|digest| digest.len() != 16) {
        return malformed("a digest has not 16 bytes");
    }
    if node_name != node {
        let detail = format!(
            "the agent says it is {node_name:?}, its token is of {node:?}; check --node-name and where the pod runs"
        );
        return Err((GoAwayReason::NodeNameMismatch, detail));
    }
    if !versions.contains(&VERSION) {
        let detail = format!("the agent speaks {versions:?}, this controller {VERSION}");
        return Err((GoAwayReason::Version, detail));
    }
    let kernel = kernel.as_ref().map_or(0, |stamp| stamp.generation);
    let view = view.as_ref().map_or(0, |view| view.generation);
    let most = if known == 0 { GENERATION } else { known.saturating_add(AHEAD) };
    if kernel.max(view) > most {
        let detail = format!("generation {} is out of range", kernel.max(view));
        return Err((GoAwayReason::GenerationOutOfRange, detail));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::Stamp;

    use super::*;

    #[test]
    fn a_claim_far_above_what_is_known_is_refused() {
        let claim = |generation| {
            let kernel = Some(Stamp { generation, digest: vec![0; 16] });
            Hello { versions: vec![VERSION], node_name: "n".into(), kernel, ..Hello::default() }
        };
        let refused = |generation, known| check(&claim(generation), "n", known).is_err();
        for (generation, known) in [(7, 0), (GENERATION, 0), (7, 9), (AHEAD + 9, 9), (u64::MAX, u64::MAX)] {
            assert!(!refused(generation, known), "{generation} over {known}");
        }
        for (generation, known) in [(GENERATION + 1, 0), (u64::MAX, 0), (AHEAD + 10, 9), (1 << 61, 70)] {
            assert!(refused(generation, known), "{generation} over {known}");
        }
    }
}
