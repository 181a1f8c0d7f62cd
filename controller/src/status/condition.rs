//! A condition of a row before it is merged with the previous one.

use std::borrow::Cow;

use switchtower_admin_api::NodeReason;

use super::absence::Blocker;

/// Status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    True,
    False,
    Unknown,
}

impl Status {
    /// Returns the status as it appears in the API.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Status, reason and message of a condition.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) status: Status,
    /// A [`NodeReason`], or the reason of the kubelet or the agent.
    pub(super) reason: Cow<'static, str>,
    pub(super) message: String,
}

impl Verdict {
    pub(super) fn new(status: Status, reason: NodeReason, message: impl Into<String>) -> Self {
        Self { status, reason: reason.as_str().into(), message: message.into() }
    }

    /// Returns the same reason and message with another status.
    pub(super) fn with_status(&self, status: Status) -> Self {
        Self { status, reason: self.reason.clone(), message: self.message.clone() }
    }

    /// The agent is not connected: because of the blocker if it is known, otherwise with the given reason.
    pub(super) fn not_connected(
        blocker: Option<&Blocker>,
        reason: NodeReason,
        message: &'static str,
    ) -> Self {
        match blocker {
            Some(Blocker { reason, message }) => {
                Self { status: Status::False, reason: reason.clone(), message: message.clone() }
            }
            None => Self::new(Status::False, reason, message),
        }
    }

    /// Returns true if the status is True.
    pub(super) fn holds(&self) -> bool {
        self.status == Status::True
    }
}
