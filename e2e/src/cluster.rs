//! A real Kubernetes cluster on one machine: kubelets, containers, CoreDNS, installed as a user would.
//!
//! Each machine of the cluster (one *hub* with the control plane, and the nodes) is a set of Linux
//! namespaces: network, mounts, host name and processes. The hub holds a bridge that joins them. Inside
//! a machine `/run` and `/var` are its own, so that the kubelet and containerd work with their default
//! paths and leave nothing outside the cluster's folder.
//!
//! Holds throughout: whatever exists of a cluster can be found from its [`Layout`] alone, and
//! [`down::down`] removes it, wherever a start was interrupted; a start that is told to end removes it by
//! itself. Killing the first process of a machine ends all of its processes, the containers included.
//!
//! No service proxy runs until one is installed.

pub mod addons;
pub mod conformance;
pub mod control_plane;
pub mod demo;
pub mod down;
pub mod faults;
pub mod images;
pub mod install;
pub mod installed;
pub mod interrupt;
pub mod layout;
pub mod load_balancer;
pub mod machine;
pub mod network;
pub mod node;
pub mod pki;
pub mod plugin;
pub mod shell;
pub mod uninstall;
pub mod up;

pub use layout::{Layout, Tools};
