//! Decides which replica writes the status of a node's row. Pure.
//!
//! The replica that serves a node claims the row with its name and the number of the stream, which exceeds the number in the
//! row. The row therefore names the latest stream of the node, and only the replica that it names writes it. The leader
//! writes the rows that name no replica, or one that is gone.

/// Maximum number of a stream in a row. A higher one was not written by a replica and is ignored.
pub(super) const SESSION_LIMIT: u64 = 1 << 48;

/// Claim in a row: the replica, and the number of its stream.
pub(super) type Claim<'a> = (&'a str, u64);

/// The latest stream of a node in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LatestStream {
    pub(super) session: u64,
    pub(super) open: bool,
}

/// State of this replica and of the one that the row names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing<'a> {
    /// Name of this replica.
    pub(super) replica: &'a str,
    pub(super) stream: Option<LatestStream>,
    /// This replica is the leader.
    pub(super) leads: bool,
    /// The replica in the claim is gone.
    pub(super) claimant_gone: bool,
}

/// Right of this replica to write the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Author {
    /// It serves the node, or served it last.
    Serving,
    /// No present replica serves the node, and this one is the leader.
    Leader,
    /// Another replica writes.
    Other,
    /// Another replica writes, and the stream that is open here is not the node's latest.
    Superseded,
}

/// Returns the right of this replica to write a row with this claim.
pub(super) fn author(claim: Option<Claim<'_>>, standing: Standing<'_>) -> Author {
    let Standing { replica, stream, leads, claimant_gone } = standing;
    let claim = claim.filter(|(_, session)| *session <= SESSION_LIMIT);
    let foreign = claim.filter(|(name, _)| *name != replica);
    match (stream, foreign) {
        (Some(LatestStream { session, open: true }), Some((_, theirs))) if theirs >= session => {
            Author::Superseded
        }
        (Some(LatestStream { open: true, .. }), _) => Author::Serving,
        // A claim by an earlier process of the same name is this replica's, too.
        (_, None) if claim.is_some() => Author::Serving,
        (_, Some(_)) if !claimant_gone => Author::Other,
        _ if leads => Author::Leader,
        _ => Author::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(stream: Option<(u64, bool)>, leads: bool, claimant_gone: bool) -> Standing<'static> {
        let stream = stream.map(|(session, open)| LatestStream { session, open });
        Standing { replica: "own", stream, leads, claimant_gone }
    }

    #[test]
    fn open_stream_claims_a_row_with_a_lower_number() {
        let standing = with(Some((5, true)), false, false);
        for claim in [None, Some(("own", 4)), Some(("own", 9)), Some(("other", 4))] {
            assert_eq!(author(claim, standing), Author::Serving, "{claim:?}");
        }
        for theirs in [5, 6] {
            assert_eq!(author(Some(("other", theirs)), standing), Author::Superseded);
        }
        let edited = Some(("edited by hand", u64::MAX));
        assert_eq!(author(edited, standing), Author::Serving, "no replica can exceed it");
    }

    #[test]
    fn lost_stream_is_written_only_while_the_row_names_the_replica() {
        let standing = with(Some((5, false)), false, false);
        assert_eq!(author(Some(("own", 5)), standing), Author::Serving);
        for claim in [None, Some(("other", 4)), Some(("other", 6))] {
            assert_eq!(author(claim, standing), Author::Other, "{claim:?}");
        }
    }

    #[test]
    fn leader_writes_rows_without_a_present_replica() {
        for stream in [None, Some((5, false))] {
            assert_eq!(author(None, with(stream, true, false)), Author::Leader);
            assert_eq!(author(Some(("other", 9)), with(stream, true, true)), Author::Leader);
            assert_eq!(author(Some(("other", 9)), with(stream, true, false)), Author::Other);
            assert_eq!(author(Some(("other", 9)), with(stream, false, true)), Author::Other);
        }
        assert_eq!(author(Some(("own", 3)), with(None, false, false)), Author::Serving, "after a restart");
    }

    /// Whatever the numbers, at most one of two replicas with open streams writes, and the other ends its stream.
    #[test]
    fn no_two_replicas_write_a_claimed_row() {
        for (a, b, claimed) in (0..64).map(|n| (n % 4, n / 4 % 4, n / 16)) {
            for claimant in ["a", "b"] {
                let of = |replica, session| {
                    let stream = Some(LatestStream { session, open: true });
                    author(
                        Some((claimant, claimed)),
                        Standing { replica, stream, leads: false, claimant_gone: false },
                    )
                };
                let (other, session) = if claimant == "a" { ("b", b) } else { ("a", a) };
                let expected = if claimed >= session { Author::Superseded } else { Author::Serving };
                assert_eq!(of(other, session), expected, "{a} {b} {claimant} {claimed}");
            }
        }
    }
}
