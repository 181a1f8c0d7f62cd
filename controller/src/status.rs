//! One `ProxyStatus` per Node: what the node should hold and what its kernel holds, for `kubectl`.

pub mod observation;
pub mod row;

#[cfg(test)]
mod row_tests;
