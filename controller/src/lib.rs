//! The controller: watches the API server, compiles what every node must program, serves it to the node
//! agents and publishes one `ProxyStatus` per node.
//!
//! Path of a change: [`watch`] receives it, [`ingest`] converts the API object into the core's model, [`engine`]
//! compiles it and publishes a new revision of the layers to the [`fleet`], a [`session`] streams it to each agent,
//! [`status`] writes the acknowledged state, and [`propagation`] measures the delay. [`status::absence`] finds the
//! blocker of an absent agent. [`serve`] accepts and authenticates the connections of agents. Every replica serves agents;
//! the holder of the [`lease`] writes what concerns the whole cluster, and [`replicas`] query each other.

pub mod admin;
pub mod authority;
mod background;
pub mod bootstrap;
pub mod builtin;
pub mod cli;
pub mod engine;
mod errors;
pub mod events;
#[cfg(test)]
mod fake_api;
pub mod fleet;
#[doc(hidden)]
pub mod fuzzing;
pub mod import_config;
pub mod ingest;
pub mod lease;
pub mod metrics;
pub mod peers;
mod process;
pub mod propagation;
pub mod render;
pub mod replicas;
pub mod rollout;
pub mod run;
pub mod serve;
pub mod server_clock;
pub mod session;
pub mod status;
mod sync;
mod text;
mod token_bucket;
pub mod traces;
pub mod watch;
