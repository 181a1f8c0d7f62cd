//! `check`: checks before and after the installation.

use serde::Serialize;
use switchtower_admin_api::codes::{self, Code};

use crate::args::{CheckArgs, Global};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, wrapped};

mod builtin;
mod drain_gate;
mod migration;
mod post;
mod pre;
mod proxies;

pub(super) use proxies::is_kube_proxy;

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Verdict {
    Passed,
    Warning,
    Failed,
}

/// A check and its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Check {
    verdict: Verdict,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<&'static str>,
}

impl Check {
    fn passed(what: impl Into<String>) -> Self {
        Self { verdict: Verdict::Passed, what: what.into(), code: None, action: None }
    }

    fn warning(code: Code, what: impl Into<String>) -> Self {
        let (code, action) = (Some(code.code), Some(code.action));
        Self { verdict: Verdict::Warning, what: what.into(), code, action }
    }

    fn failed(code: Code, what: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failed, ..Self::warning(code, what) }
    }

    /// The object to check could not be read.
    fn not_seen(error: &CliError) -> Self {
        Self::warning(codes::NOT_LOOKED_AT, error.message.clone())
    }

    fn has_passed(&self) -> bool {
        self.verdict == Verdict::Passed
    }

    fn error(error: CliError) -> Self {
        let code = error.code.map(|code| (code.code, code.action)).unzip();
        Self { verdict: Verdict::Failed, what: error.message, code: code.0, action: code.1 }
    }
}

pub(crate) async fn run(global: &Global, args: &CheckArgs, style: Style) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let checks = if args.pre { pre::run(&cluster).await? } else { post::run(global, &cluster).await? };
    let exit = if any_failed(&checks) { Exit::Wrong } else { Exit::Ok };
    Report::new(text(&checks, style), &checks, exit)
}

/// Runs the checks before a migration from kube-proxy. `own`: the profiles of the migration.
pub(super) async fn migration(cluster: &Cluster, own: &[&str]) -> Result<Vec<Check>, CliError> {
    migration::run(cluster, own).await
}

/// Returns whether a check failed.
pub(super) fn any_failed(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.verdict == Verdict::Failed)
}

pub(super) fn text(checks: &[Check], style: Style) -> String {
    let mut text = String::new();
    for check in checks {
        let sign = match check.verdict {
            Verdict::Passed => style.good("ok     "),
            Verdict::Warning => style.warn("warning"),
            Verdict::Failed => style.bad("FAILED "),
        };
        let code = check.code.map(|code| format!("{code} ")).unwrap_or_default();
        text += &format!("{sign}  {}\n", wrapped(&format!("{code}{}", check.what), 9));
        if let Some(action) = check.action {
            text += &format!("         {}\n", wrapped(action, 9));
        }
    }
    let number = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let (failed, warned) = (number(Verdict::Failed), number(Verdict::Warning));
    text += &format!("\n{}, {failed} failed, {}\n", count(checks.len(), "check"), count(warned, "warning"));
    text
}

#[cfg(test)]
fn codes_of(checks: &[Check]) -> Vec<Option<&'static str>> {
    checks.iter().map(|check| check.code).collect()
}
