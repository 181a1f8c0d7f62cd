//! The connection to the controller: bootstrap sources, sessions and their backoff, link status.

pub(crate) mod backoff;
pub mod bootstrap;
pub(crate) mod certificate;
mod choice;
pub mod link;
pub mod session;
