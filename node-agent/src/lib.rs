//! The node agent: controller session → state (pure) → kernel.
//!
//! It holds the node's view, commits it to nftables in one batch per generation, and acknowledges a generation once
//! the kernel holds it. It links no Kubernetes client and needs no Kubernetes API.

pub(crate) mod cleanup;
pub mod cli;
pub mod controller;
pub mod drain;
pub mod engine;
#[doc(hidden)]
pub mod fuzzing;
pub(crate) mod health;
pub mod kernel;
pub(crate) mod log;
pub mod metrics;
pub(crate) mod probe;
pub mod run;
pub mod state;
pub mod storage;
pub(crate) mod traces;

#[cfg(test)]
mod testing;
