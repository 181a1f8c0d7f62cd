//! The last message of a stream that the controller ends, with the time after which the agent reconnects.

use switchtower_proto::v1::controller_message::Message as ToAgent;
use switchtower_proto::v1::{ControllerMessage, GoAway, GoAwayReason};

use super::{Limits, message};

/// Response to an agent that exceeds the limits.
pub(crate) fn overloaded(limits: &Limits) -> ControllerMessage {
    go_away(GoAwayReason::Overloaded, "too many agents connect at once".to_owned(), limits)
}

/// Returns the message, with a random delay.
pub(super) fn go_away(reason: GoAwayReason, detail: String, limits: &Limits) -> ControllerMessage {
    // Full jitter: agents that were disconnected together do not reconnect together.
    let retry_after_milliseconds = match reason {
        GoAwayReason::CredentialExpiring | GoAwayReason::Shutdown => rand::random_range(0..1_000),
        // It spreads over the interval between pings already, and another replica accepts the agent.
        GoAwayReason::StaleReplica => rand::random_range(0..2_000),
        GoAwayReason::NotReady => rand::random_range(500..2_000),
        GoAwayReason::Overloaded => rand::random_range(
            500..2_000 + (limits.stream_burst / limits.streams_per_second * 1_000.0) as u32,
        ),
        _ => rand::random_range(5_000..15_000),
    };
    message(ToAgent::GoAway(GoAway { reason: reason as i32, detail, retry_after_milliseconds }))
}
