//! Validation of a Hello.

use switchtower_proto::v1::{GoAwayReason, Hello};

/// Supported schema version.
pub(super) const VERSION: u32 = 1;
/// Maximum generation that an agent may claim if nothing is known of its node, for example after its row was deleted.
/// It is reached after 8,900 years at a thousand changes per second.
pub(super) const GENERATION: u64 = 1 << 48;
/// Maximum distance of a claim above the known generation: a controller that is behind its agents, for example after
/// a restore of etcd, is behind by less.
const AHEAD: u64 = 1 << 32;
/// Maximum length of lists, and of strings in bytes.
const LIST: usize = 64;
const STRING: usize = 256;

/// Reason and message of a refusal.
pub(super) type Fault = (GoAwayReason, String);

/// Checks a Hello against the limits, the credential's node, and the highest generation that is known of it.
///
/// Generations that this controller issued stay within [`AHEAD`] of the known one, so that no node is refused for an
/// issued generation.
pub(super) fn check(hello: &Hello, node: &str, known: u64) -> Result<(), Fault> {
    let malformed = |what: &str| Err((GoAwayReason::Malformed, format!("Hello: {what}")));
    // Deviations and trial are sanitized in `bounded`.
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
        mode: _,
        session: _,
        public_key: _,
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
        return malformed("a digest does not have 16 bytes");
    }
    if node_name != node {
        let detail = format!(
            "the agent claims to be {node_name:?}, but its token is bound to {node:?}; check --node-name and the node of the pod"
        );
        return Err((GoAwayReason::NodeNameMismatch, detail));
    }
    if !versions.contains(&VERSION) {
        let detail = format!(
            "the agent supports the protocol versions {versions:?}, this controller supports {VERSION}"
        );
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

/// Returns the number of the agent's last session, 0 if it is out of range. Another replica may have served it, whose number
/// has not arrived in the row yet.
pub(super) fn last_session(hello: &Hello, known: u64) -> u64 {
    if hello.session <= known.saturating_add(AHEAD) { hello.session } else { 0 }
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::Stamp;

    use super::*;

    #[test]
    fn last_session_is_bounded() {
        let hello = |session| Hello { session, ..Hello::default() };
        assert_eq!(last_session(&hello(7), 3), 7);
        assert_eq!(last_session(&hello(u64::MAX), 3), 0);
    }

    #[test]
    fn claim_far_above_known_generation_is_refused() {
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
