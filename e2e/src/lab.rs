//! The environment of a test: a control plane on loopback, and nodes, pods and clients as network namespaces.

pub mod api;
pub mod cleanup;
pub mod control_plane;
pub mod forwarder;
pub mod http;
pub mod kube_proxy;
pub mod namespace;
mod network;
pub mod objects;
pub mod process;
pub mod programs;
pub mod refusing_proxy;
pub mod wait;

pub use network::{Lab, NodeNet, POD_PORTS, PodNet};
