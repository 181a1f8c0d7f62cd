//! Fixtures that the node agent's unit tests and integration tests share: synthetic views of a node, and a controller
//! that a test drives message by message. Only tests use this crate.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

pub mod controller;
pub mod fleet;
