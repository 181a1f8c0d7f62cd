//! End-to-end tests of Switchtower: real control planes, nodes as network namespaces, real packets.
//!
//! - [`lab`] builds the environment: control plane, nodes, pods and off-cluster clients.
//! - [`switchtower`] runs the real controller and agents in it; [`scene`] is the fleet that the tests of one program
//!   share.
//! - [`probe`] sends packets and reports the outcome; [`observe`] reads the kernel and a trace collector independently
//!   of the product.
//! - [`parity`] compares Switchtower with kube-proxy, [`mod@bench`] measures both, [`growth`] fits the growth of costs and
//!   [`plot`] draws it, [`demo`] is `make demo`,
//!   [`chaos`] injects faults.
//! - [`cluster`] is the other environment: a cluster with kubelets and containers.
//!
//! Invariants:
//! - No part of the product is stubbed.
//! - Everything that a laboratory creates is removed when it is dropped, when the process ends, and on Ctrl-C;
//!   [`lab::cleanup::sweep`] removes the remains of killed processes.
//! - Several laboratories can run at the same time.

#![allow(missing_docs, reason = "the only users are tests, and names carry the meaning")]

pub mod bench;
pub mod chaos;
pub mod cluster;
pub mod demo;
pub mod drain_gate;
pub mod fleet;
pub mod growth;
pub mod lab;
pub mod observe;
pub mod parity;
pub mod plot;
pub mod probe;
pub mod scene;
pub mod switchtower;
