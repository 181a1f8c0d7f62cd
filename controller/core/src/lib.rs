//! The pure core. Nothing here does IO, reads a clock, draws a random number or depends on iteration order:
//! the same objects give the same bytes and the same digest on every replica.
//!
//! Items of the view are the protocol's own messages (`switchtower-proto` without its gRPC half), so that
//! there is one definition of what is hashed, sent and merged.

pub mod compile;
pub mod compiled;
pub mod drain;
pub mod explain;
pub mod layer;
pub mod locality;
pub mod model;
pub mod names;
pub mod propagation;
pub mod rollout;
pub mod tracer;
pub mod view;
pub mod wire;
