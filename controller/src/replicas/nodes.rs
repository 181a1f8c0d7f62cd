//! Observations of nodes as replicas exchange them. Times are ages, so that the clocks of the replicas do not matter.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use switchtower_admin_api::{NodeReason, NodeStatus};
use switchtower_proto::v1::{Deviations, DriftCause, TrialStatus};
use tokio::time::Instant;

use crate::status::Observation;
use crate::status::observation::{Moments, RefusedGeneration};

/// Path of [`ObservedNode`]s of all nodes with a stream, now or before.
pub(crate) const PATH: &str = "/v1/replica/nodes";

/// A node with a stream to the replica that answers, now or before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ObservedNode {
    /// Number of its latest stream to this replica.
    pub(crate) session: u64,
    /// Progress.
    pub(crate) status: NodeStatus,
    connected: Option<u64>,
    lost: Option<u64>,
    settings: Option<(String, u64)>,
    took: Option<u64>,
    /// Encoded [`Deviations`].
    deviations: Option<Vec<u8>>,
    /// Encoded [`TrialStatus`].
    trial: Option<Vec<u8>>,
    refusal: Option<Refusal>,
    drift: Option<(u64, i32)>,
    losses: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Refusal {
    reason: String,
    detail: String,
    errno: i32,
    generation: u64,
}

impl ObservedNode {
    pub(crate) fn new(status: NodeStatus, observation: &Observation, now: Instant) -> Self {
        let age = |at: Instant| milliseconds(now.saturating_duration_since(at));
        let moments = &observation.moments;
        let refusal = observation.failure.as_ref().map(|failure| Refusal {
            reason: failure.reason.as_str().to_owned(),
            detail: failure.detail.clone(),
            errno: failure.errno,
            generation: failure.generation,
        });
        Self {
            session: observation.session,
            status,
            connected: moments.connected.map(age),
            lost: observation.lost_since.and(moments.lost).map(age),
            settings: observation.settings.as_ref().map(|(name, revision)| (name.to_string(), *revision)),
            took: observation.settings_took.map(milliseconds),
            deviations: observation.deviations.as_ref().map(Deviations::encode_to_vec),
            trial: observation.trial.as_ref().map(TrialStatus::encode_to_vec),
            refusal,
            drift: moments.drifted.map(|at| (age(at), observation.drift_cause as i32)),
            losses: moments.losses.iter().map(|at| age(*at)).collect(),
        }
    }

    /// Returns the observation as if this process had made it.
    pub(crate) fn observation(&self, now: Instant) -> Observation {
        let at = |age: u64| now.checked_sub(Duration::from_millis(age)).unwrap_or(now);
        let refusal = |refusal: &Refusal| RefusedGeneration {
            reason: NodeReason::from_name(&refusal.reason).unwrap_or(NodeReason::Refused),
            detail: refusal.detail.clone(),
            errno: refusal.errno,
            generation: refusal.generation,
        };
        Observation {
            session: self.session,
            lost_since: self.lost.map(|_| Timestamp::now()),
            desired: self.status.desired,
            applied: self.status.applied,
            settings: self.settings.as_ref().map(|(name, revision)| (Arc::from(name.as_str()), *revision)),
            settings_took: self.took.map(Duration::from_millis),
            deviations: self.deviations.as_ref().and_then(|bytes| Deviations::decode(bytes.as_slice()).ok()),
            trial: self.trial.as_ref().and_then(|bytes| TrialStatus::decode(bytes.as_slice()).ok()),
            failure: self.refusal.as_ref().map(refusal),
            drift_cause: self
                .drift
                .and_then(|(_, cause)| DriftCause::try_from(cause).ok())
                .unwrap_or(DriftCause::Unspecified),
            moments: Moments {
                connected: self.connected.map(at),
                lost: self.lost.map(at),
                drifted: self.drift.map(|(age, _)| at(age)),
                losses: self.losses.iter().map(|age| at(*age)).collect(),
            },
            ..Observation::default()
        }
    }
}

/// Returns a duration as replicas exchange it.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As version 0.1.0 sends it; a later version may add fields.
    #[tokio::test(start_paused = true)]
    async fn node_of_another_version_is_understood() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let node: ObservedNode = serde_json::from_value(serde_json::json!({
            "session": 7, "aLaterField": {"more": true},
            "status": {"node": "n", "connected": true, "desired": 4, "applied": 3},
            "connected": 9_000, "lost": null, "settings": ["default", 2], "took": 12, "deviations": [8, 2],
            "trial": null, "drift": [100, 2], "losses": [50],
            "refusal": {"reason": "KernelRefused", "detail": "no memory", "errno": 12, "generation": 4},
        }))
        .unwrap();
        let known = node.observation(Instant::now());
        assert_eq!((known.session, known.desired, known.applied), (7, 4, 3));
        assert_eq!(known.deviations.map(|deviations| deviations.held), Some(2));
        assert_eq!(known.failure.map(|failure| failure.reason), Some(NodeReason::KernelRefused));
        assert_eq!(known.moments.connected.map(|at| at.elapsed()), Some(Duration::from_secs(9)));
        assert_eq!((known.lost_since, known.drift_cause), (None, DriftCause::TableDeleted));
    }

    #[tokio::test(start_paused = true)]
    async fn observation_survives_the_way_to_another_replica() {
        let mut observation = Observation { session: 7, applied: 3, desired: 4, ..Observation::default() };
        observation.note_connected();
        observation.note_loss();
        observation.note_drift(DriftCause::TableDeleted);
        observation.settings = Some(("default".into(), 2));
        observation.settings_took = Some(Duration::from_millis(12));
        observation.deviations = Some(Deviations { held: 2, ..Deviations::default() });
        observation.trial =
            Some(TrialStatus { profile: "default".into(), revision: 2, ..TrialStatus::default() });
        observation.failure = Some(RefusedGeneration {
            reason: NodeReason::KernelRefused,
            detail: "no memory".to_owned(),
            errno: 12,
            generation: 4,
        });
        tokio::time::advance(Duration::from_secs(3)).await;
        let status = NodeStatus { node: "n".into(), connected: true, desired: 4, applied: 3, failure: None };
        let sent = serde_json::to_vec(&ObservedNode::new(status, &observation, Instant::now())).unwrap();
        let received: ObservedNode = serde_json::from_slice(&sent).unwrap();
        let known = received.observation(Instant::now());
        assert_eq!(known.moments, observation.moments);
        let shown = |known: &Observation| {
            let Observation {
                session, settings, settings_took, deviations, trial, failure, drift_cause, ..
            } = known.clone();
            (
                session,
                settings,
                settings_took,
                deviations,
                trial,
                failure,
                drift_cause,
                known.lost_since.is_some(),
            )
        };
        assert_eq!(shown(&known), shown(&observation));
    }
}
