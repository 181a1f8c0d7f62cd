//! Whether a Hello may begin a stream.

use switchtower_proto::v1::{GoAwayReason, Hello};

/// The schema version that is spoken here.
pub(super) const VERSION: u32 = 1;
/// Highest generation that an agent may claim: far above what is ever reached, far below an overflow.
const GENERATION: u64 = 1 << 62;
/// Longest list and longest string.
const LIST: usize = 64;
const STRING: usize = 256;

/// What is wrong, and the words for people.
pub(super) type Fault = (GoAwayReason, String);

/// Checks a Hello against the limits and the credential's node.
pub(super) fn check(hello: &Hello, node: &str) -> Result<(), Fault> {
    let malformed = |what: &str| Err((GoAwayReason::Malformed, format!("Hello: {what}")));
    // What it says of deviations and of a trial is shortened where it is taken in.
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
    if kernel.max(view) > GENERATION {
        let detail = format!("generation {} is out of range", kernel.max(view));
        return Err((GoAwayReason::GenerationOutOfRange, detail));
    }
    Ok(())
}
