//! The kernel's side of the agent: nftables, conntrack, interface addresses and sysctls.
//!
//! Everything here reads or writes the network namespace of the agent. Nothing here knows the engine: watchers send
//! notices of their own type, which `run` maps to the engine's commands.

pub mod addresses;
pub mod change;
pub mod conntrack;
pub mod dataplane;
pub mod inspector;
mod netlink;
pub mod nft;
pub mod original_destination;
pub mod sysctl;
