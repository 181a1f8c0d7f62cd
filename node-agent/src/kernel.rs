//! The kernel's side of the agent: nftables, conntrack, interface addresses and sysctls.
//!
//! Everything here reads or writes the network namespace of the agent. Nothing here knows the engine: watchers send
//! notices of their own type, which `run` maps to the engine's commands.

pub(crate) mod addresses;
pub mod change;
pub(crate) mod conntrack;
pub mod dataplane;
pub(crate) mod inspector;
mod legacy;
mod netlink;
pub mod nft;
pub(crate) mod original_destination;
pub(crate) mod sysctl;

/// Reads a datagram as answers to all requests of the agent, for fuzzing.
pub(crate) fn read_datagram(bytes: &[u8]) {
    for message in netlink::wire::Messages(bytes) {
        let _ = netlink::Reply::read(&message);
        nft::read_message(&message);
        conntrack::read_message(&message);
        addresses::read_message(&message);
    }
}

/// Datagrams as the kernel sends them.
#[cfg(test)]
pub(crate) fn example_datagrams() -> Vec<(&'static str, Vec<u8>)> {
    nft::example_datagrams()
}
