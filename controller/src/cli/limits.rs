//! Flags that bound what Services may occupy.

use clap::Args;
use switchtower_core::compile::{Limits, Usage};

/// Bounds of Services. A Service beyond them gets an Event with the reason LimitExceeded.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Maximum number of addresses × ports of one Service; further ports and external addresses are left out.
    #[arg(long, env = "SWITCHTOWER_MAX_SERVICE_FRONTENDS", default_value_t = Limits::default().service.frontends, value_name = "NUMBER")]
    pub max_service_frontends: usize,
    /// Maximum number of endpoints × ports of one Service; further endpoints are left out.
    #[arg(long, env = "SWITCHTOWER_MAX_SERVICE_ENDPOINTS", default_value_t = Limits::default().service.endpoints, value_name = "NUMBER")]
    pub max_service_endpoints: usize,
    /// Maximum number of addresses × ports in a namespace; its newest Services beyond that are not programmed.
    #[arg(long, env = "SWITCHTOWER_MAX_NAMESPACE_FRONTENDS", default_value_t = Limits::default().namespace.frontends, value_name = "NUMBER")]
    pub max_namespace_frontends: usize,
    /// Maximum number of endpoints × ports in a namespace; its newest Services beyond that are not programmed.
    #[arg(long, env = "SWITCHTOWER_MAX_NAMESPACE_ENDPOINTS", default_value_t = Limits::default().namespace.endpoints, value_name = "NUMBER")]
    pub max_namespace_endpoints: usize,
    /// Maximum number of addresses × ports in the cluster; the newest Services beyond that are not programmed.
    #[arg(long, env = "SWITCHTOWER_MAX_TOTAL_FRONTENDS", default_value_t = Limits::default().total.frontends, value_name = "NUMBER")]
    pub max_total_frontends: usize,
    /// Maximum number of endpoints × ports in the cluster; the newest Services beyond that are not programmed.
    #[arg(long, env = "SWITCHTOWER_MAX_TOTAL_ENDPOINTS", default_value_t = Limits::default().total.endpoints, value_name = "NUMBER")]
    pub max_total_endpoints: usize,
}

impl LimitArgs {
    /// The bounds for the compiler.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let usage = |frontends, endpoints| Usage { frontends, endpoints };
        Limits {
            service: usage(self.max_service_frontends, self.max_service_endpoints),
            namespace: usage(self.max_namespace_frontends, self.max_namespace_endpoints),
            total: usage(self.max_total_frontends, self.max_total_endpoints),
        }
    }
}
