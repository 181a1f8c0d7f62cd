//! The controller: watches the API server, compiles what every node must program, serves it to the node
//! agents and publishes one `ProxyStatus` per node.
//!
//! The way of a change: [`watch`] hears it, [`ingest`] turns the API object into the core's model, [`engine`]
//! compiles it and publishes a new revision of the layers, `serve` streams it to the agents, [`status`]
//! writes what they acknowledged, [`propagation`] measures how long it took, and [`status::absence`] finds out why an
//! agent is absent. Of several controllers only the holder of the [`lease`] serves and writes.

pub mod admin;
mod background;
pub mod bootstrap;
pub mod builtin;
pub mod cli;
pub mod engine;
mod errors;
pub mod events;
#[cfg(test)]
mod fake_api;
pub mod ingest;
pub mod lease;
pub mod metrics;
pub mod peers;
mod process;
pub mod propagation;
pub mod render;
pub mod rollout;
pub mod run;
pub mod serve;
pub mod status;
pub mod traces;
pub mod watch;
