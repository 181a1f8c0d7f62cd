//! The kernel's side of the agent: nftables, conntrack, interface addresses and sysctls.
//!
//! Everything here reads or writes the network namespace of the agent. Nothing here knows the engine: watchers send
//! notices of their own type, which `run` maps to the engine's commands.

pub(crate) mod addresses;
pub mod change;
pub(crate) mod conntrack;
pub mod dataplane;
pub(crate) mod inspector;
mod netlink;
pub mod nft;
pub(crate) mod original_destination;
pub(crate) mod sysctl;
