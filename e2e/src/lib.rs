//! The laboratory: a real control plane, nodes as network namespaces, real packets.
//!
//! [`control_plane`] runs etcd, kube-apiserver and kube-controller-manager on loopback; [`lab`] makes nodes,
//! pods and off-cluster clients as network namespaces and joins them; [`switchtower`] runs the real controller
//! and agents; [`probe`] sends packets and tells what came back; [`kernel_reader`] reads the kernel with `nft`,
//! independently of the agent. Nothing here is a stand-in for a part of the product.
//!
//! [`cluster`] is the other kind of laboratory: a cluster with kubelets and containers.
//!
//! Everything that a laboratory makes is removed when it is dropped, when the process ends, and on Ctrl-C;
//! [`cleanup::sweep`] removes what a killed process left. Several laboratories can run at the same time.

pub mod api;
pub mod bench;
pub mod cleanup;
pub mod cluster;
pub mod collector;
pub mod commits;
pub mod control_plane;
pub mod demo;
pub mod differential;
pub mod kernel_reader;
pub mod lab;
pub mod namespace;
pub mod objects;
pub mod oracle;
pub mod plugin;
pub mod probe;
pub mod process;
pub mod programs;
mod progress;
pub mod scrape;
pub mod switchtower;
pub mod wait;
