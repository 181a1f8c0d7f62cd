//! The node agent: session → state (pure) → nft.
//!
//! It holds the node's view, commits it to nftables in one batch per generation, and acknowledges only what
//! the kernel holds. It never links the Kubernetes client and needs no Kubernetes API.

pub mod cleanup;
pub mod cli;
pub mod controller;
pub mod engine;
pub mod health;
pub mod kernel;
pub mod log;
pub mod metrics;
pub mod probe;
pub mod run;
pub mod state;
pub mod storage;
pub mod traces;

#[cfg(test)]
mod testing;
