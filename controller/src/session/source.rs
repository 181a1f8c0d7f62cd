//! A replica that is behind what a node has already seen must not send it older content.

use std::time::Duration;

use switchtower_proto::digest::Digest;
use switchtower_proto::v1::{GoAwayReason, Hello, Source};
use tokio::time::Instant;

use super::{End, Session};
use crate::fleet::elsewhere::covers;

/// Time that a replica has to process what the node has seen.
const PATIENCE: Duration = Duration::from_secs(5);
/// Interval between checks.
const INTERVAL: Duration = Duration::from_millis(50);
/// The watches are current if the API server responded on each of them within this time.
const CURRENT: Duration = Duration::from_secs(15);

/// Treatment of a node that has seen later versions than this replica has processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lag {
    /// Send the agent to another replica.
    SendAway,
    /// The API server went back in time: serve what it has now.
    Regressed,
}

/// Decides after [`PATIENCE`]. `fresher`: another replica has processed what the node has seen.
fn judge(fresher: bool, upstream_age: Option<Duration>) -> Lag {
    let current = upstream_age.is_some_and(|age| age <= CURRENT);
    if fresher || !current { Lag::SendAway } else { Lag::Regressed }
}

impl Session {
    /// Waits until this replica has processed what the node has seen, or holds the same content. Sends nothing.
    pub(super) async fn catch_up(&self, hello: &Hello) -> Result<(), End> {
        let Some(view) = &hello.view else { return Ok(()) };
        let Some(seen) = &view.source else { return Ok(()) };
        let digest = Digest::from_bytes(&view.digest);
        let deadline = Instant::now() + PATIENCE;
        while !self.is_current(seen, digest) {
            if Instant::now() < deadline {
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
            let fresher = self.fleet.is_fresher_elsewhere(seen).await;
            match judge(fresher, self.fleet.upstream_age()) {
                Lag::SendAway => {
                    let detail = "the node has seen later changes than this replica".to_owned();
                    return Err(End::GoAway(GoAwayReason::StaleReplica, detail));
                }
                Lag::Regressed => {
                    self.fleet.metrics().source_regressed.inc();
                    let (processed, _) = self.fleet.processed();
                    tracing::warn!(node = %self.node, ?seen, ?processed, "source_regressed: the node has seen later \
                        versions than the API server has, as after a restore of etcd; it gets the present state");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn is_current(&self, seen: &Source, digest: Option<Digest>) -> bool {
        let (processed, _) = self.fleet.processed();
        covers(&processed, seen) || digest.is_some() && self.fleet.desired_digest(&self.node) == digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_is_sent_away_unless_the_api_server_went_back() {
        let recent = Some(Duration::from_secs(2));
        assert_eq!(judge(true, recent), Lag::SendAway);
        assert_eq!(judge(false, recent), Lag::Regressed, "no replica is fresher");
        for unheard in [None, Some(Duration::from_secs(16))] {
            assert_eq!(judge(false, unheard), Lag::SendAway, "this replica's own watches are stale");
        }
    }
}
