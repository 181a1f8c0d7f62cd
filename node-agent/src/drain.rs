//! The drain gate: a pod's `preStop` hook waits here until no node sends new connections to the pod any more.
//!
//! The kubelet sends the hook's request from the host to the pod's address. A rule of the agent redirects it to a listener
//! on loopback ([`server`]), which learns the pod's address from connection tracking. The controller answers over the
//! open stream ([`requests`]).

pub mod requests;
pub mod server;

use std::time::Duration;

/// Timeout of a request without `?timeout=`.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(25);
/// Maximum timeout of a request.
pub const TIMEOUT_LIMIT: Duration = Duration::from_secs(600);
