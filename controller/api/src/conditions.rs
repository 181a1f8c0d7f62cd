//! Types and reasons of the conditions in the custom resources.
//!
//! The fields are strings in the schema: the condition of a row also passes on reasons of the kubelet and of agents.

use crate::states::{RolloutState, names};

names! {
    /// Type of a condition.
    ConditionType {
        /// Row: the kernel holds the desired generation. Profile and rollout: complete.
        Ready,
        /// Row: the agent has a stream to the controller.
        Connected,
        /// Row: the agent acknowledged the latest generation, without deviations.
        Programmed,
        /// Row: no other program changed the agent's tables.
        Consistent,
        /// Row: the node has no rules of another service proxy.
        Exclusive,
        /// Row: local detection covers the known pods of the node.
        LocalDetection,
        /// Row: the kernel has the connection tracking settings of the profile.
        KernelSettings,
        /// Row: the drain gate works. Present only if it does not.
        DrainGate,
        /// Profile and rollout: in progress.
        Reconciling,
        /// Profile and rollout: no progress without intervention.
        Stalled,
        /// Profile: another profile takes precedence on selected nodes.
        Overlapping,
    }
}

names! {
    /// Reason of a condition in the row of a node.
    NodeReason {
        /// The agent's stream is open.
        StreamOpen,
        /// The agent's stream ended.
        AgentDisconnected,
        /// The agent's stream is open, but its heartbeats do not arrive.
        AgentSilent,
        /// The replica of the controller that served the agent is gone, and the agent has not reconnected yet.
        AwaitingAgent,
        /// No agent of the node has connected.
        NoAgent,
        /// The node has no Pod of the agent.
        NoAgentPod,
        /// The agent's container was restarted.
        AgentRestarted,
        /// The agent's container does not run; the kubelet's reason is not valid in a condition.
        AgentNotRunning,
        /// The agent runs and its health port does not respond.
        AgentNotAnswering,
        /// The scheduler did not place the agent's Pod.
        Unschedulable,
        /// The agent's Pod failed.
        PodFailed,
        /// The kubelet of the node does not report.
        NodeStatusUnknown,
        /// Another program uses the controller's port.
        ControllerNotListening,
        /// The agent has not acknowledged a generation yet.
        Programming,
        /// The agent has not acknowledged the latest generation in time.
        Behind,
        /// The kernel holds the desired generation.
        UpToDate,
        /// The kernel holds the desired generation without effect on packets.
        ShadowMode,
        /// The previous settings are in force during the baseline of a trial.
        SettingsOnTrial,
        /// The settings failed their trial.
        RolledBack,
        /// The kernel refused single items.
        ItemsRefused,
        /// The delete budget holds removals back.
        DeletionsHeld,
        /// The agent refused an update without a reason that this version knows.
        Refused,
        /// The update does not continue from the agent's generation.
        FromMismatch,
        /// The agent computed another digest.
        DigestMismatch,
        /// The agent could not decode the update.
        MalformedUpdate,
        /// The update exceeds a limit of the agent.
        OverLimit,
        /// The update needs a feature that the agent lacks.
        UnknownFeature,
        /// The kernel refused the update.
        KernelRefused,
        /// Another program changed the agent's tables.
        ForeignChange,
        /// No program changed the agent's tables.
        NoDrift,
        /// Rules of kube-proxy exist on the node.
        ForeignProxy,
        /// No rules of another service proxy exist on the node.
        OnlyProxy,
        /// Known pods have addresses outside the networks of local detection.
        PodsOutside,
        /// All known pods have addresses inside the networks of local detection.
        PodsInside,
        /// Local detection uses an interface, which only the node can evaluate.
        ByInterface,
        /// No connection counts as one of a local pod.
        NothingLocal,
        /// The settings are in force.
        InForce,
        /// The settings are not in force.
        NotInForce,
    }
}

