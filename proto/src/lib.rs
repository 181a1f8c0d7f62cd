//! The protocol between the controller and the node agents.
//!
//! `proto/switchtower/v1/fleet.proto` is the specification, with the state machine in its comments.
//! This crate holds the code generated from it, [`digest`], the canonical encoding that both sides
//! hash, and the rounding of [`affinity`] timeouts that both sides apply.

pub mod affinity;
pub mod digest;
#[cfg(feature = "grpc")]
pub mod tls;

/// Feature in Hello and `Update.required_features`: the layer of health check node ports.
pub const HEALTH_CHECK_LAYER: &str = "health-check-layer";

/// Feature in Hello, Welcome and `Update.required_features`: the drain gate.
pub const DRAIN_GATE: &str = "drain-gate";

/// Feature in Hello and `Update.required_features`: settings with mode Shadow.
pub const SHADOW_MODE: &str = "shadow-mode";

/// Feature in Hello: heartbeats at the interval in Welcome.
pub const HEARTBEAT: &str = "heartbeat";

/// Returns an address as the messages contain it: 4 or 16 bytes in network order.
#[must_use]
pub fn address_bytes(address: std::net::IpAddr) -> Vec<u8> {
    match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl v1::DriftCause {
    /// Returns the name in messages, spans and the metric's label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unknown",
            Self::Changed => "changed",
            Self::TableDeleted => "table_deleted",
            Self::Overflow => "overflow",
            Self::Unwatched => "unwatched",
        }
    }
}

/// Messages and service of `switchtower.v1`, generated; do not edit.
pub mod v1 {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::too_many_lines,
        unreachable_pub,
        reason = "generated from fleet.proto, documented there"
    )]
    include!("gen/switchtower.v1.rs");
}
