//! `kubectl switchtower` in the laboratory: the real plugin against the real API server and controller.
//!
//! There is no kubelet here that could forward a port, so the plugin is told where the controller's admin API is;
//! token, CA and TLS are as everywhere.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Fleet;
use crate::lab::programs;

/// What a run of the plugin gave.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// Standard output.
    pub text: String,
    /// Standard error.
    pub errors: String,
}

impl Answer {
    /// The output as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.text).with_context(|| format!("{self:?} is not JSON"))
    }
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
    let mut command = Command::new(programs::workspace("kubectl-switchtower")?);
    command.arg("--kubeconfig").arg(kubeconfig).arg("--controller").arg(fleet.admin_address().to_string());
    command.args(arguments);
    let output = command.output().context("starting kubectl-switchtower")?;
    Ok(Answer {
        code: output.status.code().context("kubectl-switchtower was killed")?,
        text: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
