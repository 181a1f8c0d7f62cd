//! Values of `status.state`, `status.waitingOn` and the reasons of failures in the custom resources.
//!
//! The fields are strings in the schema, so that components of different versions accept each other's values. These enums
//! are the values that this version knows.

/// Defines an enum whose variants have the same names in the API.
macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($(#[doc = $text:literal])* $variant:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[doc = $text])* $variant,)*
        }

        impl $name {
            /// All values.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Returns the name in the API.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($variant),)*
                }
            }

            /// Returns the meaning, as in the documentation.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                let text = match self {
                    $(Self::$variant => concat!($($text),*),)*
                };
                text.trim_ascii()
            }

            /// Parses a name. Returns `None` for the values of other versions.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.as_str() == name)
            }
        }
    };
}

pub(crate) use names;

names! {
    /// State of a node: the summary of its conditions.
    NodeState {
        /// The kernel holds the latest generation.
        Synced,
        /// The kernel holds the latest generation without effect on packets: the settings have mode Shadow.
        Shadow,
        /// The agent is connected and has not applied the latest generation yet.
        Progressing,
        /// The agent is disconnected; the kernel keeps its rules.
        Stale,
        /// The agent or the kernel refused the latest generation.
        ApplyFailed,
        /// The kernel differs from the view on purpose: refused items, or other settings in force.
        Deviating,
        /// Another program changed the agent's tables.
        Drifted,
        /// Pods of the node have addresses that its local detection does not cover.
        PodsNotLocal,
        /// Rules of another service proxy exist on the node.
        NotExclusive,
        /// The controller has restarted, and the agent has not connected yet.
        Unknown,
        /// No agent has ever connected from this node.
        Absent,
    }
}

names! {
    /// State of a rollout. An object that the controller did not create has the state `Ignored` instead.
    RolloutState {
        /// No node has been updated yet.
        Pending,
        /// Nodes are being updated.
        Progressing,
        /// All nodes of the step hold the target and are observed.
        Soaking,
        /// The rollout waits for an external event, see [`WaitingOn`].
        Paused,
        /// Too many nodes outside the rollout are unhealthy.
        Frozen,
        /// Nodes return to the stable revision.
        RollingBack,
        /// All reachable nodes hold the target.
        Complete,
        /// A node failed, and all nodes have returned.
        Failed,
        /// A user aborted the rollout, and all nodes have returned.
        Aborted,
        /// A newer revision has replaced this one.
        Superseded,
    }
}

#[allow(clippy::derivable_impls, reason = "names! accepts no attributes on values")]
impl Default for RolloutState {
    fn default() -> Self {
        Self::Pending
    }
}

impl RolloutState {
    /// Returns true if the rollout has ended.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Complete | Self::Failed | Self::Aborted | Self::Superseded)
    }
}

names! {
    /// Event that a rollout needs to continue.
    WaitingOn {
        /// Nodes apply the target.
        Nodes,
        /// The soak ends.
        Soak,
        /// A user approves the step.
        Approval,
        /// A user ends the pause.
        Resume,
        /// The selector of the step matches a connected node again.
        CanaryNodes,
        /// A node of the profile connects.
        EligibleNodes,
        /// Unhealthy nodes outside the rollout recover.
        HealthyNodes,
        /// Nodes of an earlier rollout return to the stable revision.
        Stable,
        /// Unreachable nodes with the target reconnect, or a user approves the step without them.
        UnreachableNodes,
    }
}

names! {
    /// Reason why a node failed.
    FailureReason {
        /// A probe failed that had succeeded before the switch.
        ProbeFailed,
        /// The agent or its kernel refused the update.
        ApplyFailed,
        /// The kernel refused single items.
        ItemsRefused,
        /// Another program changed the node's tables after the update.
        Drifted,
        /// The agent lost its connection too often after the update.
        Reconnecting,
        /// The node was connected and did not apply the target in time.
        ApplyDeadlineExceeded,
        /// The agent of a canary was lost after it got the target, and did not reconnect in time.
        LostAfterUpdate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_unknown() {
        for state in NodeState::ALL {
            assert_eq!(NodeState::from_name(state.as_str()), Some(*state));
        }
        assert_eq!(RolloutState::from_name("RollingBack"), Some(RolloutState::RollingBack));
        assert_eq!(WaitingOn::from_name("UnreachableNodes"), Some(WaitingOn::UnreachableNodes));
        for other in ["", "synced", "Later"] {
            assert_eq!(NodeState::from_name(other), None, "{other}");
        }
    }
}
