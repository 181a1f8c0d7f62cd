//! Independent observers: the kernel's rules and commits, trace collectors, Prometheus' parser.

pub mod collector;
pub mod commits;
pub mod kernel;
pub mod promtool;
