//! The order of installation does not matter: the controller waits for what is missing and logs the remedy.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::time::Duration;

use anyhow::ensure;
use switchtower_e2e::lab::wait;
use switchtower_e2e::switchtower::{Fleet, NodeSpec};

#[test]
fn controller_without_crds_names_command_and_recovers() {
    let fleet = Fleet::build(&[NodeSpec::new("alpha", "east", &[])]).unwrap();
    fleet.install_rights().unwrap();
    fleet.start_controller().unwrap();
    wait::until("the controller logs what is missing", Duration::from_secs(20), || {
        fleet.check_controller()?;
        let log = fleet.controller_log();
        ensure!(log.contains("kubectl apply"), "its log:\n{log}");
        Ok(())
    })
    .unwrap();
    fleet.install_crds().unwrap();
    for node in fleet.nodes() {
        fleet.start_agent(node).unwrap();
    }
    fleet.settled(Duration::from_secs(60)).unwrap();
}
