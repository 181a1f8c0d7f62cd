//! See Cargo.toml.
pub mod cluster;
