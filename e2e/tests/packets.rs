//! Services reach their pods: every kind of address, protocol, family and policy, proved by packets.

mod common;

use common::fleet;
use std::time::Duration;

#[test]
fn rows_and_kernels_agree() {
    fleet().settled(Duration::from_secs(5)).unwrap();
}