names! {
    /// Reason of the conditions of a rollout: its state, or a more specific one.
    RolloutReason {
        /// See [`RolloutState::Pending`].
        Pending,
        /// See [`RolloutState::Progressing`].
        Progressing,
        /// See [`RolloutState::Soaking`].
        Soaking,
        /// See [`RolloutState::Paused`].
        Paused,
        /// See [`RolloutState::Frozen`].
        Frozen,
        /// See [`RolloutState::RollingBack`].
        RollingBack,
        /// See [`RolloutState::Complete`].
        Complete,
        /// See [`RolloutState::Failed`].
        Failed,
        /// A user aborted the rollout.
        Aborted,
        /// See [`RolloutState::Superseded`].
        Superseded,
        /// A node failed.
        NodeFailed,
        /// A user must approve the step.
        WaitingForApproval,
        /// No node of the profile is connected.
        NoEligibleNodes,
        /// No connected node matches the selector of the step.
        Inconclusive,
        /// Nodes with the target are unreachable.
        UnreachableNodes,
        /// The step made no progress in time.
        ProgressDeadlineExceeded,
        /// The controller did not create the object.
        NotOwned,
    }
}

impl From<RolloutState> for RolloutReason {
    fn from(state: RolloutState) -> Self {
        match state {
            RolloutState::Pending => Self::Pending,
            RolloutState::Progressing => Self::Progressing,
            RolloutState::Soaking => Self::Soaking,
            RolloutState::Paused => Self::Paused,
            RolloutState::Frozen => Self::Frozen,
            RolloutState::RollingBack => Self::RollingBack,
            RolloutState::Complete => Self::Complete,
            RolloutState::Failed => Self::Failed,
            RolloutState::Aborted => Self::Aborted,
            RolloutState::Superseded => Self::Superseded,
        }
    }
}

names! {
    /// Reason of the conditions of a profile.
    ProfileReason {
        /// The first rollout has not started.
        Pending,
        /// A rollout is in progress.
        RollingOut,
        /// The latest rollout is complete.
        UpToDate,
        /// The latest rollout failed.
        RolloutFailed,
        /// A user aborted the latest rollout.
        RolloutAborted,
        /// The API server refused the rollout object.
        RolloutRefused,
        /// The profile is being deleted and still has nodes.
        Deleting,
        /// The rollout that should take over the nodes of a deleted profile did not complete.
        HandoverFailed,
        /// Another profile takes precedence on selected nodes.
        OtherProfileWins,
        /// No other profile takes precedence on a selected node.
        NoOverlap,
    }
}

#[cfg(test)]
mod tests {
    use crate::states::NodeState;

    use super::*;

    /// The page docs/conditions.md.
    fn page() -> String {
        let mut page = "# Conditions, states and reasons\n\n\
            Generated by `SWITCHTOWER_UPDATE=1 cargo test -p switchtower-admin-api page`; do not edit. Rows (ProxyStatus) also\n\
            pass on reasons of the kubelet, such as `ErrImagePull`, and of agents; manifests/README.md lists them.\n"
            .to_owned();
        let mut table = |title: &str, entries: Vec<(&'static str, &'static str)>| {
            page += &format!("\n## {title}\n\n| Name | Meaning |\n|---|---|\n");
            for (name, meaning) in entries {
                let state =
                    meaning.strip_prefix("See [`RolloutState::").and_then(|rest| rest.strip_suffix("`]."));
                let state = state.and_then(RolloutState::from_name);
                page += &format!("| `{name}` | {} |\n", state.map_or(meaning, RolloutState::meaning));
            }
        };
        macro_rules! table {
            ($title:literal, $name:ident) => {
                table($title, $name::ALL.iter().map(|value| (value.as_str(), value.meaning())).collect())
            };
        }
        table!("Types of conditions", ConditionType);
        table!("State of a row", NodeState);
        table!("Reasons in a row", NodeReason);
        table!("State of a rollout", RolloutState);
        table!("Reasons of a rollout", RolloutReason);
        table!("Reasons of a profile", ProfileReason);
        page
    }

    #[test]
    fn page_in_docs_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conditions.md");
        if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
            std::fs::write(path, page()).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == page(),
            "docs/conditions.md is out of date: run this test with SWITCHTOWER_UPDATE=1"
        );
    }

    #[test]
    fn rollout_reason_has_name_of_its_state() {
        for state in RolloutState::ALL {
            assert_eq!(RolloutReason::from(*state).as_str(), state.as_str());
        }
    }
}
