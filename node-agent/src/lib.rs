//! The node agent: session → state (pure) → nft.
//!
//! It holds the node's view, commits it to nftables in one batch per generation, and acknowledges only what
//! the kernel holds. It never links the Kubernetes client and needs no Kubernetes API.

pub mod backoff;
pub mod cleanup;
pub mod cli;
pub mod conntrack;
pub mod contact;
pub mod controllers;
pub mod dataplane;
pub mod engine;
pub mod facts;
pub mod files;
pub mod health;
pub mod kernel_change;
pub mod log;
pub mod metrics;
pub mod nft;
pub mod probe;
pub mod questions;
mod rawnetlink;
pub mod run;
pub mod session;
pub mod snapshot;
pub mod state;
pub mod state_lock;
pub mod sysctl;
mod time;
pub mod traces;
pub mod trial_file;

#[cfg(test)]
mod testing;
