//! A real Kubernetes cluster on one machine: kubelets, containers, CoreDNS, installed as a user would.
//!
//! Each machine of the cluster (one *hub* with the control plane, and the nodes) is a set of Linux namespaces:
//! network, mounts, host name and processes. A bridge in the hub connects them. Inside a machine `/run` and `/var`
//! are private, so that the kubelet and containerd use their default paths and leave nothing outside the cluster's
//! folder.
//!
//! Invariants:
//! - The [`Layout`] determines every resource of a cluster, and [`down::down`] removes them even after an interrupted
//!   start; an interrupted start calls it.
//! - Killing the first process of a machine ends all its processes, including containers.
//!
//! No service proxy runs until one is installed.

pub mod addons;
pub mod conformance;
pub mod control_plane;
pub mod demo;
pub mod down;
pub mod faults;
pub mod helm;
mod high_availability;
pub mod images;
pub mod install;
pub mod installed;
pub mod interrupt;
pub mod layout;
pub mod load_balancer;
pub mod machine;
pub mod migrate;
pub mod network;
pub mod node;
pub mod pki;
pub mod plugin;
pub mod rolling_update;
pub mod shell;
pub mod uninstall;
pub mod up;

pub use layout::{Layout, Tools};
