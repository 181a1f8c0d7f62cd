//! The order in which things are installed does not matter: the controller waits for what is missing, and says what
//! to do.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::time::Duration;

use anyhow::ensure;
use switchtower_e2e::lab::wait;
use switchtower_e2e::switchtower::{Fleet, NodeSpec};

#[test]
fn without_its_crds_the_controller_says_which_command_installs_them_and_serves_once_they_are_there() {
    let fleet = Fleet::build(&[NodeSpec::new("alpha", "east", &[])]).unwrap();
    fleet.install_rights().unwrap();
    fleet.start_controller().unwrap();
    wait::until("the controller says what is missing", Duration::from_secs(20), || {
        fleet.check_controller()?;
        let log = fleet.controller_log();
        ensure!(log.contains("kubectl apply"), "it says:\n{log}");
        Ok(())
    })
    .unwrap();
    fleet.install_crds().unwrap();
    for node in fleet.nodes() {
        fleet.start_agent(node).unwrap();
    }
    fleet.settled(Duration::from_secs(60)).unwrap();
}
