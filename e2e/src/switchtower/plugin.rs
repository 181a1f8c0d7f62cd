//! `kubectl switchtower` in the laboratory: the real plugin against the real API server and controller.
//!
//! No kubelet can forward a port here, so the plugin gets the address of the admin API as an argument. Token, CA and
//! TLS are as in a cluster.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Fleet;
use crate::lab::programs;

/// Result of one run of the plugin.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: i32,
    pub text: String,
    pub errors: String,
}

impl Answer {
    /// Parses the output as JSON.
    ///
    /// # Errors
    /// The output is not JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.text).with_context(|| format!("{self:?} is not JSON"))
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// It cannot be started, or is killed.
    pub fn of(command: &mut Command) -> Result<Self> {
        let output = command.output().context("starting kubectl-switchtower")?;
        Ok(Self {
            code: output.status.code().context("kubectl-switchtower was killed")?,
            text: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// The plugin with a kubeconfig, ready to run.
///
/// # Errors
/// It is not built.
pub fn command(fleet: &Fleet, kubeconfig: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(programs::workspace("kubectl-switchtower")?);
    command.arg("--kubeconfig").arg(kubeconfig).arg("--controller").arg(fleet.admin_address().to_string());
    command.args(arguments);
    Ok(command)
}

/// Runs the plugin as administrator.
///
/// # Errors
/// It cannot be started.
pub fn run(fleet: &Fleet, arguments: &[&str]) -> Result<Answer> {
    run_as(fleet, &fleet.control_plane().kubeconfig(), arguments)
}

/// Runs the plugin with a kubeconfig.
///
/// # Errors
/// It cannot be started.
pub fn run_as(fleet: &Fleet, kubeconfig: &Path, arguments: &[&str]) -> Result<Answer> {
    Answer::of(&mut command(fleet, kubeconfig, arguments)?)
}
